"""The Flower `ServerApp` and `ClientApp`: the same federation in Flower's own runtimes.

``flwr run .`` reads the settings from ``[tool.flwr.app.config]``: ``config`` names a YAML file
(or is empty) and ``overrides`` holds ``key=value`` settings separated by spaces. The clients are
Flower's supernodes, so their number comes from the runtime and not from ``clients.count``.
A client's state lives in its `Context`; results go to a run folder, as everywhere.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedkd.data import FederatedData
from fedkd.training import ClientState
from sim.engine.messages import CohortCall, Phase, read_instruction, reply_content
from sim.engine.runtime import ClientRuntime
from sim.observers import Observer, Row
from sim.records import RunFolder, new_run_folder
from sim.rounds import RoundLoop, registered_nodes
from sim.running import load_data, run_result
from sim.settings import Settings, load_settings
from strategies.knowledge import from_array_record, to_array_record

server_app = ServerApp()
client_app = ClientApp()

STATE = "state"

_LOG = logging.getLogger("flwr")
"""Flower's own log, which ``flwr run . --stream`` shows."""


class _RoundLog(Observer):
    """One line a round in Flower's log."""

    def __init__(self, settings: Settings) -> None:
        self._rounds = settings.rounds

    def metrics(self, rows: Sequence[Row]) -> None:
        row = rows[0]
        _LOG.info("round %d/%d: accuracy %s", row["round"], self._rounds, row.get("accuracy"))


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds on the nodes that the runtime has."""
    settings, data = _load(_words(context), len(registered_nodes(grid)))
    folder = new_run_folder(settings.output, settings.name)
    with RunFolder(folder, settings) as recorder:
        loop = RoundLoop(grid, settings, data, [recorder, _RoundLog(settings)])
        loop.run()
        recorder.result(run_result(settings, folder, loop.history).to_row())
    _LOG.info("run folder: %s", folder.resolve())


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Say which partition this node is."""
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
    client = int(context.node_config["partition-id"])
    count = int(context.node_config["num-partitions"])
    runtime = _runtime(_words(context), count)
    record = context.state.array_records.get(STATE)
    state = None if record is None else ClientState.from_arrays(from_array_record(record))
    told = read_instruction(message.content)
    call = CohortCall(phase, told.round, (client,), attempt=told.attempt)
    replies, states = runtime.run(call, told.knowledge, [state])
    if states:
        context.state[STATE] = to_array_record(states[0].to_arrays())
    return Message(reply_content(replies[0]), reply_to=message)


def _words(context: Context) -> tuple[str, ...]:
    """Return the settings' file, then the overrides, as words."""
    config = str(context.run_config.get("config", ""))
    return config, *str(context.run_config.get("overrides", "")).split()


# A node's process serves message after message: load once, not every time.
@lru_cache(maxsize=1)
def _load(words: tuple[str, ...], count: int) -> tuple[Settings, FederatedData]:
    config, *overrides = words
    settings = load_settings(config or None, [*overrides, f"clients.count={count}"])
    return settings, load_data(settings)


@lru_cache(maxsize=1)
def _runtime(words: tuple[str, ...], count: int) -> ClientRuntime:
    return ClientRuntime(*_load(words, count))
