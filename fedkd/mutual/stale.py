"""Codistillation: peers learn from each other as they were some steps ago."""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.losses.response import soft_target_kl
from fedkd.mutual.averages import ensemble_target
from fedkd.mutual.peers import check_counts


def codistillation_loss(
    logits: Float[Tensor, "batch classes"],
    stale_peer_logits: Float[Tensor, "others batch classes"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull one model towards the mean prediction of the others as they were some steps ago.

    Computes ``temperature**2 * KL(mean of the others' softened probabilities || student)``; the
    paper's cross-entropy has the same gradient. During the burn-in it has weight 0: give it the
    weight schedule ``{kind: step, values: [0.0, 1.0], milestones: [0.2]}``.

    Args:
        logits: unnormalised scores of the model that learns; gradients flow through these.
        stale_peer_logits: scores of the other models, such as `StalePeers.others` returns;
            treated as constants.
        temperature: softening divisor, > 0; the paper uses 1.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if there is no other model or ``temperature`` is out of range.

    Source:
        Anil et al., 2018, Large scale distributed neural network training through online
        distillation, Algorithm 1. https://arxiv.org/abs/1804.03235
    """
    if len(stale_peer_logits) == 0:
        raise ValueError("codistillation needs at least 1 other model, got 0")
    return soft_target_kl(
        logits,
        ensemble_target(stale_peer_logits, temperature=temperature),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )


class StalePeers(nn.Module):
    """Copies of the peers as they were at the last exchange, some steps ago.

    The copies share no memory with the peers, never train and always predict in evaluation mode.
    They are in this module's ``state_dict``, so a resumed run goes on with the same ones.

    Source:
        Anil et al., 2018, section 2.1. https://arxiv.org/abs/1804.03235
    """

    def __init__(self, peers: Sequence[nn.Module], *, interval: int) -> None:
        """Copy the peers as they are now.

        Args:
            peers: the models that train; their architectures may differ.
            interval: steps between two exchanges, >= 1.

        Raises:
            ValueError: if there are fewer than two peers or ``interval`` is below 1.
        """
        super().__init__()
        if len(peers) < 2:
            raise ValueError(f"codistillation needs at least 2 peers, got {len(peers)}")
        check_counts(interval=interval)
        self.interval = interval
        self.copies = nn.ModuleList(copy.deepcopy(peer) for peer in peers)
        self.copies.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "StalePeers":
        """Stay in evaluation mode, whatever the module that this one belongs to does."""
        return super().train(False)

    @torch.no_grad()
    def refresh(self, peers: Sequence[nn.Module], *, step: int) -> bool:
        """Copy the peers' weights again where ``step`` is a multiple of the interval.

        Args:
            peers: the models that train, in the order they were given first.
            step: number of steps done, >= 0.

        Returns:
            Whether they were copied.

        Raises:
            ValueError: if ``step`` is negative or the number of peers has changed.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if len(peers) != len(self.copies):
            raise ValueError(f"peers must be the {len(self.copies)} of the start, got {len(peers)}")
        if step % self.interval:
            return False
        for stale, peer in zip(self.copies, peers, strict=True):
            stale.load_state_dict(peer.state_dict())
        return True

    @torch.no_grad()
    def others(self, inputs: Tensor, *, leave_out: int) -> Float[Tensor, "others batch classes"]:
        """Return what the copies of all peers but one say about a batch.

        Args:
            inputs: a batch as the peers take it.
            leave_out: index of the peer that learns.

        Raises:
            ValueError: if there is no peer ``leave_out``.
        """
        if not 0 <= leave_out < len(self.copies):
            raise ValueError(f"leave_out must be in [0, {len(self.copies)}), got {leave_out}")
        kept: list[Callable[[Tensor], Tensor]] = [
            stale for index, stale in enumerate(self.copies) if index != leave_out
        ]
        return torch.stack([stale(inputs) for stale in kept])
