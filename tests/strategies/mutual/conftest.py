from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.training.objectives import Batch, Outputs
from strategies.contract import Round, ServerTools, Strategy, Upload
from strategies.shared.taught import lesson_of

LOGITS = {
    0: [[1, 2, 3, 0], [0.5, -1, 0, 2]],
    1: [[2, 1, 4, -1], [0, 0, 1, 3]],
    2: [[-4, 3, 1, 1], [2, 0, -1, 1]],
}
"""What three clients say about two rows: s, t and u of the reference values."""

LABELS = [2, 0]


class Reference(NamedTuple):
    """Three clients that have sent the logits of the reference values."""

    strategy: Strategy[Any, Any]
    server: ServerTools
    state: Any
    next: Round

    def taught(self, client: int) -> Predictions:
        """What a client receives in the next round."""
        key = self.strategy.receives(self.state, client, self.next)
        return self.strategy.payload(self.state, key)

    def losses(self, client: int, taught: Predictions | None = None) -> dict[str, float]:
        """What a client minimises, by terms, whose rows, private and public, are the two rows."""
        return losses_of(self.strategy, client, taught or self.taught(client))


def losses_of(strategy: Strategy[Any, Any], client: int, taught: Predictions) -> dict[str, float]:
    """What a client minimises in round 2 that is taught this, by terms."""
    own, labels = torch.tensor(LOGITS[client], dtype=torch.float64), torch.tensor(LABELS)
    batch = Batch(labels=labels, targets=taught.targets, public_labels=labels)
    settings = strategy.settings
    composed = lesson_of(settings.terms, taught, settings, strategy.federation.round(2))
    view = composed.view("model", {"model": Outputs(private=own, public=own)}, batch)
    objective = composed.learners["model"].objective
    inputs, model = torch.zeros(2, 1, 8, 8), torch.nn.Identity()
    bound = objective.bind(model, None, inputs, num_classes=4, rows=2, seed=0)
    return {name: float(loss) for name, loss in bound.losses(view).items()}


@pytest.fixture
def minimised() -> Callable[..., dict[str, float]]:
    """Tell what a client of the reference values minimises: (strategy, client, taught)."""
    return losses_of


@pytest.fixture
def reference_parts(parts: Any, tiny_settings: Any, tiny_data: Any) -> Callable[..., Any]:
    """Make (strategy, server) of three clients and two labelled public rows of four classes."""

    def build(name: str, **options: Any) -> Any:
        data = tiny_data(rows=(8, 8, 8), public=2, num_classes=4, labelled=True)
        data = replace(data, public_labels=np.array(LABELS))
        clients = {"count": 3}
        settings = tiny_settings(
            name,
            options=options,
            clients=clients,
            rounds=2,
            data={"public": {"size": 2, "labelled": True}},
        )
        return parts(settings, data)

    return build


@pytest.fixture
def reference(reference_parts: Any) -> Callable[..., Reference]:
    """Let three clients send the logits of the reference values in round 1."""

    def build(name: str, logits: Mapping[int, Any] = LOGITS, **options: Any) -> Reference:
        strategy, server = reference_parts(name, **options)
        round = strategy.federation.round(1)
        uploads = [
            Upload(client, Predictions(rows=round.public_rows, values=np.array(own, np.float32)), 8)
            for client, own in logits.items()
        ]
        state = strategy.aggregate(strategy.begin(server), uploads, round, server)
        return Reference(strategy, server, state, round.next())

    return build
