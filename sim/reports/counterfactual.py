"""What replays and values of clients say: tables for a terminal and a report."""

from collections.abc import Mapping, Sequence
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
        said.append(f"Equal bits: clients of both end with the weights {str(before)[:16]}.")
        if first is not None:
            said.append(f"Other figures, such as the server model's, differ from round {first} on.")
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


def is_of_run(found: Mapping[str, Any], weights_sha256: object) -> bool:
    """Tell whether this is what `fedkd value` found of a run that ended with these weights.

    Args:
        found: the content of ``value.json``, whoever wrote it.
        weights_sha256: of the run.
    """
    asked, clients = found.get("asked"), found.get("clients")
    if weights_sha256 is None or found.get("run") != weights_sha256:
        return False
    numbers = [found.get("all"), found.get("coalitions")]
    if not isinstance(asked, dict) or not {"method", "of", "split", "permutations"} <= asked.keys():
        return False
    worth = {"loo": ("leave_one_out",), "shapley": ("shapley",)}.get(
        asked["method"], ("leave_one_out", "shapley")
    )
    wanted = {"client", "rows", "classes", "accuracy", *worth}
    return (
        all(isinstance(each, int | float) for each in numbers)
        and isinstance(clients, list)
        and all(isinstance(row, dict) and wanted <= row.keys() for row in clients)
    )


def value_table(found: Mapping[str, Any], names: Sequence[str] = ()) -> FittedTable:
    """Return what clients are worth, in points, the ones of most worth first.

    Args:
        found: the content of ``value.json``.
        names: of classes.
    """
    asked = found["asked"]
    by = "shapley" if asked["method"] == "shapley" else "leave_one_out"
    rows = sorted(found["clients"], key=lambda row: (-row[by], row["client"]))
    return FittedTable(
        label="client",
        labels=[str(row["client"]) for row in rows],
        columns=[
            Column(title="rows", cells=[str(row["rows"]) for row in rows], rank=3),
            Column(
                title="classes", cells=[_classes(row["classes"], names) for row in rows], rank=4
            ),
            Column(title="accuracy", cells=[_points(row["accuracy"]) for row in rows], rank=2),
            Column(
                title="leave one out",
                cells=[_worth(row.get("leave_one_out")) for row in rows],
                rank=0,
            ),
            Column(
                title="Shapley", cells=[_worth(row.get("shapley"), row) for row in rows], rank=1
            ),
        ],
        title="what clients are worth to the others, in points of accuracy",
        caption=_caption(found),
    )


def _points(value: float) -> str:
    return points(value, signed=False)


def _worth(value: float | None, row: Mapping[str, Any] | None = None) -> str:
    """Write points with two digits: what a client is worth is often less than one."""
    if value is None:
        return NOTHING
    text = f"{round(100 * value, 2) + 0.0:+.2f}"
    error = None if row is None else row.get("standard_error")
    return text if error is None else f"{text} ±{100 * error:.2f}"


def _classes(classes: Sequence[int], names: Sequence[str]) -> str:
    """Write classes shortly: runs of numbers as their ends."""
    if names and len(classes) <= 3:
        return ", ".join(names[each] for each in classes)
    parts: list[list[int]] = []
    for each in classes:
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    texts = [
        str(part[0]) if len(part) == 1 else f"{part[0]}{',' if len(part) == 2 else '-'}{part[-1]}"
        for part in parts
    ]
    return ",".join(texts)


def _caption(found: Mapping[str, Any]) -> str:
    asked = found["asked"]
    whose = "mean client" if asked["of"] == "clients" else "server model"
    said = f"{whose}, {asked['split']} split: {_points(found['all'])} % with everybody"
    if "nobody" in found:
        added = found["all"] - found["nobody"]
        said += (
            f", {_points(found['nobody'])} % with nobody who teaches; Shapley values share out the "
            f"{points(added)} between over {asked['permutations']} orders, ± one standard error"
        )
        if found.get("truncated"):
            said += f", {found['truncated']} of their steps cut short"
    return f"{said}; {found['coalitions']} coalitions"


VALUE_WORDS = (
    "Leave-one-out: by how much the others lose where a client teaches nobody. A Shapley value is "
    "what it adds on average to those who teach already, itself among those who gain. Both are of "
    "this seed: another split or other draws give others, so compare them with the spread over "
    "seeds before somebody is rewarded, or left out, by them."
)
"""What values are, and are not."""
