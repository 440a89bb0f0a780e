from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedkd.distillation.settings import DistillSettings
from sim.keeping.identity import HARMLESS, HARMLESS_ENGINE, check_same_run, data_digest, fingerprint
from sim.settings import EngineSettings, Settings, SettingsError, load_settings

Make = Callable[..., Any]


def test_every_setting_of_the_engine_was_thought_about() -> None:
    # A new one belongs either here or to HARMLESS_ENGINE: does it change a number?
    numbers = {"gpus_per_worker", "vectorize", "cohort_size"}
    assert EngineSettings.model_fields.keys() == numbers | set(HARMLESS_ENGINE)
    assert set(HARMLESS) < Settings.model_fields.keys() | DistillSettings.model_fields.keys()


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("output=elsewhere", True),
        ("checkpoints.every=7", True),
        ("keep_models=clients", True),
        ("keep_round=selected", True),
        ("engine.backend=inline", True),
        ("engine.deadline_s=5", True),
        ("engine.vectorize=loop", False),
        ("rounds=21", False),
        ("evaluation.every=2", False),
        ("faults=[{kind: crash}]", False),
        ("data.partition.alpha=0.7", False),
    ],
)
def test_a_run_is_what_its_numbers_depend_on(override: str, same: bool) -> None:
    ours, other = load_settings(), load_settings(None, [override])
    assert (fingerprint(ours) == fingerprint(other)) is same
    if same:
        check_same_run(ours, other)
    else:
        with pytest.raises(SettingsError, match=override.split("=")[0].replace(".", r"\.")):
            check_same_run(ours, other)


def test_a_setting_that_only_one_side_has_is_seen() -> None:
    ours = load_settings(None, ["strategy.temperature={kind: constant, value: 4}"])
    with pytest.raises(SettingsError, match=r"strategy\.temperature\.(kind|value)"):
        check_same_run(ours, load_settings())


def test_other_data_have_another_digest(tiny_data: Make) -> None:
    data = tiny_data()
    assert data_digest(data) == data_digest(tiny_data())
    public = data.public_inputs.copy()
    public.flat[-1] = np.nextafter(public.flat[-1], np.float32(9))
    rows = (data.client_rows[1], data.client_rows[0], *data.client_rows[2:])
    others = [
        replace(data, public_inputs=public),
        replace(data, client_rows=rows),
        replace(data, public_labels=np.zeros(len(public), np.int64)),
        replace(data, train_labels=data.train_labels[::-1].copy()),
        replace(data, channel_mean=data.channel_mean + np.float32(1e-6)),
    ]
    digests = {data_digest(other) for other in others}
    assert len(digests) == len(others)
    assert data_digest(data) not in digests
