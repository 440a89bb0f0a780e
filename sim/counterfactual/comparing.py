"""How a replay compares with the run that it repeats: who remains, and what became of them."""

from collections.abc import Collection, Mapping
from statistics import fmean
from typing import Any

from sim.reports.runs import RunRecord, number
from sim.server.observers import Row
from sim.settings.tables import dotted

MEASURES = (
    "accuracy",
    "worst_accuracy",
    "personal_accuracy",
    "server_accuracy",
    "ensemble_accuracy",
)
"""What is compared, by the names of a round's row."""


def compared(run: RunRecord, replay: RunRecord) -> Row:
    """Compare a replay with its run, as both ended, on the test split.

    Clients that are left out are part of neither side: not of means, not of bytes, and not of the
    first round that differs. (Of the run's ensemble they were a part.)

    Args:
        run: that is repeated.
        replay: of it.

    Returns:
        Plain values, see ``docs/replay.md``.
    """
    settings = replay.settings.get("counterfactual", {})
    without, flipped = list(settings.get("without", ())), list(settings.get("flipped", ()))
    before, after = (_last_of(each, without) for each in (run, replay))
    judged = sorted(before.keys() & after.keys())
    clients = [
        {
            "client": client,
            **_pair(number(before.get(client, {}), "accuracy"), number(after[client], "accuracy")),
            **({"flipped": True} if client in flipped else {}),
        }
        for client in judged
    ]
    apart = [
        {
            "client": client,
            **_pair(*(_apart(each, client) for each in (run, replay))),
            "left_out": True,
        }
        for client in without
    ]
    measures: dict[str, Row] = {}
    for name in MEASURES:
        pair = _pair(
            *(_measure(name, each, own, judged) for each, own in ((run, before), (replay, after)))
        )
        if pair["run"] is not None or pair["replay"] is not None:
            measures[name] = pair
    for direction in ("up", "down"):
        measures[f"bytes_{direction}"] = _pair(
            *(_bytes(each, direction, without) for each in (run, replay))
        )
    return {
        "without": without,
        "flipped": flipped,
        "from_round": settings.get("from_round", 0),
        "set": _settings_between(run, replay),
        "weights_sha256": [each.result.get("weights_sha256") for each in (run, replay)],
        "first_difference": first_difference(run, replay, without),
        "rounds": [len(run.federation), len(replay.federation)],
        "measures": measures,
        "clients": [*clients, *apart],
    }


def first_difference(run: RunRecord, replay: RunRecord, without: Collection[int]) -> int | None:
    """Return the first round in which any figure of those who remain differs; None: none does.

    Figures are what clients report of their learning and are judged by, and those of the server's
    models; wall time is none. What is learnt in a round shows in its figures, so a round whose
    exchange was the first to differ is often the one before.
    """
    sides = [
        {
            number_: [
                {key: value for key, value in row.items() if "seconds" not in key}
                for row in (*each.clients, *each.server)
                if row["round"] == number_ and row.get("client") not in without
            ]
            for number_ in sorted({row["round"] for row in each.federation})
        }
        for each in (run, replay)
    ]
    one, other = sides
    for round in sorted(one.keys() | other.keys()):
        if one.get(round) != other.get(round):
            return int(round)
    return None


def _last_of(record: RunRecord, without: Collection[int]) -> dict[int, Row]:
    return {row["client"]: row for row in record.last_clients if row["client"] not in without}


def _apart(record: RunRecord, client: int) -> float | None:
    """Return the accuracy of one that is left out, when it was judged last."""
    rows = [row for row in record.clients if row["client"] == client]
    found = [value for row in rows if (value := number(row, "accuracy")) is not None]
    return found[-1] if found else None


def _measure(
    name: str, record: RunRecord, rows: Mapping[int, Row], judged: Collection[int]
) -> float | None:
    own = "accuracy" if name == "worst_accuracy" else name
    if name in ("server_accuracy", "ensemble_accuracy"):
        last = [value for row in record.federation if (value := number(row, name)) is not None]
        return last[-1] if last else None
    values = [value for client in judged if (value := number(rows[client], own)) is not None]
    if not values:
        return None
    return min(values) if name == "worst_accuracy" else fmean(values)


def _bytes(record: RunRecord, direction: str, without: Collection[int]) -> float:
    totals = record.bytes_up if direction == "up" else record.bytes_down
    return float(sum(value for client, value in totals.items() if client not in without))


def _pair(before: float | None, after: float | None) -> Row:
    known = before is not None and after is not None
    return {
        "run": before,
        "replay": after,
        "difference": after - before if known else None,  # type: ignore[operator]
    }


def _settings_between(run: RunRecord, replay: RunRecord) -> dict[str, Any]:
    """Return the settings that were changed by name, each with what it was and what it is."""
    left_out = ("counterfactual", "output", "attacks", "study")
    one, other = (
        dotted({key: value for key, value in each.settings.items() if key not in left_out})
        for each in (run, replay)
    )
    return {
        path: [one.get(path), other.get(path)]
        for path in dict.fromkeys((*one, *other))
        if one.get(path) != other.get(path)
    }
