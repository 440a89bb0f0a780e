"""A federation of students with closed forms, which go through an algorithm's own server half.

`fedkd.closed_forms` says what averaging soft labels converges to; here an algorithm's `receives`,
`payload`, `orders`, `asks` and `aggregate` decide what its students learn from, round after round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from fedkd.closed_forms import Student
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.exchange.views import Upload
from sim.contract.toy import toy_parts
from sim.settings import Settings
from strategies.contract import Round, ServerTools, Strategy

Array = np.ndarray

SMALLEST = 1e-30
"""Probabilities are at least this large before their logarithm is taken."""


@dataclass(frozen=True, slots=True)
class Member:
    """One client.

    Attributes:
        taught: what it says of the public rows, by their targets.
        alone: float64 ``[public, classes]``, what it says before it is taught anything.
    """

    taught: Student
    alone: Float[Array, "public classes"]


def converged(
    settings: Settings,
    data: Any,
    members: Sequence[Member],
    *,
    rounds: int,
    says: Literal["scores", "logs"] = "scores",
) -> dict[int, Float[Array, "public classes"]]:
    """Let an algorithm's server half and closed-form clients exchange for so many rounds.

    Args:
        settings: of the run: the algorithm, and the view of its server.
        data: of which the algorithm knows the numbers of rows.
        members: clients, by partition id.
        rounds: >= 1.
        says: what goes up where an algorithm asks for logits: what students say, or, for
            algorithms that take a softmax of it, its logarithm.

    Returns:
        What each client is taught at the end, of every public row.

    Raises:
        ValueError: an answer is not what the algorithm asked for.
    """
    strategy, server = toy_parts(settings, data)
    state = strategy.begin(server)
    held: dict[int, Float[Array, "public classes"]] = {}
    for number in range(1, rounds + 1):
        round = strategy.federation.round(number)
        _hear(strategy, state, round, held)
        uploads = []
        for client in strategy.participants(state, round):
            said = _said(members[client], held.get(client))
            uploads.append(_answer(strategy, state, client, round, server, said, says))
        view = settings.stages.view
        seen = view.shown(uploads, strategy.sums, strategy.federation.architectures.__getitem__)
        state = strategy.aggregate(state, seen, round, server)
    _hear(strategy, state, strategy.federation.round(rounds + 1), held)
    return held


def _said(
    member: Member, targets: Float[Array, "public classes"] | None
) -> Float[Array, "public classes"]:
    return member.alone if targets is None else member.taught.says(targets)


def _hear(
    strategy: Strategy[Any, Any],
    state: Any,
    round: Round,
    held: dict[int, Float[Array, "public classes"]],
) -> None:
    """Let each client put what it receives in the place of what it had of these rows."""
    federation = strategy.federation
    for client in strategy.participants(state, round):
        key = strategy.receives(state, client, round)
        if key is None:
            continue
        taught = _predictions(strategy.payload(state, key))
        if client not in held:
            held[client] = np.zeros((federation.public_size, federation.num_classes))
        values = np.array(held[client])
        values[taught.rows] = taught.values
        held[client] = values


def _predictions(payload: Payload) -> Predictions:
    """Return the only table of predictions in what was received."""
    parts = payload.parts.values() if isinstance(payload, Bundle) else (payload,)
    (taught,) = (part for part in parts if isinstance(part, Predictions))
    return taught


def _answer(
    strategy: Strategy[Any, Any],
    state: Any,
    client: int,
    round: Round,
    server: ServerTools,
    said: Float[Array, "public classes"],
    says: Literal["scores", "logs"],
) -> Upload:
    """Return what a client sends, which has to be what it was asked for."""
    asked = strategy.asks(state, client, round, server)
    if asked is None:
        raise ValueError(f"{type(strategy).__name__} asks client {client} for nothing")
    orders = strategy.orders(state, client, round)
    rows = asked.about["rows"] if orders is None or orders.rows is None else orders.rows
    scale, ids = asked.about["scale"], asked.about["ids"]
    values = said[rows]
    if scale == "logits" and says == "logs":
        values = np.log(np.maximum(values, SMALLEST))
    sent = Predictions(
        rows=rows,
        values=values.astype(np.float32),
        scale=scale,
        ids=ids,
        planned=len(asked.about["rows"]) if ids == "subset" else 0,
    )
    wrong = sent.problem(asked)
    if wrong is not None:
        raise ValueError(f"{type(strategy).__name__}, client {client}: {wrong}")
    return Upload(client, sent, strategy.federation.num_examples[client])
