import pytest
from pydantic import ValidationError

from fedkd.data import DataSettings


def test_defaults_are_the_embedded_digits():
    settings = DataSettings()
    assert settings.source == "digits"
    assert settings.public.size == 500
    assert not settings.public.labelled
    assert (settings.partition.kind, settings.partition.alpha) == ("dirichlet", 0.3)


@pytest.mark.parametrize(
    "table",
    [
        {"partition": {"alpha": 0.0}},
        {"partition": {"alpha": float("inf")}},
        {"partition": {"kind": "random"}},
        {"partition": {"classes_per_client": 0}},
        {"partition": {"shards_per_client": 0}},
        {"partition": {"min_rows": 0}},
        {"public": {"size": -1}},
        {"public": {"labeled": True}},
        {"resize": 0},
        {"resize": 1025},
        {"resize": True},
        {"resize": 8.0},
        {"resize": [8]},
        {"resize": [8, 8, 8]},
        {"resize": [8, "x"]},
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
        {"validation_fraction": 1.0},
        {"private_rows": 0},
        {"test_rows": 0},
        {"seed": -1},
        {"source": ""},
        {"sources": "digits"},
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(table):
    with pytest.raises(ValidationError):
        DataSettings.model_validate(table)


def test_one_number_stands_for_both_sides():
    assert DataSettings(resize=32).resize == (32, 32)
    assert DataSettings(resize=[32, 48]).resize == (32, 48)


def test_settings_cannot_change_after_validation():
    with pytest.raises(ValidationError, match="frozen"):
        DataSettings().source = "elsewhere"
