"""`table`: arms x measures, or the grid of a sweep, for papers and for other programs."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from sim.keeping.records import write_text
from sim.publishing.frames import Rows, tidy_rows, to_pandas
from sim.publishing.latex import escape, label_of
from sim.publishing.studies import Study, open_study
from sim.publishing.wording import check_choice, counted, matching_words, setting_words
from sim.reports.grids import Plane
from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    ACCURACIES,
    ENOUGH_SEEDS,
    MEASURES,
    SHARES,
    ArmSummary,
    At,
    Difference,
    Estimate,
    compare_arms,
    corrected,
    estimate,
    summarize,
    values_by_seed,
)
from sim.reports.statistics import counted as counted_runs
from sim.reports.tables import epsilon_text, kilobytes, p_text, percent, points
from sim.reports.terminal import NOTHING
from sim.settings import SettingsError

Format = Literal["latex", "markdown", "csv", "parquet"]

SIGNIFICANT = 0.05
"""An arm is in bold only where every comparison with another is below this, corrected by Holm."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a place of a table.

    Attributes:
        text: as a reader sees it.
        number: its value and the half width of its interval as decimals, where LaTeX can line it
            up by them; the second is empty without an interval. None for words.
        bold: whether it is the best by the rule of `best_arm`.
    """

    text: str
    number: tuple[str, str] | None = None
    bold: bool = False


NO_NUMBER = Cell(NOTHING)


@dataclass(frozen=True, slots=True)
class TableText:
    """A table in words, before it is written in a format.

    Attributes:
        head: of the first column.
        titles: of the others.
        over: what stands over all of them together; may be empty.
        rows: by label.
        caption: whole sentences.
        label: for references to it.
    """

    head: str
    titles: Sequence[str]
    over: str
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str
    label: str


def table(
    folder: Path,
    format: str = "latex",
    *,
    measures: Sequence[str] | None = None,
    at: str = "last",
    rows: str | None = None,
    output: Path | None = None,
) -> str:
    """Return the table of a study in a format, and write it where a file is named.

    LaTeX and Markdown have a line for each arm and a column for each measure; a sweep over two or
    three settings is a grid of its values instead, a table for each measure. CSV and Parquet have
    tidy rows with everything that was measured.

    Args:
        folder: of a study or a run.
        format: ``latex``, ``markdown``, ``csv`` or ``parquet``.
        measures: columns; by default those that answer the study's question.
        at: ``last`` or ``selected`` round; tidy rows have both.
        rows: what a tidy row is, see `sim.publishing.frames.tidy_rows`; ``runs`` by default.
        output: the file; Parquet needs one.

    Returns:
        The text; empty for Parquet.

    Raises:
        SettingsError: names the option or the folder that cannot work.
    """
    check_choice("format", format, get_args(Format))
    check_choice("at", at, get_args(At))
    tidy = format in ("csv", "parquet")
    if rows is not None and not tidy:
        raise SettingsError(
            f"--rows is for --format csv and parquet, which have tidy rows, got --format {format}"
        )
    if measures is not None and tidy:
        raise SettingsError(
            f"--measures is for latex and markdown: --format {format} has every measure there is"
        )
    if format == "parquet" and output is None:
        raise SettingsError(
            "--format parquet is no text to print: name a file, such as --output runs.parquet"
        )
    if tidy:
        check_choice("rows", rows or "runs", get_args(Rows))
    study = open_study(folder)
    if not tidy:
        write = to_latex if format == "latex" else to_markdown
        at_round: At = "selected" if at == "selected" else "last"
        text = "\n".join(write(each) for each in table_texts(study, measures, at_round))
    else:
        found = tidy_rows(study, rows or "runs")
        if format == "parquet" and output is not None:
            _store(output, to_parquet(found))
            return ""
        text = to_csv(found)
    if output is not None:
        _store(output, text)
    return text


def _store(path: Path, content: str | bytes) -> None:
    try:
        if isinstance(content, str):
            write_text(path, content)
        else:
            path.write_bytes(content)
    except OSError as error:
        raise SettingsError(f"--output: cannot write {str(path)!r}: {error.strerror}") from None


# -- what stands in it --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A measure as a column.

    Attributes:
        title: with its unit.
        of: returns the cell of an arm.
        share: whether it is an accuracy, which may be in bold.
    """

    title: str
    of: Callable[[ArmSummary], Cell]
    share: bool = False


def known_measures() -> tuple[str, ...]:
    """Return what ``measures`` may name."""
    return (*ACCURACIES, "bytes_up", "bytes_down", *MEASURES, "epsilon", "seconds", *_COMPARED)


_COMPARED = ("difference", "p_value", "p_holm", "p_sign_flip", "detectable")


def table_texts(
    study: Study, measures: Sequence[str] | None = None, at: At = "last"
) -> list[TableText]:
    """Return the tables of a study in words: one, or one for each plane of a sweep and measure.

    Raises:
        SettingsError: for a measure that there is not.
    """
    for name in measures or ():
        check_choice("measures", name, known_measures())
    planes = study.grid.planes if study.grid is not None else ()
    planes = tuple(plane for plane in planes if plane.rows.name)
    if planes and not set(measures or ()) <= set(ACCURACIES):
        # What is not an accuracy has no grid of its own: one line an arm has room for all.
        planes = ()
    if planes:
        return [
            _plane_text(study, plane, key, at, place)
            for key in measures or _measured_key(study)
            for place, plane in enumerate(planes)
        ]
    return [_arm_text(study, measures, at)]


def _measured_key(study: Study) -> tuple[str]:
    honest = any(run.last.get("honest_accuracy") is not None for run in study.records)
    return ("honest_accuracy",) if honest else ("accuracy",)


def _arm_text(study: Study, measures: Sequence[str] | None, at: At) -> TableText:
    summaries = {arm: summarize(arm, of_arm) for arm, of_arm in study.runs.items()}
    columns = _columns(study, at)
    if measures is None:
        chosen = [name for name in _DEFAULT if name in columns]
        kept = {
            name
            for name in chosen
            if any(columns[name].of(each) != NO_NUMBER for each in summaries.values())
        }
        chosen = [name for name in chosen if name in kept]
    else:
        chosen = list(dict.fromkeys(measures))
    best = {name: best_arm(study.runs, name, at) for name in chosen if columns[name].share}
    rows = []
    for arm, summary in summaries.items():
        cells = [columns[name].of(summary) for name in chosen]
        rows.append(
            (
                arm if summary.finished else f"{arm} (interrupted)",
                [
                    replace(cell, bold=best.get(name) == arm)
                    for name, cell in zip(chosen, cells, strict=True)
                ],
            )
        )
    caption = _caption(study, at, _told(study, chosen), bold=any(best.values()))
    titles = [columns[name].title for name in chosen]
    return TableText("arm", titles, "", rows, caption, f"tab:{label_of(study.name)}")


_DEFAULT = (
    "accuracy",
    "honest_accuracy",
    "worst_accuracy",
    "server_accuracy",
    "attack_success",
    "epsilon",
    "bytes_up",
    "bytes_down",
    "difference",
    "p_holm",
)


def _columns(study: Study, at: At) -> dict[str, Column]:
    differences = compare_arms(study.runs, "accuracy", at, study.baseline)
    p_holm = corrected(differences)

    def accuracy(key: str) -> Callable[[ArmSummary], Cell]:
        return lambda summary: _share((summary.last if at == "last" else summary.selected).get(key))

    def measure(key: str) -> Callable[[ArmSummary], Cell]:
        def of(summary: ArmSummary) -> Cell:
            value = summary.measures.get(key)
            if MEASURES[key].share:
                return _share(value)
            return (
                NO_NUMBER if value is None else _plain(f"{value.mean:.{MEASURES[key].decimals}f}")
            )

        return of

    def compared(of: Callable[[Difference], Cell]) -> Callable[[ArmSummary], Cell]:
        def cell(summary: ArmSummary) -> Cell:
            value = differences.get(summary.arm)
            return NO_NUMBER if value is None else of(value)

        return cell

    return {
        **{
            key: Column(title, accuracy(key), share=key != "attack_success")
            for key, title in ACCURACIES.items()
        },
        "bytes_up": Column("kB up", lambda summary: _kilobytes(summary.bytes_up)),
        "bytes_down": Column("kB down", lambda summary: _kilobytes(summary.bytes_down)),
        **{key: Column(each.title, measure(key)) for key, each in MEASURES.items()},
        "epsilon": Column("epsilon", lambda summary: _plain(epsilon_text(summary.epsilon))),
        "seconds": Column(
            "s",
            lambda summary: (
                NO_NUMBER if summary.seconds is None else _plain(f"{summary.seconds.mean:.1f}")
            ),
        ),
        "difference": Column(
            f"minus {study.baseline}", compared(lambda value: _share(value, signed=True))
        ),
        "p_value": Column("p", compared(lambda value: _plain(p_text(value.p_value)))),
        "p_holm": Column("p (Holm)", lambda summary: _plain(p_text(p_holm.get(summary.arm)))),
        "p_sign_flip": Column("p (sign-flip)", compared(lambda v: _plain(p_text(v.p_sign_flip)))),
        "detectable": Column(
            "detectable",
            compared(
                lambda value: (
                    NO_NUMBER
                    if value.detectable is None
                    else _plain(points(value.detectable, signed=False))
                )
            ),
        ),
    }


def _plane_text(study: Study, plane: Plane, key: str, at: At, place: int) -> TableText:
    arms = dict.fromkeys(arm for line in plane.arms for arm in line if study.runs.get(arm))
    best = best_arm({arm: study.runs[arm] for arm in arms}, key, at)

    def cell(arm: str) -> Cell:
        if arm in study.refused:
            return Cell("refused")
        values = values_by_seed(study.runs.get(arm, ()), key, at)
        return replace(_share(estimate([*values.values()], SHARES)), bold=arm == best)

    told = [f"{_sentence(ACCURACIES[key])} accuracy in %"]
    if plane.title:
        told = [f"{told[0]}, {plane.title}"]
    suffix = f"-{label_of(key)}-{place + 1}"
    return TableText(
        plane.rows.title,
        plane.columns.labels,
        plane.columns.title,
        [
            (label, [cell(arm) for arm in line])
            for label, line in zip(plane.rows.labels, plane.arms, strict=True)
        ],
        _caption(study, at, told, bold=best is not None),
        f"tab:{label_of(study.name)}{suffix}",
    )


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]


def best_arm(runs: Mapping[str, Sequence[RunRecord]], key: str, at: At) -> str | None:
    """Return the arm whose lead over every other is more than chance; None where there is none.

    That is the arm of the highest mean, if the paired t-tests of it against each of the others,
    corrected by Holm for all of these, are each below `SIGNIFICANT`.
    """
    means = {
        arm: found.mean
        for arm, of_arm in runs.items()
        if (found := estimate([*values_by_seed(of_arm, key, at).values()]))
    }
    if len(means) < 2:
        return None
    best = max(means, key=lambda arm: means[arm])
    differences = compare_arms({arm: runs[arm] for arm in means}, key, at, best)
    p_holm = corrected(differences)
    behind = all(
        value is not None and value.mean < 0 and p is not None and p < SIGNIFICANT
        for value, p in zip(differences.values(), p_holm.values(), strict=True)
    )
    return best if behind else None


def _share(value: Estimate | Difference | None, *, signed: bool = False) -> Cell:
    """Write a share in percent, or a difference of shares in points."""
    if value is None:
        return NO_NUMBER
    text = percent(value, signed=signed).replace(" ±", " ± ").rstrip("*")
    mean = points(value.mean, signed=signed)
    if value.low is None:
        return Cell(text, (mean, ""))
    half = value.half_width
    # An interval that is cut off at what is possible has two ends and no width.
    return Cell(text, None if half is None else (mean, f"{100 * half:.1f}"))


def _kilobytes(value: Estimate | None) -> Cell:
    return _plain(kilobytes(value))


def _plain(text: str) -> Cell:
    number = text.replace(",", "")
    try:
        float(number)
    except ValueError:
        return Cell(text)
    return Cell(text, (number, ""))


def _told(study: Study, chosen: Sequence[str]) -> list[str]:
    told = []
    if any(name in ACCURACIES for name in chosen):
        told.append("Accuracy in % on the common test split")
    if {"bytes_up", "bytes_down"} & set(chosen):
        told.append("kB per client over the whole run")
    if "difference" in chosen:
        told.append(f"differences from {study.baseline} in points of mean client accuracy")
    if set(_COMPARED) & set(chosen):
        told.append("paired by seed")
    if "detectable" in chosen:
        told.append("detectable: the smallest effect that so many seeds find in 80 % of studies")
    if "p_holm" in chosen:
        told.append("p of the paired t-test, corrected by Holm's method")
    return told


def _caption(study: Study, at: At, told: Sequence[str], *, bold: bool) -> str:
    seeds = {len(counted_runs(of_arm)) for of_arm in study.runs.values()}
    count = max(seeds)
    which = "the last round" if at == "last" else "the round with the best validation accuracy"
    sentences = [
        "; ".join([*told, f"at {which}"]),
        _sentence(setting_words(study.records)),
        _sentence(matching_words(study)),
        f"Mean over {counted(count, 'seed')}"
        + (f" (some arms {min(seeds)})" if len(seeds) > 1 else "")
        + ("; ± is the half width of the two-sided 95 % t-interval" if count > 1 else ""),
    ]
    if len(study.runs) > 1 and 1 < count < ENOUGH_SEEDS:
        sentences.append("Intervals and t-tests of so few seeds rest on differences being normal")
    if len(study.runs) > 1:
        sentences.append(
            "Bold: ahead of every other arm by paired t-tests with p < 0.05 after Holm's correction"
            if bold
            else "No arm is ahead of every other by paired t-tests with p < 0.05 after Holm's "
            "correction, so none is in bold"
        )
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


# -- how it is written --------------------------------------------------------------------------


def to_latex(table: TableText) -> str:
    """Write a table for LaTeX; its preamble needs ``booktabs`` and ``siunitx``."""
    columns = [[cells[place] for _, cells in table.rows] for place in range(len(table.titles))]
    heads = [f"{{{escape(title)}}}" for title in table.titles]
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape(table.caption)}}}",
        rf"  \label{{{table.label}}}",
        r"  % \usepackage{booktabs,siunitx}",
        r"  \small\setlength{\tabcolsep}{3pt}",
        r"  \sisetup{separate-uncertainty=true, retain-explicit-plus=true, detect-weight=true}",
        r"  \begin{tabular}{@{}l" + "".join(map(_column_format, columns)) + "@{}}",
        r"    \toprule",
    ]
    if table.over:
        count = len(table.titles)
        lines += [
            rf"    & \multicolumn{{{count}}}{{c}}{{{escape(table.over)}}} \\",
            rf"    \cmidrule(l){{2-{count + 1}}}",
        ]
    lines += [
        "    " + " & ".join([escape(table.head), *heads]) + r" \\",
        r"    \midrule",
        *(
            "    " + " & ".join([escape(label), *map(_latex_cell, cells)]) + r" \\"
            for label, cells in table.rows
        ),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def _column_format(cells: Sequence[Cell]) -> str:
    numbers = [cell.number for cell in cells if cell.number is not None]
    if not numbers:
        return "c"
    sign = "+" if any(value[0] in "+-" for value, _ in numbers) else ""
    decimals = [value.lstrip("+-").partition(".") for value, _ in numbers]
    whole, part = (max(len(each[place]) for each in decimals) for place in (0, 2))
    # Of an interval siunitx counts the digits without their point: 10.2 has three.
    digits = max(len(half.replace(".", "").lstrip("0")) for _, half in numbers)
    uncertain = f"({digits})" if digits else ""
    return f"S[table-format={sign}{whole}.{part}{uncertain}]"


def _latex_cell(cell: Cell) -> str:
    if cell.number is None:
        text = escape(cell.text)
        return rf"{{\bfseries {text}}}" if cell.bold else f"{{{text}}}"
    value, half = cell.number
    number = f"{value} +- {half}" if half else value
    return rf"\bfseries {number}" if cell.bold else number


def to_markdown(table: TableText) -> str:
    """Write a table for Markdown, with its caption below."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    titles = [f"{table.over} {title}".strip() for title in table.titles]
    body = [
        line([label, *(f"**{cell.text}**" if cell.bold else cell.text for cell in cells)])
        for label, cells in table.rows
    ]
    rule = "|---|" + "---:|" * len(titles)
    return "\n".join([line([table.head, *titles]), rule, *body, "", table.caption, ""])


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Write tidy rows as CSV; what is missing is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Write tidy rows as Parquet."""
    stream = io.BytesIO()
    to_pandas([dict(row) for row in rows]).to_parquet(stream, index=False)
    return stream.getvalue()
