"""ONE: branches of one network learn from their ensemble, which a gate combines.

Conventions: peers are the first axis; targets are constants; the terms of a loss come back by name,
weighted already, summed over the peers as published, and what is minimised is their sum. A weight
that ramps up is a schedule of progress: pass its value in force.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.losses.response import hard_label_loss
from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import (
    PeerShares,
    PeerTable,
    Terms,
    check_counts,
    constants,
    peer_cross_entropies,
    peer_kl,
)
from fedkd.targets import at_least_float32, soften


class BranchGate(nn.Module):
    """How much each branch counts for each row: pool, linear, BatchNorm, ReLU, softmax.

    Source:
        Lan, Zhu, Gong, 2018, Knowledge Distillation by On-the-Fly Native Ensemble (ONE),
        section 3.1. https://arxiv.org/abs/1806.04606
    """

    def __init__(self, width: int, branches: int) -> None:
        """Make a gate.

        Args:
            width: channels of the shared features that it looks at, >= 1.
            branches: number of branches that it chooses among, >= 1.

        Raises:
            ValueError: if a number is below 1.
        """
        super().__init__()
        check_counts(width=width, branches=branches)
        self.linear = nn.Linear(width, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(
        self, features: Float[Tensor, "batch width *space"]
    ) -> Float[Tensor, "batch branches"]:
        """Return shares >= 0 that sum to 1 over the branches.

        Args:
            features: the last features that all branches share; maps are averaged over space.

        Raises:
            ValueError: for one row in training mode, of which BatchNorm knows no variance.
        """
        if self.training and len(features) < 2:
            raise ValueError(
                f"a gate in training needs at least 2 rows for its BatchNorm, got {len(features)}; "
                "drop the last batch or call eval()"
            )
        pooled = features.flatten(2).mean(dim=2) if features.dim() > 2 else features
        scores = F.relu(self.norm(self.linear(pooled)))
        return torch.softmax(at_least_float32(scores), dim=1)


def gated_logits(
    logits: Float[Tensor, "branches batch classes"], gates: Float[Tensor, "batch branches"]
) -> Float[Tensor, "batch classes"]:
    """Combine the branches' logits row by row, ``sum_k gate_k * logits_k``.

    Args:
        logits: unnormalised scores of all branches; gradients flow through these.
        gates: a share of each branch for each row, such as a `BranchGate` returns; gradients flow
            through these too, which is how the gate learns.

    Source:
        Lan, Zhu, Gong, 2018, equation 5. https://arxiv.org/abs/1806.04606
    """
    return (at_least_float32(gates).t()[:, :, None] * at_least_float32(logits)).sum(dim=0)


class StreamingGate:
    """`gated_logits` of peers that arrive one after the other; holds one table."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._shares: Tensor | None = None

    def add(self, logits: PeerTable, gate: PeerShares) -> None:
        """Take in one peer.

        Args:
            logits: its unnormalised scores, an array or a tensor.
            gate: its share of each row, > 0; of all peers' shares of a row only the ratios count.
        """
        shares = constants(gate).double()
        part = shares[:, None] * constants(logits).double()
        self._sum = part if self._sum is None else self._sum + part
        self._shares = shares if self._shares is None else self._shares + shares

    def target(self) -> Float[Tensor, "rows classes"]:
        """Return the ensemble's logits, float64.

        Raises:
            ValueError: if there is no peer.
        """
        if self._sum is None or self._shares is None:
            raise ValueError("an ensemble needs at least 1 peer, got 0")
        return self._sum / self._shares[:, None]


def one_losses(
    logits: Float[Tensor, "branches batch classes"],
    gates: Float[Tensor, "batch branches"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 3.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Native ensemble: labels teach branches and ensemble, the ensemble teaches the branches.

    The ensemble is a constant in the KL; labels alone teach it and the gate.

    Args:
        logits: unnormalised scores of all branches.
        gates: shares of the branches for each row, rows summing to 1.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of both cross-entropies, >= 0.
        kd_weight: weight of the KL, >= 0. The paper ramps it up over the first 80 of 300 epochs:
            a schedule ``{kind: ramp_up, end: 1.0, until: 0.27}``.
        temperature: softening divisor, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        ``ce`` and ``kd``, summed over the branches, and ``ce_ensemble``.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Lan, Zhu, Gong, 2018, equations 2-8. https://arxiv.org/abs/1806.04606
        The released code adds 1e-7 to the probabilities; here the KL is exact.
    """
    check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    ensemble = gated_logits(logits, gates)
    divergences = peer_kl(
        logits,
        soften(ensemble.detach(), temperature=temperature),
        temperature,
        scale_by_t2,
        sample_weights,
    )
    terms = {"kd": kd_weight * divergences.sum()}
    if labels is None:
        return terms
    return {
        "ce": ce_weight * peer_cross_entropies(logits, labels, sample_weights).sum(),
        "ce_ensemble": ce_weight * hard_label_loss(ensemble, labels, sample_weights=sample_weights),
        **terms,
    }
