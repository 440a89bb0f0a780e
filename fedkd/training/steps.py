"""The steps of any training: one model or several, on one machine or in a federation.

Who trains says what is minimised in a step; everything else about a step is here::

    steps = Steps([optimizer], count)
    for step in steps:  # its learning rates and its dropout are in force
        losses = ...  # a forward pass
        steps.descend(losses)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedkd.models.dropout import DropoutStream
from fedkd.training.optimizers import Optimizer, OptimizerSettings

LossTerms = Mapping[str, Tensor]
"""What a step minimises: the sum of these terms. A vector has a number for each model."""

Gradient = Callable[[LossTerms], None]
"""Gives everything that learns its gradient of a step's losses."""

Progress = Callable[[int, int], float]
"""Returns what fraction of the run is done at a step (from 0) of so many."""


def fraction_done(step: int, steps: int) -> float:
    """Return what fraction of a training is done: 0 at its first step, 1 at its last.

    Args:
        step: number of the step, from 0.
        steps: how many there are; the only step of a training is its first.
    """
    return step / max(steps - 1, 1)


def fraction_of_rounds(step: int, steps: int, *, round: int, rounds: int) -> float:
    """Return what fraction of a run of rounds is done, in each of which so many steps are taken.

    0 at the first step of the first round, 1 at the last step of the last. A client that takes one
    step a round is at the same fractions as the rounds.

    Args:
        step: number of the step in its round, from 0.
        steps: steps of a round.
        round: number of the round, from 1.
        rounds: of the run.
    """
    return min(1.0, fraction_done((round - 1) * steps + step, rounds * steps))


@runtime_checkable
class StepOptimizer(Protocol):
    """What moves something in every step, at a learning rate that follows the run."""

    def set_rate(self, progress: Callable[[int], float]) -> None:
        """Use the learning rate of this step.

        Args:
            progress: returns, for whoever takes so many steps, what fraction of them is done.
        """

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""

    def step(self) -> None:
        """Move by the gradients of this step."""


class RatedOptimizer:
    """An optimizer whose learning rate follows the run.

    Attributes:
        optimizer: of the parameters.
        rate: the learning rate in force.
    """

    def __init__(self, optimizer: Optimizer, settings: OptimizerSettings, steps: int) -> None:
        """Take an optimizer that was built from settings.

        Args:
            optimizer: its learning rate is set here.
            settings: how its learning rate changes.
            steps: that it is going to take.
        """
        self.optimizer, self._settings, self._steps = optimizer, settings, steps
        self.rate = math.nan

    def set_rate(self, progress: Callable[[int], float]) -> None:
        """Use the learning rate of this step; a constant one is set once."""
        if self._settings.constant and not math.isnan(self.rate):
            return
        self.rate = self._settings.learning_rate(progress(self._steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Move by the gradients of this step."""
        self.optimizer.step()


class FixedRate:
    """An optimizer whose learning rate stays what it is."""

    def __init__(self, optimizer: Optimizer | torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def set_rate(self, progress: Callable[[int], float]) -> None:
        """Keep the rate."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Move by the gradients of this step."""
        self._optimizer.step()


class Step(NamedTuple):
    """One step.

    Attributes:
        number: from 0.
        progress: what fraction of the run is done, in [0, 1].
        epoch: number of the epoch that ends with this step, from 1; None: none does.
    """

    number: int
    progress: float
    epoch: int | None = None


class StepRecords:
    """What steps put out, kept as it is: to read or add up numbers would hold up every step."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Keep a number of this step, or one number a model."""
        self._values.setdefault(name, []).append(value.detach())

    def stacked(self) -> dict[str, Float[Tensor, "steps *models"]]:
        """Return everything so far, by name, steps first."""
        return {name: torch.stack(values) for name, values in self._values.items()}

    def take(self) -> dict[str, Float[Tensor, "steps *models"]]:
        """Return everything since the last time, by name, steps first."""
        taken = self.stacked()
        self._values.clear()
        return taken


class Steps:
    """The steps of one training, one after the other.

    Attributes:
        records: the losses of the steps by name, and what else is added to them.
    """

    def __init__(
        self,
        optimizers: Sequence[StepOptimizer],
        count: int,
        *,
        numbers: range | None = None,
        epochs: int = 0,
        progress: Progress = fraction_done,
        gradient: Gradient | None = None,
        dropout: Sequence[DropoutStream | None] = (),
        keys: Int64[Tensor, " steps"] | None = None,
        records: StepRecords | None = None,
    ) -> None:
        """Begin before the first step.

        Args:
            optimizers: of everything that learns.
            count: how many steps the training has.
            numbers: which of them are taken here; None: all.
            epochs: how many there are, all of the same number of steps; 0: none is told of.
            progress: where in the run a step is.
            gradient: fills in the gradients; None: one backward pass from the sum.
            dropout: of each model, None for one without dropout.
            keys: of the dropout in each step; needed where there is any.
            records: where losses are kept; None: new ones.
        """
        self._optimizers = tuple(optimizers)
        self._count = count
        self._numbers = range(count) if numbers is None else numbers
        self._per_epoch = count // epochs if epochs else 0
        self._progress = progress
        self._gradient = backward if gradient is None else gradient
        self._dropout = [(at, stream) for at, stream in enumerate(dropout) if stream is not None]
        self._keys = keys
        self.records = StepRecords() if records is None else records

    def __iter__(self) -> Iterator[Step]:
        """Bring about every step in turn: its learning rates, and what its dropout draws."""
        count, every = self._count, self._per_epoch
        for number in self._numbers:
            here = partial(self._progress, number)
            for optimizer in self._optimizers:
                optimizer.set_rate(here)
            if self._keys is not None:
                for model, stream in self._dropout:
                    stream.begin(self._keys[number], model=model)
            ends = every and (number + 1) % every == 0
            yield Step(number, here(count), (number + 1) // every if ends else None)
        self._rest()

    def descend(self, losses: LossTerms, gradient: Gradient | None = None) -> None:
        """Take the step: gradients of the sum of the losses, and one step of every optimizer.

        Without a loss nothing moves: schedules may leave no term in force.

        Args:
            losses: of the step.
            gradient: fills in the gradients of this step; None: as in all steps.
        """
        if losses:
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            (gradient or self._gradient)(losses)
            for optimizer in self._optimizers:
                optimizer.step()
        for name, loss in losses.items():
            self.records.add(name, loss)
        self._rest()

    def _rest(self) -> None:
        """Leave dropout to torch's generator until the next step, as for a validation between."""
        for _, stream in self._dropout:
            stream.end()


def backward(losses: LossTerms) -> None:
    """Send the gradient of the sum of the losses back to everything that it depends on."""
    total(losses).backward()


def total(losses: LossTerms) -> Float[Tensor, ""]:
    """Return the sum of named losses: of one model, or a number of each model in a vector."""
    first, *others = losses.values()
    if any(loss.shape != first.shape for loss in others):
        first, *others = (loss.sum() for loss in losses.values())
    for loss in others:
        first = first + loss
    return first.sum() if first.ndim else first


class DivergedError(ValueError):
    """A training whose loss is no number any more; the text names the model and the loss."""


def diverged(row: Mapping[str, int | float]) -> str | None:
    """Return the name of a loss that is NaN or infinite, None where all are numbers.

    Args:
        row: what was recorded; losses are those named ``loss/...``.
    """
    for name, value in row.items():
        if name.startswith("loss/") and not math.isfinite(value):
            return name
    return None
