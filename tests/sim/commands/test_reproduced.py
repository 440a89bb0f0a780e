"""Every study in conf/reproduced can be planned as it stands, and at its published length."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedkd.models import build_model, count_parameters
from sim.commands.arms import load_study
from sim.commands.running import run

CONF = Path(__file__).parents[3] / "conf" / "reproduced"
ARMS: Mapping[str, tuple[int, set[str]]] = {
    "fd": (6, {"fd", "fedavg"}),
    "fedgen": (12, {"fedavg", "fedprox", "fd", "feddistill_plus", "feddf", "fedgen"}),
    "fedproto": (9, {"local", "fedavg", "fedproto"}),
    "cfd": (4, {"cfd"}),
    "scarlet": (3, {"dsfl", "scarlet"}),
    "proxyfl": (6, {"local", "pooled", "fedavg", "fml", "proxyfl"}),
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


def test_the_bits_of_fds_table_are_exact(tmp_path: Path) -> None:
    arms = load_study(str(CONF / "fd.yaml")).arms
    (model,) = arms["fl-10"].clients.models
    network = build_model(model, input_shape=(1, 28, 28), num_classes=10, seed=0)
    # A device's, up and down in 16 rounds of 32 bits a number, as the paper counts them.
    assert 2 * 32 * arms["fl-10"].rounds * count_parameters(network) == 1_228_439_552
    # Tables are as large whatever the data and the network are. There is none to send down in the
    # first round: 102,400 of the paper are 99,200.
    small = ["data.source=digits", "clients.models=[mlp]", "data.partition.kind=iid"]
    words = [*small, "data.private_rows=null", "clients.local.steps=1", f"output={tmp_path}"]
    result = run(load_study(str(CONF / "fd.yaml"), words).arms["fd-2"])
    bits = [
        8 * sum(row[way] for row in result.history.federation) / 2
        for way in ("bytes_up", "bytes_down")
    ]
    assert bits == [51_200, 51_200 - 3_200]
