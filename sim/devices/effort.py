"""What learning took: optimizer steps, rows and arithmetic, of clients and of the server.

Accuracies of two algorithms can only be compared beside what each of them was given. Like the
simulated clock this is counted and not timed, so the same settings and seed give the same numbers
on any machine, in any backend, and in a resumed run.

Judging models is no part of it. Nor is what a server computes without one of its models: averages,
coefficients, gates.
"""

from collections.abc import MutableMapping
from typing import NamedTuple

from fedkd.training import Work
from sim.devices.clock import RowCosts

PREFIX = "effort_"
"""Begins what a client reports of its effort, which is summed up and in no row of its own."""


class Effort(NamedTuple):
    """What learning took.

    Attributes:
        steps: of optimizers, one for each model that learns in it.
        rows: that models learnt from, private and public ones, each as often as it was used.
        gflops: 10^9 floating-point operations, forward passes that teach or predict included; None
            where they cannot be counted, as in a model of one's own that hides them from torch.
    """

    steps: int = 0
    rows: int = 0
    gflops: float | None = 0.0

    def plus(self, other: "Effort") -> "Effort":
        """Return both together; operations are known if both are."""
        known = self.gflops is not None and other.gflops is not None
        gflops = (self.gflops or 0.0) + (other.gflops or 0.0) if known else None
        return Effort(self.steps + other.steps, self.rows + other.rows, gflops)

    @property
    def metrics(self) -> dict[str, float]:
        """As a client reports it."""
        known = {"steps": float(self.steps), "rows": float(self.rows)}
        if self.gflops is not None:
            known["gflops"] = self.gflops
        return {PREFIX + name: value for name, value in known.items()}

    @classmethod
    def taken(cls, metrics: MutableMapping[str, float]) -> "Effort":
        """Take what a client reported of its effort out of its metrics."""
        steps, rows = (int(metrics.pop(PREFIX + name, 0)) for name in ("steps", "rows"))
        return cls(steps, rows, metrics.pop(f"{PREFIX}gflops", None))

    def row(self, whose: str) -> dict[str, float | int | None]:
        """As it stands in the federation's row of a round: ``whose`` is ``client`` or ``server``.

        Nothing where nobody learnt.
        """
        if not self.steps and not self.gflops:
            return {}
        named = self._asdict()
        return {f"{whose}_{name}": value for name, value in named.items()}


class Efforts:
    """Says what work amounts to.

    Args:
        num_classes: of the run's data.
    """

    def __init__(self, num_classes: int) -> None:
        self._costs = RowCosts(num_classes)
        self._counts = True

    def of(self, work: Work) -> Effort:
        """Return the effort behind some work."""
        gflops = None
        if self._counts:
            try:
                gflops = work.flops(self._costs) / 1e9
            except Exception:
                # A model of one's own may do what torch's counter cannot follow; that it trains is
                # known by now, and a number that is for information only ends no run.
                self._counts = False
        return Effort(work.steps, work.rows, gflops)
