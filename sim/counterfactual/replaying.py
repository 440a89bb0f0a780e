"""`replay`: a finished run again, from its start or from a checkpoint, with one thing otherwise.

Everybody keeps their places: split, streams, participants and cohorts are those of the run. A
client that is left out goes on learning and receiving, and what it sends is dropped.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkd.data import FederatedData
from fedkd.exchange.pipeline import ExchangeState
from fedkd.exchange.values import flatten, unflatten
from fedkd.training import Arrays, ClientState
from sim.attacks.settings import AttackSettings
from sim.commands.running import RunResult, load_data, run, settings_of_run
from sim.counterfactual.comparing import compared
from sim.engine.runtime import with_exchange
from sim.keeping.checkpoints import Checkpoint, CheckpointStore, Table
from sim.keeping.identity import data_digest, fingerprint
from sim.keeping.provenance import Provenance, check_same_make, provenance_of
from sim.keeping.records import (
    IDENTITY_FILE,
    SETTINGS_FILE,
    is_finished,
    make_folder,
    package_versions,
    read_result,
    storing,
    to_json,
    write_text,
)
from sim.keeping.resume import CHECKPOINTS_FOLDER
from sim.reports.runs import load_run
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError, load_settings
from sim.settings.schema import CounterfactualSettings, StudySettings
from sim.settings.tables import dotted

REPLAY_FILE = "replay.json"
"""What a replay is of, and how it compares with that."""

REPLAY = "replay-"
"""Begins the name of a replay's folder."""

FIXED: Mapping[str, str] = {
    "seed": "every draw of a run is its seed's, so nobody would be paired with themselves; fedkd "
    "run with another seed is another run",
    "data": "it decides which rows there are and who holds them, so clients would be others; "
    "fedkd compare runs both as arms",
    "clients.count": "rows would be dealt anew, so clients would be others; --without-client "
    "leaves one out",
    "clients.participation": "who takes part in which round would be drawn anew",
    "clients.participants": "who takes part in which round would be drawn anew",
    "clients.models": "clients would begin as other models; fedkd compare runs both as arms",
    "clients.first_weights": "clients would begin as other models; fedkd compare runs both as arms",
    "presence": "who is there in which round would change",
    "privacy": "what a ledger promised once would be spent again on the same rows",
    "counterfactual": "--without-client, --flip-labels and --from-round say it",
    "study": "a replay is of one run",
}
"""What moves who is who, or what would not be honest; and why."""

FROM_THE_START: Mapping[str, str] = {
    "rounds": "schedules run over all rounds, so the rounds before would have been others",
    "strategy.name": "the checkpoint holds the state of another algorithm",
}
"""What may change, but not from a checkpoint on."""


@dataclass(frozen=True)
class Wanted:
    """What is to be otherwise.

    Attributes:
        without: clients that are left out.
        flipped: clients whose labels are turned round.
        words: settings, ``key=value``.
        from_round: the round to go on from; None or 0: from the start.
    """

    without: tuple[int, ...] = ()
    flipped: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    from_round: int | None = None


@dataclass(frozen=True)
class ReplayResult:
    """What a replay shows.

    Attributes:
        folder: of the replay.
        row: plain values, the content of ``replay.json``.
        result: of the replay, as of any run.
    """

    folder: Path
    row: Row
    result: RunResult


def replay(
    folder: Path,
    wanted: Wanted = Wanted(),
    *,
    accept_code: bool = False,
    allow: Sequence[str] = (),
    observers: Sequence[Observer] = (),
) -> ReplayResult:
    """Repeat a finished run with something otherwise, and compare the two.

    A replay that was stopped goes on when it is asked for again; one that is finished is read.

    Args:
        folder: of the run.
        wanted: what is otherwise; nothing: the replay ends with the run's bits.
        accept_code: repeat it although its code, or a library, has changed since.
        allow: packages whose code the folder may name.
        observers: told about every round while it happens.

    Raises:
        SettingsError: the run cannot be repeated so; names what and why.
    """
    own = repeatable(folder, allow)
    settings = replayed_settings(folder, own, wanted, allow)
    _, accepted = check_same_make(folder, provenance_of(own), accept_code=accept_code)
    place = _place(folder, settings, provenance_of(settings))
    if not (place / SETTINGS_FILE).is_file():
        data = load_data(settings)
        since = settings.counterfactual.from_round
        if since:
            kept = _kept(folder, own, since)
            _begin(folder, place, settings, data, own, kept)
        else:
            make_folder(settings.output, place)
    begun = (place / SETTINGS_FILE).is_file()
    result = run(
        settings,
        folder=place,
        resume=place if begun else None,
        accept_code=accept_code,
        observers=observers,
    )
    row = {
        "run": str(folder),
        "replay": str(place),
        **compared(load_run(folder), load_run(place)),
    }
    if accepted:
        row["accepted"] = str(accepted)
    with storing(place, goes_on="the same command writes it again"):
        write_text(place / REPLAY_FILE, to_json(row, indent=1) + "\n")
    return ReplayResult(place, row, result)


def repeatable(folder: Path, allow: Sequence[str] = ()) -> Settings:
    """Return the settings of a run that can be repeated.

    Raises:
        SettingsError: says why it cannot.
    """
    own = settings_of_run(folder, allow=allow)
    if not is_finished(folder):
        raise SettingsError(
            f"{folder} is no finished run: fedkd run --resume {folder} ends it, then replay it"
        )
    if own.privacy.on or own.privacy.audit.canaries:
        raise SettingsError(
            f"privacy.mechanism: {folder} was run under {own.privacy.mechanism.kind}, and is not "
            "repeated: a repetition learns from the same rows again and spends a second time what "
            "its ledger has promised once, and its noise is drawn anew wherever a release differs, "
            "so that nothing would be paired"
        )
    if own.counterfactual.on:
        raise SettingsError(
            f"{folder} is a replay itself: replay the run that it repeats, with all that is to be "
            "otherwise"
        )
    if read_result(folder).get("weights_sha256") is None:
        raise SettingsError(
            f"{folder}: its clients were nodes of Flower's own runtimes, which keep their models "
            "to themselves, so nobody can tell whether a repetition is one; fedkd run of the same "
            "settings can be replayed"
        )
    return own


def replayed_settings(
    folder: Path, own: Settings, wanted: Wanted, allow: Sequence[str] = ()
) -> Settings:
    """Return the settings of a replay.

    Args:
        folder: of the run.
        own: settings of the run.
        wanted: what is otherwise.
        allow: packages whose code the folder may name.

    Raises:
        SettingsError: names what cannot be otherwise, and why.
    """
    words = [word.partition("=")[0].strip() for word in wanted.words]
    for word, name in zip(wanted.words, words, strict=True):
        if "=" not in word:
            raise SettingsError(f"--set takes key=value, got {word!r}")
        if name.split(".")[0] == "counterfactual":
            raise SettingsError(f"--set {name}: {FIXED['counterfactual']}")
    settings = load_settings(folder / SETTINGS_FILE, wanted.words, allow=allow)
    since = wanted.from_round or 0
    for path in changed_paths(own, settings):
        why = _why_fixed(path, FIXED)
        if why:
            raise SettingsError(f"--set {path}: a replay cannot change it: {why}")
        why = _why_fixed(path, FROM_THE_START) if since else None
        if why:
            raise SettingsError(
                f"--set {path}: a replay --from-round {since} cannot change it: {why}"
            )
    both = sorted(set(wanted.without).intersection(wanted.flipped))
    if both:
        raise SettingsError(
            f"client {both[0]} is left out and its labels are flipped: nothing that it learns "
            "from them would count, so choose one"
        )
    if since > own.rounds - 1:
        raise SettingsError(
            f"--from-round must be below rounds ({own.rounds}), or nothing is left to run, got "
            f"{since}"
        )
    options = {"--without-client": wanted.without, "--flip-labels": wanted.flipped}
    for option, clients in options.items():
        strangers = [client for client in clients if client >= own.clients.count]
        if strangers:
            raise SettingsError(
                f"{option} must name clients of the run, 0 to {own.clients.count - 1}, got "
                f"{strangers[0]}"
            )
    counterfactual = CounterfactualSettings(
        without=wanted.without,
        flipped=wanted.flipped,
        from_round=since,
        run=read_result(folder).get("weights_sha256") if since else None,
    )
    return settings.model_copy(
        update={
            "counterfactual": counterfactual,
            "attacks": AttackSettings(),
            "study": StudySettings(),
            "trackers": (),
        }
    )


def changed_paths(before: Settings, after: Settings) -> list[str]:
    """Return the settings in which two differ, by their dotted names."""
    one, other = (dotted(each.to_table()) for each in (before, after))
    return [
        path for path in dict.fromkeys((*one, *other)) if one.get(path, ...) != other.get(path, ...)
    ]


def _why_fixed(path: str, table: Mapping[str, str]) -> str | None:
    found = (why for name, why in table.items() if path == name or path.startswith(f"{name}."))
    return next(found, None)


# -- where it is -------------------------------------------------------------------------------


def _place(folder: Path, settings: Settings, now: Provenance) -> Path:
    """Return the folder of a replay: the one that was begun before, if it was made of the same."""
    named = f"{REPLAY}{folder.resolve().name}-{fingerprint(settings)[:8]}"
    above = settings.output / settings.name
    number = 1
    while True:
        place = above / (named if number == 1 else f"{named}-{number}")
        if not (place / SETTINGS_FILE).is_file():
            return place
        before = Provenance.read(place)
        if before is not None and before.latest().to_row() == now.to_row():
            return place
        number += 1


def _kept(folder: Path, own: Settings, round: int) -> Checkpoint:
    """Return the checkpoint of a round of the run.

    Raises:
        SettingsError: names those that were kept.
        CheckpointError: it is not as it was written.
    """
    store = CheckpointStore(
        folder / CHECKPOINTS_FOLDER,
        identity={"settings": fingerprint(own), "data": data_digest(load_data(own))},
        packages=package_versions(),
    )
    kept = store.rounds()
    if round not in kept:
        some = ", ".join(map(str, kept)) or "none"
        raise SettingsError(
            f"--from-round must be a round whose checkpoint was kept ({some}), got {round}: "
            f"checkpoints.keep={max(own.rounds, 2)} checkpoints.every=1 keeps those of all rounds; "
            "without --from-round a replay begins at the start"
        )
    return store.read(folder / CHECKPOINTS_FOLDER / f"round-{round:06d}")


def _begin(
    folder: Path,
    place: Path,
    settings: Settings,
    data: FederatedData,
    own: Settings,
    kept: Checkpoint,
) -> None:
    """Make a folder that stands where the run stood after a round: `run` goes on from there."""
    codecs = [path for path in changed_paths(own, settings) if path.startswith("exchange.")]
    partial = make_folder(settings.output, place.with_name(f".{place.name}.{os.getpid()}.partial"))
    try:
        with storing(place, goes_on="repeat the command"):
            for name, mark in kept.values["marks"].items():
                content = (folder / name).read_bytes()[: mark["bytes"]]
                (partial / name).write_bytes(content)
            store = CheckpointStore(
                partial / CHECKPOINTS_FOLDER,
                identity={"settings": fingerprint(settings), "data": data_digest(data)},
                packages=kept.packages,
                keep=settings.checkpoints.keep,
            )
            values, tables = dict(kept.values), kept.tables()
            if codecs:
                values, tables = _forgotten(values, list(tables))
            store.write(kept.round, values, tables)
            write_text(partial / IDENTITY_FILE, to_json(provenance_of(settings).to_row()) + "\n")
            write_text(partial / SETTINGS_FILE, settings.to_yaml())
            os.rename(partial, place)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(partial)
        raise


def _forgotten(
    values: dict[str, Any], tables: Sequence[Table]
) -> tuple[dict[str, Any], Iterator[Table]]:
    """Return a checkpoint in which codecs remember nothing: others would not know what it is."""
    server: dict[str, Arrays] = {}
    for name, arrays in tables:
        if name == "exchange":
            server.setdefault(name, {}).update(arrays)
    exchange: ExchangeState = unflatten(server.get("exchange", {}), values["exchange"])
    flat = flatten(replace(exchange, clients={}))

    def without_memory() -> Iterator[Table]:
        for name, arrays in tables:
            if name.startswith("client-"):
                yield name, with_exchange(ClientState.from_arrays(arrays), {}).to_arrays()
            elif name != "exchange":
                yield name, arrays
        yield "exchange", flat.arrays

    return {**values, "exchange": flat.plain}, without_memory()


def read_replay(folder: Path) -> Row | None:
    """Return what a folder's replay is of; None: it is none."""
    try:
        row = json.loads((folder / REPLAY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) else None
