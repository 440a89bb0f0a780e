"""The Flower `ServerApp` and `ClientApp`: the same federation in Flower's own runtimes.

``flwr run .`` hands over ``[tool.flwr.app.config]``: ``config`` names a YAML file (or is empty) and
``overrides`` holds ``key=value`` settings as words of a shell. The server resolves them and sends
them along with every message. A client's state lives in its node's `Context`; results go to a
run folder, as everywhere.
"""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from fedkd.training import ClientState
from sim.commands.privacy import assumptions
from sim.commands.running import load_data, run_result
from sim.engine.data import data_of
from sim.engine.nodes import NodesError, introduction
from sim.engine.runtime import ClientRuntime, presence_of
from sim.keeping.models import ModelKeeper
from sim.keeping.provenance import provenance_of
from sim.keeping.records import FolderBusyError, RunFolder, StorageError, new_run_folder
from sim.server.observers import Observer, Row
from sim.server.replies import QuorumError
from sim.server.rounds import RoundLoop
from sim.server.validation import AuthorError
from sim.settings import (
    Settings,
    SettingsError,
    asked,
    load_settings,
    settings_from_table,
)
from sim.wire.flower import end_without_traceback
from sim.wire.messages import (
    MEMORY_LOST,
    MISTAKE,
    CohortCall,
    MemoryLost,
    Mistake,
    Phase,
    introduction_content,
    read_assignment,
    read_instruction,
    reply_content,
    say_state_was_lost,
)
from sim.wire.records import from_array_record, to_array_record

server_app = ServerApp()
client_app = ClientApp()

STATE = "state"
TRAINED = "trained"
"""Beside a client's state: the round in which it trained last."""

PROJECT = Path(__file__).resolve().parent.parent
"""What ``flwr run .`` took along: on every machine the files of the folder that it was given."""

_LOG = logging.getLogger("flwr")
"""Flower's own log, which ``flwr run . --stream`` shows."""


class _RoundLog(Observer):
    """One line a round, and one an event, in Flower's log."""

    def __init__(self, settings: Settings) -> None:
        self._rounds = settings.rounds

    def metrics(self, rows: Sequence[Row]) -> None:
        row = rows[0]
        _LOG.info("round %d/%d: accuracy %s", row["round"], self._rounds, row.get("accuracy"))

    def event(self, row: Row) -> None:
        about = f", client {row['client']}" if "client" in row else ""
        _LOG.warning("round %d%s: %s: %s", row["round"], about, row["event"], row.get("reason"))


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds on the nodes that the runtime has."""
    try:
        _run(grid, context)
    except (
        AuthorError,
        SettingsError,
        NodesError,
        QuorumError,
        StorageError,
        FolderBusyError,
    ):
        end_without_traceback()
        raise


def _run(grid: Grid, context: Context) -> None:
    settings = read_settings(context)
    presence_of(settings)
    data = load_data(settings, nodes=True)
    folder = new_run_folder(settings.output, settings.name, settings.to_yaml())
    status = "failed"
    with RunFolder(folder, settings, provenance_of(settings).to_row()) as recorder:
        _LOG.info("run folder: %s", folder.resolve())
        if settings.privacy.on:
            # Here there is a server that reads what nodes report beside their answers.
            for words in assumptions(settings):
                _LOG.info("privacy: %s", words)
        loop = RoundLoop(grid, settings, data, [recorder, _RoundLog(settings)])
        keeper = ModelKeeper(folder, settings, data, loop, None)
        models: Mapping[str, Row] = {}
        privacy: Row = {}
        try:
            loop.run(keeper.after_round)
            models = keeper.finish()
            privacy = loop.spent()
            status = "finished"
        except (KeyboardInterrupt, SystemExit):
            # ``flwr stop``, or whoever ends the SuperLink.
            status = "interrupted"
            raise
        finally:
            result = run_result(
                settings, folder, loop.history, status=status, models=models, privacy=privacy
            )
            recorder.result(result.to_row())


def read_settings(context: Context) -> Settings:
    """Return the settings that a run was given.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    config = str(context.run_config.get("config", ""))
    # An absolute path stays what it is.
    return load_settings(PROJECT / config if config else None, _words(context))


def _words(context: Context) -> list[str]:
    """Return the words of ``overrides``, which server and nodes are told alike."""
    overrides = str(context.run_config.get("overrides", ""))
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise SettingsError(
            f"overrides are words as in a shell, key=value separated by spaces: {error} in "
            f"{overrides!r}"
        ) from None


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this node is, and what it has."""
    return _answer("query", message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Learn, and send what the algorithm sends."""
    return _answer("train", message, context)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge this client's model."""
    return _answer("evaluate", message, context)


def _answer(phase: Phase, message: Message, context: Context) -> Message:
    assignment = read_assignment(message.content)
    try:
        client = _number(context, "partition-id")
        count = _number(context, "num-partitions")
        # To a node they are a file that came along: code needs a word given here, or to the run.
        with asked(_words(context), ()):
            settings = settings_from_table(json.loads(assignment.settings))
        if phase == "query":
            # Whatever keeps this node from taking part shows here, before anybody trains.
            said = introduction(settings, load_data(settings), client)
            content = introduction_content(replace(said, partitions=count))
            return Message(content, reply_to=message)
        runtime = _runtime(assignment.settings)
    except SettingsError as error:
        return _refusal(message, str(error))
    trained = context.state.config_records.get(TRAINED, ConfigRecord({"round": 0}))["round"]
    lost = int(trained) < assignment.trained  # type: ignore[arg-type]
    if lost and settings.nodes.restarted == "refuse":
        return _refusal(
            message,
            f"its node was restarted and no longer has the state of round {assignment.trained} "
            "(nodes.restarted: refuse)",
        )
    record = None if lost else context.state.array_records.get(STATE)
    state = None if record is None else ClientState.from_arrays(from_array_record(record))
    told = read_instruction(message.content)
    call = CohortCall(
        phase,
        told.round,
        (client,),
        attempt=told.attempt,
        orders=(told.orders,),
        since=(told.since,),
        levels=(told.levels,),
    )
    served = runtime.serve(call, [told.payload], [state])
    (answer,) = served.answers
    if isinstance(answer, Mistake | MemoryLost):
        code = MISTAKE if isinstance(answer, Mistake) else MEMORY_LOST
        return Message(Error(code, answer), reply_to=message)
    if isinstance(answer, str):
        return _refusal(message, answer)
    if client in served.states:
        context.state[STATE] = to_array_record(served.states[client].to_arrays())
        context.state[TRAINED] = ConfigRecord({"round": told.round})
    content = reply_content(answer)
    if lost:
        say_state_was_lost(content)
    return Message(content, reply_to=message)


def _refusal(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _number(context: Context, key: str) -> int:
    """Return one of the numbers that say which client a node is."""
    value = context.node_config.get(key)
    if type(value) is not int:
        raise SettingsError(
            f"each node needs --node-config 'partition-id=K num-partitions=N' with whole numbers, "
            f"got {key}={value!r}"
        )
    return value


# A node's process may serve message after message: load once, not every time.
@lru_cache(maxsize=1)
def _runtime(text: str) -> ClientRuntime:
    """Return what serves this node's client; whether it can was seen when the node was asked."""
    settings = settings_from_table(json.loads(text))
    try:
        data = data_of(settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return ClientRuntime(settings, data)
