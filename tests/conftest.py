"""Shared test settings: one thread, as in every worker, so that bits depend on no core count.

The project's packages are imported inside the fixtures: the hook that checks shapes has to be in
place before they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def tiny_data() -> Callable[..., Any]:
    """Make a `FederatedData` of noisy 8x8 pictures, one pattern a class, that learns in no time."""
    from fedkd.data import FederatedData

    def build(
        *,
        rows: tuple[int, ...] = (12, 13, 9, 17),
        public: int = 20,
        labelled: bool = False,
        num_classes: int = 3,
        seed: int = 0,
    ) -> FederatedData:
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
            name="tiny",
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

    return build


@pytest.fixture
def tiny_settings() -> Callable[..., Any]:
    """Make `Settings` for `tiny_data`: small MLPs and CNNs in turn, in this process."""
    from sim.settings import Settings

    def build(
        strategy: str = "dml",
        *,
        options: dict[str, Any] | None = None,
        clients: dict[str, Any] | None = None,
        public: int = 20,
        **settings: Any,
    ) -> Settings:
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
        return Settings.model_validate({**table, **settings})

    return build


@dataclass
class Simulated:
    """What a finished run of `simulate` shows."""

    loop: Any
    grid: Any
    history: Any
    digest: str
    states: list[Any]
    exchange: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def simulate() -> Callable[..., Simulated]:
    """Run the rounds of some settings over an inline grid, and return what happened."""
    from fedkd.training import weights_digest
    from sim.engine.inline import InlineGrid
    from sim.engine.runtime import ClientRuntime
    from sim.server.observers import Observer
    from sim.server.rounds import RoundLoop

    class Recorder(Observer):
        def __init__(self) -> None:
            self.rows: dict[str, list[Any]] = {"exchange": [], "events": [], "metrics": []}

        def metrics(self, rows: Any) -> None:
            self.rows["metrics"].extend(rows)

        def exchange(self, rows: Any) -> None:
            self.rows["exchange"].extend(rows)

        def event(self, row: Any) -> None:
            self.rows["events"].append(row)

    def run(settings: Any, data: Any, grid: Any = None, recorder: Any = None) -> Simulated:
        grid = grid or InlineGrid(settings, data)
        recorder = recorder or Recorder()
        loop = RoundLoop(grid, settings, data, [recorder])
        history = loop.run()
        runtime = ClientRuntime(settings, data)
        states = [
            state or runtime.initial_state(client)
            for client, state in enumerate(grid.client_states(range(settings.clients.count)))
        ]
        return Simulated(
            loop, grid, history, weights_digest(states), states, **getattr(recorder, "rows", {})
        )

    return run


@pytest.fixture
def listening_grid() -> Callable[..., Any]:
    """Make an inline grid that keeps what went out and what came back.

    ``change(phase, number, client, reply)`` may put another reply in the place of one; ``number``
    counts the exchanges of a phase from 0, so the first round's training is ``("train", 0)``.
    """
    from sim.engine.grid import FIRST_NODE_ID
    from sim.engine.inline import InlineGrid
    from sim.wire.messages import read_instruction

    class ListeningGrid(InlineGrid):
        def __init__(self, settings: Any, data: Any, change: Any = None) -> None:
            super().__init__(settings, data)
            self.change = change
            self.sent: dict[str, list[dict[int, Any]]] = {"train": [], "evaluate": []}
            self.replies: dict[str, list[dict[int, Any]]] = {"train": [], "evaluate": []}

        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            messages = list(messages)
            phase = messages[0].metadata.message_type
            number = len(self.sent[phase])
            self.sent[phase].append(
                {
                    m.metadata.dst_node_id - FIRST_NODE_ID: read_instruction(m.content).payload
                    for m in messages
                }
            )
            came: dict[int, Any] = {}
            self.replies[phase].append(came)
            for reply in super().send_and_receive(messages):
                client = reply.metadata.src_node_id - FIRST_NODE_ID
                if self.change is not None:
                    reply = self.change(phase, number, client, reply)
                came[client] = reply
                yield reply

    return ListeningGrid


@pytest.fixture
def lose() -> Callable[..., Any]:
    """Make a ``change`` that loses or spoils what some clients answer to their first training."""
    from dataclasses import replace

    from flwr.app import Error, Message

    from fedkd.exchange.values import flatten
    from sim.wire.messages import read_reply, reply_content

    def spoil(payload: Any) -> Any:
        """Put a NaN into the first table of numbers that a payload has."""
        arrays = flatten(payload).arrays
        place, table = next((p, a) for p, a in arrays.items() if a.dtype.kind == "f" and a.size)
        table = table.copy()
        table.flat[0] = np.nan
        return payload.with_arrays({place: table})

    def build(clients: Any, how: str = "lost", *, phase: str = "train") -> Any:
        def change(asked: str, number: int, client: int, reply: Any) -> Any:
            if client not in clients or (asked, number) != (phase, 0):
                return reply
            answer = read_reply(reply.content)
            if how == "lost" or answer.payload is None:
                error = Error(1, f"Traceback\n  at home\nOSError: client {client} is gone")
                return Message(error, metadata=reply.metadata)
            spoilt = replace(answer, payload=spoil(answer.payload))
            return Message(reply_content(spoilt), metadata=reply.metadata)

        return change

    return build
