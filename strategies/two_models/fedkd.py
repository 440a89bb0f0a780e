"""FedKD: a mentor stays, a mentee travels as low-rank updates; they learn from each other at home.

Source: Wu, Wu, Lyu, Huang, Xie, 2022, FedKD, equations 1 to 9. https://arxiv.org/abs/2108.13323
Each client has a mentor of its own architecture, which never leaves it, and a mentee of one that
all share. In every step both learn from the same private rows: from the labels, from the other's
predictions, and from what the other's last layer reads, which a projection W of the client's own
brings to one width. What they learn from each other counts the less, the larger the cross-entropies
of both are. Updates of the mentee travel by their largest singular values, both ways.

Differs from the paper: each model's predictions and features are constants for the other. The
denominators are constants too by default; the authors' code lets gradients flow through them,
which rewards a larger cross-entropy (``detach_denominator: false``). A kernel of a convolution is
one matrix, output channels against the rest. Where the threshold is never exceeded the matrix
travels whole. Who has not got the last mentee gets all of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from fedkd.bounds import Weight
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import LowRank, Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import RunningMean, Weighting
from fedkd.inputs import Shape
from fedkd.losses.reduction import Loss
from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.models import ModelSettings
from fedkd.objectives.taps import PENULTIMATE, vector_width, vectors
from fedkd.schedules import Between, LinearSchedule, Schedule
from fedkd.training import Architecture, Batch, Cohort, Losses, Outputs, PerRow, WholeStep
from strategies.contract import (
    Call,
    Card,
    Fault,
    PrivateUse,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.as_published import kl_of_both, without_full_rank
from strategies.shared.features import feature_width, feature_widths

MENTOR = "mentor"
"""The model that stays at home and is judged."""
MENTEE = "mentee"
"""The model that travels; in a client's mind the same name is the number of the one it has."""
PROJECTION = "projection"
"""The part W, from a mentee's features to a mentor's."""


class FedKDSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fedkd``.

    Attributes:
        mentee: the model that all clients share; their mentors are ``clients.models``.
        hidden_weight: of the distance between features; 1 in the paper.
        detach_denominator: whether no gradient flows through the sum of both cross-entropies, by
            which what models learn from each other is divided.
        energy: share of a matrix's energy that its factors exceed; 1 sends updates as they are.
        weighting: ``examples`` weights a client by its private rows; ``equal`` counts each once.
    """

    name: Literal["fedkd"] = "fedkd"
    mentee: ModelSettings = ModelSettings(name="mlp")
    hidden_weight: Weight = 1.0
    detach_denominator: bool = True
    energy: Annotated[Schedule, AfterValidator(Between(0.0, 1.0))] = Field(
        LinearSchedule(start=0.95, end=0.98),
        description="share of a matrix's energy that its factors exceed; a number or a schedule",
    )
    weighting: Weighting = "examples"


@dataclass(frozen=True)
class Mentee(Value):
    """What the server remembers.

    Attributes:
        model: the mentee that all share.
        number: which one it is, from 1 on.
        news: what made it of the one before; None before the first.
        held: the number of the mentee that a client last answered with, by client.
    """

    model: ServerModel
    number: int = 1
    news: LowRank | None = None
    held: Mapping[int, int] = field(default_factory=dict)


def adaptive(of_rows: Tensor, cross_entropies: Tensor, *, detach_denominator: bool) -> WholeStep:
    """Divide the mean of what one model learns from another by both models' cross-entropy.

    Args:
        of_rows: divergence or distance of each row.
        cross_entropies: their sum, each a mean over the rows.
        detach_denominator: whether that is a constant.
    """
    # Where both models know every row by heart the sum rounds to 0.
    least = torch.finfo(cross_entropies.dtype).eps
    divisor = cross_entropies.clamp_min(least)
    return WholeStep(of_rows.mean() / (divisor.detach() if detach_denominator else divisor))


def mutual(
    outputs: Mapping[str, Outputs],
    batch: Batch,
    *,
    learners: Sequence[str] = (MENTOR, MENTEE),
    hidden_weight: float = 1.0,
    detach_denominator: bool = True,
    kl_mean: bool = False,
    no_detach: bool = False,
) -> Losses:
    """Return both models' losses; those named in ``learners`` learn from the other as well.

    ``kl_mean`` and ``no_detach`` are the faults of these names.
    """

    def constant(tensor: Tensor) -> Tensor:
        return tensor if no_detach else tensor.detach()

    logits: dict[str, Tensor] = {}
    losses: dict[str, Loss] = {}
    sums: Tensor = torch.zeros(())
    for name in (MENTOR, MENTEE):
        own = outputs[name].private
        if own is None or batch.labels is None:
            raise ValueError("fedkd learns on private rows with labels, got none")
        logits[name] = own
        rows = hard_label_rows(own, batch.labels)
        losses[_called(name, "ce")] = PerRow(rows, of="private")
        # Who does not learn from the other must not be reached through what divides, either.
        sums = sums + (rows.mean() if name in learners else rows.mean().detach())
    divided = partial(adaptive, cross_entropies=sums, detach_denominator=detach_denominator)
    for name, other in ((MENTOR, MENTEE), (MENTEE, MENTOR)):
        if name in learners:
            if no_detach:
                rows = kl_of_both(logits[name], logits[other])
            else:
                target = logits[other].detach().softmax(-1)
                rows = soft_target_rows(logits[name], target, temperature=1.0)
            losses[_called(name, "kd")] = divided(
                rows / logits[name].shape[-1] if kl_mean else rows
            )
    if not learners or not hidden_weight:
        return losses
    mentor = vectors(outputs[MENTOR].features[PENULTIMATE])
    mentee = vectors(outputs[MENTEE].features[PENULTIMATE])
    # W learns together with the mentee, or alone where that does not learn from its mentor.
    mentee = mentee if MENTEE in learners else mentee.detach()
    projected = batch.parts.call(PROJECTION, mentee)
    for name, distance in (
        (MENTOR, mentor - constant(projected)),
        (MENTEE, projected - constant(mentor)),
    ):
        if name in learners or name == MENTEE:
            losses[_called(name, "hidden")] = hidden_weight * divided(distance.square().mean(-1))
    return losses


def _called(model: str, term: str) -> str:
    return term if model == MENTOR else f"{model}/{term}"


FAULTS = {
    "kl_mean": Fault(
        does="divides both divergences by the number of classes as well as by the rows",
        read_in="TsingZ0/HtFLlib and PFLlib, clients/clientkd.py; Koukyosyumei/AIJack, FedKD",
        right="the mean over rows of the sum over classes",
    ),
    "no_detach": Fault(
        does="lets each model receive the gradient of the other's loss as well",
        read_in="TsingZ0/HtFLlib and PFLlib, clients/clientkd.py",
        right="each model's predictions and features are constants for the other",
    ),
    "denominator_attached": Fault(
        does="sends gradients through the cross-entropies it divides by, rewarding larger ones",
        read_in="wuch15/FedKD, run.py; TsingZ0/HtFLlib, clients/clientkd.py",
        right="the denominators are constants",
        stands_for="strategy.detach_denominator=false",
    ),
    "svd_rank_zero": Fault(
        does="replaces a matrix by zeros where only all its singular values have the energy",
        read_in="wuch15/FedKD, run.py; TsingZ0/HtFLlib, clients/clientkd.py",
        right="such a matrix travels whole",
        # With the energies of the paper small models' updates never need all their values.
        shows_with=("strategy.energy=0.999",),
    ),
    "compresses_parameters": Fault(
        does="factorises the mentee's parameters themselves, not how they changed",
        read_in="TsingZ0/HtFLlib, clients/clientkd.py",
        right="updates are factorised, so that what is cut off is small",
    ),
}


class FedKD(Strategy[FedKDSettings, Mentee]):
    """The mentee's news down, mutual learning at home, its update up, the mean of the updates."""

    card = Card(
        learns="a client's mentor and its mentee from each other; updates of mentees are averaged",
        up="factors of the mentee's update: r (m + n + 1) a matrix of rank r",
        down="the same of the mean update; P of the mentee for who missed one",
        equation=(
            "mentor: CE_t + (KL(mentee || mentor) + MSE(H_t, H_s W)) / (CE_t + CE_s); "
            "mentee: CE_s + (KL(mentor || mentee) + MSE(H_t, H_s W)) / (CE_t + CE_s)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FedKDSettings
    State: ClassVar[type[Value]] = Mentee
    up = (LowRank,)
    down = (LowRank,)
    directions: ClassVar[Mapping[str, str]] = {
        MENTOR: "from the mentee",
        MENTEE: "from the mentor",
    }
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    def architecture(self, client: int) -> Architecture:
        """A mentor and a mentee."""
        return {MENTOR: self.federation.models[client], MENTEE: self.settings.mentee}

    @property
    def private_use(self) -> PrivateUse:
        """The mentee learns from a mentor, on private rows."""
        return super().private_use._replace(
            peer="a mentor, which is not protected, teaches the mentee on private rows",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether neither model learns from the other.

        A mentor beside a mentee that learns from it is trained as in `local` but for rounding.
        """
        return not (self.learns(MENTOR) or self.learns(MENTEE))

    def check(self, input_shape: Shape) -> None:
        """Refuse models without features, as far as features are compared."""
        super().check(input_shape)
        if self.settings.hidden_weight:
            feature_widths(self.federation, input_shape)
            mentee, classes = self.settings.mentee, self.federation.num_classes
            feature_width("strategy.mentee", mentee, input_shape, classes)

    def smallest_steps(self) -> Iterator[Step]:
        """A client's mentee learns in every step, too."""
        yield from super().smallest_steps()
        for client in range(self.federation.num_clients):
            yield from self.private_steps("strategy.mentee", self.settings.mentee, client)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Bring the mentee up to date, learn with it and from it, and send how it has changed.

        Between rounds a client's mentee is the one that all share, to which news are added.
        """
        shared, numbers = [], []
        for own, number, piece in zip(
            cohort.weights(model=MENTEE), cohort.kept(MENTEE), received, strict=True
        ):
            known = 0 if number is None else int(number)
            news = None if piece is None else expect(piece, LowRank)
            if news is not None and news.base in (0, known):
                own, known = news.added_to(self._origin(own)), news.made
            shared.append(own)
            numbers.append(known)
        cohort.load_weights(shared, model=MENTEE)
        cohort.reset_optimizers(model=MENTEE)
        self._learn(cohort, call)
        energy = self.settings.energy.at(call.progress)
        # A client that lost its state has number 0: its answer is refused, and it gets the whole.
        updates = [
            self._travelling(before, after, energy=energy, base=number)
            for before, after, number in zip(
                shared, cohort.weights(model=MENTEE), numbers, strict=True
            )
        ]
        cohort.load_weights(shared, model=MENTEE)
        cohort.keep(MENTEE, [np.array(number) for number in numbers])
        return updates

    def _origin(self, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return what changes are told from: weights, or zeros by ``compresses_parameters``."""
        if not self.commits("compresses_parameters"):
            return weights
        return {name: np.zeros_like(array) for name, array in weights.items()}

    def _travelling(
        self,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
        *,
        energy: float,
        base: int,
        made: int = 0,
    ) -> LowRank:
        """Return how weights changed, as far as it travels."""
        start = self._origin(before)
        if self.commits("svd_rank_zero"):
            after = without_full_rank(start, after, energy)
        return LowRank.between(start, after, energy=energy, base=base, made=made)

    def _learn(self, cohort: Cohort, call: Call) -> None:
        learners = [name for name in self.directions if self.learns(name)]
        hidden = self.settings.hidden_weight if learners else 0.0
        parts = {}
        if hidden:
            mentee, mentor = (
                vector_width(cohort.layer_shape(PENULTIMATE, model=name))
                for name in (MENTEE, MENTOR)
            )
            parts[PROJECTION] = partial(nn.Linear, mentee, mentor, bias=False)
        objective = partial(
            mutual,
            learners=learners,
            hidden_weight=hidden,
            detach_denominator=self.settings.detach_denominator
            and not self.commits("denominator_attached"),
            kl_mean=self.commits("kl_mean"),
            no_detach=self.commits("no_detach"),
        )
        cohort.fit(
            objective,
            private=call.local,
            models=[MENTOR, MENTEE],
            layers=[PENULTIMATE] if hidden else [],
            parts=parts,
        )

    # -- server half ---------------------------------------------------------------------

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The mentee that all share."""
        return {MENTEE: ServerModelSettings(self.settings.mentee)}

    def begin(self, server: ServerTools) -> Mentee:
        """Let all mentees start alike."""
        return Mentee(server.new(MENTEE))

    def receives(self, state: Mentee, client: int, round: Round) -> str | None:
        """News for who has the mentee before, nothing for who has this one, else all of it."""
        held = state.held.get(client, 0)
        if held == state.number:
            return None
        return "news" if state.news is not None and held == state.news.base else MENTEE

    def payload(self, state: Mentee, key: str) -> LowRank:
        """News of the mentee, or all of it."""
        if key == "news" and state.news is not None:
            return state.news
        return LowRank.itself(state.model.weights, made=state.number)

    def asks(self, state: Mentee, client: int, round: Round, server: ServerTools) -> Asked:
        """How the mentee that all share has changed at a client."""
        return LowRank.asked(state.model.weights, base=state.number)

    def aggregate(
        self, state: Mentee, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Mentee:
        """Add the mean update, as far as it travels; without any the mentee stays as it is."""
        weights, held = state.model.weights, dict(state.held)
        mean = RunningMean[Weights]()
        for upload, sent in payloads_of(uploads, LowRank):
            own = sent.added_to(self._origin(weights))
            mean.add(Weights(arrays=own), upload.weight(self.settings.weighting))
            held[upload.client] = state.number
        if not mean.weight:
            return state
        news = self._travelling(
            weights,
            mean.mean().arrays,
            energy=self.settings.energy.at(round.progress),
            base=state.number,
            made=state.number + 1,
        )
        model = server.with_weights(state.model, news.added_to(self._origin(weights)))
        return Mentee(model, state.number + 1, news, dict(sorted(held.items())))

    def forget(self, state: Mentee, clients: Sequence[int]) -> Mentee:
        """Whoever lost its mentee is sent all of it next."""
        held = {client: own for client, own in state.held.items() if client not in clients}
        return replace(state, held=held)

    def judged_models(self, state: Mentee) -> Mapping[str, ServerModel]:
        """The mentee that all share."""
        return {MENTEE: state.model}
