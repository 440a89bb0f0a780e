from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def parts(tiny_settings) -> Callable[..., Any]:
    """Make the server half's surroundings by hand: (strategy, server) of some settings and data."""
    from sim.engine.runtime import build_strategy, federation_of
    from strategies.server import Server

    def build(settings: Any, data: Any) -> Any:
        federation = federation_of(settings, data)
        server = Server(
            federation=federation,
            data=data,
            optimizer=settings.clients.optimizer,
            device=torch.device("cpu"),
        )
        return build_strategy(settings, federation), server

    return build


@pytest.fixture
def scores() -> Callable[..., Any]:
    """Make uploads of logits on a plan's public rows: client -> random or given values."""
    from strategies.knowledge import ClientUpload, Predictions

    def build(plan: Any, clients: Any, *, seed: int = 0) -> list[ClientUpload]:
        values = clients if isinstance(clients, dict) else dict.fromkeys(clients)
        shape = len(plan.public_rows), plan.federation.num_classes
        return [
            ClientUpload(
                client,
                Predictions(
                    kind="logits",
                    rows=plan.public_rows,
                    values=(
                        np.random.default_rng([seed, client]).normal(0, 2, shape)
                        if given is None
                        else np.broadcast_to(given, shape)
                    ).astype(np.float32),
                ),
                plan.federation.num_examples[client],
            )
            for client, given in values.items()
        ]

    return build


class SpyCohort:
    """Writes down what an algorithm asks of a cohort, in order; predicts zeros."""

    def __init__(self, clients: tuple[int, ...] = (0,), num_classes: int = 3) -> None:
        self.clients = clients
        self.num_classes = num_classes
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def fit(self, objective: Any, *, private: Any = None, public: Any = None) -> None:
        self.asked.append(("fit", {"objective": objective, "private": private, "public": public}))

    def predict_public(self, rows: np.ndarray) -> np.ndarray:
        self.asked.append(("predict_public", {"rows": rows}))
        return np.zeros((len(self.clients), len(rows), self.num_classes), np.float32)

    def weights(self) -> list[dict[str, np.ndarray]]:
        self.asked.append(("weights", {}))
        return [{"w": np.zeros(1, np.float32)} for _ in self.clients]

    def load_weights(self, weights: Any) -> None:
        self.asked.append(("load_weights", {"weights": weights}))

    def reset_optimizers(self) -> None:
        self.asked.append(("reset_optimizers", {}))

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.asked]

    @property
    def fits(self) -> list[dict[str, Any]]:
        return [told for name, told in self.asked if name == "fit"]


@pytest.fixture
def spy() -> Any:
    """Make a `SpyCohort` that passes for a cohort."""
    from fedkd.training import Cohort

    Cohort.register(SpyCohort)
    return SpyCohort


@pytest.fixture
def same_knowledge() -> Callable[[Any, Any], bool]:
    """Tell whether two pieces of knowledge are equal bit for bit, or both None."""
    from strategies.knowledge import Predictions

    def arrays(knowledge: Any) -> dict[str, np.ndarray]:
        if isinstance(knowledge, Predictions):
            return {"rows": knowledge.rows, "values": knowledge.values}
        return knowledge.arrays

    def compare(one: Any, other: Any) -> bool:
        if one is None or other is None:
            return one is other
        mine, others = arrays(one), arrays(other)
        return (
            one.kind == other.kind
            and getattr(one, "temperature", None) == getattr(other, "temperature", None)
            and mine.keys() == others.keys()
            and all(
                mine[name].dtype == others[name].dtype
                and mine[name].shape == others[name].shape
                and mine[name].tobytes() == others[name].tobytes()
                for name in mine
            )
        )

    return compare
