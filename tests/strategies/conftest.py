from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def parts() -> Callable[..., Any]:
    """Make the server half's surroundings by hand: (strategy, tools) of some settings and data."""
    from sim.contract.toy import toy_parts

    return toy_parts


@pytest.fixture
def scores() -> Callable[..., Any]:
    """Make uploads of logits on a round's public rows: client -> random or given values."""
    from fedkd.exchange.payloads import Predictions
    from strategies.contract import Upload

    def build(round: Any, clients: Any, *, seed: int = 0) -> list[Upload]:
        values = clients if isinstance(clients, dict) else dict.fromkeys(clients)
        shape = len(round.public_rows), round.federation.num_classes
        return [
            Upload(
                client,
                Predictions(
                    rows=round.public_rows,
                    values=(
                        np.random.default_rng([seed, client]).normal(0, 2, shape)
                        if given is None
                        else np.broadcast_to(given, shape)
                    ).astype(np.float32),
                ),
                round.federation.num_examples[client],
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

    def fit(self, objective: Any, *, private: Any = None, public: Any = None, **more: Any) -> list:
        told = {"objective": objective, "private": private, "public": public, **more}
        self.asked.append(("fit", told))
        return []

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
def told() -> Callable[..., Any]:
    """Return what clients are told in a round: (strategy, state, round) -> client -> payload.

    Those that receive the same are told one object.
    """

    def build(strategy: Any, state: Any, round: Any = None) -> Callable[[int], Any]:
        made: dict[Any, Any] = {None: None}

        def tell(client: int) -> Any:
            key = strategy.receives(state, client, round or strategy.federation.round(1))
            if key not in made:
                made[key] = strategy.payload(state, key)
            return made[key]

        return tell

    return build


@pytest.fixture
def learn() -> Callable[..., Any]:
    """Let a cohort go through one client half; all members receive the same, or nothing."""
    from strategies.contract import Call, Received

    def run(strategy: Any, cohort: Any, received: Any, number: int = 1) -> Any:
        pieces = Received([received] * len(cohort.clients))
        return strategy.client(cohort, pieces, Call(strategy.federation, number))

    return run


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Tell whether two values are equal bit for bit, or both None."""
    from fedkd.exchange.values import digest

    def compare(one: Any, other: Any) -> bool:
        if one is None or other is None:
            return one is other
        return digest(one) == digest(other)

    return compare
