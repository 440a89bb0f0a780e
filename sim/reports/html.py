"""The report: one HTML file that needs nothing else, and the figures beside it."""

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedkd.names import printable
from sim.keeping.records import SETTINGS_FILE, make_folder, write_text
from sim.reports.attacks import (
    LEAKAGE_CAPTION,
    attack_tables,
    is_attacked,
    leakage_cells,
)
from sim.reports.counterfactual import VALUE_WORDS, is_of_run, value_table
from sim.reports.families import Families, compare_families
from sim.reports.grids import Grid
from sim.reports.power import PRECISION
from sim.reports.runs import (
    STUDY_FILE,
    RunRecord,
    load_run,
    load_study,
    model_label,
    number,
    study_baseline,
    study_families,
    study_grid,
    study_precision,
    study_refused,
)
from sim.reports.statistics import (
    ACCURACIES,
    MEASURES,
    ArmSummary,
    At,
    Difference,
    baseline_of,
    compare_arms,
    compare_pairs,
    corrected,
    counted,
    epsilon_of,
    measured_title,
    summarize,
)
from sim.reports.tables import (
    FEW,
    audit_text,
    epsilon_text,
    kilobytes,
    measure_text,
    p_text,
    percent,
    plane_tables,
    points,
    seconds_to_target,
    simulated_seconds,
    target_title,
)
from sim.reports.terminal import NOTHING
from sim.reports.verdicts import verdicts
from sim.settings import SettingsError

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
TEMPLATES = Path(__file__).parent

ALT_TEXTS: Mapping[str, str] = {
    "accuracy_in_grid": "Accuracy of every arm of the sweep in colours and numbers",
    "accuracy_by_value": "Accuracy against a number that is swept over",
    "accuracy_by_round": "Mean client accuracy by round for each arm",
    "accuracy_by_exchange": "Mean client accuracy against kilobytes exchanged for each arm",
    "accuracy_by_time": "Mean client accuracy against simulated seconds for each arm",
    "accuracy_by_epsilon": "Mean client accuracy against epsilon, and kilobytes, for each arm",
    "accuracy_by_client": "Accuracy of every client in the last round for each arm",
    "targets_by_round": "Entropy of shared targets and peer disagreement by round",
    "membership_roc": "True against false positives of membership attacks from three places",
    "accuracy_by_leak": "Mean client accuracy against what attacks found, for each arm",
}

COMPARED: Sequence[tuple[str, At, str]] = (
    ("accuracy", "last", "mean client, last round"),
    ("accuracy", "selected", "mean client, selected round"),
    ("worst_accuracy", "last", "worst client, last round"),
    ("personal_accuracy", "last", "own mix, last round"),
    ("macro_recall", "last", "macro recall, last round"),
)
"""What arms are compared in: key, round and title."""

MOST_BY_ARM = 24
"""With more arms a sweep has no figure with a line for each, and no table of every pair."""

_NOT_COMPARED = ("name", "output", "seed", "study")
_NO_NUMBERS = ("engine",)


def write_report(
    runs: Mapping[str, Sequence[RunRecord]],
    folder: Path,
    *,
    title: str,
    baseline: str | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
    grid: Grid | None = None,
    families: Families = MappingProxyType({}),
    precision: float = PRECISION,
) -> Path:
    """Write ``report.html`` and ``figures/<name>.png`` and return the path of the former.

    Args:
        runs: of each arm, one a seed.
        folder: is made if it does not exist; an older report in it is replaced.
        title: the heading.
        baseline: the arm that the others are compared with; the first by default.
        refused: arms that could not run, each with the reason.
        grid: how arms that come from a sweep lie side by side.
        families: arms that belong to one question; where there are any only their pairs are shown.
        precision: the half width of an interval that is wanted, a share.

    Raises:
        SettingsError: if there is no run, an arm has two runs with one seed, the baseline is none
            of the arms, or the folder cannot be written.
    """
    # matplotlib takes a second, and whoever reads or lists runs draws nothing.
    from sim.reports.attack_figures import ATTACK_FIGURES, draw_attacks
    from sim.reports.figures import FIGURES, draw_figures, to_png
    from sim.reports.grid_figures import GRID_FIGURES, NARROW, draw_grid

    order = list(runs)
    runs = {arm: tuple(of_arm) for arm, of_arm in runs.items() if of_arm}
    if not runs:
        raise SettingsError("a report needs at least one run, got none")
    summaries = [summarize(arm, of_arm) for arm, of_arm in runs.items()]
    crowded = grid is not None and len(runs) > MOST_BY_ARM
    images = {} if crowded else {name: to_png(each) for name, each in draw_figures(runs).items()}
    narrow: dict[str, bytes] = {}
    images |= {name: to_png(each) for name, each in draw_attacks(runs).items()}
    if grid is not None:
        images = {name: to_png(each) for name, each in draw_grid(runs, grid).items()} | images
        narrow = {name: to_png(each) for name, each in draw_grid(runs, grid, NARROW).items()}
    pictures = [
        Image(name, ALT_TEXTS[name], _base64(image), _base64(narrow.get(name, b"")))
        for name, image in images.items()
    ]
    differing, common = split_settings(runs)
    text = template("report.html").render(
        title=title,
        overview=_overview(summaries, runs),
        summary=_summary_table(summaries, [arm for arm in order if arm in runs or arm in refused]),
        refused=Table(["arm", "reason"], [*refused.items()], left=2) if refused else None,
        planes=_plane_tables(runs, grid, refused) if grid is not None else [],
        measured=measured_title(runs),
        crowded=MOST_BY_ARM if crowded else 0,
        verdicts=verdicts(runs, baseline, precision),
        differences=_difference_table(runs, baseline),
        pairs=None if crowded or families else _pair_table(runs),
        families=_family_tables(runs, families),
        privacy=_privacy_table(runs),
        promises=promises_of(runs),
        leakage=_leakage_table(runs),
        leakage_caption=LEAKAGE_CAPTION,
        attacks=_attack_tables(runs),
        audits=audits_of(runs),
        values=_value_tables(runs),
        value_words=VALUE_WORDS,
        figures=[each for each in pictures if each.name not in GRID_FIGURES],
        grid_figures=[each for each in pictures if each.name in GRID_FIGURES],
        arms=list(runs),
        differing=differing,
        common=common,
        clients=[_client_table(arm, of_arm) for arm, of_arm in runs.items()],
        run_table=_run_table(runs, folder),
        versions=versions_of(run.environment for of_arm in runs.values() for run in of_arm),
        many_seeds=any(len(summary.seeds) > 1 for summary in summaries),
        few=FEW,
        nothing=NOTHING,
    )
    make_folder(folder, folder)
    figures = make_folder(folder, folder / FIGURES_FOLDER)
    for name in (*FIGURES, *GRID_FIGURES, *ATTACK_FIGURES):
        if name in images:
            write_bytes(figures / f"{name}.png", images[name])
        else:
            # Of an older report on other runs.
            (figures / f"{name}.png").unlink(missing_ok=True)
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def report(
    paths: Sequence[Path], output: Path | None = None, *, baseline: str | None = None
) -> Path:
    """Report on run folders and study folders together.

    Runs are grouped by arm. Runs that would share an arm but differ in settings that change
    numbers become arms of their own, named after what differs; so does a second run of one seed.

    Args:
        paths: in the order of the arms.
        output: where the report goes; by default the path itself if there is one, else
            ``report/`` in the folder that all paths have in common.
        baseline: the arm that the others are compared with; by default that of the only study
            among the paths, or else the first arm.

    Returns:
        The path of the report.

    Raises:
        SettingsError: names the folder that cannot be read or written.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    if not unique:
        raise SettingsError("a report needs at least one run or study folder, got none")
    records: list[RunRecord] = []
    for path in unique:
        if (path / STUDY_FILE).is_file():
            records += [run for of_arm in load_study(path).values() for run in of_arm]
        elif (path / SETTINGS_FILE).is_file():
            records.append(load_run(path))
        else:
            raise SettingsError(
                f"{str(path)!r} is neither a run folder, which has a {SETTINGS_FILE}, nor a study "
                f"folder, which has a {STUDY_FILE} once all its runs are finished; the runs of an "
                "unfinished study can be named one by one"
            )
    # A run may be given both by itself and as part of its study.
    records = list({record.folder.resolve(): record for record in records}.values())
    if output is None and len(unique) == 1:
        output = unique[0]
    elif output is None:
        parents = [str(path.resolve().parent) for path in unique]
        output = Path(os.path.commonpath(parents)) / "report"
    names = list(dict.fromkeys(str(record.settings.get("name", "")) for record in records))
    arms = group_by_arm(records)
    title = ", ".join(filter(None, names))
    if len(unique) > 1 or not (unique[0] / STUDY_FILE).is_file():
        return write_report(arms, output, title=title, baseline=baseline)
    (study,) = unique
    of_study = study_baseline(study)
    if baseline is None and of_study in arms:
        baseline = of_study
    refused = study_refused(study)
    # In the place that each arm has in the study.
    in_order = {arm: arms.get(arm, []) for arm in load_study(study) if arm in {*arms, *refused}}
    return write_report(
        {**in_order, **arms},
        output,
        title=title,
        baseline=baseline,
        refused=refused,
        grid=study_grid(study),
        families=study_families(study),
        precision=study_precision(study),
    )


def group_by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs that may be averaged: same arm, same settings but for the seed, one a seed."""
    by_name: dict[str, dict[str, list[RunRecord]]] = {}
    for record in records:
        key = json.dumps(_numbers(record), sort_keys=True)
        by_name.setdefault(record.arm, {}).setdefault(key, []).append(record)
    arms: dict[str, list[RunRecord]] = {}
    for name, variants in by_name.items():
        tables = [flatten(_numbers(of_variant[0])) for of_variant in variants.values()]
        for table, of_variant in zip(tables, variants.values(), strict=True):
            label = name if len(variants) == 1 else f"{name} ({_what_differs(table, tables)})"
            for repeat, of_repeat in enumerate(_one_a_seed(of_variant), start=1):
                of_label = label if repeat == 1 else f"{label} #{repeat}"
                while of_label in arms:
                    of_label += "'"
                arms[of_label] = of_repeat
    return arms


def _one_a_seed(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Deal runs out so that no group has a seed twice: finished ones first."""
    groups: list[list[RunRecord]] = []
    for record in sorted(records, key=lambda record: record.status != "finished"):
        for group in groups:
            if all(record.seed != other.seed for other in group):
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _numbers(record: RunRecord) -> dict[str, Any]:
    """Return the settings that change numbers, without the seed."""
    left_out = (*_NOT_COMPARED, *_NO_NUMBERS)
    return {key: value for key, value in record.settings.items() if key not in left_out}


def _what_differs(table: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in table if any(other.get(key, _ABSENT) != table[key] for other in tables)]
    parts = [f"{_shortest(key, table)}={value_text(table[key])}" for key in keys[:3]]
    return ", ".join([*parts, "..."] if len(keys) > 3 else parts) or "otherwise"


def _shortest(key: str, table: Mapping[str, Any]) -> str:
    """Return the shortest end of a dotted key that no other key ends in: ``lr``."""
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[start:])
        if sum(f".{other}".endswith(f".{end}") for other in table) == 1:
            return end
    return key


_ABSENT = object()


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def value_text(value: Any) -> str:
    """Write a setting as a reader would in YAML; models by their short names."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return ", ".join(model_label(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


Settings = list[tuple[str, list[str]]]


def split_settings(
    runs: Mapping[str, Sequence[RunRecord]],
) -> tuple[Settings, list[tuple[str, str]]]:
    """Return the settings in which arms differ, one text for each arm, and those in common.

    The seed, the name and the place of the output differ by design and are left out.
    """
    by_arm = {
        arm: [
            flatten({k: v for k, v in run.settings.items() if k not in _NOT_COMPARED})
            for run in of_arm
        ]
        for arm, of_arm in runs.items()
    }
    keys = dict.fromkeys(key for tables in by_arm.values() for table in tables for key in table)
    differing: Settings = []
    common: list[tuple[str, str]] = []
    for key in keys:
        texts = []
        for tables in by_arm.values():
            found = dict.fromkeys(
                value_text(table[key]) if key in table else NOTHING for table in tables
            )
            texts.append(" | ".join(found))
        if len(set(texts)) == 1 and " | " not in texts[0]:
            common.append((key, texts[0]))
        else:
            differing.append((key, texts))
    return differing, common


@dataclass(frozen=True, slots=True)
class Image:
    """A figure to embed: PNG bytes in base64, and what it shows for those who cannot see it.

    Where there is a narrow form it is shown on a narrow screen.
    """

    name: str
    alt: str
    data: str
    narrow: str = ""


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; the first ``left`` columns are words, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""


def template(name: str) -> Any:
    """Return one of the pages beside this file, to be rendered; texts are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Autoescape leaves control characters as they are.
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    return environment.get_template(name)


def _overview(summaries: Sequence[ArmSummary], runs: Mapping[str, Sequence[RunRecord]]) -> str:
    arms = len(summaries)
    total = sum(len(of_arm) for of_arm in runs.values())
    seeds = {seed for summary in summaries for seed in summary.seeds}
    return (
        f"{total} run{'s' * (total != 1)}: {arms} arm{'s' * (arms != 1)}, "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} "
        f"({', '.join(map(str, sorted(seeds)[:10]))}{', ...' if len(seeds) > 10 else ''})"
    )


def _plane_tables(
    runs: Mapping[str, Sequence[RunRecord]], grid: Grid, refused: Mapping[str, str]
) -> list[Table]:
    return [
        Table(
            [plane.label, *(column.title for column in plane.columns)],
            [
                [label, *(column.cells[row] for column in plane.columns)]
                for row, label in enumerate(plane.labels)
            ],
            title=plane.title,
        )
        for plane in plane_tables(runs, grid, refused)
    ]


def _summary_table(summaries: Sequence[ArmSummary], order: Sequence[str]) -> Table:
    """Return a line for each arm, without numbers for those that could not run."""
    shown = [
        key
        for key in ACCURACIES
        if key == "accuracy" or any(key in summary.last for summary in summaries)
    ]
    header = ["arm", "seeds", "last round", f"{ACCURACIES['accuracy']} (%)"]
    # Runs that promise privacy select no round by validation rows.
    selects = any(summary.selected for summary in summaries)
    header += ["same, at selected round (%)", "selected round"] * selects
    header += [f"{ACCURACIES[key]} (%)" for key in shown[1:]]
    measures = [key for key in MEASURES if any(key in each.measures for each in summaries)]
    private = any(summary.epsilon is not None for summary in summaries)
    header += ["epsilon"] * private
    header += ["kB up", "kB down", *(MEASURES[key].title for key in measures), "seconds"]
    clocked = any(summary.simulated_s is not None for summary in summaries)
    aimed = any(summary.targets for summary in summaries)
    header += ["simulated s"] * clocked + [target_title(summaries)] * aimed
    rows = {}
    for summary in summaries:
        rows[summary.arm] = [
            summary.arm + ("" if summary.finished else " (interrupted)"),
            str(len(summary.seeds))
            + (f" (+{summary.left_out} interrupted)" if summary.left_out else ""),
            _span(summary.last_rounds),
            percent(summary.last.get("accuracy")),
            *[percent(summary.selected.get("accuracy")), _span(summary.selected_rounds)] * selects,
            *(percent(summary.last.get(key)) for key in shown[1:]),
            *[epsilon_text(summary.epsilon)] * private,
            kilobytes(summary.bytes_up),
            kilobytes(summary.bytes_down),
            *(measure_text(key, summary) for key in measures),
            NOTHING if summary.seconds is None else f"{summary.seconds.mean:.1f}",
            *[simulated_seconds(summary.simulated_s)] * clocked,
            *[seconds_to_target(summary)] * aimed,
        ]
    empty = [NOTHING] * (len(header) - 1)
    return Table(header, [rows.get(arm, [f"{arm} (refused)", *empty]) for arm in order])


def _privacy_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Say what each arm promises; None where none does."""
    promised = (run.privacy.get("mechanism") for own in runs.values() for run in counted(own))
    if not any(promised):
        return None
    rows = []
    for arm, of_arm in runs.items():
        chosen = counted(of_arm)
        told = [run.privacy for run in chosen]
        words = [_told(told, key) for key in ("mechanism", "where", "unit")]
        bound = [value for each in told if (value := number(each, "renyi")) is not None]
        rows.append(
            [
                arm,
                *words,
                epsilon_text(epsilon_of(chosen)),
                epsilon_text(max(bound, default=None)),
                *(_told(told, key) for key in ("delta", "budget")),
            ]
        )
    header = ["arm", "mechanism", "where", "unit", "epsilon", "Renyi bound", "delta", "budget"]
    return Table(header, rows, left=4)


def audits_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Return a sentence for each audited run: what its canaries proved."""
    return [
        f"{arm}, seed {run.seed}: {audit_text(audit)}."
        for arm, of_arm in runs.items()
        for run in counted(of_arm)
        if isinstance(audit := run.privacy.get("audit"), dict)
    ]


def _told(tables: Sequence[Mapping[str, Any]], key: str) -> str:
    found = dict.fromkeys(
        NOTHING if (value := table.get(key)) is None else value_text(value) for table in tables
    )
    return " | ".join(found)


def promises_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Return the sentences of what is promised to whom, each once."""
    said = (run.privacy.get("promise") for of_arm in runs.values() for run in counted(of_arm))
    return list(dict.fromkeys(text for text in said if isinstance(text, str)))


def _leakage_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Put accuracy and cost of each arm beside what leaks; None where nothing was attacked."""
    if not is_attacked(runs) or len(runs) < 2:
        return None
    cells = leakage_cells(runs)
    rows = [list(row) for row in zip(runs, *cells.values(), strict=True)]
    return Table(["arm", *cells], rows)


def _attack_tables(runs: Mapping[str, Sequence[RunRecord]]) -> list[tuple[str, Table]]:
    """Return what was found of a single run, table by table; of several there is one table."""
    found = [run.attacks for of_arm in runs.values() for run in of_arm if run.attacks]
    if len(found) != 1:
        return []
    tables = []
    for fitted in attack_tables(found[0]):
        columns = [column for column in fitted.columns if not column.empty]
        rows = [
            [label, *(column.cells[place] for column in columns)]
            for place, label in enumerate(fitted.labels)
        ]
        table = Table([fitted.label, *(column.title for column in columns)], rows)
        tables.append((f"{fitted.title}: {fitted.caption}", table))
    return tables


def _value_tables(runs: Mapping[str, Sequence[RunRecord]]) -> list[tuple[str, Table]]:
    """Return what clients of each run are worth, as far as somebody asked and it is of that run."""
    tables = []
    for arm, of_arm in runs.items():
        for run in of_arm:
            if not is_of_run(run.value, run.result.get("weights_sha256")):
                continue
            fitted = value_table(run.value)
            columns = [column for column in fitted.columns if not column.empty]
            rows = [
                [label, *(column.cells[place] for column in columns)]
                for place, label in enumerate(fitted.labels)
            ]
            table = Table([fitted.label, *(column.title for column in columns)], rows)
            tables.append((f"{arm}, seed {run.seed}: {fitted.caption}", table))
    return tables


def _span(rounds: Sequence[int | None]) -> str:
    known = [round for round in rounds if round is not None]
    if not known:
        return NOTHING
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low} to {high}"


def _difference_table(
    runs: Mapping[str, Sequence[RunRecord]], baseline: str | None
) -> Table | None:
    if len(runs) < 2:
        return None
    rows = []
    for key, at, title in COMPARED:
        differences = compare_arms(runs, key, at, baseline)
        if at == "selected" and not any(differences.values()):
            continue
        p_holm = corrected(differences)
        rows += [
            [title, arm, *_difference_cells(difference, p_holm[arm])]
            for arm, difference in differences.items()
        ]
    header = ["accuracy", "arm", *DIFFERENCE_HEADER]
    return Table(header, rows, left=2, title=baseline_of(runs, baseline))


def _pair_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Compare every arm with every other; two arms have one pair, which stands above already."""
    if len(runs) < 3:
        return None
    differences = compare_pairs(runs, "accuracy", "last")
    p_holm = corrected(differences)
    rows = [
        [other, first, *_difference_cells(difference, p_holm[first, other])]
        for (first, other), difference in differences.items()
    ]
    return Table(["arm", "minus", *DIFFERENCE_HEADER], rows, left=2)


def _family_tables(runs: Mapping[str, Sequence[RunRecord]], families: Families) -> list[Table]:
    """Compare every pair of arms of each family."""
    return [
        Table(
            ["arm", "minus", *DIFFERENCE_HEADER],
            [
                [other, first, *_difference_cells(difference, p_holm)]
                for (first, other), (difference, p_holm) in pairs.items()
            ],
            left=2,
            title=name,
        )
        for name, pairs in compare_families(runs, families).items()
    ]


DIFFERENCE_HEADER = (
    "difference (points)",
    "95 % interval",
    "p",
    "p (Holm)",
    "p (sign-flip)",
    "ahead",
    "pairs",
)


def _difference_cells(difference: Difference | None, p_holm: float | None) -> list[str]:
    if difference is None:
        return [*[NOTHING] * 6, "0"]
    few = difference.few
    interval = (
        NOTHING
        if difference.low is None or difference.high is None
        else f"{points(difference.low)} to {points(difference.high)}{FEW if few else ''}"
    )
    return [
        points(difference.mean),
        interval,
        p_text(difference.p_value, few=few),
        p_text(p_holm, few=few),
        p_text(difference.p_sign_flip),
        str(difference.ahead),
        str(difference.n),
    ]


def _client_table(arm: str, runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in counted(runs):
        labels = run.model_labels
        judged = {row["client"]: row for row in run.last_clients}
        for client in range(run.num_clients):
            row = judged.get(client, {})
            shares = [
                NOTHING if (value := number(row, key)) is None else f"{100 * value:.1f}"
                for key in ("accuracy", "personal_accuracy", "macro_recall", "worst_class_recall")
            ]
            sent, received = run.bytes_up.get(client, 0), run.bytes_down.get(client, 0)
            rows.append(
                [
                    labels[client],
                    str(run.seed),
                    f"{client} (left out)" if row.get("left_out") else str(client),
                    *shares,
                    f"{sent / 1e3:,.1f}",
                    f"{received / 1e3:,.1f}",
                ]
            )
    header = ["model", "seed", "client", "accuracy (%)", "own mix (%)", "macro recall (%)"]
    header += ["worst class (%)", "kB up", "kB down"]
    return Table(header, rows, title=arm)


def _run_table(runs: Mapping[str, Sequence[RunRecord]], folder: Path) -> Table:
    rows = []
    for arm, of_arm in runs.items():
        for run in of_arm:
            missing = sum(
                int((number(row, "participants") or 0) - (number(row, "replies") or 0))
                for row in run.federation
            )
            rows.append(
                [
                    arm,
                    relative_path(run.folder, folder),
                    str(run.result.get("status", run.status)),
                    str(run.seed),
                    f"{len(run.federation)} of {run.settings.get('rounds', NOTHING)}",
                    str(missing),
                    str(run.result.get("weights_sha256") or NOTHING)[:12],
                ]
            )
    header = ["arm", "folder", "status", "seed", "rounds", "replies missing", "weights (SHA-256)"]
    return Table(header, rows, left=3)


def relative_path(path: Path, start: Path) -> str:
    """Return the way from one folder to another, where there is one."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path)


def versions_of(environments: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what runs ran on, by name; several values where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for key, value in flatten(environment).items():
            if value is not None:
                name = key.removeprefix("packages.").replace("_", " ")
                found.setdefault(name, {})[str(value)] = None
    return [(name, " | ".join(values)) for name, values in found.items()]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
