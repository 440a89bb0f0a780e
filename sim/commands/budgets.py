"""Budgets: what the rounds of an arm take, and the rounds that take what another arm's do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sim.reports.tables import kilobytes
from sim.server.observers import Row

Budget = Literal["steps", "bytes"]

MOST_TOLD = 6
"""Arms that a sentence names."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the rounds of a run take of a budget.

    Attributes:
        first: the first round, and what comes before it, such as a teacher's training.
        further: each round after it.
    """

    first: int
    further: int

    def total(self, rounds: int) -> int:
        """Return what so many rounds take.

        Args:
            rounds: >= 1.
        """
        return self.first + (rounds - 1) * self.further

    def nearest_rounds(self, target: int) -> int:
        """Return the rounds whose total is nearest to a target; of two as near, the fewer.

        Raises:
            ValueError: if a further round takes nothing.
        """
        if not self.further:
            raise ValueError("a further round takes nothing")
        below = max(1, 1 + math.floor((target - self.first) / self.further))
        return min(below, below + 1, key=lambda rounds: abs(self.total(rounds) - target))


@dataclass(frozen=True, slots=True)
class MatchedArm:
    """What became of an arm.

    Attributes:
        arm: its name.
        rounds_before, rounds: as the settings say, and as they were set.
        before, after: what these rounds take.
        unequal: the remaining difference from the reference, as a share of it; > 0 takes more.
    """

    arm: str
    rounds_before: int
    rounds: int
    before: int
    after: int
    unequal: float


@dataclass(frozen=True, slots=True)
class Matching:
    """Which rounds were set, and how equal arms are.

    Attributes:
        budget: what is made equal.
        reference: the arm whose rounds stay.
        arms: all of them.
    """

    budget: Budget
    reference: str
    arms: tuple[MatchedArm, ...]

    def to_row(self) -> Row:
        """Return it as plain values."""
        return {
            "budget": self.budget,
            "reference": self.reference,
            "arms": [
                {name: getattr(arm, name) for name in MatchedArm.__slots__} for arm in self.arms
            ],
        }

    def sentences(self) -> list[str]:
        """Say what was set, arms of which the same is true together."""
        (reference,) = (arm for arm in self.arms if arm.arm == self.reference)
        together: dict[str, list[str]] = {}
        for arm in self.arms:
            if arm is not reference:
                together.setdefault(self._told(arm), []).append(arm.arm)
        rounds = f"{reference.rounds} round{'s' * (reference.rounds != 1)}"
        told = [f"{_names(names)}: {what}" for what, names in together.items()]
        more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
        return [
            f"matched by {self.budget} to {self.reference} ({self._amount(reference.after)} in "
            f"{rounds}): {'; '.join(told[:MOST_TOLD])}{more}"
        ]

    def _told(self, arm: MatchedArm) -> str:
        instead = arm.rounds != arm.rounds_before
        return (
            f"{arm.rounds} rounds{f' instead of {arm.rounds_before}' * instead}, "
            f"{self._amount(arm.after)}{f' instead of {self._amount(arm.before)}' * instead}, "
            f"{100 * arm.unequal:+.1f} %"
        )

    def _amount(self, count: int) -> str:
        return f"{kilobytes(float(count))} kB" if self.budget == "bytes" else f"{count:,} steps"


def _names(arms: Sequence[str]) -> str:
    more = f" and {len(arms) - MOST_TOLD} more" if len(arms) > MOST_TOLD else ""
    return ", ".join(arms[:MOST_TOLD]) + more
