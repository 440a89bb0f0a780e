"""The page on directions has every arm and every pair of the studies that it is about."""

import re
from itertools import combinations
from pathlib import Path

import pytest

from sim.commands.arms import load_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mutual-vs-one-way.md").read_text(encoding="utf-8")


def rows(name: str, kind: str) -> list[list[str]]:
    block = re.search(rf"<!-- attribution: {name} {kind} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert block is not None, f"no table {name} {kind}"
    lines = block[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", ["attribution", "attribution-mnist"])
def test_the_page_has_what_the_study_asks(name: str) -> None:
    study = load_study(str(ROOT / "conf" / "examples" / f"{name}.yaml"), ["study.sweep=null"])
    assert [row[0] for row in rows(name, "arms")] == [f"`{arm}`" for arm in study.arms]
    asked = [
        [family, f"`{other}` - `{first}`"]
        for family, arms in study.families.items()
        for first, other in combinations(arms, 2)
    ]
    assert [row[:2] for row in rows(name, "pairs")] == asked
    # Arms are equal in steps: none differs by more than a tenth from the one without exchange.
    steps = [
        [float(text.replace(",", "")) for text in row[5].split(" / ")] for row in rows(name, "arms")
    ]
    assert all(abs(each / steps[0][0] - 1) < 0.1 for own in steps for each in own), steps
    assert rows(name, "arms")[0][-2:] == ["0.0", "0.0"]
