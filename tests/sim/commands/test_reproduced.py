"""Every study in conf/reproduced can be planned as it stands, and at its published length."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from sim.commands.arms import load_study

CONF = Path(__file__).parents[3] / "conf" / "reproduced"
ARMS: Mapping[str, tuple[int, set[str]]] = {
    "fd": (6, {"fd", "fedavg"}),
    "fedgen": (12, {"fedavg", "fedprox", "fd", "feddistill_plus", "feddf", "fedgen"}),
    "fedproto": (9, {"local", "fedavg", "fedproto"}),
    "cfd": (4, {"cfd"}),
    "scarlet": (3, {"dsfl", "scarlet"}),
    "proxyfl": (7, {"local", "pooled", "fedavg", "fml", "proxyfl"}),
    "heterogeneous": (4, {"local", "fml", "fedkd", "fd"}),
}
"""How many arms there are, and of which algorithms."""


def commands(name: str) -> list[list[str]]:
    """The words of every `fedkd compare` in a file's head."""
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    start = f"#   fedkd compare conf/reproduced/{name}.yaml"
    return [
        [word for word in shlex.split(line.removeprefix(start), comments=True) if "=" in word]
        for line in lines
        if line.startswith(start)
    ]


def test_no_file_is_left_out() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == sorted(ARMS)


@pytest.mark.parametrize("name", ARMS)
def test_each_command_in_a_files_head_is_a_study_of_the_same_arms(name: str) -> None:
    assert commands(name)
    for words in [[], *commands(name)]:
        study = load_study(str(CONF / f"{name}.yaml"), words)
        count, strategies = ARMS[name]
        assert len(study.arms) == count
        assert {arm.strategy.name for arm in study.arms.values()} == strategies
        assert all(arm.study.seeds >= 3 for arm in study.arms.values())
        assert {arm.name for arm in study.arms.values()} <= {name, f"{name}-full"}
