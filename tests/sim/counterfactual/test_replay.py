"""`fedkd replay`: a run again, with one thing otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.commands.interruption import Interruption
from sim.commands.running import run
from sim.counterfactual.comparing import first_difference
from sim.counterfactual.replaying import Wanted, replay
from sim.keeping.checkpoints import CheckpointError
from sim.reports.counterfactual import otherwise, replay_table, replay_words
from sim.reports.runs import load_run
from sim.reports.terminal import NOTHING
from sim.server.observers import Observer
from sim.settings import SettingsError, load_settings

WORDS = (
    "rounds=4",
    "clients.count=4",
    "clients.models=[mlp]",
    "clients.local.epochs=1",
    "data.private_rows=120",
    "data.test_rows=60",
    "data.public.size=40",
    "data.partition.min_rows=2",
    "engine.backend=inline",
    "checkpoints={every: 1, keep: 3}",
)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replayed")


@pytest.fixture(scope="module")
def finished(place: Path) -> Make:
    """Make a finished run, the same one for all that ask alike."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*words: str) -> Path:
        if words not in made:
            made[words] = run(load_settings(None, [*WORDS, f"output={place}", *words])).folder
        return made[words]

    return folder


def digests(row: dict[str, Any]) -> tuple[str, str]:
    before, after = row["weights_sha256"]
    assert before
    return before, after


# -- with nothing otherwise -----------------------------------------------------------------------


@pytest.mark.parametrize("from_round", [None, 2, 3])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("strategy.name=fedavg", "clients.participation=0.5"),
        ("strategy.name=cfd", "exchange.up=cfd_delta", "exchange.down=cfd_delta"),
        ("strategy.name=feddf", "strategy.server_steps=5"),
    ],
)
def test_with_nothing_otherwise_it_ends_with_the_runs_bits(
    words: tuple[str, ...], from_round: int | None, finished: Make
) -> None:
    found = replay(finished(*words), Wanted(from_round=from_round)).row
    before, after = digests(found)
    assert before == after
    assert found["first_difference"] is None
    assert all(row["difference"] == 0 for row in found["clients"])
    assert all(row["difference"] == 0 for row in found["measures"].values())


@pytest.mark.slow
def test_so_it_does_on_ray(finished: Make) -> None:
    words = Wanted(words=("engine.backend=ray",))
    one = replay(finished(), words).row
    other = replay(finished(), Wanted(words=words.words, from_round=2)).row
    assert digests(one)[0] == digests(one)[1] == digests(other)[1]
    without = [
        replay(finished(), Wanted(without=(1,), words=backend)).row["weights_sha256"][1]
        for backend in ((), words.words)
    ]
    assert without[0] == without[1] != digests(one)[0]


# -- with something otherwise ---------------------------------------------------------------------


def test_without_a_client_the_others_are_compared_with_themselves(finished: Make) -> None:
    result = replay(finished(), Wanted(without=(1,)))
    found = result.row
    before, after = digests(found)
    assert before != after
    # Its first answer is missing from what is learnt in round 2.
    assert found["first_difference"] == 2
    assert [row["client"] for row in found["clients"]] == [0, 2, 3, 1]
    assert found["clients"][-1]["left_out"] is True
    assert not any("left_out" in row for row in found["clients"][:-1])
    judged = [row for row in found["clients"] if not row.get("left_out")]
    for side in ("run", "replay"):
        mean = sum(row[side] for row in judged) / 3
        assert found["measures"]["accuracy"][side] == pytest.approx(mean)
        worst = min(row[side] for row in judged)
        assert found["measures"]["worst_accuracy"][side] == worst
    own = load_run(result.folder)
    assert own.last["accuracy"] == pytest.approx(found["measures"]["accuracy"]["replay"])
    assert found["measures"]["bytes_up"]["difference"] == 0
    assert own.bytes_up[1] == 0
    events = [json.loads(line) for line in (result.folder / "events.jsonl").open()]
    assert [(row["event"], row["client"]) for row in events] == [("left out", 1)]


def test_it_may_leave_after_some_rounds(finished: Make) -> None:
    found = replay(finished(), Wanted(without=(1,), from_round=2))
    assert found.row["first_difference"] == 4
    run_, own = load_run(finished()), load_run(found.folder)
    assert own.federation[:2] == run_.federation[:2]
    events = [json.loads(line) for line in (found.folder / "events.jsonl").open()]
    assert [(row["event"], row["round"]) for row in events] == [("left out", 3)]
    # Until then it was there, and what it sent counts.
    assert 0 < own.bytes_up[1] < run_.bytes_up[1]


def test_labels_may_be_flipped(finished: Make) -> None:
    found = replay(finished(), Wanted(flipped=(2,), without=(0,))).row
    assert found["first_difference"] == 1
    assert [row["client"] for row in found["clients"]] == [1, 2, 3, 0]
    assert found["clients"][1]["flipped"] is True
    late = replay(finished(), Wanted(flipped=(2,), from_round=3)).row
    assert late["first_difference"] == 4


@pytest.mark.parametrize("from_round", [0, 2])
def test_a_codec_may_be_another(from_round: int, finished: Make) -> None:
    wanted = Wanted(words=("exchange.up=int8",), from_round=from_round)
    found = replay(finished(), wanted).row
    assert found["measures"]["bytes_up"]["difference"] < 0
    assert found["measures"]["bytes_down"]["difference"] == 0
    assert found["set"] == {"exchange.up.kind": ["float32", "int8"]}
    assert found["first_difference"] is not None
    assert found["first_difference"] > from_round


def test_a_codec_that_remembers_begins_anew_where_there_was_another(finished: Make) -> None:
    folder = finished("strategy.name=cfd", "exchange.up=cfd_delta", "exchange.down=cfd_delta")
    bits = ("exchange.up={kind: cfd_delta, bits: 4}", "exchange.down=cfd")
    found = replay(folder, Wanted(words=bits, from_round=2))
    assert found.result.status == "finished"
    assert (found.folder / "events.jsonl").read_text() == ""


# -- stopped and asked again ----------------------------------------------------------------------


class _Stops(Observer):
    def completed(self, round: int) -> None:
        if round == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("from_round", [0, 2])
def test_the_same_command_goes_on(from_round: int, finished: Make) -> None:
    wanted = Wanted(without=(2,), words=("evaluation.every=2",), from_round=from_round)
    with pytest.raises(Interruption):
        replay(finished(), wanted, observers=[_Stops()])
    told: list[int] = []

    class Counts(Observer):
        def completed(self, round: int) -> None:
            told.append(round)

    whole = replay(finished(), wanted, observers=[Counts()])
    assert told == [4]
    again = replay(finished(), wanted, observers=[Counts()])
    assert told == [4]
    assert again.row == whole.row
    shutil.rmtree(whole.folder)
    afresh = replay(finished(), wanted)
    assert afresh.row["weights_sha256"] == whole.row["weights_sha256"]


def test_one_that_goes_on_from_a_checkpoint_does_not_begin_without_it(finished: Make) -> None:
    wanted = Wanted(without=(3,), words=("evaluation.every=3",), from_round=3)
    with pytest.raises(Interruption):
        replay(finished(), wanted, observers=[_StopsAtOnce()])
    (folder,) = [
        path.parent
        for path in finished().parent.glob("replay-*/settings.yaml")
        if not (path.parent / "replay.json").exists()
    ]
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises((SettingsError, CheckpointError), match="from_round"):
        replay(finished(), wanted)
    shutil.rmtree(folder)


class _StopsAtOnce(Observer):
    def event(self, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(words=("seed=3",)), "--set seed: a replay cannot change it"),
        (Wanted(words=("clients.count=3",)), "--set clients.count: .*--without-client"),
        (Wanted(words=("data.partition.alpha=0.1",)), "--set data.partition.alpha"),
        (Wanted(words=("clients.participation=0.5",)), "--set clients.participation"),
        (Wanted(words=("clients.models=[cnn]",)), "--set clients.models"),
        (Wanted(words=("privacy.mechanism=gaussian", "privacy.noise=4")), "--set privacy"),
        (Wanted(words=("presence.leave=0.1",)), "--set presence.leave: a replay cannot"),
        (Wanted(words=("counterfactual.without=[1]",)), "--without-client, --flip-labels"),
        (Wanted(words=("rounds",)), "--set takes key=value, got 'rounds'"),
        (Wanted(without=(4,)), "--without-client must name clients of the run, 0 to 3, got 4"),
        (Wanted(flipped=(9,)), "--flip-labels must name clients of the run"),
        (Wanted(without=(1,), flipped=(1,)), "client 1 is left out and its labels are flipped"),
        (Wanted(from_round=1), r"a round whose checkpoint was kept \(2, 3, 4\), got 1"),
        (Wanted(from_round=4), "--from-round must be below rounds"),
        (Wanted(words=("rounds=9",), from_round=2), "--set rounds: a replay --from-round 2"),
        (Wanted(words=("strategy.name=fedmd",), from_round=2), "--set strategy.name"),
    ],
)
def test_what_would_move_others_is_refused_by_name(
    wanted: Wanted, said: str, finished: Make
) -> None:
    before = sorted(finished().parent.iterdir())
    with pytest.raises(SettingsError, match=said):
        replay(finished(), wanted)
    assert sorted(finished().parent.iterdir()) == before


def test_more_rounds_or_another_algorithm_are_no_matter_from_the_start(finished: Make) -> None:
    found = replay(finished(), Wanted(words=("rounds=5",))).row
    assert found["rounds"] == [4, 5]


def test_runs_that_cannot_be_repeated_are_refused(
    finished: Make, place: Path, tmp_path: Path
) -> None:
    private = finished(
        "strategy.name=fedmd", "privacy.mechanism=gaussian", "privacy.noise=4", "rounds=1"
    )
    with pytest.raises(SettingsError, match=r"privacy.mechanism: .* was run under gaussian"):
        replay(private)
    own = replay(finished(), Wanted(without=(1,))).folder
    with pytest.raises(SettingsError, match="is a replay itself"):
        replay(own)
    copy = tmp_path / "run"
    shutil.copytree(finished(), copy)
    (copy / "result.json").unlink()
    with pytest.raises(SettingsError, match="is no finished run: fedkd run --resume"):
        replay(copy)


def test_other_code_is_refused_unless_it_is_accepted(finished: Make, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished(), copy)
    path = copy / "identity.json"
    row = json.loads(path.read_text())
    first = next(iter(row["code"]))
    row["code"][first] = "0" * 64
    path.write_text(json.dumps(row))
    words = (f"output={tmp_path}",)
    with pytest.raises(SettingsError, match="--accept-code"):
        replay(copy, Wanted(words=words))
    found = replay(copy, Wanted(words=words), accept_code=True).row
    assert first in found["accepted"]


# -- what is shown --------------------------------------------------------------------------------


def test_tables_say_what_is_otherwise() -> None:
    row = {
        "without": [3],
        "flipped": [1],
        "from_round": 4,
        "set": {"exchange.up.kind": ["float32", "int8"]},
        "weights_sha256": ["a" * 64, "b" * 64],
        "first_difference": 5,
        "measures": {
            "accuracy": {"run": 0.5, "replay": 0.525, "difference": 0.025},
            "bytes_up": {"run": 2000.0, "replay": 500.0, "difference": -1500.0},
        },
        "clients": [
            {"client": 1, "run": 0.5, "replay": 0.525, "difference": 0.025, "flipped": True},
            {"client": 3, "run": 0.5, "replay": None, "difference": None, "left_out": True},
        ],
    }
    assert otherwise(row) == (
        "replay without client 3; labels flipped of client 1; exchange.up.kind int8, "
        "from round 4 on"
    )
    table = replay_table(row)
    assert [column.cells for column in table.columns] == [
        ["50.0", "2.0", "50.0", "50.0"],
        ["52.5", "0.5", "52.5", NOTHING],
        ["+2.5", "-1.5", "+2.5", NOTHING],
    ]
    assert "is of round 5" in replay_words(row)[0]
    # A digest is of clients' weights: a server's model may differ where it teaches nobody.
    row["weights_sha256"] = ["a" * 64] * 2
    assert "clients of both end with the weights aaaa" in replay_words(row)[0]
    assert "server model's, differ from round 5 on" in replay_words(row)[1]
    assert "differ" not in " ".join(replay_words({**row, "first_difference": None}))


def test_the_first_difference_is_of_those_who_remain(finished: Make) -> None:
    run_ = load_run(finished())
    assert first_difference(run_, run_, ()) is None
    other = load_run(replay(finished(), Wanted(flipped=(2,))).folder)
    assert first_difference(run_, other, ()) == 1
    assert first_difference(run_, other, (2,)) == 2
