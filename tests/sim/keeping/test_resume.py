"""A run that was stopped goes on and ends with the bits of one that was not, wherever it was."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import sim
from fedkd.exchange.pipeline import Remembered
from fedkd.exchange.values import flatten
from fedkd.privacy import Gaussian, spent
from sim.commands import running
from sim.commands.running import RunResult, run, settings_of_run
from sim.contract import sections_of
from sim.engine.grid import StatesLostError
from sim.engine.inline import InlineGrid
from sim.keeping import checkpoints, records
from sim.keeping import resume as persistence
from sim.keeping.checkpoints import CheckpointError, _manifest_text
from sim.keeping.records import FolderBusyError, RunFolder, StorageError, read_rows
from sim.keeping.resume import CHECKPOINTS_FOLDER
from sim.reports.runs import load_run
from sim.server.observers import Observer, Row
from sim.server.replies import QuorumError
from sim.settings import Settings, SettingsError
from strategies import STRATEGIES

Make = Callable[..., Settings]


@pytest.fixture
def make(
    tiny_settings: Callable[..., Settings],
    tiny_data: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Make settings of runs that take a moment, on data that need not be loaded."""
    monkeypatch.setattr(
        running, "load_data", lambda of: tiny_data(labelled=of.data.public.labelled)
    )

    def settings(strategy: str = "dml", **changes: Any) -> Settings:
        changes = {"rounds": 4, "checkpoints": {"every": 1}, **changes}
        return tiny_settings(strategy, output=tmp_path / "runs", **changes)

    return settings


class Stopping(Observer):
    """Presses Ctrl-C when a round is about to be complete."""

    def __init__(self, round: int) -> None:
        self.round = round
        self.pressed = False

    def metrics(self, rows: Sequence[Row]) -> None:
        if rows[0]["round"] == self.round:
            self.pressed = True
            raise KeyboardInterrupt


def stopped(settings: Settings, round: int, **options: Any) -> Path:
    """Run until a round is about to be complete; return the folder."""
    stopping = Stopping(round)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(settings, observers=[stopping], **options)
    assert stopping.pressed, "somebody else interrupted the run"
    folder = stop.value.folder
    assert isinstance(folder, Path)
    return folder


def bits(folder: Path) -> tuple[Any, ...]:
    """Return everything of a finished run that a seed decides."""
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    metrics = [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    exchange = read_rows(folder / "exchange.jsonl")
    summary = {
        key: result[key] for key in ("weights_sha256", "rounds", "bytes_up", "bytes_down")
    } | {"selected": result["selected"].get("round"), "last": result["last"].get("round")}
    return summary, metrics, exchange


def events(folder: Path, kind: str) -> list[Row]:
    return [row for row in read_rows(folder / "events.jsonl") if row["event"] == kind]


def found(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / CHECKPOINTS_FOLDER).iterdir())


# -- the same bits -----------------------------------------------------------------------------


OFTEN = ("dml", "fedavg", "fedkd", "one_way", "scarlet")
"""Different kinds of memory; the contract test resumes all algorithms in one process."""


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        *(
            pytest.param(name, {}, marks=[pytest.mark.slow] * (name not in OFTEN))
            for name in STRATEGIES
        ),
        ("one_way", {"direction": "server_to_clients"}),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    make: Make, strategy: str, options: dict[str, Any]
) -> None:
    # Three of four clients a round: some have a state and some have none when it stops.
    needs = sections_of(STRATEGIES[strategy].card.needs)
    clients = {"participants": 3, **needs.pop("clients", {})}
    settings = make(strategy, options=options, clients=clients, **needs)
    whole = run(settings)
    folder = stopped(settings, 3)
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    resumed = run(resume=folder)
    assert resumed.folder == folder
    assert resumed.weights_sha256 == whole.weights_sha256
    assert bits(folder) == bits(whole.folder)
    assert timeless(resumed) == timeless(whole)


@pytest.mark.parametrize("where", ["client", "server"])
def test_every_entry_of_the_ledger_is_written_once_also_in_a_resumed_run(
    make: Make, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKD_ALLOW", "own_stages")
    privacy = {"mechanism": "own_stages:Noise", "where": where}
    settings = make("dsfl", privacy=privacy, clients={"participants": 3})
    whole = run(settings)
    folder = stopped(settings, 3)
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)
    charges = [row for row in read_rows(folder / "exchange.jsonl") if row["direction"] == "release"]
    rounds = range(1, settings.rounds + 1)
    assert [row["of_round"] for row in charges] == [row["round"] for row in charges]
    if where == "client":
        assert [(row["round"], len(row["clients"])) for row in charges] == [(r, 3) for r in rounds]
        assert all(row["attempts"] == [1, 1, 1] for row in charges)
    else:
        # A mean of each architecture, since nobody knows what this rule would make of others.
        assert all(row["sent"].startswith("mean of ") for row in charges)
        clients = {(row["round"], client) for row in charges for client in row["clients"]}
        assert len(clients) == sum(len(row["clients"]) for row in charges) == 3 * len(rounds)
    assert {row["mechanism"] for row in charges} == {"mixture"}
    assert load_run(folder).bytes_up == load_run(whole.folder).bytes_up


@pytest.mark.parametrize("where", ["client", "server"])
def test_a_resumed_run_goes_on_with_its_privacy_budget(make: Make, where: str) -> None:
    budget = spent([Gaussian(3, 2.0)], delta=1e-5).epsilon
    privacy = {"mechanism": "gaussian", "noise": 2.0, "where": where, "budget": budget}
    settings = make("fedmd", privacy=privacy)
    whole = run(settings)
    folder = stopped(settings, 3)
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)
    # Of four rounds three were paid for, however often the run was begun.
    assert charged_in(folder) == [(r, client, 1) for r in (1, 2, 3) for client in range(4)]
    assert len(events(folder, "privacy budget spent")) == 1
    # Nor does it release more when it is begun once more.
    before = (folder / "exchange.jsonl").read_bytes()
    run(resume=folder)
    assert (folder / "exchange.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "optimizer", [{"name": "adam"}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}]
)
def test_stacked_clients_go_on_with_their_bits_whether_their_state_was_read_or_trained(
    make: Make,
    tiny_data: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: dict[str, Any],
) -> None:
    data = tiny_data(rows=(12, 13, 9, 17, 12, 10, 14, 12))
    monkeypatch.setattr(running, "load_data", lambda _: data)
    # Five of eight a round: a stack holds clients just trained beside clients from the file.
    settings = make(
        "dml",
        clients={
            "count": 8,
            "participants": 5,
            "models": [{"name": "mlp", "options": {"hidden": [8]}}],
            "optimizer": optimizer,
        },
        engine={"backend": "inline", "vectorize": "vmap"},
    )
    whole = run(settings)
    resumed = run(resume=stopped(settings, 3))
    assert resumed.weights_sha256 == whole.weights_sha256


def timeless(result: RunResult) -> str:
    row = result.to_row()
    for key in ("seconds", "folder"):
        del row[key]

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(value[key]) for key in value if "seconds" not in key}
        return [without(item) for item in value] if isinstance(value, list) else value

    return json.dumps(without(row))


@pytest.mark.parametrize("every", [1, 2, 3, None])
def test_results_do_not_depend_on_when_checkpoints_are_written(
    make: Make, every: int | None
) -> None:
    whole = run(make())
    settings = make(checkpoints={"every": every, "keep": 3})
    often = run(settings)
    assert bits(often.folder) == bits(whole.folder)
    rounds = {1: [2, 3, 4], 2: [2, 4], 3: [3, 4]}.get(every or 0)
    if rounds is not None:
        assert found(often.folder) == [f"round-{round:06d}" for round in rounds]
    folder = stopped(settings, 4)
    # Whatever the interval, an interruption saves the last complete round.
    assert found(folder)[-1] == "round-000003"
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_a_run_may_be_stopped_after_every_round(make: Make) -> None:
    settings = make()
    whole = run(settings)
    folder = stopped(settings, 2)
    for round in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(resume=folder, observers=[Stopping(round)])
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_a_run_that_never_wrote_a_checkpoint_starts_over(make: Make) -> None:
    settings = make()
    folder = stopped(settings, 1)
    assert not (folder / CHECKPOINTS_FOLDER).exists()
    assert read_rows(folder / "metrics.jsonl")
    run(resume=folder)
    assert bits(folder) == bits(run(settings).folder)


def test_a_finished_run_is_only_read(make: Make) -> None:
    whole = run(make("one_way"))
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    again = run(resume=whole.folder)
    assert again.to_row() == whole.to_row()
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_a_run_that_lost_only_its_result_trains_nothing_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make())
    expected = bits(whole.folder)
    (whole.folder / "result.json").unlink()

    def no_more(*_: object) -> Iterator[Any]:
        raise AssertionError("nobody should train")

    monkeypatch.setattr(InlineGrid, "_execute", no_more)
    run(resume=whole.folder)
    assert bits(whole.folder) == expected


def test_a_progress_bar_starts_where_the_run_goes_on(make: Make) -> None:
    folder = stopped(make(), 3)
    told: list[Any] = []

    class Listener(Observer):
        def returned(self, round: int) -> None:
            told.append(("returned", round))

        def completed(self, round: int) -> None:
            told.append(("completed", round))

    run(resume=folder, observers=[Listener()])
    assert told == [("returned", 2), ("completed", 3), ("completed", 4)]


# -- what may change on resume -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("rounds=8", r"rounds: a resumed run cannot change it \(it has 4, got 8\): schedules"),
        ("seed=3", r"seed: a resumed run cannot change it \(it has 0, got 3\)"),
        ("strategy.kd_weight=2", r"strategy\.kd_weight\.value"),
        ("strategy.name=local", r"strategy\.name: .* 'dml', got 'local'"),
        ("clients.batch_size=4", r"clients\.batch_size"),
        ("engine.cohort_size=2", r"engine\.cohort_size"),
        ("engine.vectorize=loop", r"engine\.vectorize"),
        ("name=other", "name: a resumed run"),
    ],
)
def test_what_changes_numbers_is_refused_and_named(
    make: Make, override: str, complaint: str
) -> None:
    folder = stopped(make(), 2)
    with pytest.raises(SettingsError, match=complaint):
        settings_of_run(folder, [override])


def test_what_changes_no_number_may_be_another(make: Make) -> None:
    whole = run(make())
    folder = stopped(make(), 2)
    settings = settings_of_run(folder, ["engine.quorum=0.25", "checkpoints.keep=1", "rounds=4"])
    run(settings, resume=folder)
    assert bits(folder) == bits(whole.folder)
    assert len(found(folder)) == 1
    assert settings_of_run(folder).engine.quorum == 0.25


def test_other_versions_are_a_warning_not_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(make(), 3)
    versions = {**records.package_versions(), "torch": "9.9"}
    monkeypatch.setattr(persistence, "package_versions", lambda: versions)
    run(resume=folder)
    (event,) = events(folder, "environment changed")
    assert event["round"] == 2
    assert "torch" in event["reason"]
    assert "9.9 now" in event["reason"]
    assert "numpy" not in event["reason"]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is not the folder of a run: .* settings\.yaml"):
        run(resume=tmp_path)


# -- bad checkpoints ---------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(make: Make) -> None:
    settings = make()
    whole = run(settings)
    folder = stopped(settings, 4)
    assert found(folder) == ["round-000002", "round-000003"]
    (shard,) = (folder / CHECKPOINTS_FOLDER / "round-000003").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)
    (event,) = events(folder, "checkpoint unusable")
    assert "round-000003: arrays-00001.safetensors does not fit its SHA-256" in event["reason"]
    assert event["reason"].endswith("went back to round-000002")


def test_without_a_usable_checkpoint_each_is_named(make: Make) -> None:
    folder = stopped(make(), 4)
    for checkpoint in (folder / CHECKPOINTS_FOLDER).iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        run(resume=folder)
    text = str(refused.value)
    assert "no checkpoint can be used" in text
    assert text.index("round-000003: state.json cannot be read") < text.index("round-000002")


def test_a_checkpoint_of_another_run_is_not_used(make: Make) -> None:
    folder, other = stopped(make(), 3), stopped(make(seed=1), 4)
    shutil.copytree(
        other / CHECKPOINTS_FOLDER / "round-000003",
        folder / CHECKPOINTS_FOLDER / "round-000003",
    )
    run(resume=folder)
    assert bits(folder) == bits(run(make()).folder)
    (event,) = events(folder, "checkpoint unusable")
    assert "belongs to other settings" in event["reason"]


def test_other_data_are_noticed(
    make: Make, tiny_data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(make(), 3)
    monkeypatch.setattr(running, "load_data", lambda _: tiny_data(seed=1))
    with pytest.raises(CheckpointError, match="belongs to other data"):
        run(resume=folder)


def spoil_row(folder: Path, name: str, number: int, change: Callable[[bytes], bytes]) -> None:
    """Change a line of a file of rows, counted from 1."""
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    (folder / name).write_bytes(b"".join(lines))


def rows_of_round(folder: Path, round: int) -> list[int]:
    rows = read_rows(folder / "metrics.jsonl")
    return [number for number, row in enumerate(rows, start=1) if row["round"] == round]


def test_rows_that_were_damaged_late_are_made_again_from_the_checkpoint_before(make: Make) -> None:
    whole = run(make())
    folder = stopped(make(), 4)
    spoil_row(folder, "metrics.jsonl", rows_of_round(folder, 3)[0], lambda line: b"\0" + line[1:])
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)
    (event,) = events(folder, "checkpoint unusable")
    assert "was written beside another metrics.jsonl" in event["reason"]


FLIPS = {
    "of the format": (lambda line: bytes([line[0] ^ 4]) + line[1:], "line 1 left out"),
    "of a letter": (lambda line: line.replace(b'"round"', b'"rounf"'), "line 1 left out"),
    "of a number": (
        lambda line: line.replace(b'"participants": 4', b'"participants": 5'),
        "every line is a row, but not all numbers are right",
    ),
    "of the round": (
        lambda line: line.replace(b'"round": 1', b'"round": 3'),
        "no figures of the whole federation in round 1",
    ),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_row_that_was_damaged_early_is_named_and_costs_no_state(make: Make, flip: str) -> None:
    change, lost = FLIPS[flip]
    whole = run(make())
    folder = stopped(make(), 4)
    before = (folder / "metrics.jsonl").read_bytes()
    spoil_row(folder, "metrics.jsonl", 1, change)
    damaged = (folder / "metrics.jsonl").read_bytes()
    assert damaged != before
    result = run(resume=folder)
    assert result.weights_sha256 == whole.weights_sha256
    (event,) = events(folder, "rows damaged")
    assert event["reason"].startswith("metrics.jsonl is not what was written until round 3: ")
    assert lost in event["reason"]
    kept = damaged[: len(before)]
    assert (folder / "metrics.jsonl.damaged-1").read_bytes() == kept
    # All rows that are left are those of the run that was never stopped.
    _, rows, exchange = bits(folder)
    _, all_rows, all_exchange = bits(whole.folder)
    assert exchange == all_exchange
    if flip != "of a number":
        assert rows == all_rows[1:]
    assert [row["round"] for row in result.history.federation][-1] == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "exchange.jsonl", "events.jsonl"])
def test_a_file_of_rows_that_is_gone_is_named(make: Make, name: str) -> None:
    folder = stopped(make(faults=[{"kind": "dropout", "clients": [1]}]), 4)
    (folder / name).unlink()
    run(resume=folder)
    (event,) = events(folder, "rows damaged")
    assert event["reason"].startswith(f"{name} is not what was written until round 3: ")


# -- forged ------------------------------------------------------------------------------------


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Change a checkpoint of one shard, and make every checksum right again."""
    values = json.loads((folder / "state.json").read_text())
    arrays = dict(load_file(folder / "arrays-00001.safetensors"))
    change(values, arrays)
    (folder / "state.json").write_text(json.dumps(values))
    (folder / "arrays-00001.safetensors").write_bytes(save(arrays))
    sign(folder)


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    change(manifest)
    (folder / "MANIFEST.json").write_bytes(_manifest_text(manifest))


def at(*path: Any, value: Any = None) -> Callable[[dict[str, Any], Any], None]:
    """Put a value into a table; without one, take the key away."""

    def change(values: dict[str, Any], _: object = None) -> None:
        for key in path[:-1]:
            values = values[key]
        if value is None:
            del values[path[-1]]
        else:
            values[path[-1]] = value

    return change


def first(prefix: str, value: Callable[[np.ndarray], np.ndarray] | None) -> Any:
    """Change the first array whose name begins so, or take it away."""

    def change(_: object, arrays: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(arrays) if name.startswith(prefix))
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value(arrays[name])

    return change


def at_nothing() -> dict[str, Any]:
    """Return what codecs remember of a client of whom they remember nothing."""
    return flatten(Remembered(1, {}, {})).plain


StoppedRun = tuple[Path, tuple[Any, ...]]


@pytest.fixture(scope="module")
def made_once() -> dict[str, Any]:
    """What tests of this module keep for each other."""
    return {}


@pytest.fixture
def stopped_once(
    make: Make,
    made_once: dict[str, Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> StoppedRun:
    """Return a copy of a run stopped in its third round, and the bits that it has to end with."""
    if not made_once:
        kept = tmp_path_factory.mktemp("stopped") / "run"
        shutil.copytree(stopped(make(rounds=3), 3), kept)
        made_once |= {"folder": kept, "bits": bits(run(make(rounds=3)).folder)}
    folder = tmp_path / "stopped"
    shutil.copytree(made_once["folder"], folder)
    return folder, made_once["bits"]


SHARED = ("state", "fields", "shared", "fields")
OTHERS = ("state", "fields", "others", "map")

FORGED: dict[str, Any] = {
    "no marks": at("marks"),
    "marks of nothing": at("marks", value={}),
    "a mark that is text": at("marks", "metrics.jsonl", "bytes", value="9"),
    "a negative mark": at("marks", "metrics.jsonl", "bytes", value=-1),
    "no grid": at("grid"),
    "an excluded stranger": at("grid", "excluded", "99", value="bad"),
    "an excluded nobody": at("grid", "excluded", "one", value="bad"),
    "a backend of no kind": at("grid", "backends", value={"mlp": "fast"}),
    "fewer clients": at("clients", value=3),
    "clients in words": at("clients", value="four"),
    "a state that is text": at("state", value="none"),
    "a state of nobody": at("state", "value", value="os:system"),
    "a state of another algorithm": at(
        "state", value={"value": "strategies.contract.strategy:Nothing", "fields": {}}
    ),
    "a field less": at("state", "fields", "others"),
    "a field more": at("state", "fields", "more", value=1),
    "a part that is none": at("state", "fields", "shared", value=7),
    "a part of another kind": at("state", "fields", "shared", "value", value="os:system"),
    "a hot temperature": at(*SHARED, "temperature", value="hot"),
    "a cold temperature": at(*SHARED, "temperature", value=-1.0),
    "no scale of ours": at(*SHARED, "scale", value="odds"),
    "an array that is not there": at(*SHARED, "values", "array", value="nowhere"),
    "an array twice": at(*OTHERS, 0, 1, "fields", "values", "array", value="shared/values"),
    "no memory of the exchange": at("exchange"),
    "a state in the place of the exchange's": at(
        "exchange", value={"value": "strategies.contract.strategy:Nothing", "fields": {}}
    ),
    "another shape": first("client-0/", lambda array: np.zeros((2, 2), np.float32)),
    "another type": first("client-0/", lambda array: array.astype(np.float64)),
    "a weight less": first("client-0/model/weights/", None),
    "a slot less": first("client-0/model/optimizer/exp_avg/", None),
    "a client twice": at(*OTHERS, 1, 0, value=0),
    "a client in letters": at(*OTHERS, 1, 0, value="1"),
    "a slot of another name": lambda _, arrays: arrays.update(
        {"client-0/model/optimizer/speed/0": np.zeros(1, np.float32)}
    ),
    "a model more": lambda _, arrays: arrays.update(
        {"client-0/peer/weights/x": np.zeros(1, np.float32)}
    ),
    "a client more": lambda _, arrays: arrays.update(
        {"client-99/model/weights/x": np.zeros(1, np.float32)}
    ),
    "a client in words": lambda _, arrays: arrays.update({"client-x/y": np.zeros(1, np.float32)}),
    "another table": lambda _, arrays: arrays.update({"other/y": np.zeros(1, np.float32)}),
    "no table": lambda _, arrays: arrays.update({"other": np.zeros(1, np.float32)}),
    "rows of nowhere": first("state/shared/rows", lambda rows: rows + 10**6),
    "scores of fewer classes": first("state/shared/values", lambda values: values[:, :1].copy()),
    "a client that there is not": at(*OTHERS, 1, 0, value=99),
    "scores that are none": first("state/shared/values", lambda values: values * np.nan),
    "weights of other rows": at(*OTHERS, 0, 1, "fields", "weights", value="x"),
    "memory of a client that there is not": lambda values, _: values["exchange"]["fields"][
        "clients"
    ]["map"].append([7, at_nothing()]),
    "no scores": first("state/shared/values", None),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_checkpoint_with_right_checksums_is_named_and_passed_over(
    stopped_once: StoppedRun, what: str
) -> None:
    folder, ends_with = stopped_once
    newest = folder / CHECKPOINTS_FOLDER / "round-000002"
    forge(newest, FORGED[what])
    run(resume=folder)
    (event,) = events(folder, "checkpoint unusable")
    assert event["reason"].startswith(f"checkpoint {newest}: ")
    assert event["reason"].endswith("; went back to round-000001")
    assert "\n" not in event["reason"]
    assert bits(folder) == ends_with


BATCH_NORM = [{"name": "cnn", "options": {"channels": [4], "norm": "batch"}}]
LEARNED = {"ce": 1.0, "kd": {"learned": True}, "sp": {"weight": 1, "on": "logits"}}


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("dml", {"clients": {"optimizer": {"name": "sgd", "lr": 0.1}}}),
        ("dml", {"clients": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}}),
        ("dml", {"clients": {"optimizer": {"name": "rmsprop", "momentum": 0.9}}}),
        ("dml", {"clients": {"models": BATCH_NORM}}),
        ("fedavg", {"clients": {"models": BATCH_NORM}}),
        ("dml", {"clients": {"models": BATCH_NORM}, "engine": {"vectorize": "vmap"}}),
        ("dml", {"options": {"objective": LEARNED}}),
        ("one_way", {"options": {"direction": "server_to_clients", "objective": LEARNED}}),
        ("pooled", {}),
        ("dml", {"options": {"include_self": True}}),
        ("dml", {"clients": {"participants": 2}}),
    ],
)
def test_what_was_saved_is_never_taken_for_a_forgery(
    make: Make, strategy: str, changes: dict[str, Any]
) -> None:
    engine = {"backend": "inline", **changes.get("engine", {})}
    folder = stopped(make(strategy, rounds=3, **{**changes, "engine": engine}), 3)
    run(resume=folder)
    assert events(folder, "checkpoint unusable") == []


@pytest.mark.parametrize("strategy", ["fedavg", "one_way", "fml"])
def test_what_other_algorithms_remember_is_looked_at_too(make: Make, strategy: str) -> None:
    folder = stopped(make(strategy, rounds=3), 3)
    newest = folder / CHECKPOINTS_FOLDER / "round-000002"

    def reshape(_: object, arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.startswith("state/")]:
            arrays[name] = np.zeros((3, 1, 2), np.float32)

    forge(newest, reshape)
    run(resume=folder)
    (event,) = events(folder, "checkpoint unusable")
    assert event["reason"].startswith(f"checkpoint {newest}: ")


@pytest.mark.parametrize(
    "change",
    [
        at("files", value=[]),
        at("files", "state.json"),
        at("files", "../../settings.yaml", value={"bytes": 1, "sha256": "0"}),
        at("files", "state.json", "bytes", value="12"),
        at("identity", value=["settings"]),
        at("packages", value="torch"),
        at("round", value="2"),
        at("more", value=1),
    ],
)
def test_a_forged_manifest_with_a_right_checksum_is_named_and_passed_over(
    stopped_once: StoppedRun, change: Any
) -> None:
    folder, _ = stopped_once
    newest = folder / CHECKPOINTS_FOLDER / "round-000002"
    sign(newest, change)
    run(resume=folder)
    (event,) = events(folder, "checkpoint unusable")
    assert event["reason"].startswith(f"checkpoint {newest}: ")


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"\xff\xfe", b""]
)
@pytest.mark.parametrize("name", ["state.json", "arrays-00001.safetensors"])
def test_files_that_are_none_with_right_checksums_are_named(
    stopped_once: StoppedRun, name: str, content: bytes
) -> None:
    folder, _ = stopped_once
    newest = folder / CHECKPOINTS_FOLDER / "round-000002"
    (newest / name).write_bytes(content)
    sign(newest)
    run(resume=folder)
    (event,) = events(folder, "checkpoint unusable")
    assert event["reason"].startswith(f"checkpoint {newest}: ")


# -- killed ------------------------------------------------------------------------------------

WATCHED = {
    str((Path(sim.__file__).parent / path).resolve())
    for path in (
        "commands/interruption.py",
        "commands/running.py",
        "engine/grid.py",
        "engine/inline.py",
        "keeping/checkpoints.py",
        "keeping/records.py",
        "keeping/resume.py",
        "server/history.py",
        "server/outbox.py",
        "server/replies.py",
        "server/rounds.py",
        "../fedkd/exchange/ledger.py",
        "../fedkd/exchange/pipeline/client.py",
        "../fedkd/exchange/pipeline/server.py",
        "../fedkd/exchange/spending.py",
    )
}
"""Between any two lines of these a process may be killed."""


Visit = tuple[str, int, int]
"""A file, a line of it, and which of the line's visits."""


class Lines:
    """Notes which source lines a run visits, and kills the process at one visit."""

    def __init__(self, fatal: Visit | None = None) -> None:
        self.visits: Counter[tuple[str, int]] = Counter()
        self.fatal = fatal

    def __enter__(self) -> "Lines":
        sys.settrace(self._calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _calls(self, frame: FrameType, event: str, _: object) -> Any:
        return self._lines if frame.f_code.co_filename in WATCHED else None

    def _lines(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.visits[line] += 1
            if (*line, self.visits[line]) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._lines


def killed_at(visit: Visit, call: Callable[[], object]) -> bool:
    """Let a child process make a call and kill it there; False if it never came there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Lines(visit):
                call()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status != 0


def charged_in(folder: Path) -> list[tuple[int, int, int]]:
    """Return (round, client, attempt) of each entry of the ledger; a server's is its first."""
    return [
        (row["of_round"], client, attempt)
        for row in read_rows(folder / "exchange.jsonl")
        if row["direction"] == "release"
        for client, attempt in zip(
            row["clients"], row.get("attempts", [1] * len(row["clients"])), strict=True
        )
    ]


def survives(make: Make, strategy: str, count: int, **changes: Any) -> None:
    clients = {"participants": 3, **changes.pop("clients", {})}
    settings = make(strategy, rounds=3, clients=clients, **changes)
    whole = bits(run(settings).folder)
    folder = settings.output / "counted"
    folder.mkdir()
    with Lines() as lines:
        run(settings, folder=folder)
    assert bits(folder) == whole
    assert len(lines.visits) > 300
    rng = np.random.default_rng(count)

    def draw() -> Visit:
        # First a line, then a visit: what runs once counts as much as what runs often.
        (path, line), visits = sorted(lines.visits.items())[int(rng.integers(len(lines.visits)))]
        return path, line, 1 + int(rng.integers(visits))

    for number in range(count):
        folder = settings.output / f"killed-{number}"
        folder.mkdir()
        visit = draw()
        assert killed_at(visit, lambda folder=folder: run(settings, folder=folder)), visit
        if (folder / "settings.yaml").exists():
            # Once more, somewhere in what is left.
            killed_at(draw(), lambda folder=folder: run(resume=folder))
            run(resume=folder)
        else:
            run(settings, folder=folder)
        assert bits(folder) == whole, visit
        charged = charged_in(folder)
        assert len(set(charged)) == len(charged)
        assert not list((folder / CHECKPOINTS_FOLDER).glob(".*"))
        shutil.rmtree(folder)


def test_sigkill_anywhere_costs_no_bit(make: Make) -> None:
    survives(make, "dml", 6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dml", "fedavg", "one_way"])
def test_sigkill_at_a_hundred_points_costs_no_bit(make: Make, strategy: str) -> None:
    survives(make, strategy, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "privacy"),
    [
        ("dml", {"mechanism": "dp_sgd", "noise": 1.0}),
        ("fedmd", {"mechanism": "gaussian", "noise": 2.0, "where": "server"}),
    ],
    ids=["dp_sgd", "gaussian at the server"],
)
def test_sigkill_releases_and_charges_nothing_twice(
    make: Make, strategy: str, privacy: dict[str, Any]
) -> None:
    mlp = [{"name": "mlp", "options": {"hidden": [8]}}]
    survives(make, strategy, 10, clients={"models": mlp}, privacy=privacy)


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
    ids=["int", "term"],
)
def test_a_signal_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, small_words: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    words = [*small_words, "rounds=300", "evaluation.every=300", f"output={tmp_path}", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "run", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/checkpoints/round-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    (folder,) = tmp_path.glob("*/*")
    assert err == f"fedkd: interrupted; fedkd run --resume {folder} goes on from there\n"
    rounds = [r["round"] for r in read_rows(folder / "metrics.jsonl") if r["scope"] == "federation"]
    newest = int(found(folder)[-1].removeprefix("round-"))
    assert newest in (rounds[-1], rounds[-1] - 1)


def test_a_signal_waits_until_a_round_is_complete(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make()
    whole = run(settings)
    commit = InlineGrid.commit

    def interrupted_commit(grid: InlineGrid) -> None:
        signal.raise_signal(signal.SIGTERM)
        commit(grid)

    with monkeypatch.context() as during:
        during.setattr(InlineGrid, "commit", interrupted_commit)
        with pytest.raises(KeyboardInterrupt) as stop:
            run(settings)
    folder = stop.value.folder
    assert stop.value.exit_code == 143
    # The round whose end it came in is there as a whole: states, rows and checkpoint.
    assert found(folder) == ["round-000001"]
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_a_second_ctrl_c_during_the_last_write_costs_that_write_only(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make(checkpoints={"every": 2})
    whole = run(settings)
    rename = os.rename

    def impatient(source: Any, target: Any) -> None:
        if "round-000003" in str(target):
            signal.raise_signal(signal.SIGINT)
        rename(source, target)

    with monkeypatch.context() as during:
        during.setattr(checkpoints.os, "rename", impatient)
        folder = stopped(settings, 4)
    assert found(folder) == [".round-000003.partial", "round-000002"]
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_handlers_are_as_they_were_after_a_run(make: Make) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(make(rounds=1))
    stopped(make(rounds=1), 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# -- one process at a time ---------------------------------------------------------------------


def test_two_processes_in_one_folder_are_one_clear_error(make: Make) -> None:
    folder = stopped(make(), 2)
    ready, hold = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder(folder, settings_of_run(folder)):
            os.write(hold, b"!")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        rows = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(FolderBusyError, match=rf"in use by process {child};"):
            run(resume=folder)
        assert (folder / "metrics.jsonl").read_bytes() == rows
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(hold)
    # Nobody holds the lock of a process that was killed.
    run(resume=folder)
    assert bits(folder)


# -- disks that refuse -------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_later(make: Make) -> None:
    settings = make(rounds=30)
    whole = run(settings)
    folder = settings.output / "full"
    folder.mkdir()
    limit = int(0.6 * (whole.folder / "metrics.jsonl").stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 8192), hard))
    try:
        with pytest.raises(StorageError) as full:
            run(settings, folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(full.value)
    assert "File too large" in text
    assert f"fedkd run --resume {folder}" in text
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    make: Make, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    settings = make(checkpoints={"every": 2})
    whole = run(settings)
    folder = settings.output / "refused"
    folder.mkdir()
    write = checkpoints._write_file

    def refuse(path: Path, content: bytes) -> None:
        if "round-000004" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        write(path, content)

    with monkeypatch.context() as during:
        during.setattr(checkpoints, "_write_file", refuse)
        with pytest.raises(StorageError, match=os.strerror(code)):
            run(settings, folder=folder)
    assert found(folder) == ["round-000002"]
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_no_folder_is_left_where_the_data_cannot_be_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make()

    def no_data(_: Settings) -> None:
        raise SettingsError("data.source: nothing there")

    monkeypatch.setattr(running, "load_data", no_data)
    with pytest.raises(SettingsError, match="nothing there"):
        run(settings)
    assert not settings.output.exists()


# -- what the grid has learnt ------------------------------------------------------------------


class Excluding(InlineGrid):
    """Finds in the second round that a client cannot be served."""

    def _execute(self, calls: Any) -> Iterator[Any]:
        yield from super()._execute(calls)
        if calls and calls[0].call.round == 2:
            self._excluded[1] = "excluded since round 2: it takes every worker down"


def test_who_was_excluded_stays_so_after_a_resume(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "InlineGrid", Excluding)
    settings = make()
    whole = run(settings)
    folder = stopped(settings, 4)
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)
    rejected = [(row["round"], row["client"]) for row in events(folder, "rejected")]
    assert rejected == [(3, 1), (4, 1)]


# -- lost states -------------------------------------------------------------------------------


class Forgetful(InlineGrid):
    """Loses all states at some moments, as a grid does whose machine is gone."""

    lose_at: tuple[tuple[str, int], ...] = ()
    seen: dict[tuple[str, int], int] = {}  # noqa: RUF012

    def _execute(self, calls: Any) -> Iterator[Any]:
        for number, answer in enumerate(super()._execute(calls)):
            call = calls[0].call
            key = call.phase, call.round
            self.seen[key] = self.seen.get(key, 0) + (number == 0)
            if number == 1 and self.lose_at.count(key) >= self.seen[key]:
                self._committed.clear()
                self._pending.clear()
                raise StatesLostError("clients' states were lost: node gone")
            yield answer


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> type[Forgetful]:
    monkeypatch.setattr(running, "InlineGrid", Forgetful)
    monkeypatch.setattr(Forgetful, "seen", {})
    return Forgetful


@pytest.mark.parametrize("strategy", ["dml", "fedavg", "one_way"])
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_lost_states_come_back_from_the_last_checkpoint_and_the_run_says_so(
    make: Make,
    forgetful: type[Forgetful],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    phase: str,
) -> None:
    settings = make(strategy, checkpoints={"every": 2})
    whole = run(settings)
    monkeypatch.setattr(forgetful, "seen", {})
    monkeypatch.setattr(forgetful, "lose_at", ((phase, 1), (phase, 4)))
    lossy = run(settings)
    assert bits(lossy.folder) == bits(whole.folder)
    lost = events(lossy.folder, "states lost")
    # The first time there was no checkpoint yet.
    assert [event["round"] for event in lost] == [0, 2]
    assert lost[1]["reason"].endswith("node gone; went back to the end of round 2")
    assert forgetful.seen[phase, 1] == forgetful.seen[phase, 4] == 2


def test_ctrl_c_while_states_are_fetched_back_saves_nothing_half_done(
    make: Make, forgetful: type[Forgetful], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make(checkpoints={"every": 2})
    whole = run(settings)
    monkeypatch.setattr(forgetful, "seen", {})
    monkeypatch.setattr(forgetful, "lose_at", (("train", 4),))
    load_states = Forgetful.load_states

    def interrupted(grid: Forgetful, states: Any) -> None:
        load_states(grid, list(states)[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Forgetful, "load_states", interrupted)
        with pytest.raises(KeyboardInterrupt) as stop:
            run(settings)
    folder = stop.value.folder
    # Round 3 was complete, but its states are gone.
    assert found(folder) == ["round-000002"]
    run(resume=folder)
    assert bits(folder) == bits(whole.folder)


def test_states_that_are_lost_again_and_again_end_the_run(
    make: Make, forgetful: type[Forgetful], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make()
    monkeypatch.setattr(forgetful, "lose_at", (("train", 3),) * 9)
    with pytest.raises(StatesLostError) as end:
        run(settings)
    assert forgetful.seen["train", 3] == 1 + running.MOST_RETURNS
    (note,) = end.value.__notes__
    assert note.startswith("fedkd run --resume ")


# -- quorum ------------------------------------------------------------------------------------


def test_a_run_that_is_aborted_can_be_resumed_after_its_last_complete_round(make: Make) -> None:
    fault = {"kind": "dropout", "clients": [0, 1, 2], "rounds": [3], "attempts": None}
    engine = {"backend": "inline", "below_quorum": "abort", "quorum": 0.5}
    settings = make(faults=[fault], engine=engine)
    with pytest.raises(QuorumError, match="round 3: 1 of 4") as aborted:
        run(settings)
    (note,) = aborted.value.__notes__
    folder = Path(note.split()[3])
    assert found(folder)[-1] == "round-000002"
    # The quorum decides no number of a round that is complete, so it may be lowered now.
    run(settings_of_run(folder, ["engine.quorum=0.25"]), resume=folder)
    lenient = make(faults=[fault], engine={**engine, "quorum": 0.25})
    assert bits(folder) == bits(run(lenient).folder)


# -- the command line --------------------------------------------------------------------------


def test_compare_goes_on_in_the_middle_of_a_run(small: Callable[..., Settings]) -> None:
    settings = small("study={seeds: 1, arms: {a: {strategy: local}}}", "checkpoints.every=1")

    def stop(arm: str, seed: int) -> Sequence[Observer]:
        return [Stopping(2)]

    with pytest.raises(KeyboardInterrupt):
        sim.compare(settings, observer_of=stop)
    returned: list[int] = []

    class Listener(Observer):
        def returned(self, round: int) -> None:
            returned.append(round)

    study = sim.compare(settings, observer_of=lambda arm, seed: [Listener()])
    assert returned == [1]
    fresh = sim.compare(settings.model_copy(update={"name": "fresh"}))
    assert study.to_row()["weights_sha256"] == fresh.to_row()["weights_sha256"]
