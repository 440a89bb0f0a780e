"""A federation that learns in no time: noisy 8x8 pictures, small models, all in this process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedkd.data import FederatedData
from fedkd.exchange.payload import Payload
from fedkd.exchange.values import flatten
from fedkd.training import ClientState, weights_digest
from sim.engine.grid import FIRST_NODE_ID
from sim.engine.inline import InlineGrid
from sim.engine.runtime import ClientRuntime, build_strategy, federation_of, server_tools
from sim.server.history import History
from sim.server.observers import Observer, Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings
from sim.wire.messages import Instruction, read_instruction, read_reply, reply_content
from strategies.contract import ServerTools, Strategy

CLASSES = 3
ROWS = (12, 13, 9, 17)
"""Private rows of each client; uneven, so that batches are padded where clients are stacked."""
PUBLIC_ROWS = 20


def toy_data(
    *,
    rows: Sequence[int] = ROWS,
    public: int = PUBLIC_ROWS,
    labelled: bool = False,
    num_classes: int = CLASSES,
    seed: int = 0,
) -> FederatedData:
    """Return pictures with one pattern a class.

    Args:
        rows: private rows of each client.
        public: rows of the public set.
        labelled: whether the public set has labels.
        num_classes: at most 8.
        seed: of patterns, noise and labels.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.standard_normal((num_classes, 1, 8, 8))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(count) % num_classes)
        noise = rng.standard_normal((count, 1, 8, 8))
        return (patterns[labels] + 0.3 * noise).astype(np.float32), labels

    train_inputs, train_labels = draw(sum(rows))
    public_inputs, public_labels = draw(public)
    validation_inputs, validation_labels = draw(15)
    test_inputs, test_labels = draw(21)
    dealt = np.split(rng.permutation(sum(rows)), np.cumsum(rows)[:-1])
    return FederatedData(
        name="toy",
        class_names=tuple("abcdefgh"[:num_classes]),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=train_inputs,
        train_labels=train_labels,
        client_rows=tuple(np.sort(part) for part in dealt),
        public_inputs=public_inputs,
        public_labels=public_labels if labelled else None,
        validation_inputs=validation_inputs,
        validation_labels=validation_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
    )


def toy_settings(
    strategy: str = "dml",
    *,
    options: Mapping[str, Any] | None = None,
    clients: Mapping[str, Any] | None = None,
    public: int = PUBLIC_ROWS,
    **settings: Any,
) -> Settings:
    """Return settings for `toy_data`: see `toy_table`."""
    return Settings.model_validate(
        toy_table(strategy, options=options, clients=clients, public=public, **settings)
    )


def toy_table(
    strategy: str = "dml",
    *,
    options: Mapping[str, Any] | None = None,
    clients: Mapping[str, Any] | None = None,
    public: int = PUBLIC_ROWS,
    **settings: Any,
) -> dict[str, Any]:
    """Return plain settings for `toy_data`: small MLPs and CNNs in turn.

    Args:
        strategy: its name.
        options: its settings.
        clients: in the place of some of ``clients``.
        public: rows of the public set.
        settings: whole sections.
    """
    table = {
        "rounds": 3,
        "data": {"public": {"size": public}},
        "clients": {
            "count": 4,
            "models": [
                {"name": "mlp", "options": {"hidden": [8]}},
                {"name": "cnn", "options": {"channels": [4]}},
            ],
            "batch_size": 8,
            "local": {"epochs": 1},
            "optimizer": {"name": "adam", "lr": 0.01},
            **(clients or {}),
        },
        "strategy": {"name": strategy, **(options or {})},
        "engine": {"backend": "inline"},
    }
    return {**table, **settings}


def toy_parts(settings: Settings, data: FederatedData) -> tuple[Strategy[Any, Any], ServerTools]:
    """Return an algorithm and what its server half may use."""
    federation = federation_of(settings, data)
    strategy = build_strategy(settings, federation)
    return strategy, server_tools(settings, strategy, data)


@dataclass
class Simulated:
    """What a finished run of `simulate` shows."""

    loop: RoundLoop
    grid: InlineGrid
    history: History
    digest: str
    states: list[ClientState]
    exchange: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    charges: list[Row] = field(default_factory=list)


class _Rows(Observer):
    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {
            "exchange": [],
            "charges": [],
            "events": [],
            "metrics": [],
        }

    def metrics(self, rows: Sequence[Row]) -> None:
        self.rows["metrics"].extend(rows)

    def exchange(self, rows: Sequence[Row]) -> None:
        self.rows["exchange"].extend(rows)

    def charges(self, rows: Sequence[Row]) -> None:
        self.rows["charges"].extend(rows)

    def event(self, row: Row) -> None:
        self.rows["events"].append(row)


def simulate(
    settings: Settings,
    data: FederatedData,
    grid: InlineGrid | None = None,
    recorder: Observer | None = None,
) -> Simulated:
    """Run the rounds of some settings in this process, and return what happened."""
    grid = grid or InlineGrid(settings, data)
    recorder = recorder or _Rows()
    loop = RoundLoop(grid, settings, data, [recorder])
    history = loop.run()
    states = final_states(settings, data, grid)
    rows = getattr(recorder, "rows", {})
    return Simulated(loop, grid, history, weights_digest(states), states, **rows)


def final_states(settings: Settings, data: FederatedData, grid: InlineGrid) -> list[ClientState]:
    """Return every client's state; of those that never trained, the first one."""
    runtime = ClientRuntime(settings, data)
    return [
        state or runtime.initial_state(client)
        for client, state in enumerate(grid.client_states(range(settings.clients.count)))
    ]


Change = Callable[[str, int, int, Message], Message]
"""``(phase, number, client, reply)``: what stands in the place of a reply; ``number`` counts the
exchanges of a phase from 0, so the first round's training is ``("train", 0)``."""


class ListeningGrid(InlineGrid):
    """Keeps what went out and what came back.

    Attributes:
        told: for each exchange of a phase, what each client was told.
        replies: the same of its reply.
    """

    def __init__(
        self, settings: Settings, data: FederatedData, change: Change | None = None
    ) -> None:
        super().__init__(settings, data)
        self.change = change
        self.told: dict[str, list[dict[int, Instruction]]] = {"train": [], "evaluate": []}
        self.replies: dict[str, list[dict[int, Message]]] = {"train": [], "evaluate": []}

    @property
    def sent(self) -> dict[str, list[dict[int, Payload | None]]]:
        """What each client received."""
        return {
            phase: [{client: told.payload for client, told in each.items()} for each in exchanges]
            for phase, exchanges in self.told.items()
        }

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
        """Pass messages on and keep them."""
        messages = list(messages)
        phase = messages[0].metadata.message_type
        number = len(self.told[phase])
        self.told[phase].append(
            {m.metadata.dst_node_id - FIRST_NODE_ID: read_instruction(m.content) for m in messages}
        )
        came: dict[int, Message] = {}
        self.replies[phase].append(came)
        for reply in super().send_and_receive(messages):
            client = reply.metadata.src_node_id - FIRST_NODE_ID
            if self.change is not None:
                reply = self.change(phase, number, client, reply)
            came[client] = reply
            yield reply


def losing(clients: Sequence[int], how: str = "lost", *, phase: str = "train") -> Change:
    """Return a change that loses (or, with ``spoilt``, spoils) what clients answer at first."""

    def spoil(payload: Payload) -> Payload:
        """Put a NaN into the first table of numbers that a payload has, or cut its first array."""
        arrays = flatten(payload).arrays
        for place, table in arrays.items():
            if table.dtype.kind == "f" and table.size:
                table = table.copy()
                table.flat[0] = np.nan
                return payload.with_arrays({place: table})
        # What a codec makes of numbers may be whole ones, which have no NaN.
        place, table = next((p, a) for p, a in arrays.items() if a.size)
        return payload.with_arrays({place: table.reshape(-1)[:-1]})

    def change(asked: str, number: int, client: int, reply: Message) -> Message:
        if client not in clients or (asked, number) != (phase, 0):
            return reply
        answer = read_reply(reply.content)
        if how == "lost" or answer.payload is None:
            error = Error(1, f"Traceback\n  at home\nOSError: client {client} is gone")
            return _in_place_of(reply, error)
        spoilt = replace(answer, payload=spoil(answer.payload))
        return _in_place_of(reply, reply_content(spoilt))

    return change


def _in_place_of(reply: Message, content: RecordDict | Error) -> Message:
    # Flower makes replies to messages only; this one was made already.
    changed: Any = Message
    message: Message = changed(content, metadata=reply.metadata)
    return message
