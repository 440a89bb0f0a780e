"""What an objective returns: losses of rows, or of a step as a whole; and how they become a number.

An author says which rows a loss speaks about; whoever trains takes the mean over the rows that
count. So what pads the batches of stacked clients is nobody else's business, and a rule that clips
the gradient of each row gets rows to clip.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import row_mean

RowKind = Literal["private", "public"]


class PerRow:
    """A loss of each row that depends on no other row; ``0.5 * PerRow(...)`` weighs it.

    Attributes:
        of: which rows; None where the step has rows of one kind only.
        weights: >= 0, how much each row counts, as a constant; None: all the same. The mean is
            divided by the sum of the weights, and 0 where that is.
        factors: what multiplies the mean, one after the other.
    """

    __slots__ = ("_mean", "_values", "factors", "of", "weights")

    def __init__(
        self,
        values: Tensor | Callable[[], Tensor],
        of: RowKind | None = None,
        weights: Tensor | None = None,
        *,
        mean: Callable[[], Tensor] | None = None,
        factors: tuple[float, ...] = (),
    ) -> None:
        """Say of which rows values are.

        Args:
            values: one number a row; or a function that returns them, which is not called where
                ``mean`` does.
            of: which rows they are.
            weights: of the rows.
            mean: returns the mean of all values cheaper than by way of the values.
            factors: of the mean.
        """
        self._values, self._mean = values, mean
        self.of, self.weights, self.factors = of, weights, factors

    @property
    def values(self) -> Tensor:
        """One number a row."""
        if not isinstance(self._values, Tensor):
            self._values = self._values()
        return self._values

    def fits(self, rows: int | None) -> bool:
        """Tell whether there is one value for each of so many rows."""
        if not isinstance(self._values, Tensor):
            return rows is not None
        return self._values.ndim == 1 and len(self._values) == rows

    def __mul__(self, factor: int | float) -> "PerRow":
        """Return the same rows with one more factor.

        Raises:
            TypeError: the factor is no plain number; a tensor's gradient would get lost.
        """
        if not isinstance(factor, int | float):
            raise TypeError(
                f"PerRow can be weighed by an int or a float, got a {type(factor).__name__}: "
                "multiply the values inside of it, or use float(...)"
            )
        # A product with 1 changes no bit and costs two nodes of the graph in every step.
        if factor == 1:
            return self
        factors = (*self.factors, float(factor))
        return PerRow(self._values, self.of, self.weights, mean=self._mean, factors=factors)

    __rmul__ = __mul__

    def row_losses(self, counted: Float[Tensor, " rows"] | None = None) -> Float[Tensor, " rows"]:
        """Return each row's loss with its weight and the factors; 0 where it does not count.

        Args:
            counted: 1 for a row that counts, 0 for one that pads the batch; None: all count.
        """
        values = self.values if counted is None else _without_padding(self.values, counted)
        if self.weights is not None:
            values = self.weights.detach().to(values.dtype) * values
        for factor in self.factors:
            values = factor * values
        return values

    def mean(self, counted: Float[Tensor, " rows"] | None = None) -> Float[Tensor, ""]:
        """Return the mean over the rows that count; what the others hold does not matter.

        Args:
            counted: 1 for a row that counts, 0 for one that pads the batch; None: all count.
        """
        weights = self.weights
        if self._mean is not None and counted is None and weights is None:
            mean = self._mean()
        else:
            values = self.values
            if counted is not None:
                values = _without_padding(values, counted)
                weights = counted if weights is None else _without_padding(weights, counted)
            mean = row_mean(values, weights)
        for factor in self.factors:
            mean = factor * mean
        return mean


@dataclass(frozen=True, slots=True, eq=False)
class WholeStep:
    """A loss that compares the rows of a step with each other, or looks at none.

    Whoever trains shows it the rows that count and no others. Rules that clip the gradient of each
    row refuse it.

    Attributes:
        value: one number.
    """

    value: Tensor

    def __mul__(self, factor: int | float) -> "WholeStep":
        """Return the loss times a factor."""
        return self if factor == 1 else WholeStep(factor * self.value)

    __rmul__ = __mul__


Loss = PerRow | WholeStep | Tensor
"""A bare tensor is taken where it is unambiguous, see `StepRows.read`."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step: how many there are of each kind, and which of them count.

    Attributes:
        sizes: rows by kind, kinds without any left out.
        counted: 1 for a row that counts, 0 for padding, by kind; all count of a kind that is not
            in it.
    """

    sizes: Mapping[RowKind, int]
    counted: Mapping[RowKind, Float[Tensor, " rows"]] = field(default_factory=dict)

    def read(self, name: str, loss: Loss) -> PerRow | WholeStep:
        """Say of which rows a loss is.

        A bare number is a `WholeStep`. Bare numbers, one a row, are a `PerRow` in a step with
        rows of one kind.

        Raises:
            TypeError: if it is no loss.
            ValueError: naming the loss, where it is of none of the step's rows or nobody can tell
                of which; with what to return.
        """
        if isinstance(loss, WholeStep):
            if loss.value.ndim:
                raise ValueError(
                    f"loss {name!r} is a WholeStep of shape {list(loss.value.shape)}: it needs "
                    "one number; return PerRow(values, of=...) for one a row"
                )
            return loss
        if isinstance(loss, Tensor):
            if loss.ndim == 0:
                return WholeStep(loss)
            loss = PerRow(loss)
        elif not isinstance(loss, PerRow):
            raise TypeError(
                f"loss {name!r} must be PerRow(values, of=...) or WholeStep(scalar), got "
                f"{type(loss).__name__}"
            )
        if loss.of is None:
            if len(self.sizes) != 1:
                raise ValueError(
                    f"loss {name!r} of shape {list(loss.values.shape)} could be of either kind in "
                    f"a step with {self._told} rows: return PerRow(values, of='private') or "
                    "PerRow(values, of='public')"
                )
            loss.of = next(iter(self.sizes))
        if loss.of is None or not loss.fits(self.sizes.get(loss.of)):
            raise ValueError(
                f"loss {name!r} of {loss.of} rows has shape {list(loss.values.shape)} in a step "
                f"with {self._told} rows: return PerRow(values, of=...) with one value a row, or "
                "WholeStep(scalar)"
            )
        return loss

    @property
    def _told(self) -> str:
        return " and ".join(f"{rows} {kind}" for kind, rows in self.sizes.items()) or "no"

    def mean(self, name: str, loss: Loss) -> Float[Tensor, ""]:
        """Return a loss as the number to be minimised.

        Raises:
            ValueError: as `read`.
        """
        read = self.read(name, loss)
        if isinstance(read, WholeStep):
            return read.value
        return read.mean(None if read.of is None else self.counted.get(read.of))

    def means(self, losses: Mapping[str, Loss]) -> dict[str, Float[Tensor, ""]]:
        """Return the numbers to be minimised, by name."""
        return {name: self.mean(name, loss) for name, loss in losses.items()}


def _without_padding(
    values: Float[Tensor, " rows"], counted: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    # Not a product, in which padding that is not a number would stay one.
    return torch.where(counted > 0, values, torch.zeros_like(values))
