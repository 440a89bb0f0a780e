"""ONE across clients: a gate combines all clients into an ensemble, from which each of them learns.

Source: Lan, Zhu, Gong, 2018, Knowledge Distillation by On-the-Fly Native Ensemble.
https://arxiv.org/abs/1806.04606
The weight of the ensemble ramps up over the first 27 % of the run, as in 80 of the paper's 300
epochs.

Differs from the paper: its peers are branches on one trunk, which the labels of the ensemble
train as well, and its gate looks at the trunk's features. Clients share no trunk: predictions of
public rows travel in the place of branches, once a round, and the cross-entropy of the ensemble
reaches the gate alone. What clients share is the public picture, so the gate looks at that: with
``gate: learned`` it is the paper's (linear, BatchNorm, ReLU, softmax), trained on the server by
the labels of public rows. ``confidence``, the default, weighs each client by how sure it is of a
row and needs no labels; ``equal`` is a plain mean. Who was away has no share. The KL is exact,
where the published code adds 1e-7 to probabilities.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Count, LearningRate
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.inputs import input_shape_of
from fedkd.mutual.native_ensemble import BranchGate, StreamingGate, one_losses
from fedkd.randomness import seeded_torch
from fedkd.schedules import (
    ConstantSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
    RampUpSchedule,
)
from fedkd.targets import confidence, soften
from fedkd.training import Arrays, as_tensor
from fedkd.training.state import to_arrays
from fedkd.training.steps import FixedRate, Steps
from strategies.contract import (
    Card,
    Federation,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.mutual.taught_by_peers import Peers, TaughtByPeers, lesson
from strategies.shared.robust import CheckedSettings, checked, values_of
from strategies.shared.taught import TaughtSettings


class ONESettings(TaughtSettings, CheckedSettings):
    """Settings under ``strategy:`` when ``name: one``.

    Attributes:
        gate: how much a client counts for a row. ``confidence``: its largest probability there;
            ``equal``: the same as all others; ``learned``: a gate that looks at the picture and
            learns from the labels of public rows.
        gate_steps: of a ``learned`` gate, in a round, each on all of the round's rows.
        gate_lr: its learning rate, with SGD.
    """

    name: Literal["one"] = "one"
    temperature: PositiveSchedule = ConstantSchedule(value=3.0)
    kd_weight: NonNegativeSchedule = RampUpSchedule(end=1.0, until=0.27)
    gate: Literal["confidence", "equal", "learned"] = "confidence"
    gate_steps: Count = Field(20)
    gate_lr: LearningRate = 0.1


@dataclass(frozen=True)
class Gated(Peers):
    """What the peers teach, and by which gate.

    Attributes:
        gate: the weights of a gate that learns; empty where there is none.
    """

    gate: Mapping[str, np.ndarray] = field(default_factory=dict)


class ONE(TaughtByPeers[ONESettings, Gated]):
    """Learn from own labels and from the gated ensemble of all clients."""

    card = Card(
        learns="each client from the gated ensemble of all; a learned gate from public labels",
        up="n x C logits",
        down="n x C logits, the same for all",
        equation=(
            "CE on private rows + w(t) T^2 KL(sum_k g_k(x) z_k || own) on public rows; "
            "w(t) = exp(-5 (1 - t / 0.27)^2); a learned g minimises CE(sum_k g_k(x) z_k, y)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = ONESettings
    State: ClassVar[type[Value]] = Gated

    def __init__(self, settings: ONESettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if settings.gate == "learned":
            federation.check_public_labels(
                "strategy.gate: learned", "strategy.gate: confidence, which does without"
            )
        if settings.gate == "learned" and input_shape_of(federation.input_shape).kind == "text":
            raise ValueError(
                "strategy.gate: learned is linear in pixels or features, and numbers of tokens "
                "are none: use strategy.gate: confidence"
            )
        if settings.gate == "learned" and federation.rows_per_round < 2:
            raise ValueError(
                "strategy.gate: learned has BatchNorm, which needs at least 2 public rows in a "
                f"round, got {federation.rows_per_round}: set exchange.rows_per_round or "
                "strategy.gate: confidence"
            )

    def begin(self, server: ServerTools) -> Gated:
        """Make the gate that learns, if there is one."""
        if self.settings.gate != "learned":
            return Gated()
        with seeded_torch(int(self.federation.round(1).random().integers(2**31))):
            return Gated(gate=to_arrays(self._gate().state_dict()))

    def aggregate(
        self, state: Gated, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Gated:
        """Let the gate combine all that came; who was alone is not taught by itself."""
        gate, shares, senders, ensemble = state.gate, None, [], StreamingGate()
        uploads = checked(self.settings, uploads, values_of)
        if self.settings.gate == "learned":
            every = [(u.client, sent.values) for u, sent in payloads_of(uploads, Predictions)]
            if every:
                gate, shares = self._taught_gate(gate, dict(every), round, server)
            sent_values = iter(every)
        else:
            sent_values = ((u.client, sent.values) for u, sent in payloads_of(uploads, Predictions))
        for place, (client, values) in enumerate(sent_values):
            senders.append(client)
            ensemble.add(values, self._share(values) if shares is None else shares[:, place])
        if not senders:
            return Gated(gate=gate)
        temperature = self.settings.softening(round.next().progress)
        common = lesson(round.public_rows, ensemble.target(), "logits", temperature)
        return Gated(common, dict.fromkeys(senders) if len(senders) == 1 else {}, gate)

    def _share(self, values: np.ndarray) -> Tensor:
        if self.settings.gate == "equal":
            return torch.ones(len(values))
        return confidence(soften(as_tensor(values), temperature=1.0))

    # -- a gate that learns ----------------------------------------------------------------

    def _gate(self, weights: Mapping[str, np.ndarray] | None = None) -> BranchGate:
        pixels = int(np.prod(tuple(self.federation.input_shape)))
        gate = BranchGate(pixels, self.federation.num_clients)
        if weights is not None:
            gate.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        return gate

    def _taught_gate(
        self,
        weights: Mapping[str, np.ndarray],
        sent: Mapping[int, np.ndarray],
        round: Round,
        server: ServerTools,
    ) -> tuple[Arrays, Tensor]:
        """Minimise the ensemble's cross-entropy; return the gate, and the senders' shares."""
        known, rows, senders = server.data.public_labels, round.public_rows, list(sent)
        assert known is not None  # noqa: S101 (refused when the algorithm was made)
        pictures = as_tensor(server.data.public_inputs[rows]).flatten(1)
        logits, labels = torch.tensor(np.stack(list(sent.values()))), as_tensor(known[rows])
        gate = self._gate(weights)
        optimizer = torch.optim.SGD(gate.parameters(), lr=self.settings.gate_lr)
        training = Steps([FixedRate(optimizer)], self.settings.gate_steps)
        for _ in training:
            losses = one_losses(logits, among(gate(pictures), senders), labels, kd_weight=0.0)
            training.descend({"ce_ensemble": losses["ce_ensemble"]})
        gate.eval()
        with torch.no_grad():
            return to_arrays(gate.state_dict()), among(gate(pictures), senders)


def among(gates: Tensor, senders: list[int]) -> Tensor:
    """Divide the shares of those that are there, ``[rows, senders]``, so that they sum to 1."""
    there = gates[:, senders]
    return there / there.sum(1, keepdim=True)
