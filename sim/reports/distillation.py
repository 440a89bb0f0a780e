"""Reports on distillations: the table for the terminal, and the HTML file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sim.keeping.records import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    SETTINGS_FILE,
    make_folder,
    read_result,
    read_rows,
    write_text,
)
from sim.reports.html.drawings import Scale, interval_bar, interval_text
from sim.reports.html.origins import machines_of, relative_path, versions_of
from sim.reports.html.pages import template
from sim.reports.html.pictures import picture, write_figures
from sim.reports.html.settings import value_text
from sim.reports.html.tables import Table
from sim.reports.html.writing import REPORT_FILE
from sim.reports.runs import STUDY_FILE, number
from sim.reports.statistics import (
    SHARES,
    Bounds,
    Difference,
    Estimate,
    difference_by_seed,
    estimate,
)
from sim.reports.tables import FEW, p_text, percent, points
from sim.reports.terminal import NOTHING, FittedTable
from sim.reports.terminal import Column as TerminalColumn
from sim.reports.verdicts import few_seeds, verdict
from sim.server.observers import Row
from sim.settings import SettingsError
from sim.settings.tables import dotted, fill_in, read_yaml

DISTILLATIONS = "distillations"
"""Kind of a ``study.json`` whose runs are distillations."""

DIAGNOSTICS_FILE = "diagnostics.json"
SEARCH_FILE = "search.json"


@dataclass(frozen=True, kw_only=True)
class DistillRecord:
    """One distillation as its folder tells it.

    Attributes:
        folder: where it was read from.
        seed: pairs the runs of a repetition.
        settings: as resolved, plain values.
        result: content of ``result.json``; empty if there is none.
        epochs: the rows of every model, in the order in which they came.
        diagnostics: content of ``diagnostics.json``; empty if there is none.
        environment: content of ``environment.json``; empty if there is none.
    """

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    epochs: tuple[Row, ...]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``finished``, ``interrupted`` or ``failed``."""
        return str(self.result.get("status", "interrupted"))

    @property
    def models(self) -> Mapping[str, Row]:
        """What every model is worth and costs, by name, with one flat latency a batch size."""
        return {
            name: {
                **row,
                **{f"latency_{size}": value for size, value in row.get("latency_s", {}).items()},
            }
            for name, row in self.result.get("models", {}).items()
        }


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table of models.

    Attributes:
        title: with the unit.
        factor: from what is stored to what is shown.
        decimals: shown.
        varies: whether it differs from seed to seed, and so has an interval.
        rank: columns of lower rank find room on a narrow terminal first.
    """

    title: str
    factor: int | float = 1
    decimals: int = 1
    varies: bool = True
    rank: int = 1

    @property
    def bounds(self) -> Bounds:
        """The smallest and the largest value that is possible."""
        return SHARES if self.factor == 100 else (0.0, math.inf)


COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "accuracy": Column("accuracy (%)", 100),
        "macro_recall": Column("macro recall (%)", 100, rank=6),
        "worst_class_recall": Column("worst class (%)", 100, rank=7),
        "ece": Column("ECE (%)", 100, rank=5),
        "agreement": Column("agreement (%)", 100, rank=2),
        "kl_to_teacher": Column("KL (nats)", 1, 3, rank=4),
        "agreement_with_student": Column("as float (%)", 100, rank=3),
        "sparsity": Column("zeros (%)", 100, varies=False, rank=8),
        "parameters": Column("parameters", 1, 0, varies=False, rank=9),
        "flops": Column("MFLOPs", 1e-6, 3, varies=False, rank=10),
        "size_bytes": Column("bytes", 1, 0, varies=False, rank=11),
        "latency_1": Column("ms (1 row)", 1e3, 3, varies=False, rank=12),
        "latency_64": Column("ms (64 rows)", 1e3, 3, varies=False, rank=13),
    }
)
"""What is shown of every model: key of its row in ``result.json``, and how."""

COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "accuracy",
        "macro_recall": "macro recall",
        "worst_class_recall": "worst class",
        "ece": "ECE",
    }
)
"""What student and twin are compared in; all shares in [0, 1]."""


def is_distillation(folder: Path) -> bool:
    """Tell whether a folder is a distillation's, or that of a repetition of one."""
    try:
        if (folder / STUDY_FILE).is_file():
            study = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
            return isinstance(study, dict) and study.get("kind") == DISTILLATIONS
        settings = read_yaml(folder / SETTINGS_FILE, fast=True)
    except (OSError, ValueError):
        return False
    return {"teacher", "student", "method"} <= settings.keys()


def load_distillation(folder: Path) -> DistillRecord:
    """Read the folder of a distillation, finished or not.

    Raises:
        SettingsError: names the folder, if a file in it is damaged.
    """
    try:
        settings = fill_in(read_yaml(folder / SETTINGS_FILE, fast=True))
        metrics = folder / METRICS_FILE
        return DistillRecord(
            folder=folder,
            seed=int(settings["seed"]),
            settings=settings,
            result=read_result(folder, rows=True),
            epochs=tuple(read_rows(metrics)) if metrics.is_file() else (),
            diagnostics=_read_json(folder / DIAGNOSTICS_FILE),
            environment=_read_json(folder / ENVIRONMENT_FILE),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{str(folder)!r} cannot be read as the folder of a distillation: {reason}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no table")
    return content


def report_distillations(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report on distillations again, or on several seeds of one together.

    Args:
        paths: folders of distillations or of their repetitions.
        output: where the report goes; by default the first path.

    Raises:
        SettingsError: names the folder that cannot be read or written, or the seed that two
            folders share.
    """
    records: list[DistillRecord] = []
    for path in paths:
        if (path / STUDY_FILE).is_file():
            runs = json.loads((path / STUDY_FILE).read_text(encoding="utf-8"))["runs"]
            records += [load_distillation(path / run) for run in runs]
        elif (path / SEARCH_FILE).is_file():
            raise SettingsError(
                f"{str(path)!r} is the folder of a search, whose students were judged on "
                f"validation rows only: its grid is in {SEARCH_FILE}, and a report needs a "
                "distillation"
            )
        else:
            records.append(load_distillation(path))
    seeds = [record.seed for record in records]
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise SettingsError(
            f"a report on distillations takes one run a seed, got several with seed {twice[0]}: "
            "give runs that differ in nothing but their seeds"
        )
    title = str(records[0].settings.get("name", ""))
    return write_distill_report(records, output or paths[0], title=title)


def write_distill_report(runs: Sequence[DistillRecord], folder: Path, *, title: str) -> Path:
    """Write ``report.html`` and ``figures/<name>.svg`` and return the path of the former.

    Args:
        runs: of one distillation, one a seed; those that did not finish show how far they got.
        folder: is made if it does not exist; an older report in it is replaced.
        title: the heading.

    Raises:
        SettingsError: if there is no run, or the folder cannot be written.
    """
    # matplotlib takes a second, and whoever reads or lists runs draws nothing.
    from sim.reports.distillation_figures import CURVES, draw_distillation
    from sim.reports.figures import NARROW, WIDE

    if not runs:
        raise SettingsError("a report needs at least one run, got none")
    wide, narrow = (
        draw_distillation(
            {run.seed: run.epochs for run in runs},
            next((run.diagnostics for run in runs if run.diagnostics), {}),
            columns,
        )
        for columns in (WIDE, NARROW)
    )
    found = [
        picture(name, title, figure, narrow[name][0] if name in CURVES else None)
        for name, (figure, title) in wide.items()
    ]
    first = runs[0]
    text = template("distillation.html").render(
        title=title,
        overview=_overview(runs),
        models=_model_table(runs),
        differences=_difference_table(runs),
        pictures=[embedded for embedded, _ in found],
        answer=distill_answer(runs),
        remarks=distill_remarks(runs),
        pictured=None if len(runs) == 1 else first.seed,
        notes=[
            (key, value_text(value)) for key, value in dotted(first.result.get("notes", {})).items()
        ],
        told=[
            (key, value_text(value))
            for key, value in dotted(first.settings).items()
            if key not in ("name", "output", "seed", "seeds") and not key.startswith("search.")
        ],
        run_table=_run_table(runs, folder),
        machines=machines_of(run.environment for run in runs),
        versions=versions_of(run.environment for run in runs),
        many_seeds=len(runs) > 1,
        few=FEW,
        nothing=NOTHING,
    )
    make_folder(folder, folder)
    write_figures(folder, {embedded.name: text for embedded, text in found})
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def model_names(runs: Sequence[DistillRecord]) -> list[str]:
    """Return the models that runs measured, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run.models))


def estimates(runs: Sequence[DistillRecord], model: str) -> dict[str, Estimate]:
    """Average what the runs measured of a model, by key of `COLUMNS`."""
    found = {
        key: estimate(
            [
                value
                for run in runs
                if (value := number(run.models.get(model, {}), key)) is not None
            ],
            COLUMNS[key].bounds if key in COLUMNS else (0.0, math.inf),
        )
        for key in (*COLUMNS, "nll")
    }
    return {key: value for key, value in found.items() if value is not None}


def differences(runs: Sequence[DistillRecord]) -> dict[str, Difference]:
    """Compare the student with its undistilled twin, paired by seed: student - twin."""

    def by_seed(model: str, key: str) -> dict[int, float]:
        return {
            run.seed: value
            for run in runs
            if (value := number(run.models.get(model, {}), key)) is not None
        }

    found = {
        key: difference_by_seed(by_seed("twin", key), by_seed("student", key)) for key in COMPARED
    }
    return {key: value for key, value in found.items() if value is not None}


def distill_rows(runs: Sequence[DistillRecord]) -> dict[str, Any]:
    """Return the table as plain values: ``models``, and ``differences`` of student and twin.

    Values are as in ``result.json``; ``<key>_low`` and ``<key>_high`` are the 95 % t-interval over
    seeds, None for one seed.
    """
    models = {}
    for model in model_names(runs):
        row: dict[str, Any] = {}
        for key, value in estimates(runs, model).items():
            row |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
        models[model] = row
    return {
        "seeds": [run.seed for run in runs],
        "models": models,
        "differences": {
            key: {
                "mean": value.mean,
                "low": value.low,
                "high": value.high,
                "p_value": value.p_value,
                "p_sign_flip": value.p_sign_flip,
                "ahead": value.ahead,
                "pairs": value.n,
            }
            for key, value in differences(runs).items()
        },
    }


def cell(column: Column, value: Estimate | None, *, intervals: bool) -> str:
    """Write a number as its column shows it, with half of its interval where it has one."""
    if value is None:
        return NOTHING

    def shown(number: float) -> str:
        return f"{column.factor * number:,.{column.decimals}f}"

    text = shown(value.mean)
    if not intervals or value.low is None or value.high is None or not column.varies:
        return text
    half = value.half_width
    interval = f"[{shown(value.low)}, {shown(value.high)}]" if half is None else f"±{shown(half)}"
    return f"{text} {interval}{FEW if value.few else ''}"


def distill_table(runs: Sequence[DistillRecord]) -> FittedTable:
    """Return the table of models for the terminal; columns that no model fills are left out."""
    by_model = {model: estimates(runs, model) for model in model_names(runs)}
    several = len(runs) > 1
    return FittedTable(
        label="model",
        labels=list(by_model),
        columns=[
            TerminalColumn(
                title=column.title,
                cells=[
                    cell(column, found.get(key), intervals=several) for found in by_model.values()
                ],
                rank=column.rank,
            )
            for key, column in COLUMNS.items()
        ],
        title="test split"
        + (f"; mean over {len(runs)} seeds ± 95 % t-interval" if several else ""),
        caption=_caption(runs),
    )


def distill_answer(runs: Sequence[DistillRecord]) -> tuple[str, ...]:
    """Say what distillation changed in accuracy; where there is no twin, what was reached."""
    found = differences(runs).get("accuracy")
    if found is not None:
        said = verdict(found, found.p_value, arm="the student", baseline="its undistilled twin")
        return (said[0].upper() + said[1:],)
    reached = estimates(runs, "student").get("accuracy")
    return () if reached is None else (f"The student has {percent(reached)} % on the test split.",)


def distill_remarks(runs: Sequence[DistillRecord]) -> tuple[str, ...]:
    """Say what so few seeds cannot show, where they are few."""
    return few_seeds(list(differences(runs).values()))


def _caption(runs: Sequence[DistillRecord]) -> str:
    parts = []
    for key, value in differences(runs).items():
        text = points(value.mean)
        if value.low is not None and value.high is not None:
            few = FEW if value.few else ""
            text += f" [{points(value.low)}, {points(value.high)}]{few}, p "
            text += p_text(value.p_value, few=value.few)
        parts.append(f"{COMPARED[key]} {text}")
    return f"student - twin, points: {'; '.join(parts)}" if parts else ""


def _overview(runs: Sequence[DistillRecord]) -> str:
    first = runs[0]
    seeds = ", ".join(str(run.seed) for run in runs[:10]) + (", ..." if len(runs) > 10 else "")
    sizes = ", ".join(f"{count:,} {name}" for name, count in first.result.get("rows", {}).items())
    method = dotted(first.settings).get("method.name", "")
    return f"method {method}, seed{'s' * (len(runs) > 1)} {seeds}" + (
        f"; rows: {sizes}" if sizes else ""
    )


def _model_table(runs: Sequence[DistillRecord]) -> Table:
    several = len(runs) > 1
    by_model = {model: estimates(runs, model) for model in model_names(runs)}
    shown = [key for key in COLUMNS if any(key in found for found in by_model.values())]
    rows = [
        [model, *(cell(COLUMNS[key], found.get(key), intervals=several) for key in shown)]
        for model, found in by_model.items()
    ]
    header = ["model", *(COLUMNS[key].title for key in shown)]
    return Table(header, rows, caption="What every model is worth on the test split, and costs")


def _difference_table(runs: Sequence[DistillRecord]) -> Table | None:
    rows = []
    found = differences(runs)
    scale = Scale.of(found.values())
    for key, value in found.items():
        rows.append(
            [
                COMPARED[key],
                points(value.mean),
                interval_text(value),
                interval_bar(value, scale),
                p_text(value.p_value, few=value.few),
                p_text(value.p_sign_flip),
                str(value.n),
            ]
        )
    header = ["measure", "student - twin (points)", "95 % interval", scale.text]
    header += ["p", "p (sign-flip)", "pairs"]
    return Table(header, rows, caption="Student minus twin") if rows else None


def _run_table(runs: Sequence[DistillRecord], folder: Path) -> Table:
    def shown(run: DistillRecord, model: str) -> str:
        value = number(run.models.get(model, {}), "accuracy")
        return NOTHING if value is None else f"{100 * value:.1f}"

    rows = []
    for run in runs:
        seconds = number(run.result, "seconds")
        rows.append(
            [
                relative_path(run.folder, folder),
                run.status,
                str(run.seed),
                *(shown(run, model) for model in ("student", "twin")),
                NOTHING if seconds is None else f"{seconds:.1f}",
                str(run.result.get("weights_sha256") or NOTHING)[:12],
            ]
        )
    header = ["folder", "status", "seed", "student (%)", "twin (%)", "seconds"]
    header.append("student's weights (SHA-256)")
    return Table(header, rows, left=2, caption="Every run")
