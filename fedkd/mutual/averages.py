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
from fedkd.targets import StreamingMean, leave_one_out, mean_logit, soften

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
    return mean_logit(_entering(constants(logits), temperature, average))


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
    return leave_one_out(_entering(constants(logits), temperature, average))


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


class PeerMean:
    """`ensemble_target` and `leave_one_out_targets` of peers that arrive one after the other.

    Holds one table of rows x classes however many peers there are. The same peers in the same
    order give the same bits.
    """

    def __init__(self, *, temperature: float, average: Average = "probability") -> None:
        """Begin without any peer.

        Args:
            temperature: softening divisor of probabilities, > 0; logits are averaged as they are.
            average: what is averaged.
        """
        self._temperature, self._average = temperature, average
        self._mean = StreamingMean()

    @property
    def count(self) -> int:
        """Number of peers so far."""
        return self._mean.count

    def add(self, logits: PeerTable) -> PeerTable:
        """Take in one peer's predictions.

        Args:
            logits: unnormalised scores on the rows of all earlier peers; an array or a tensor.

        Returns:
            What of them entered the mean, for `of_others`.

        Raises:
            ValueError: if a value is not finite, the shape differs from the earlier peers', or
                ``temperature`` is out of range.
        """
        values = _entering(constants(logits), self._temperature, self._average)
        self._mean.add(values)
        return values

    def of_all(self) -> Float[Tensor, "rows classes"]:
        """Return the mean of all peers, float64 on the CPU.

        Raises:
            ValueError: if there is none.
        """
        return self._mean.mean()

    def of_others(self, own: PeerTable) -> Float[Tensor, "rows classes"]:
        """Return the mean of all peers but one, float64 on the CPU.

        Args:
            own: exactly what `add` returned for this peer.

        Raises:
            ValueError: if there is no other peer.
        """
        return self._mean.without(own)


def _entering(
    logits: Float[Tensor, "*peers rows classes"], temperature: float, average: Average
) -> Float[Tensor, "*peers rows classes"]:
    """Return what is averaged."""
    return soften(logits, temperature=temperature) if average == "probability" else logits
