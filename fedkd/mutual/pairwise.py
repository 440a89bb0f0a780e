"""Deep mutual learning: peers that train together and each pull towards every other one."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import peer_cross_entropies
from fedkd.targets import at_least_float32, check_temperature


def pairwise_kl(
    logits: Float[Tensor, "peers batch classes"],
    *,
    temperature: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers peers"]:
    """Divergence of every peer from every other: entry [i, j] is KL(p_i || p_j).

    One matrix product instead of peers x (peers - 1) passes. Row i is the target and a constant;
    the gradient of column j reaches only peer j's logits.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        temperature: softening divisor, > 0. No factor ``temperature**2`` is applied here.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Nats per example, averaged over the batch; zero on the diagonal up to rounding.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    check_temperature(temperature)
    log_p = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    target_log_p = log_p.detach()
    target_p = target_log_p.exp()
    divisor: int | Tensor = max(logits.shape[1], 1)
    if sample_weights is not None:
        row_weights = sample_weights.detach().to(log_p.dtype)
        total = row_weights.sum()
        divisor = torch.where(total > 0, total, torch.ones_like(total))
        target_p = target_p * row_weights[:, None]
    negative_entropy = (target_p * target_log_p).sum(dim=(1, 2))
    # Under autocast a matrix product runs in half precision, too coarse for a small difference.
    with torch.autocast(logits.device.type, enabled=False):
        negative_cross_entropy = torch.einsum("ibc,jbc->ij", target_p, log_p)
    return (negative_entropy[:, None] - negative_cross_entropy) / divisor


def mutual_losses(
    logits: Float[Tensor, "peers batch classes"],
    *,
    temperature: float = 1.0,
    peer_reduction: Literal["mean", "sum"] = "mean",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """For each peer, ``temperature**2 * KL(other || self)`` reduced over the OTHER peers.

    The others are constants, so the sum of these losses can be sent back in one backward pass:
    each peer gets the gradient of its own loss only. With the mean, that gradient is the same as
    that of one KL to the others' average probabilities; the values differ by a constant.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        temperature: softening divisor, > 0; the paper uses 1.
        peer_reduction: "mean" is the paper's 1/(peers - 1). "sum" is what the authors' released
            code does; its gradient grows with the number of peers.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        One loss per peer in nats per example, >= 0 up to rounding; 0 for a peer alone.

    Raises:
        ValueError: if ``temperature`` or ``peer_reduction`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning. https://arxiv.org/abs/1706.00384
    """
    if peer_reduction not in ("mean", "sum"):
        raise ValueError(f"unknown peer_reduction {peer_reduction!r}; known: mean, sum")
    num_peers = len(logits)
    divergence = pairwise_kl(logits, temperature=temperature, sample_weights=sample_weights)
    itself = torch.eye(num_peers, dtype=torch.bool, device=logits.device)
    losses = divergence.masked_fill(itself, 0.0).sum(dim=0)
    if peer_reduction == "mean":
        losses = losses / max(num_peers - 1, 1)
    return losses * (temperature**2 if scale_by_t2 else 1.0)


def deep_mutual_losses(
    logits: Float[Tensor, "peers batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    peer_reduction: Literal["mean", "sum"] = "mean",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """Deep mutual learning: each peer fits the labels and imitates the other peers.

    Computes ``ce_weight * CE + kd_weight * mutual`` for every peer, with `mutual_losses` as the
    second term. The cross-entropy never sees the temperature.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        labels: class of each example, in [0, classes).
        ce_weight: weight of the labels, >= 0.
        kd_weight: weight of the peers, >= 0; 0 trains every peer alone.
        temperature: softening divisor of the mutual term, > 0.
        peer_reduction: "mean" or "sum" over the other peers.
        scale_by_t2: False leaves the factor ``temperature**2`` out of the mutual term.
        sample_weights: >= 0, one per row, for both terms.

    Returns:
        One loss per peer, in nats per example.

    Raises:
        ValueError: if a weight, ``temperature`` or ``peer_reduction`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning. https://arxiv.org/abs/1706.00384
    """
    check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    mutual = mutual_losses(
        logits,
        temperature=temperature,
        peer_reduction=peer_reduction,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )
    return ce_weight * peer_cross_entropies(logits, labels, sample_weights) + kd_weight * mutual
