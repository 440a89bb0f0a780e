"""The arithmetic by hand, and what is asked of every algorithm."""

import numpy as np
import pytest

import fedkd
from my_method.method import certainty

NAME = "my_method:MyMethod"


def test_a_row_counts_by_the_variance_of_its_logits():
    # Means 2 and 1: variances (4 + 4) / 2 = 4 and (1 + 1) / 2 = 1.
    logits = np.array([[0.0, 4.0], [0.0, 2.0]], np.float32)
    assert certainty(logits, 1.0).tolist() == [[4.0], [1.0]]
    assert certainty(logits, 0.0).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("power", [0, 2])
def test_its_settings_count(power, tmp_path):
    words = [f"strategy.name={NAME}", f"strategy.power={power}", f"output={tmp_path}"]
    assert fedkd.load_settings(None, words).strategy.power == power
    with pytest.raises(fedkd.SettingsError, match=r"strategy\.power: must be .*, got -1"):
        fedkd.load_settings(None, [*words, "strategy.power=-1"])


def test_it_keeps_to_the_contract():
    fedkd.check_strategy(NAME, {}, {"power": 0.0})
