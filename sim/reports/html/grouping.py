"""Which runs are one arm: `report` takes folders together, and only what may be averaged is."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.keeping.records import SETTINGS_FILE
from sim.reports.html.settings import NOT_COMPARED, value_text
from sim.reports.html.writing import write_report
from sim.reports.runs import (
    STUDY_FILE,
    RunRecord,
    load_run,
    load_study,
    study_baseline,
    study_families,
    study_grid,
    study_notes,
    study_precision,
    study_refused,
)
from sim.settings import SettingsError
from sim.settings.tables import dotted

_NO_NUMBERS = ("engine",)
_ABSENT = object()


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
    order: list[str] = []
    for path in unique:
        if (path / STUDY_FILE).is_file():
            of_study = load_study(path)
            order += of_study
            records += [run for of_arm in of_study.values() for run in of_arm]
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
    asked = study_baseline(study)
    if baseline is None and asked in arms:
        baseline = asked
    refused = study_refused(study)
    # In the place that each arm has in the study.
    in_order = {arm: arms.get(arm, []) for arm in order if arm in {*arms, *refused}}
    return write_report(
        {**in_order, **arms},
        output,
        title=title,
        baseline=baseline,
        refused=refused,
        grid=study_grid(study),
        families=study_families(study),
        precision=study_precision(study),
        notes=study_notes(study),
    )


def group_by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs that may be averaged: same arm, same settings but for the seed, one a seed."""
    by_name: dict[str, dict[str, list[RunRecord]]] = {}
    for record in records:
        key = json.dumps(_numbers(record), sort_keys=True)
        by_name.setdefault(record.arm, {}).setdefault(key, []).append(record)
    arms: dict[str, list[RunRecord]] = {}
    for name, variants in by_name.items():
        tables = [dotted(_numbers(of_variant[0])) for of_variant in variants.values()]
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
    left_out = (*NOT_COMPARED, *_NO_NUMBERS)
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
