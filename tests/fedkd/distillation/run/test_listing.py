from typing import get_args

from fedkd import schedules
from fedkd.data.augmentation import AUGMENTATIONS
from fedkd.distillation.methods import METHODS
from fedkd.distillation.run.listing import list_components, source_of
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.selection import Selection
from fedkd.models import known_models
from fedkd.objectives import TERMS
from fedkd.training.optimizers import OptimizerSettings


def test_every_entry_of_every_table_is_listed() -> None:
    names = {section: [entry.name for entry in of] for section, of in list_components().items()}
    kinds = get_args(get_args(schedules.Schedule)[0])
    assert names == {
        "terms": list(TERMS),
        "methods": list(METHODS),
        "schedules": [kind.model_fields["kind"].default for kind in kinds],
        "targets": [
            *(f"targets.{name}" for name in Selection.model_fields),
            *(f"teacher.combine.{name}" for name in Combination.model_fields),
        ],
        "models": list(known_models()),
        "augmentations": list(AUGMENTATIONS),
        "optimizers": list(get_args(OptimizerSettings.model_fields["name"].annotation)),
    }


def test_terms_methods_models_and_augmentations_have_a_source() -> None:
    sections = list_components()
    for section in ("terms", "methods", "models", "augmentations", "optimizers"):
        for entry in sections[section]:
            assert entry.source, f"{section}: {entry.name}"


def test_defaults_are_those_of_the_settings() -> None:
    sections = list_components()
    entries = {entry.name: entry for entry in sections["terms"]}
    # As a settings file writes it: a schedule that never changes is a number.
    assert entries["kd"].defaults["temperature"] == 4.0
    assert entries["ce"].defaults == {"weight": 1.0, "label_smoothing": 0.0}
    ramp = next(entry for entry in sections["schedules"] if entry.name == "ramp_up")
    assert (ramp.defaults, ramp.required) == ({"start": 0.0, "until": 1.0}, ("end",))
    adam = next(entry for entry in sections["optimizers"] if entry.name == "adam")
    assert "momentum" not in adam.defaults
    by = next(entry for entry in sections["targets"] if entry.name == "teacher.combine.by")
    assert by.defaults["choices"] == list(get_args(Combination.model_fields["by"].annotation))


def test_a_source_is_read_from_a_docstring() -> None:
    assert "1608.03983" in source_of(schedules.cosine)
    assert source_of(schedules.linear) == ""


def test_an_entry_says_what_it_is_where_from_and_its_defaults() -> None:
    (kd,) = [entry for entry in list_components()["terms"] if entry.name == "kd"]
    summary, source, defaults = kd.lines()
    assert "KL(teacher || student)" in summary
    assert source.startswith("source: Hinton")
    assert "weight: 1.0, temperature: 4.0" in defaults
