"""RHFL: clients whose labels may be wrong teach the others the less, the worse they learn.

Source: Fang and Ye, 2022, Robust Federated Learning with Noisy and Heterogeneous Clients (CVPR), in
the form of the authors' code. https://github.com/FangXiuwen/Robust_FL
A client's confidence is the share by which its own loss fell since it last took part. Beside soft
labels of public rows ITS LOSS ON ITS PRIVATE ROWS leaves each client, as one number that the server
has to believe.
Differs from the authors' code: predictions are exchanged once a round and not once a batch of
public rows, so one mean of the others' soft labels travels, whose divergence has the gradient of
theirs; a loss that rose counts as one that stayed, where theirs divides by a sum that may be 0 or
negative; losses are of models in evaluation mode; clients begin untrained.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from fedkd.bounds import CountOrZero
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Bundle, Numbers, Predictions
from fedkd.exchange.values import Value
from fedkd.losses.noisy_labels import symmetric_rows
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import soft_target_rows
from fedkd.schedules import Between, ConstantSchedule, NonNegativeSchedule, Schedule
from fedkd.targets import leave_one_out, mean_logit, soften
from fedkd.training import Batch, Cohort, Losses, Outputs, Table, as_tensor, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.robust import CheckedSettings, checked

SCORES, LOSS = "scores", "loss"
"""What a client sends: logits of public rows, and its mean loss on private rows."""
TAUGHT, TRUST = "taught", "trust"
"""What a client receives: the others' mean soft labels, and the sum of their weights."""


class RHFLSettings(CheckedSettings):
    """Settings under ``strategy:`` when ``name: rhfl``.

    Attributes:
        public_epochs: passes over the round's public rows towards the others, before a client
            trains at home; 0: none.
        beta: how much confidence decides, beside equal weights; 0 weights all clients the same.
        ce_weight: weight of cross-entropy on private rows.
        reverse_weight: weight of the reverse cross-entropy there, which forgives wrong labels; 0
            beside a ``ce_weight`` of 1 is plain cross-entropy. Where these two are schedules, the
            losses that clients send are measured with their last values.
    """

    name: Literal["rhfl"] = "rhfl"
    public_epochs: CountOrZero = 1
    beta: Annotated[Schedule, AfterValidator(Between(0.0, 20.0))] = ConstantSchedule(value=0.5)
    ce_weight: NonNegativeSchedule = ConstantSchedule(value=0.1)
    reverse_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)


@dataclass(frozen=True)
class Trust(Value):
    """What the server remembers.

    Attributes:
        losses: of each client on its private rows, when it last took part.
        shared: what all taught, for whoever was none of them; None before anybody did.
        others: for each client of the last round what the others taught; None where it was alone.
    """

    losses: Mapping[int, float] = field(default_factory=dict)
    shared: Bundle | None = None
    others: Mapping[int, Bundle | None] = field(default_factory=dict)


def confidence_weights(
    before: Sequence[int | float | None], now: Sequence[int | float], *, beta: int | float
) -> list[float]:
    """Weigh clients by how their losses fell.

    With ``q_k = max(before_k - now_k, 0) / now_k`` the weights are the softmax over the K clients
    of ``1 / (K - 1) + beta * q_k / sum q``.

    Args:
        before: each client's loss on its private rows when it last took part; None: it never did,
            so nothing is known of how it learns.
        now: the same, now; >= 0.
        beta: >= 0.

    Returns:
        Weights > 0: ``1 / (K - 1)`` where no client was there before, else they sum to 1. One
        client alone has the weight 1.
    """
    clients = len(now)
    if all(loss is None for loss in before):
        return [1 / max(clients - 1, 1)] * clients
    fell = [
        0.0 if old is None else max(old - new, 0.0) / max(new, math.ulp(1.0))
        for old, new in zip(before, now, strict=True)
    ]
    total = sum(fell) or 1.0
    # The term 1 / (K - 1) is the same for all, which a softmax does not see.
    powers = [math.exp(beta * share / total) for share in fell]
    return [power / sum(powers) for power in powers]


def private_losses(
    outputs: Outputs, batch: Batch, *, rows_of: Callable[[Tensor, Tensor], Tensor]
) -> Losses:
    """Symmetric cross-entropy on private rows; ``rows_of`` has its weights."""
    assert outputs.private is not None and batch.labels is not None  # noqa: S101, PT018
    return {"sce": PerRow(rows_of(outputs.private, batch.labels), of="private")}


def towards_others(outputs: Outputs, batch: Batch) -> Losses:
    """``sum_j w_j KL(p_j || own)`` over the others, up to what does not depend on the own model.

    That is the sum of their weights times the divergence from their weighted mean.
    """
    assert outputs.public is not None and batch.targets is not None  # noqa: S101, PT018
    rows = soft_target_rows(outputs.public, batch.targets.probabilities(1.0), temperature=1.0)
    return {"kd": PerRow(batch.tables[TRUST] * rows, of="public")}


class RHFL(Strategy[RHFLSettings, Trust]):
    """Learn from the others as far as they are to be trusted, then at home; then show both."""

    card = Card(
        learns="clients from each other, weighted by how their own losses fell",
        up="n x C logits, 1 loss",
        down="n x C probabilities, different for each client, 1 weight",
        equation=(
            "sum_j w_j KL(p_j || p_k) on public rows, w = softmax(1/(K-1) + beta q / sum q), "
            "q = (L_before - L) / L; then 0.1 CE + RCE on private rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = RHFLSettings
    takes_views = True
    State: ClassVar[type[Value]] = Trust
    up = (Bundle,)
    down = (Bundle,)
    needs_public = True
    has_ensemble = True
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from the other clients"}

    @property
    def private_use(self) -> PrivateUse:
        """Losses are those of private rows."""
        return super().private_use._replace(
            sent="the loss on private rows",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether nothing is learnt on public rows."""
        return not (self.learns(CLIENTS) and self.settings.public_epochs)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        if not self.learns_alone:
            yield from self.clients_public_steps(self.federation.rows_per_round)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Approach the others, train at home, send scores and how well the private rows fit."""
        settings = self.settings
        if received and not self.learns_alone:
            pieces = received.all(Bundle)
            taught = Received([expect(piece[TAUGHT], Predictions) for piece in pieces])
            trust = [expect(piece[TRUST], Numbers).values for piece in pieces]
            cohort.fit(
                towards_others,
                public=call.lesson(taught, epochs=settings.public_epochs),
                tables={TRUST: Table(trust)},
            )
        symmetric, measured = (
            partial(
                symmetric_rows,
                ce_weight=settings.ce_weight.at(progress),
                reverse_weight=settings.reverse_weight.at(progress),
            )
            # Losses of two rounds are compared: what they are measured with must not move.
            for progress in (call.progress, 1.0)
        )
        at_home = partial(private_losses, rows_of=symmetric) if self.learns(CLIENTS) else supervised
        cohort.fit(at_home, private=call.local)
        answers = []
        scores = cohort.predict_public(call.public_rows)
        for own, seen in zip(scores, cohort.outputs(on="private"), strict=True):
            assert seen.labels is not None  # noqa: S101
            rows = measured(as_tensor(seen.logits), as_tensor(seen.labels))
            answers.append(
                Bundle(
                    parts={
                        SCORES: Predictions(rows=call.public_rows, values=own),
                        LOSS: Numbers.of(float(rows.double().mean())),
                    }
                )
            )
        return answers

    # -- server half ---------------------------------------------------------------------

    def receives(self, state: Trust, client: int, round: Round) -> str | int | None:
        """What the others taught, or what all did where the client is none of them."""
        if self.learns_alone:
            return None
        if client in state.others:
            return None if state.others[client] is None else client
        return None if state.shared is None else "shared"

    def payload(self, state: Trust, key: str | int) -> Bundle:
        """The mean of all, or of the others of one client, and the sum of their weights."""
        taught = state.shared if isinstance(key, str) else state.others[key]
        assert taught is not None  # noqa: S101
        return taught

    def asks(self, state: Trust, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows, and a loss."""
        return Bundle.asked(
            **{SCORES: round.asked_logits, LOSS: Numbers.asked(1, subject="a loss")}
        )

    def aggregate(
        self, state: Trust, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Trust:
        """Weigh the clients, and average for each of them what the others say."""
        losses, tables = {}, []
        for upload, sent in payloads_of(checked(self.settings, uploads, _soft), Bundle):
            losses[upload.client] = expect(sent[LOSS], Numbers)[0]
            tables.append(as_tensor(_soft(upload)))
        if not losses:
            return state
        weights = confidence_weights(
            [state.losses.get(client) for client in losses],
            list(losses.values()),
            beta=self.settings.beta.at(round.progress),
        )
        known = dict(sorted({**state.losses, **losses}.items()))
        soft = torch.stack(tables)

        def lesson(values: Tensor, trust: float) -> Bundle:
            taught = Predictions(
                rows=round.public_rows,
                values=values.float().numpy(),
                scale="probabilities",
                averaged=True,
            )
            return Bundle(parts={TAUGHT: taught, TRUST: Numbers.of(trust)})

        # Whoever did not take part is nobody of whom a weight would have to be left out.
        shared = lesson(mean_logit(soft, weights=weights), 1.0)
        if len(losses) == 1:
            return Trust(known, shared, dict.fromkeys(losses))
        targets = leave_one_out(soft, weights=weights)
        others = {
            client: lesson(target, float(np.sum(weights) - own))
            for client, target, own in zip(losses, targets, weights, strict=True)
        }
        return Trust(known, shared, others)


def _soft(upload: Upload) -> np.ndarray:
    scores = expect(expect(upload.payload, Bundle)[SCORES], Predictions).values
    return soften(as_tensor(scores), temperature=1.0).numpy()
