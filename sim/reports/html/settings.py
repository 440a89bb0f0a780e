"""What runs were told: settings as a reader would write them, and those in which arms differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sim.reports.html.tables import Table
from sim.reports.runs import RunRecord, model_label
from sim.reports.terminal import NOTHING
from sim.settings.tables import dotted

NOT_COMPARED = ("name", "output", "seed", "study")
"""Sections in which runs of a study differ by design, or that change no number."""

_MOST_COLUMNS = 5
"""Arms, or else settings, that stand side by side; of more of both each arm has a list."""

Settings = list[tuple[str, list[str]]]


def value_text(value: Any) -> str:
    """Write a setting as a reader would in YAML; models by their short names."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return ", ".join(model_label(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def split_settings(
    runs: Mapping[str, Sequence[RunRecord]],
) -> tuple[Settings, list[tuple[str, str]]]:
    """Return the settings in which arms differ, one text for each arm, and those in common.

    The seed, the name and the place of the output differ by design and are left out.
    """
    by_arm = {
        arm: [
            dotted({k: v for k, v in run.settings.items() if k not in NOT_COMPARED})
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


def differing_table(arms: Sequence[str], differing: Settings) -> Table | None:
    """Return what each arm has for itself: arms or settings side by side, or a list an arm."""
    if not differing:
        return None
    caption = "Settings in which arms differ"
    if len(arms) <= _MOST_COLUMNS:
        rows = [[key, *texts] for key, texts in differing]
        return Table(["setting", *arms], rows, left=len(arms) + 1, caption=caption)
    if len(differing) <= _MOST_COLUMNS:
        rows = [[arm, *(texts[place] for _, texts in differing)] for place, arm in enumerate(arms)]
        header = ["arm", *(key for key, _ in differing)]
        return Table(header, rows, left=len(header), caption=caption)
    lists = [
        ", ".join(f"{key}={texts[place]}" for key, texts in differing if texts[place] != NOTHING)
        for place in range(len(arms))
    ]
    rows = [[arm, told] for arm, told in zip(arms, lists, strict=True)]
    return Table(["arm", "where it differs from others"], rows, left=2, caption=caption)
