"""How many rows went through which models: what the arithmetic of a call follows from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fedkd.inputs import Shape
from fedkd.models import ModelSettings


class Network(NamedTuple):
    """A model on rows of one shape; its arithmetic follows from both."""

    model: ModelSettings
    input_shape: Shape


@dataclass(slots=True)
class Work:
    """Rows that went through models, each as often as it did.

    Attributes:
        trained: rows of steps, private and public ones, of each model that learnt in them.
        predicted: rows that went through a model forwards only, frozen ones beside those that learn
            included.
        steps: of optimizers; where two models learn in one step these are two.
    """

    trained: Counter[Network] = field(default_factory=Counter)
    predicted: Counter[Network] = field(default_factory=Counter)
    steps: int = 0

    @property
    def rows(self) -> int:
        """Rows that models learnt from, each as often as it did and for each model that did."""
        return self.trained.total()

    def flops(self, costs: "Mapping[Network, RowFlops]") -> int:
        """Return the floating-point operations of all rows."""
        return sum(
            rows * getattr(costs[network], kind)
            for kind in ("trained", "predicted")
            for network, rows in getattr(self, kind).items()
        )


class RowFlops(NamedTuple):
    """Floating-point operations of a row: forwards and backwards, and forwards alone."""

    trained: int
    predicted: int
