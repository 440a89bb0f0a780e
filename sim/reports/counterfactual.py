"""What replays and values of clients say: tables for a terminal and a report."""

from collections.abc import Mapping
from typing import Any

from sim.reports.tables import kilobytes, points
from sim.reports.terminal import NOTHING, Column, FittedTable

TITLES: Mapping[str, str] = {
    "accuracy": "mean client",
    "worst_accuracy": "worst client",
    "personal_accuracy": "own mix",
    "server_accuracy": "server model",
    "ensemble_accuracy": "ensemble",
    "bytes_up": "kB up",
    "bytes_down": "kB down",
}

MOST_CLIENTS = 40
"""Clients that a terminal's table shows; ``--json`` and ``replay.json`` have all."""


def replay_table(found: Mapping[str, Any]) -> FittedTable:
    """Return run, replay and difference, for the federation and then for each client.

    Args:
        found: the content of ``replay.json``.
    """
    labels: list[str] = []
    cells: list[tuple[str, str, str]] = []
    for name, row in found["measures"].items():
        labels.append(TITLES[name])
        bytes_ = name.startswith("bytes_")
        cells.append(tuple(_cell(row[side], side, bytes_) for side in _SIDES))  # type: ignore[arg-type]
    for row in found["clients"][:MOST_CLIENTS]:
        mark = " (left out)" if row.get("left_out") else " (flipped)" if row.get("flipped") else ""
        labels.append(f"client {row['client']}{mark}")
        cells.append(tuple(_cell(row[side], side, False) for side in _SIDES))  # type: ignore[arg-type]
    return FittedTable(
        label="test split, last round",
        labels=labels,
        columns=[
            Column(title=side, cells=[each[place] for each in cells], rank=place)
            for place, side in enumerate(_SIDES)
        ],
        title=otherwise(found),
    )


_SIDES = ("run", "replay", "difference")


def _cell(value: float | None, side: str, bytes_: bool) -> str:
    if value is None:
        return NOTHING
    if bytes_:
        sign = "+" if side == "difference" and value > 0 else ""
        return f"{sign}{kilobytes(value)}" if value >= 0 else f"-{kilobytes(-value)}"
    return points(value, signed=side == "difference")


def otherwise(found: Mapping[str, Any]) -> str:
    """Say what is otherwise in a replay, in a few words."""
    parts = []
    for name, clients in (("without", found["without"]), ("labels flipped of", found["flipped"])):
        if clients:
            some = ", ".join(map(str, clients[:10])) + ", ..." * (len(clients) > 10)
            parts.append(f"{name} client{'s' * (len(clients) > 1)} {some}")
    parts += [f"{path} {_short(after)}" for path, (_, after) in found["set"].items()]
    since = f", from round {found['from_round']} on" if found["from_round"] else ""
    return f"replay {'; '.join(parts) or 'with nothing otherwise'}{since}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def replay_words(found: Mapping[str, Any]) -> list[str]:
    """Return sentences: when the two part, and who is counted."""
    first, (before, after) = found["first_difference"], found["weights_sha256"]
    said = []
    if before == after:
        said.append(f"Equal bits: both end with the weights {str(before)[:16]}.")
    elif first is None:
        said.append("No figure of those who remain differs in any round.")
    else:
        said.append(f"The first figure of those who remain that differs is of round {first}.")
    if found["without"]:
        said.append(
            "Means, bytes and the worst client are of those who remain, on both sides; who is left "
            "out goes on learning from the others, and is shown apart."
        )
        if "ensemble_accuracy" in found["measures"]:
            said.append("Of the run's ensemble those who are left out were a part.")
    if len(found["clients"]) > MOST_CLIENTS:
        said.append(f"Clients beyond the first {MOST_CLIENTS} are in replay.json.")
    return said
