"""KT-pFL: each client learns its own mix of all clients' soft labels; the server learns the mixes.

Source: Zhang, Guo, Ma, Wang, Xu, Wu, 2021, Parameterized Knowledge Transfer for Personalized
Federated Learning, Algorithm 1. https://arxiv.org/abs/2111.02862
The server keeps a matrix of coefficients, c[i, j] how much client i learns from client j. In every
round it moves each row one step towards a mix that is near the client's own soft labels and, by
``rho``, near the mean of all, and sends client i sum_j c[i, j] p_j. The step is that of the
authors' code, whose objective is the mean squared distance of the mix.

Only the abstract of the paper was at hand, so that ``rho`` and the weight of distillation stand
where the published code has them.

Differs from the authors' code: a row is put back on the simplex by its nearest point; the code's
softmax of five times the row, which draws the coefficients of more than five clients to equal ones,
is ``project: softmax5``. The divergence is a mean over rows times T^2, where the code divides by
the classes as well and leaves T^2 out; an optimizer keeps its memory from phase to phase, where the
code begins each without. Where only some clients take part, their coefficients among each other
move, and what a client learns is weighted by them alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedkd.bounds import Count, PositiveWeight, Temperature, Weight
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import nearest_shares, soften
from fedkd.tensors import as_tensor
from fedkd.training import Cohort, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    upload_logits,
)
from strategies.shared.lessons import Distilling
from strategies.shared.robust import CheckedSettings, checked

GOAL = 0.01
"""What the published code brings the mean size of a row's step to, by factors of five."""


class KTpFLSettings(CheckedSettings):
    """Settings under ``strategy:`` when ``name: ktpfl``.

    Attributes:
        temperature: softens what is mixed and who learns it.
        kd_weight: weight of distillation, lambda in the paper; a number or a schedule.
        scale_by_t2: multiply the divergence by the temperature's square.
        rho: how strongly coefficients are drawn to equal ones.
        step: of the coefficients along their gradient; null: as in the published code, the power
            of five for which the mean size of a row's changes is about 0.01.
        project: how a row is made to sum to 1 again: ``simplex`` takes the nearest distribution,
            ``softmax5`` the softmax of five times the row, as published.
        distil_epochs: passes over the mix's public rows before a client trains at home.
    """

    name: Literal["ktpfl"] = "ktpfl"
    temperature: Temperature = 10.0
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    scale_by_t2: bool = True
    rho: Weight = 0.7
    step: PositiveWeight | None = None
    project: Literal["simplex", "softmax5"] = "simplex"
    distil_epochs: Count = 1


@dataclass(frozen=True)
class Knowledge(Value):
    """What the server remembers.

    Attributes:
        coefficients: float64 ``[clients, clients]``; row i sums to 1 and says how much client i
            learns from each.
        rows: int64, the public rows that the soft labels are of.
        senders: who sent some, in order; empty before anybody did.
        soft: float32 ``[senders, rows, classes]``, their soft labels at ``temperature``.
    """

    coefficients: np.ndarray
    rows: np.ndarray
    senders: tuple[int, ...]
    soft: np.ndarray


# -- its arithmetic ----------------------------------------------------------------------------


def shares_of(coefficients: np.ndarray) -> np.ndarray:
    """Return coefficients ``[..., senders]`` as shares of a whole; equal ones where all are 0."""
    total = coefficients.sum(axis=-1, keepdims=True)
    equal = np.full_like(coefficients, 1 / coefficients.shape[-1])
    return np.where(total > 0, coefficients / np.where(total > 0, total, 1.0), equal)


def mixed(shares: np.ndarray, soft: np.ndarray) -> np.ndarray:
    """Return the mix ``[rows, classes]`` of soft labels ``[senders, rows, classes]``, float32."""
    total = np.zeros(soft.shape[1:])
    for share, own in zip(shares, soft, strict=True):
        total += share * own
    return total.astype(np.float32)


def gradients(
    coefficients: np.ndarray, soft: np.ndarray, *, rho: float, clients: int
) -> np.ndarray:
    """Return the gradient of each sender's row of coefficients ``[senders, senders]``.

    Of ``mean (sum_j c_ij p_j - p_i)^2 + rho mean_j (c_ij - 1/clients)^2``, the soft labels
    ``[senders, rows, classes]`` constants and the first mean over rows and classes.
    """
    flat = as_tensor(soft).flatten(1)
    # The inner products are all that is needed of the labels; in parts, for the sake of memory.
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(2**16, dim=1):
        products += part.double() @ part.double().T
    inner = products.numpy() / flat.shape[1]
    towards_own = 2 * (shares_of(coefficients) @ inner - inner)
    towards_equal = 2 * rho / clients * (coefficients - 1 / clients)
    found: np.ndarray = towards_own + towards_equal
    return found


def published_steps(gradient: np.ndarray) -> np.ndarray:
    """Return the step ``[rows, 1]`` of each row's gradient that the published code takes."""
    steps = np.ones((len(gradient), 1))
    sizes = np.abs(gradient).mean(axis=1, keepdims=True)
    for _ in range(5):
        steps = np.where(sizes * steps > GOAL, steps / 5, steps)
        steps = np.where(sizes * steps < GOAL, steps * 5, steps)
    return steps


def projected(coefficients: np.ndarray, how: Literal["simplex", "softmax5"]) -> np.ndarray:
    """Make each row sum to 1 again."""
    if how == "simplex":
        return nearest_shares(coefficients)
    return soften(torch.from_numpy(coefficients), temperature=1 / 5).numpy()


FAULTS = {
    "kl_mean": Fault(
        does="divides the divergence by the number of classes as well as by the rows",
        read_in="cugzj/KT-pFL, src/engine_kt_pfl.py: reduction='mean'",
        right="the mean over rows of the sum over classes",
    ),
    "no_t2": Fault(
        does="leaves out the temperature's square, at a temperature of 10",
        read_in="cugzj/KT-pFL, src/engine_kt_pfl.py",
        right="T^2 times the divergence, so that gradients keep their size",
        stands_for="strategy.scale_by_t2=false",
    ),
    "softmax_drift": Fault(
        does="passes coefficients through softmax(5 c) every round, which draws them to equal ones",
        read_in="cugzj/KT-pFL, src/engine_kt_pfl.py",
        right="the nearest point of the simplex, which leaves shares as they are",
        stands_for="strategy.project=softmax5",
    ),
    "fresh_optimizer": Fault(
        does="makes a new optimizer for every phase, so that what it remembers is lost",
        read_in="cugzj/KT-pFL, src/engine_kt_pfl.py",
        right="one optimizer for the whole run",
    ),
}


class KTpFL(Strategy[KTpFLSettings, Knowledge]):
    """Predict; the server moves the coefficients and mixes; distil the mix, train at home."""

    card = Card(
        learns="each client from a mix of all clients' soft labels that the server learns for it",
        up="n x C logits",
        down="n x C, each client its own",
        equation=(
            "T^2 KL(sum_j c_ij p_j || own) on public rows, then CE on private rows; c_i a step "
            "down mean (sum_j c_ij p_j - p_i)^2 + rho mean (c_ij - 1/K)^2, put back on the simplex"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = KTpFLSettings
    takes_views = True
    State: ClassVar[type[Value]] = Knowledge
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "each from its own mix of all clients"}
    faults: ClassVar[Mapping[str, Fault]] = FAULTS
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return not self.learns(CLIENTS) or self.federation.never(self.settings.kd_weight)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Distil the mix, train on private rows, predict the round's public rows."""
        if received and self.settings.kd_weight.at(call.progress):
            lesson = call.lesson(received, epochs=self.settings.distil_epochs)
            self._forget(cohort)
            cohort.fit(self.objective(call.progress), public=lesson)
        self._forget(cohort)
        cohort.fit(supervised, private=call.local)
        return upload_logits(cohort, call)

    def _forget(self, cohort: Cohort) -> None:
        """Begin a phase with a new optimizer, as the fault ``fresh_optimizer``; else do nothing."""
        if self.commits("fresh_optimizer"):
            cohort.reset_optimizers()

    def objective(self, progress: float) -> Distilling:
        """Return what a client minimises on public rows."""
        weight = self.settings.kd_weight.at(progress)
        temperature = self.settings.temperature
        if not self.settings.scale_by_t2 or self.commits("no_t2"):
            weight /= temperature**2
        if self.commits("kl_mean"):
            weight /= self.federation.num_classes
        return Distilling(weight, temperature)

    # -- server half ---------------------------------------------------------------------

    def begin(self, server: ServerTools) -> Knowledge:
        """Everybody learns equally from all, once somebody has sent something."""
        clients, classes = self.federation.num_clients, self.federation.num_classes
        return Knowledge(
            coefficients=np.full((clients, clients), 1 / clients),
            rows=np.empty(0, np.int64),
            senders=(),
            soft=np.empty((0, 0, classes), np.float32),
        )

    def receives(self, state: Knowledge, client: int, round: Round) -> int | None:
        """A mix of its own; nothing where nobody else has sent anything."""
        others = [sender for sender in state.senders if sender != client]
        return client if others and self.learns(CLIENTS) else None

    def payload(self, state: Knowledge, key: int) -> Predictions:
        """The mix of one client, by its coefficients of those who sent something."""
        shares = shares_of(state.coefficients[key, list(state.senders)])
        return Predictions(
            rows=state.rows,
            values=mixed(shares, state.soft),
            scale="probabilities",
            temperature=self.settings.temperature,
            averaged=True,
        )

    def asks(self, state: Knowledge, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows; the server softens them."""
        return round.asked_logits

    def aggregate(
        self, state: Knowledge, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Knowledge:
        """Keep the soft labels, and move the coefficients of those who sent them one step."""
        soft = {
            upload.client: self._soft(upload)
            for upload in checked(self.settings, uploads, self._soft)
        }
        if not soft:
            return state
        after = Knowledge(
            coefficients=state.coefficients,
            rows=round.public_rows,
            senders=tuple(soft),
            soft=np.stack(list(soft.values())),
        )
        return replace(after, coefficients=self.moved(after))

    def _soft(self, upload: Upload) -> np.ndarray:
        sent = expect(upload.payload, Predictions)
        return soften(as_tensor(sent.values), temperature=self.settings.temperature).numpy()

    def moved(self, state: Knowledge) -> np.ndarray:
        """Return the coefficients after a step of those who sent something among each other."""
        settings, coefficients = self.settings, state.coefficients.copy()
        senders = list(state.senders)
        among = np.ix_(senders, senders)
        gradient = gradients(
            coefficients[among], state.soft, rho=settings.rho, clients=len(coefficients)
        )
        steps = published_steps(gradient) if settings.step is None else settings.step
        # What the senders have of a row together stays with them: absentees' parts do not move.
        whole = coefficients[among].sum(axis=1, keepdims=True)
        project = "softmax5" if self.commits("softmax_drift") else settings.project
        stepped = shares_of(coefficients[among]) - steps * gradient
        coefficients[among] = whole * projected(stepped, project)
        return coefficients

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        yield from self.clients_public_steps(self.federation.rows_per_round)
