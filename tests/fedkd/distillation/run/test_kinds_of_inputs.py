"""Distillations of features and of texts."""

import numpy as np
import pytest

from fedkd.distillation.methods import METHODS
from fedkd.distillation.run.running import distill
from fedkd.distillation.settings import DistillSettings

PICTURES_ONLY = {"dafl", "deep_inversion", "sskd", "co_training"}


def settings_of(folder, kind, **changed):
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    inputs = rng.normal(size=(90, 4)) + labels[:, None]
    if kind == "text":
        inputs = np.array(["".join(rng.choice(list("abc"[n] + "xy"), 4)) for n in labels])
    np.savez(folder / "rows.npz", x=inputs, y=labels)
    return DistillSettings.model_validate(
        {
            "data": {
                "source": str(folder / "rows.npz"),
                "private_rows": 20,
                "public": {"size": 20},
            },
            "teacher": {"models": ["mlp"], "training": {"epochs": 1}},
            "student": {"model": "mlp"},
            "training": {"epochs": 1},
            **changed,
        }
    )


@pytest.mark.parametrize("kind", ["features", "text"])
def test_a_student_learns_from_a_teacher_on_them(tmp_path, kind):
    done = distill(settings_of(tmp_path, kind))
    assert done.rows.input_shape.kind == kind
    assert done.costs["student"].flops > 0


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("kind", ["features", "text"])
def test_methods_that_need_pictures_are_refused_by_name_and_others_are_not(tmp_path, kind, name):
    assert (kind in METHODS[name].takes) == (name not in PICTURES_ONLY)
    if name in PICTURES_ONLY:
        with pytest.raises(ValueError, match=f"method '{name}' is for pictures, .* holds {kind}"):
            distill(settings_of(tmp_path, kind, method=name))


def test_augmentation_of_pictures_is_refused_by_its_setting(tmp_path):
    flip = {"epochs": 1, "augmentation": {"horizontal_flip": 0.5}}
    with pytest.raises(ValueError, match=r"^training\.augmentation\.horizontal_flip is for pic"):
        distill(settings_of(tmp_path, "features", training=flip))
    teacher = {"models": ["mlp"], "training": flip}
    with pytest.raises(ValueError, match=r"^teacher\.training\.augmentation\.horizontal_flip"):
        distill(settings_of(tmp_path, "text", teacher=teacher))
