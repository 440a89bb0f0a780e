"""Figures inside a page: drawn as SVG, in two widths, with words for those who cannot see them.

SVG rather than PNG: it is sharp in print and on every screen, a quarter of the size, and its
colours can follow the reader's scheme. It stands in an ``img`` and not among the page's own
elements, so ids of two figures cannot clash, a reader can save it, and its alternative is read as
one text. On a phone a second drawing with the same size of letters takes its place.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup

from sim.keeping.records import make_folder, write_text
from sim.reports.html.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES_FOLDER = "figures"

_THEMED: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        # In a figure: its name, and what it is on white and on black.
        "#0072b2": ("blue", "#0072b2", "#4da3e0"),
        "#d55e00": ("vermilion", "#d55e00", "#f0803c"),
        "#009e73": ("green", "#009e73", "#2bbf92"),
        "#cc79a7": ("purple", "#b5588c", "#dd94bd"),
        "#e69f00": ("orange", "#b87f00", "#e9a820"),
        "#56b4e9": ("sky", "#2f95cf", "#8fd0f7"),
        "#222222": ("black", "#222222", "#f2f2f2"),
        "#1d1d1f": ("ink", "#1d1d1f", "#e8e8ea"),
        "#333333": ("ink", "#1d1d1f", "#e8e8ea"),
        "#555555": ("soft", "#55585f", "#a9adb6"),
        "#666666": ("soft", "#55585f", "#a9adb6"),
        "#999999": ("faint", "#8a8d94", "#8a8d94"),
        "#e4e4e4": ("grid", "#e4e4e4", "#34373d"),
        "#dddddd": ("lost", "#dddddd", "#34373d"),
        "#ffffff": ("paper", "#ffffff", "#17181b"),
    }
)
"""The house's colours by what they are in an embedded figure, light and dark.

Hues stay those that people with any common colour blindness tell apart; on white the lightest are a
little darker, since a thin line needs a contrast of 3 to be seen.
"""

_COLOUR = re.compile("#[0-9a-f]{6}")
_FONTS = "'DejaVu Sans',Verdana,Geneva,sans-serif"
"""Letters were laid out in the first, and none of the others is wider."""

_FONT = re.compile(r" ?font-family: [^;\"]*;")
_TURN = re.compile(r' transform="rotate\(-0 [^"]*\)"')
_DIGITS = re.compile(r"\d+\.\d{3,}")
_PATH = re.compile(r' d="([^"]*)"')
_COMMAND = re.compile(r" ?([A-Za-z]) ?")
_STYLE = re.compile(r' style="[^"]*"')
_QUOTED = re.compile(r"=\"([^\"']*)\"")
_NOISE = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure to embed.

    Attributes:
        name: of its file, without the ending.
        title: what it shows.
        note: how to read it.
        alt: what it says, in words and numbers.
        wide, narrow: the figure as an address that holds it, for a screen and for a phone;
            ``narrow`` is None where one drawing serves both.
        width, height: of the wide one, in pixels.
        numbers: what is drawn, as tables.
    """

    name: str
    title: str
    note: str
    alt: str
    wide: Markup
    narrow: Markup | None
    width: int
    height: int
    numbers: Sequence[Table]


def picture(
    name: str, title: str, wide: "Figure", narrow: "Figure | None" = None
) -> tuple[Picture, str]:
    """Return a figure to embed, and the same as the text of an SVG file.

    Args:
        name: of its file.
        title: what it shows, where the figure itself does not say.
        wide: for a screen and for paper.
        narrow: the same for a phone.
    """
    from sim.reports.html.alternatives import alternative, number_tables

    said, note = _title_taken(wide)
    title = said or title
    width, height = (round(100 * inches) for inches in wide.get_size_inches())
    if narrow is not None:
        _title_taken(narrow)
    file = to_svg(wide)
    return (
        Picture(
            name=name,
            title=title,
            note=note,
            alt=alternative(wide, title),
            wide=_address(file),
            narrow=None if narrow is None else _address(to_svg(narrow)),
            width=width,
            height=height,
            numbers=number_tables(wide),
        ),
        file,
    )


def _title_taken(figure: "Figure") -> tuple[str, str]:
    """Take title and note out of a figure: in a page they are text of the page, and folded.

    Panels of several keep their titles.
    """
    head = str(figure.get_suptitle())
    if head:
        figure.suptitle("")
        title, _, note = head.partition("\n")
        return title, note
    titled = [axes for axes in figure.axes if axes.get_title(loc="left")]
    if len(titled) != 1:
        return "", ""
    (axes,) = titled
    title, _, said = axes.get_title(loc="left").partition("\n")
    axes.set_title("", loc="left")
    for text in [text for text in axes.texts if text.get_gid() == "note"]:
        said = f"{said} {text.get_text()}".strip()
        text.remove()
    return title, said


def to_svg(figure: "Figure") -> str:
    """Render a figure; the same figure gives the same text, and its letters stay letters."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    from fedkd.figures.saving import UNSAID
    from sim.reports.figures import STYLE

    buffer = io.StringIO()
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    with matplotlib.rc_context(STYLE):
        # Figure.savefig would lay everything out twice, which is half of the time of a report.
        FigureCanvasSVG(figure).print_svg(buffer, metadata=UNSAID["svg"])  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def themed(svg: str) -> str:
    """Return a figure's text without what no reader needs, in the colours of a scheme."""
    text = _NOISE.sub("", svg).strip()
    used = {
        _THEMED[colour] for colour in set(_COLOUR.findall(text.lower())) if colour in _THEMED
    } | {_THEMED["#1d1d1f"]}
    names = sorted(used)
    light = "".join(f"--{name}:{on_white};" for name, on_white, _ in names)
    dark = "".join(f"--{name}:{on_black};" for name, _, on_black in names)
    style = (
        f"<style>svg{{{light}}}text{{fill:var(--ink);font-family:{_FONTS}}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
        f"@media print{{svg{{{light}}}}}</style>"
    )
    text = _COLOUR.sub(
        lambda found: f"var(--{_THEMED[found[0]][0]})" if found[0] in _THEMED else found[0],
        text,
    )
    text = _FONT.sub("", text)
    text = _TURN.sub("", text)
    text = _DIGITS.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
    text = _PATH.sub(lambda found: f' d="{_packed(found[1])}"', text)
    text = _STYLE.sub(lambda found: found[0].replace(": ", ":").replace("; ", ";"), text)
    head, opened, rest = text.partition(">")
    return " ".join(f"{head}{opened}{style}{rest}".split())


def _packed(path: str) -> str:
    """Return the same path without spaces, each of which takes three letters in an address."""
    return _COMMAND.sub(r"\1", " ".join(path.split())).replace(" ", ",")


def _address(svg: str) -> Markup:
    """Return a figure as an address that holds it; shorter than base64, and readable."""
    text = _QUOTED.sub(r"='\1'", themed(svg))
    # No spaces: a list of sources is cut at them.
    return Markup("data:image/svg+xml," + quote(text, safe="!$'()*+,-./:;=?@_~"))  # noqa: S704


def write_figures(folder: Path, files: Mapping[str, str]) -> None:
    """Write the figures of a report beside it; those of an older one go."""
    place = make_folder(folder, folder / FIGURES_FOLDER)
    for name, text in files.items():
        write_text(place / f"{name}.svg", text)
    for old in (*place.glob("*.png"), *place.glob("*.svg")):
        if old.suffix == ".png" or old.stem not in files:
            old.unlink()
