"""Who holds what, and a page for each client: its label mix, its model and its history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.reports.html.drawings import spark_line
from sim.reports.html.tables import Table
from sim.reports.runs import RunRecord, number
from sim.reports.statistics import counted
from sim.reports.tables import kilobytes
from sim.reports.terminal import NOTHING

MOST_PAGES = 40
"""Clients that have a page of their own."""

_MOST_CLASSES = 20
"""Columns of classes; with more of them only sums are shown."""

_MOST_LETTERS = 14

_SHARES: Mapping[str, str] = {
    "accuracy": "accuracy (%)",
    "personal_accuracy": "own mix (%)",
    "macro_recall": "macro recall (%)",
    "worst_class_recall": "worst class (%)",
}


@dataclass(frozen=True, slots=True)
class ClientPage:
    """What there is to say of one client in one seed.

    Attributes:
        anchor: of its place in the page.
        title: which client.
        words: its model and rows.
        mix: rows of each class, in shades; None where the run did not record them.
        history: a line for each arm.
    """

    anchor: str
    title: str
    words: str
    mix: Table | None
    history: Table


def clients_table(arm: str, runs: Sequence[RunRecord]) -> Table:
    """Return the last round of every client of every seed of an arm."""
    rows = []
    for run in counted(runs):
        labels = run.model_labels
        judged = {row["client"]: row for row in run.last_clients}
        for client in range(run.num_clients):
            row = judged.get(client, {})
            rows.append(
                [
                    labels[client],
                    str(run.seed),
                    f"{client} (left out)" if row.get("left_out") else str(client),
                    *(_share(row, key) for key in _SHARES),
                    kilobytes(float(run.bytes_up.get(client, 0))),
                    kilobytes(float(run.bytes_down.get(client, 0))),
                ]
            )
    header = ["model", "seed", "client", *_SHARES.values(), "kB up", "kB down"]
    return Table(header, rows, title=arm, caption=f"Clients of {arm} in the last round")


def size_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Return the rows of each split; None where runs did not record them."""
    found: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for arm, of_arm in runs.items():
        for run in counted(of_arm):
            sizes = run.split.get("sizes")
            if isinstance(sizes, dict):
                arms = found.setdefault(tuple(sizes.items()), [])
                arms += [arm] * (arm not in arms)
    if not found:
        return None
    names = list(dict.fromkeys(name for sizes in found for name, _ in sizes))
    rows = [
        [
            "every arm" if len(arms) == len(runs) else ", ".join(arms),
            *(f"{dict(sizes).get(name, 0):,}" for name in names),
        ]
        for sizes, arms in found.items()
    ]
    return Table(["arm", *(f"{name} rows" for name in names)], rows, caption="Rows of each split")


def split_table(run: RunRecord) -> Table | None:
    """Return who holds how many rows of which class, in shades; None where nobody recorded it."""
    rows = run.split.get("rows")
    if not isinstance(rows, list) or len(rows) > MOST_PAGES:
        return None
    counts, classes = _counts(run)
    if not counts:
        return None
    return Table(
        ["client", *(_short(name) for name in classes)],
        [
            [f"{client} ({run.model_labels[client]})", *(f"{count:,}" for count in own)]
            for client, own in enumerate(counts)
        ],
        caption=f"Private rows of each class by client, seed {run.seed}",
        heat=counts,
    )


def first_run(runs: Mapping[str, Sequence[RunRecord]]) -> RunRecord:
    """Return the run whose clients have pages: the first seed that counts of the first arm."""
    return next(counted(of_arm)[0] for of_arm in runs.values())


def client_pages(runs: Mapping[str, Sequence[RunRecord]]) -> list[ClientPage]:
    """Return a page for each client of the first seed; none where they are too many."""
    first = first_run(runs)
    if first.num_clients > MOST_PAGES:
        return []
    same_seed = {
        arm: run
        for arm, of_arm in runs.items()
        for run in counted(of_arm)
        if run.seed == first.seed and run.num_clients == first.num_clients
    }
    counts, classes = _counts(first)
    # A study over sizes or partitions deals every arm rows of its own.
    alike = all(_counts(run) == (counts, classes) for run in same_seed.values())
    pages = []
    for client in range(first.num_clients):
        models = dict.fromkeys(run.model_labels[client] for run in same_seed.values())
        mix, words = None, f"Model: {', '.join(models)}."
        if counts and alike:
            held = sum(count > 0 for count in counts[client])
            words += f" {sum(counts[client]):,} private rows of {held} of {len(classes)} classes."
            mix = Table(
                ["class", *(_short(name) for name in classes)],
                [["rows", *(f"{count:,}" for count in counts[client])]],
                caption=f"Label mix of client {client}",
                heat=[counts[client]],
            )
        pages.append(
            ClientPage(
                anchor=f"client-{client}",
                title=f"Client {client}",
                words=words,
                mix=mix,
                history=_history(same_seed, client),
            )
        )
    return pages


def _history(runs: Mapping[str, RunRecord], client: int) -> Table:
    """Return accuracy by round of a client in every arm, drawn to one scale."""
    curves = {
        arm: [
            value
            for row in run.clients
            if row["client"] == client and (value := number(row, "accuracy")) is not None
        ]
        for arm, run in runs.items()
    }
    known = [value for curve in curves.values() for value in curve]
    low, high = min(known, default=0.0), max(known, default=1.0)
    rows = []
    for arm, run in runs.items():
        last = next((row for row in run.last_clients if row["client"] == client), {})
        drawn = spark_line(curves[arm], low, high) if curves[arm] else NOTHING
        rows.append(
            [
                arm,
                drawn,
                *(_share(last, key) for key in _SHARES if key != "accuracy"),
                kilobytes(float(run.bytes_up.get(client, 0))),
                kilobytes(float(run.bytes_down.get(client, 0))),
            ]
        )
    others = [title for key, title in _SHARES.items() if key != "accuracy"]
    header = ["arm", "accuracy by round (%)", *others, "kB up", "kB down"]
    return Table(header, rows, caption=f"Client {client} in every arm")


def _counts(run: RunRecord) -> tuple[list[list[int]], list[str]]:
    counts, classes = run.split.get("counts"), run.split.get("classes")
    if not isinstance(counts, list) or not isinstance(classes, list):
        return [], []
    if len(classes) > _MOST_CLASSES or len(counts) != run.num_clients:
        return [], []
    return counts, [str(name) for name in classes]


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _share(row: Mapping[str, object], key: str) -> str:
    value = number(row, key)
    return NOTHING if value is None else f"{100 * value:.1f}"
