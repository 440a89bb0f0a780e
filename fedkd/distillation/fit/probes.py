"""What is measured while a student trains, without moving a bit of what it becomes."""

import copy

import torch
from torch import Tensor, nn

from fedkd.metrics.gradients import compare_gradients
from fedkd.objectives import BoundObjective, View
from fedkd.objectives.basic import HardLabels
from fedkd.randomness import seeded_torch
from fedkd.targets import Targets, entropy, soften

GRADIENT_ROWS = 256
"""Rows with and without labels, at most, on which gradients are compared: always the same."""

BUFFERED_STEPS = 64
"""Targets of so many steps are softened at once, which costs less than one by one."""


class TargetEntropy:
    """Averages how undecided the targets of an epoch were, at the temperature in force.

    Args:
        same_every_epoch: whether every epoch has the targets of the first one: then only those
            are looked at, because all of them would cost as much as a small loss.
    """

    def __init__(self, *, same_every_epoch: bool = False) -> None:
        self._same_every_epoch = same_every_epoch
        self._known: float | None = None
        self._buffer: list[Tensor] = []
        self._temperature = 1.0
        self._sum = 0.0
        self._rows = 0

    def add(self, targets: Targets, *, temperature: float) -> None:
        """Take in the targets of a step.

        Args:
            targets: of the step.
            temperature: at which they are looked at, > 0.
        """
        if self._known is not None:
            return
        if temperature != self._temperature or len(self._buffer) == BUFFERED_STEPS:
            self._flush()
            self._temperature = temperature
        self._buffer.append(targets.logits())

    def take(self) -> float | None:
        """Return the mean over rows in nats and start anew; None where there was no target."""
        if self._known is not None:
            return self._known
        self._flush()
        mean = self._sum / self._rows if self._rows else None
        self._sum, self._rows = 0.0, 0
        if self._same_every_epoch:
            self._known = mean
        return mean

    def _flush(self) -> None:
        if self._buffer:
            logits = torch.cat(self._buffer).double()
            self._sum += float(entropy(soften(logits, temperature=self._temperature)).sum())
            self._rows += len(logits)
            self._buffer = []


def fixed_rows(first: int, last: int, device: torch.device) -> Tensor:
    """Return ids in [first, last), evenly spaced, at most `GRADIENT_ROWS`."""
    return spread_ids(first, last, GRADIENT_ROWS).to(device)


def spread_ids(first: int, last: int, most: int) -> Tensor:
    """Return ids in [first, last), all of them or ``most`` that are evenly spaced."""
    count = last - first
    if count <= most:
        return torch.arange(first, last)
    return first + torch.arange(most) * count // most


def gradients_beside_labels(
    bound: BoundObjective, view: View, student: nn.Module
) -> dict[str, float]:
    """Compare the gradient of every term, as weighted, with that of the labels.

    Copies are asked: terms that keep something from step to step would be changed by it.

    Args:
        bound: the student's objective; it is left as it is.
        view: one step, with the graph from the student's parameters.
        student: with respect to whose parameters.

    Returns:
        ``gradients/<term>/norm_ratio`` (to the labels' gradient) and ``gradients/<term>/cosine``;
        empty without a term on labels, or while one of the two weights is 0.
    """
    copies = copy.deepcopy(bound.terms)
    for term in copies.values():
        term.modules.eval()
    labels = next((name for name, term in copies.items() if isinstance(term.term, HardLabels)), "")
    # A term that draws, such as one that samples negatives, must not take the training's draws.
    with seeded_torch(0):
        losses = BoundObjective(copies).losses(view)
    if labels not in losses:
        return {}
    found: dict[str, float] = {}
    for name in losses:
        if name != labels:
            compared = compare_gradients(losses, labels, name, student)
            found[f"gradients/{name}/norm_ratio"] = compared.norm_ratio
            found[f"gradients/{name}/cosine"] = compared.cosine
    return found
