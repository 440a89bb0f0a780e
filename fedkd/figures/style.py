"""How every figure looks, and what they share: colours, dashes, names and ticks."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
STYLE_FILE = Path(__file__).with_name("fedkd.mplstyle")
STYLE: Any = MappingProxyType(dict(rc_params_from_file(STYLE_FILE, use_default_template=False)))
COLORS = tuple(map(to_hex, STYLE["axes.prop_cycle"].by_key()["color"]))
"""Those of the style, by the position of what is drawn."""


def color(position: int) -> str:
    """Return the colour of what is drawn at this position, under the style in force."""
    colors = _colors()
    return colors[position % len(colors)]


def dash(position: int) -> Any:
    """Return how its line is dashed: whole until colours come round again."""
    return DASHES[position // len(_colors()) % len(DASHES)]


def _colors() -> Sequence[str]:
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
    return [to_hex(each) for each in cycle.get("color", COLORS)]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that no window and no global list knows of."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def check_names(names: Sequence[str], wanted: int) -> None:
    """Refuse names that are not one for each row or column."""
    if len(names) != wanted:
        raise ValueError(f"names must be {wanted}, one for each row or column, got {len(names)}")


def one_per_step(
    name: str, values: Sequence[int | float], steps: Sequence[int | float]
) -> Sequence[int | float]:
    """Return the values of a curve; refuse one that has not a value for each step."""
    if len(values) != len(steps):
        raise ValueError(
            f"{name!r} must have one value for each of {len(steps)} steps, got {len(values)}"
        )
    return values


def visible(name: str) -> str:
    """Return a label that a legend shows, whatever it starts with."""
    # A label that starts with _ would be left out of the legend; a zero-width space is not seen.
    return f"\u200b{name}" if name.startswith("_") else name


def integer_steps(axes: Axes, steps: Sequence[int | float]) -> None:
    """Number the steps by whole numbers where all of them are."""
    if all(float(step).is_integer() for step in steps):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def whole_numbers(axes: Axes, axis: str) -> None:
    """Write whole numbers only along an axis of counts."""
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def readable_on(background: Float[np.ndarray, "4"]) -> str:
    """Return black or white, whichever stands out from a colour."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
