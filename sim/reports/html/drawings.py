"""Drawings of a few lines that stand in cells beside the numbers they show.

They say nothing that their row does not say in words, so they are hidden from screen readers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sim.reports.statistics import Difference
from sim.reports.tables import FEW, points
from sim.reports.terminal import NOTHING


@dataclass(frozen=True, slots=True)
class Scale:
    """Percentage points from left to right; 0 is part of it.

    Attributes:
        low: at the left edge, <= 0.
        high: at the right edge, >= 0.
    """

    low: int | float
    high: int | float

    @classmethod
    def over(cls, values: Sequence[int | float]) -> "Scale":
        """Return one of round ends that holds all values, and 0."""
        low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
        reach = max(high - low, 1e-6)
        step = 10 ** math.floor(math.log10(reach))
        if reach / step < 3:
            step /= 2
        return cls(step * math.floor(low / step), max(step, step * math.ceil(high / step)))

    @classmethod
    def of(cls, differences: Iterable[Difference]) -> "Scale":
        """Return one that holds every difference and its interval."""
        ends = [
            100 * end
            for value in differences
            for end in (value.mean, value.low, value.high)
            if end is not None
        ]
        return cls.over(ends)

    def place(self, value: int | float) -> str:
        """Return where a value lies, in percent of the width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    @property
    def text(self) -> str:
        """The two ends in words."""
        return f"{self.low:+g} to {self.high:+g} points"


def interval_bar(value: Difference, scale: Scale) -> Markup:
    """Draw a difference and its interval over a line at 0."""
    mean, zero = scale.place(100 * value.mean), scale.place(0)
    interval = Markup()
    if value.low is not None and value.high is not None:
        low, high = scale.place(100 * value.low), scale.place(100 * value.high)
        interval = Markup('<line class="span" x1="{}" x2="{}" y1="9" y2="9"/>').format(low, high)
    return Markup(
        '<svg class="interval" aria-hidden="true" focusable="false" width="100%" height="18">'
        '<line class="axis" x1="0" x2="100%" y1="9" y2="9"/>'
        '<line class="zero" x1="{zero}" x2="{zero}" y1="1" y2="17"/>{interval}'
        '<circle class="mean" cx="{mean}" cy="9" r="4"/></svg>'
    ).format(zero=zero, interval=interval, mean=mean)


def interval_text(value: Difference) -> str:
    """Write the two ends of an interval in points, marked where it rests on few seeds."""
    if value.low is None or value.high is None:
        return NOTHING
    return f"{points(value.low)} to {points(value.high)}{FEW if value.few else ''}"


def spark_line(values: Sequence[int | float], low: int | float, high: int | float) -> Markup:
    """Draw shares by round, from ``low`` at the bottom to ``high`` at the top; ends in words."""
    words = (
        points(values[-1], signed=False)
        if len(values) == 1
        else f"{points(values[0], signed=False)} → {points(values[-1], signed=False)}"
    )
    reach = max(high - low, 1e-9)
    across = 100 / max(len(values) - 1, 1)
    places = " ".join(
        f"{across * place:.1f},{18 - 16 * (value - low) / reach:.1f}"
        for place, value in enumerate(values)
    )
    return Markup(
        '<svg class="spark" aria-hidden="true" focusable="false" width="90" height="20" '
        'viewBox="0 0 100 20" preserveAspectRatio="none"><polyline points="{}"/></svg> {}'
    ).format(places, words)
