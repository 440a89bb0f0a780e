import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_trackers
import pytest

from sim.commands.running import run
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import provenance_of
from sim.server.observers import Observer
from sim.settings import Settings, SettingsError
from sim.trackers.tracking import measured, tracked

Small = Callable[..., Settings]

LOCAL = ("clients.models=[mlp]", "strategy.name=local", "rounds=3")
MEMORY = "trackers=[{kind: 'own_trackers:Memory', clients: false}]"


@pytest.fixture
def told() -> Iterator[list[tuple[Any, ...]]]:
    own_trackers.TOLD.clear()
    yield own_trackers.TOLD
    own_trackers.TOLD.clear()


class Interrupt(Observer):
    def __init__(self, round: int) -> None:
        self._round = round

    def completed(self, round: int) -> None:
        if round == self._round:
            raise KeyboardInterrupt


def logged(told: list[tuple[Any, ...]]) -> list[int]:
    return [row[1] for row in told if row[0] == "log"]


def interrupted(settings: Settings, *, after: int) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(settings, observers=[Interrupt(after)])
    (folder,) = (settings.output / settings.name).iterdir()
    return folder


def test_numbers_are_named_by_scope_and_client_and_what_is_none_is_left_out() -> None:
    rows = [
        {"round": 2, "scope": "federation", "accuracy": 0.5, "entropy": None, "skipped": True},
        {"round": 2, "scope": "client", "client": 3, "accuracy": 1, "loss/ce": 0.25},
        {"round": 2, "scope": "server", "accuracy": 0.75},
        {"round": 2, "scope": "server", "model": "small", "accuracy": float("nan"), "recall": 0.5},
    ]
    of_all = {"federation/accuracy": 0.5, "server/accuracy": 0.75, "server/small/recall": 0.5}
    assert dict(measured(rows, clients=False)) == of_all
    of_clients = {"client_accuracy/3": 1.0, "client_loss/ce/3": 0.25}
    assert dict(measured(rows, clients=True)) == of_all | of_clients


def test_a_tracker_changes_no_number_and_is_no_part_of_a_run_s_identity(
    small: Small, told: list[tuple[Any, ...]]
) -> None:
    plain, tracking = small(*LOCAL), small(*LOCAL, MEMORY)
    assert fingerprint(tracking) == fingerprint(plain)
    assert provenance_of(tracking) == provenance_of(plain)
    result = run(tracking)
    assert result.weights_sha256 == run(plain).weights_sha256
    title = result.folder.name
    assert [row[:2] for row in told] == [
        ("open", title),
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("finish", "finished"),
    ]
    names = told[1][2]
    assert "federation/accuracy" in names
    assert not any(name.startswith("client") for name in names)


def test_a_resumed_run_goes_on_without_a_round_told_twice(
    small: Small, told: list[tuple[Any, ...]]
) -> None:
    settings = small(*LOCAL, MEMORY, "checkpoints={every: 1, keep: 9}")
    folder = interrupted(settings, after=2)
    assert logged(told) == [1, 2]
    assert told[-1] == ("finish", "interrupted", 2)
    # As if it had been killed before its last checkpoint: round 2 is run again.
    shutil.rmtree(folder / "checkpoints" / "round-000002")
    told.clear()
    run(settings, resume=folder)
    assert told[0] == ("open", folder.name, "mine")
    assert logged(told) == [3]
    assert told[-1] == ("finish", "finished", 3)


def test_what_a_tracker_has_missed_it_is_told(small: Small, told: list[tuple[Any, ...]]) -> None:
    folder = interrupted(small(*LOCAL), after=2)
    run(small(*LOCAL, MEMORY), resume=folder)
    assert logged(told) == [1, 2, 3]


def test_a_tracker_that_fails_is_an_event_and_ends_no_run(
    small: Small, told: list[tuple[Any, ...]]
) -> None:
    failing = "trackers=[{kind: 'own_trackers:Memory', fails_in: 2}]"
    result = run(small(*LOCAL, failing))
    assert result.status == "finished"
    assert logged(told) == [1]
    (event,) = [json.loads(line) for line in (result.folder / "events.jsonl").open()]
    assert event == {
        "round": 1,
        "event": "tracker failed",
        "reason": "own_trackers:Memory: RuntimeError: out of ink",
    }


def test_what_cannot_be_opened_or_is_not_installed_is_said_before_the_first_round(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = small(*LOCAL, "trackers=['own_trackers:Closed']")
    with pytest.raises(SettingsError, match="Closed cannot be opened: the door is closed"):
        run(closed)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    settings = small(*LOCAL, "trackers=[wandb]", "name=none")
    with pytest.raises(SettingsError, match=r"wandb is not installed: pip install 'fedkd\[wandb\]"):
        run(settings)
    assert not (settings.output / "none").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("trackers=[tensorbord]", r"unknown tracker 'tensorbord'.*did you mean 'tensorboard'"),
        ("trackers=[wandb,{kind: wandb, project: b}]", "names wandb twice"),
        ("trackers=[{kind: wandb, mode: live}]", r"wandb: mode: must be 'offline' or 'online'"),
    ],
)
def test_a_mistake_in_settings_is_named(small: Small, words: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        small(words)


def test_a_study_s_run_says_where_it_belongs(small: Small) -> None:
    settings = small("seed=3")
    study = settings.output / settings.name
    of_study = tracked(study / "dml" / "seed-3-0", settings, None)
    assert (of_study.title, of_study.arm) == ("dml seed 3", "dml")
    assert of_study.labels == {
        "study": "default",
        "arm": "dml",
        "seed": "3",
        "folder": str(study / "dml" / "seed-3-0"),
    }
    assert of_study.settings["clients.count"] == 4
    alone = tracked(study / "20260101-120000-1a2b3c", settings, "known")
    assert (alone.title, alone.arm, alone.known_as) == ("20260101-120000-1a2b3c", "", "known")
    assert "study" not in alone.labels
