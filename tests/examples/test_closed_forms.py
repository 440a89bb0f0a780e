"""The table of docs/closed-forms.md can be made again."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "closed_forms.py"


@pytest.mark.slow
def test_strong_pulls_gain_more_than_one_exchange_and_wrong_labels_cost():
    script = runpy.run_path(str(SCRIPT))
    few = script["accuracies"](script["data_of"](0.1, 0), 10.0)
    assert few["pooled"] > few["fixed point"] > few["after one exchange"] > few["alone"]
    equal = script["data_of"](100.0, 0)
    alone, ended = script["of_honest"](equal, 0)
    assert ended > alone
    alone, ended = script["of_honest"](equal, 3)
    assert ended < alone
