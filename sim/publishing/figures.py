"""`figures`: all figures of a study's report as SVG, PDF or PNG, in a style of one's own."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from fedkd.names import nearest
from sim.keeping.records import make_folder
from sim.publishing.studies import Study, open_study
from sim.publishing.wording import check_choice
from sim.reports.html.pictures import FIGURES_FOLDER
from sim.reports.html.writing import draw_report
from sim.settings import SettingsError

Format = Literal["svg", "pdf", "png"]

WIDTHS = (2.0, 20.0)
"""Of a figure, in inches."""


def figures(
    folder: Path,
    format: str = "pdf",
    *,
    style: str | None = None,
    width: int | float | None = None,
    output: Path | None = None,
) -> list[Path]:
    """Draw all figures of a study or a run, each into a file.

    The same runs give the same bits: no file says when or by what it was made. Text in SVG is text;
    PDF holds its fonts.

    Args:
        folder: of a study or a run.
        format: ``svg``, ``pdf`` or ``png``.
        style: an ``.mplstyle`` file, or a style that matplotlib knows by name; it is laid over
            fedkd's own, ``fedkd/figures/fedkd.mplstyle``.
        width: in inches, 2 to 20; heights follow. Letters keep their size, so that those of a
            narrow figure are large in it. By default each figure has the width of the report's.
        output: the folder; ``figures/`` in the study's by default.

    Returns:
        The files, in the order of the report.

    Raises:
        SettingsError: names the option or the folder that cannot work, or a study without
            anything to draw.
    """
    check_choice("format", format, get_args(Format))
    if width is not None and not WIDTHS[0] <= width <= WIDTHS[1]:
        raise SettingsError(f"--width must be {WIDTHS[0]:g} to {WIDTHS[1]:g} inches, got {width:g}")
    study = open_study(folder)
    drawn = draw_study(study, load_style(style), format=format, width=width)
    if not drawn:
        raise SettingsError(f"{str(folder)!r} has nothing to draw: no round was judged")
    place = output if output is not None else folder / FIGURES_FOLDER
    make_folder(place, place)
    paths = []
    for name, content in drawn.items():
        paths.append(place / f"{name}.{format}")
        paths[-1].write_bytes(content)
    return paths


def load_style(style: str | None) -> Any:
    """Return the report's style with another laid over it.

    Raises:
        SettingsError: if it is neither a file nor a name that matplotlib knows, or damaged.
    """
    from sim.reports.figures import STYLE

    if style is None:
        return STYLE
    import matplotlib.style
    from matplotlib import rc_params_from_file

    if not Path(style).is_file() and style not in matplotlib.style.library:
        known = sorted(matplotlib.style.library)
        raise SettingsError(
            f"style must be a file or one of matplotlib's styles, got {style!r}"
            f"{nearest(style, known)}; fedkd's own is fedkd/figures/fedkd.mplstyle"
        )
    if style in matplotlib.style.library and not Path(style).is_file():
        return MappingProxyType({**STYLE, **matplotlib.style.library[style]})
    import logging
    import warnings

    logger = logging.getLogger("matplotlib")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = dict(rc_params_from_file(style, use_default_template=False))
    except (OSError, ValueError, UnicodeDecodeError, Warning) as error:
        raise SettingsError(f"style: {style!r} cannot be read: {error}") from None
    finally:
        logger.removeHandler(handler)
    # matplotlib only logs the lines that it leaves out.
    if told:
        raise SettingsError(f"style: {style!r} cannot be read: {' '.join(told[0].split())}")
    return MappingProxyType({**STYLE, **found})


def draw_study(
    study: Study, style: Any, *, format: str, width: int | float | None = None
) -> dict[str, bytes]:
    """Return the figures of a study as files of a format, by name, in the order of the report."""
    from fedkd.figures import figure_bytes  # imported late: matplotlib takes a second

    drawn = draw_report(study.runs, study.grid, style=style)
    for figure in drawn.values():
        if width is not None:
            of_figure, height = figure.get_size_inches()
            figure.set_size_inches(width, height * width / of_figure)
    return {name: figure_bytes(each, format, style=style) for name, each in drawn.items()}
