"""OKDDip: each peer chooses from whom it learns, a leader learns from all.

Conventions: peers are the first axis; targets are constants; the terms of a loss come back by name,
weighted already, summed over the peers as published, and what is minimised is their sum. A weight
that ramps up is a schedule of progress: pass its value in force.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.losses.response import hard_label_loss, soft_target_kl
from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import Terms, check_counts, peer_cross_entropies, peer_kl
from fedkd.targets import at_least_float32, soften


class PeerAttention(nn.Module):
    """How much each peer learns from each other one, row by row: a softmax of queries times keys.

    Features enter as constants: only the two linear maps of the attention get a gradient.

    Source:
        Chen et al., 2020, Online Knowledge Distillation with Diverse Peers (OKDDip), equation 3.
        https://arxiv.org/abs/1912.00350. Two linear maps to an eighth of the width, as published.
    """

    def __init__(self, width: int, *, reduction: int = 8) -> None:
        """Make the attention of peers that have features of one width.

        Args:
            width: numbers in a peer's features, >= 1.
            reduction: queries and keys have ``width // reduction`` numbers, at least one; >= 1.

        Raises:
            ValueError: if a number is below 1.
        """
        super().__init__()
        check_counts(width=width, reduction=reduction)
        self.query = nn.Linear(width, max(1, width // reduction), bias=False)
        self.key = nn.Linear(width, max(1, width // reduction), bias=False)

    def forward(
        self, features: Float[Tensor, "peers batch width"], *, include_self: bool = True
    ) -> Float[Tensor, "batch peers peers"]:
        """Return for each row what peer a (row of the matrix) takes from peer b.

        Args:
            features: one vector per peer and row, treated as constants.
            include_self: whether a peer may attend to itself, as published. What it takes from
                itself teaches it nothing, and is the mixture that it can follow best.

        Returns:
            Shares >= 0 that sum to 1 over the last axis.

        Raises:
            ValueError: if a peer alone is not to attend to itself.
        """
        by_row = features.detach().transpose(0, 1)
        scores = self.query(by_row) @ self.key(by_row).transpose(1, 2)
        if not include_self:
            if len(features) < 2:
                raise ValueError("attention to others needs at least 2 peers, got 1")
            itself = torch.eye(len(features), dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(itself, -torch.inf)
        return torch.softmax(at_least_float32(scores), dim=2)


def peer_mixtures(
    peer_logits: Float[Tensor, "peers batch classes"],
    attention: Float[Tensor, "batch peers peers"],
    *,
    temperature: float,
    average: Literal["prob", "logit"] = "prob",
) -> Float[Tensor, "peers batch classes"]:
    """Mix the peers' predictions for each of them: what it learns.

    Args:
        peer_logits: unnormalised scores of the peers; treated as constants.
        attention: what each peer takes from each, such as `PeerAttention` returns; gradients flow
            through it.
        temperature: softening divisor, > 0.
        average: "prob" mixes softened probabilities, as the paper; "logit" mixes logits and
            softens the mixture, as the released code.

    Returns:
        Softened probabilities.

    Raises:
        ValueError: if ``temperature`` or ``average`` is out of range.

    Source:
        Chen et al., 2020, equation 4. https://arxiv.org/abs/1912.00350
    """
    if average not in ("prob", "logit"):
        raise ValueError(f"unknown average {average!r}; known: prob, logit")
    constants = at_least_float32(peer_logits.detach())
    shares = at_least_float32(attention)
    if average == "prob":
        return _mixtures(shares, soften(constants, temperature=temperature))
    return soften(_mixtures(shares, constants), temperature=temperature)


def okddip_losses(
    peer_logits: Float[Tensor, "peers batch classes"],
    leader_logits: Float[Tensor, "batch classes"],
    attention: Float[Tensor, "batch peers peers"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 3.0,
    average: Literal["prob", "logit"] = "prob",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Diverse peers: peer a learns from its own mixture of the peers, the leader from their mean.

    The peers' logits are constants in every target, so no peer is pulled towards its pupils. The
    attention is not: the KL is its only lesson, and through it attention learns which mixture a
    peer can follow. Pass ``attention.detach()`` to leave it as it is.

    Args:
        peer_logits: unnormalised scores of the auxiliary peers.
        leader_logits: unnormalised scores of the model that is kept in the end.
        attention: what each peer takes from each, such as `PeerAttention` returns.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of the labels for peers and leader, >= 0.
        kd_weight: weight of both KL terms, >= 0; the paper ramps it up, as `one_losses`.
        temperature: softening divisor, > 0.
        average: "prob" mixes softened probabilities, as the paper; "logit" mixes logits and
            softens the mixture, as the released code.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        ``ce`` (peers and leader), ``kd_peers`` (summed over the peers) and ``kd_leader``.

    Raises:
        ValueError: if a weight, ``temperature`` or ``average`` is out of range.

    Source:
        Chen et al., 2020, equations 4-7. https://arxiv.org/abs/1912.00350
        The released code detaches nothing.
    """
    check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    peer_targets = peer_mixtures(peer_logits, attention, temperature=temperature, average=average)
    constants = at_least_float32(peer_logits.detach())
    if average == "prob":
        leader_target = soften(constants, temperature=temperature).mean(dim=0)
    else:
        leader_target = soften(constants.mean(dim=0), temperature=temperature)
    divergences = peer_kl(peer_logits, peer_targets, temperature, scale_by_t2, sample_weights)
    kd_leader = soft_target_kl(
        leader_logits,
        leader_target,
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )
    terms = {"kd_peers": kd_weight * divergences.sum(), "kd_leader": kd_weight * kd_leader}
    if labels is None:
        return terms
    ce_peers = peer_cross_entropies(peer_logits, labels, sample_weights).sum()
    ce_leader = hard_label_loss(leader_logits, labels, sample_weights=sample_weights)
    return {"ce": ce_weight * (ce_peers + ce_leader), **terms}


def _mixtures(
    attention: Float[Tensor, "batch peers peers"], values: Float[Tensor, "peers batch classes"]
) -> Float[Tensor, "peers batch classes"]:
    # Sums of products, not a matrix product: autocast would run that in half precision.
    weights = attention.permute(1, 2, 0)[:, :, :, None]
    return (weights * values[None]).sum(dim=1)
