"""Figures as files: the same figure gives the same bits, on every day and from every program."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fedkd.figures.style import STYLE

Style = Any
"""Parameters of matplotlib by name, as `matplotlib.rc_context` takes them."""

UNSAID: Mapping[str, Mapping[str, None]] = MappingProxyType(
    {
        "png": {"Software": None},
        "svg": {"Creator": None, "Date": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }
)
"""What matplotlib would write into a file besides the figure: when, and with which version."""


def figure_bytes(figure: Figure, format: str = "png", *, style: Style = STYLE) -> bytes:
    """Render a figure as a file of a format.

    Args:
        figure: drawn under the same style.
        format: any that matplotlib knows. Of ``png``, ``svg`` and ``pdf`` the same figure gives
            the same bytes; text in SVG is text, and PDF holds the fonts that it uses.
        style: ``savefig.dpi`` is the resolution of ``png``.

    Raises:
        ValueError: if matplotlib does not know the format.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format=format, metadata=UNSAID.get(format))
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, *, style: Style = STYLE) -> None:
    """Write a figure to a file, in the format that its ending names.

    Args:
        figure: drawn under the same style.
        path: is replaced where it exists.
        style: see `figure_bytes`.

    Raises:
        ValueError: if matplotlib does not know the format.
        OSError: if the file cannot be written.
    """
    path.write_bytes(figure_bytes(figure, path.suffix.lower().removeprefix("."), style=style))
