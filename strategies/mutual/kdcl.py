"""KDCL: the clients' predictions of public rows become one teacher, from which all of them learn.

Source: Guo et al., 2020, Online Knowledge Distillation via Collaborative Learning, section 3.
https://openaccess.thecvf.com/content_CVPR_2020/html/Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html
Differs from the paper: its students see the same labelled rows, each in its own augmentation, and
meet in every step. Here the cross-entropy is on private rows, the divergence from the common
teacher on public ones, in the same step, and predictions are exchanged once a round. The paper's
four rules look at the labels of the public rows, which the server then has to have; ``general``
weighs the clients by their errors on the round's public rows, where the paper has a validation
set, with a ridge and without negative weights, which are ours. ``mean``, the default, is no rule of
the paper: it needs no labels. The authors have published no code.
"""

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fedkd.bounds import PositiveWeight
from fedkd.exchange.payloads import Predictions
from fedkd.mutual.kdcl import (
    GatheredPeers,
    StreamingMinLogit,
    StreamingNaive,
    kdcl_general,
    kdcl_general_weights,
    kdcl_linear,
)
from fedkd.schedules import ConstantSchedule, PositiveSchedule
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
from strategies.shared.robust import Consensus, TrustingSettings
from strategies.shared.taught import TaughtSettings


class KDCLSettings(TaughtSettings, TrustingSettings):
    """Settings under ``strategy:`` when ``name: kdcl``.

    Attributes:
        rule: what the common teacher says of a row. ``mean``: the clients' mean logits; the others
            need labels of the public rows. ``naive``: what the client with the lowest cross-entropy
            says; ``minlogit``: for each class the smallest margin over the label's logit that any
            client has; ``linear``: the mixture of the clients' logits with the lowest
            cross-entropy; ``general``: their mean with weights from how their errors go together.
        mixture: of ``linear``: one for each ``row``, or one for the round's rows as a ``batch``.
        ridge: of ``general``: steadies the weights; the larger, the more alike they are.
    """

    name: Literal["kdcl"] = "kdcl"
    temperature: PositiveSchedule = ConstantSchedule(value=2.0)
    rule: Literal["mean", "naive", "minlogit", "linear", "general"] = "mean"
    mixture: Literal["row", "batch"] = "row"
    ridge: PositiveWeight = 0.1

    @model_validator(mode="after")
    def _labels_defend_themselves(self) -> "KDCLSettings":
        if self.rule != "mean":
            self.check_no_defence(
                f"strategy.rule: {self.rule}",
                "it weighs clients by the labels of public rows; use rule: mean",
            )
        return self


LabelRule = StreamingNaive | StreamingMinLogit | GatheredPeers


class KDCL(TaughtByPeers[KDCLSettings, Peers]):
    """Learn from own labels and from the teacher that all clients together make."""

    card = Card(
        learns="each client from one teacher made of all clients",
        up="n x C logits",
        down="n x C logits, the same for all",
        equation=(
            "CE on private rows + kd_weight * T^2 KL(target || own) on public rows; target: mean "
            "logits; or by labels y: the logits of argmin_k CE(z_k, y); min_k (z_k - z_k[y]); "
            "sum_k a_k z_k with the lowest CE; sum_k w_k z_k, w = C^-1 1 / (1' C^-1 1)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = KDCLSettings
    takes_views = True

    def __init__(self, settings: KDCLSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if settings.rule != "mean":
            federation.check_public_labels(
                f"strategy.rule: {settings.rule}", "strategy.rule: mean, which does without"
            )

    def aggregate(
        self, state: Peers, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Peers:
        """Make one teacher of all that came; who was alone is not taught by itself."""
        by_labels, senders = self._rule_by_labels(round, server), []
        with Consensus(
            self.settings, scale="logits", trust=state.trust, clients=self.federation.num_clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                if by_labels is None:
                    consensus.add(upload.client, sent.values)
                else:
                    by_labels.add(sent.values)
                senders.append(upload.client)
            if not senders:
                return Peers(trust=state.trust)
            target = consensus.of_all() if by_labels is None else by_labels.target()
            temperature = self.settings.softening(round.next().progress)
            common = lesson(round.public_rows, target, "logits", temperature)
            alone: dict[int, Predictions | None] = (
                dict.fromkeys(senders) if len(senders) == 1 else {}
            )
            return Peers(common, alone, trust=consensus.trust)

    def _rule_by_labels(self, round: Round, server: ServerTools) -> LabelRule | None:
        """Return the rule that looks at labels; None where the settings' looks at none."""
        settings = self.settings
        if settings.rule == "mean":
            return None
        known = server.data.public_labels
        assert known is not None  # noqa: S101 (refused when the algorithm was made)
        labels = torch.from_numpy(known[round.public_rows])
        match settings.rule:
            case "naive":
                return StreamingNaive(labels)
            case "minlogit":
                return StreamingMinLogit(labels)
            case "linear":
                return GatheredPeers(partial(kdcl_linear, labels=labels, per=settings.mixture))
            case "general":
                return GatheredPeers(partial(_general, labels=labels, ridge=settings.ridge))


def _general(logits: Tensor, *, labels: Tensor, ridge: float) -> Tensor:
    return kdcl_general(logits, kdcl_general_weights(logits, labels, ridge=ridge))
