"""Averages of peers: one target for all of them, or for each the mean of the others.

Each rule has two forms that agree: of predictions that lie side by side, as models on one machine
make them in a step, and of predictions that arrive one after the other, as a server receives them.
What comes out are constants: softened probabilities, or logits for the learner to soften.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.response import soft_target_kl
from fedkd.mutual.peers import PeerTable, PeerTables, constants
from fedkd.targets import leave_one_out, mean_logit, soften

Average = Literal["probability", "logit"]
"""What is averaged: softened probabilities, or logits, where one very sure peer weighs more."""


def ensemble_target(
    logits: PeerTables, *, temperature: float, average: Average = "probability"
) -> Float[Tensor, "rows classes"]:
    """Return the mean of all peers' predictions, oneself included.

    Args:
        logits: unnormalised scores of all peers on the same rows; an array or a tensor.
        temperature: softening divisor of probabilities, > 0; logits are averaged as they are.
        average: what is averaged.

    Returns:
        Probabilities softened by ``temperature``, or logits.

    Raises:
        ValueError: if there is no peer, or ``temperature`` is out of range.
    """
    return mean_logit(entering(logits, temperature=temperature, average=average))


def leave_one_out_targets(
    logits: PeerTables, *, temperature: float, average: Average = "probability"
) -> Float[Tensor, "peers rows classes"]:
    """Return for each peer the mean of the OTHER peers' predictions, so none learns from itself.

    With ``average="probability"`` one KL to this target has the gradient of the mean of the KLs
    to each other peer (`fedkd.mutual.pairwise.mutual_losses`); the values differ by a constant.

    Args:
        logits: unnormalised scores of all peers on the same rows; an array or a tensor.
        temperature: softening divisor of probabilities, > 0; logits are averaged as they are.
        average: what is averaged.

    Returns:
        At index k what peer k learns: probabilities softened by ``temperature``, or logits.

    Raises:
        ValueError: if there are fewer than two peers, or ``temperature`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning, the second way with more than two networks.
        https://arxiv.org/abs/1706.00384
    """
    return leave_one_out(entering(logits, temperature=temperature, average=average))


def leave_one_out_losses(
    logits: Float[Tensor, "peers rows classes"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, " peers"]:
    """For each peer, ``temperature**2 * KL(mean of the others || self)``.

    Args:
        logits: unnormalised scores of all peers on the same rows; each peer's gradient comes from
            its own loss only.
        temperature: softening divisor, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        One loss per peer in nats per row, >= 0.

    Raises:
        ValueError: if there are fewer than two peers or ``temperature`` is out of range.
    """
    targets = leave_one_out_targets(logits, temperature=temperature)
    return torch.stack(
        [
            soft_target_kl(
                own,
                target,
                temperature=temperature,
                scale_by_t2=scale_by_t2,
                sample_weights=sample_weights,
            )
            for own, target in zip(logits, targets, strict=True)
        ]
    )


def entering(
    logits: PeerTable | PeerTables, *, temperature: float, average: Average = "probability"
) -> Float[Tensor, "*peers rows classes"]:
    """Return what of peers' predictions is averaged, as a constant.

    Args:
        logits: unnormalised scores, an array or a tensor.
        temperature: softening divisor of probabilities, > 0; logits are averaged as they are.
        average: what is averaged.

    Raises:
        ValueError: if ``temperature`` is out of range.
    """
    known = constants(logits)
    return soften(known, temperature=temperature) if average == "probability" else known
