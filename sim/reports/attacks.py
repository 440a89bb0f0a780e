"""What attacks on runs found: tables for a terminal and a report, from ``attacks.json``."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sim.reports.runs import RunRecord
from sim.reports.statistics import SHARE_DIFFERENCES, SHARES, Estimate, counted, estimate
from sim.reports.tables import epsilon_text, kilobytes, percent
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Row

PLACES: Mapping[str, str] = {
    "model": "client's model",
    "upload": "its upload",
    "consensus": "consensus",
}
"""From where an attacker looks, and its title."""

ATTACKS: Mapping[str, str] = {
    "threshold": "loss threshold",
    "lira_offline": "LiRA offline",
    "lira_online": "LiRA online",
    "rmia": "RMIA",
}
"""Membership attacks and their titles."""

CONTROLS: Mapping[str, str] = {
    "positive": "by heart",
    "negative": "at random",
    "look": "by look",
}
"""Controls of membership and their titles."""

_SHORT: Mapping[str, str] = {
    "threshold": "threshold",
    "lira_offline": "LiRA off",
    "lira_online": "LiRA on",
    "rmia": "RMIA",
}
"""The same for a table's rows."""

LEADING = "lira_online"
"""The attack that stands for membership where there is room for one; chosen before any was run."""

MOMENTS: Mapping[str, str] = {
    "first": "first upload",
    "upload": "last upload",
    "model": "last model",
}
"""From what labels are guessed, and its title."""

ESTIMATES: Mapping[str, str] = {
    "mean_prediction": "mean prediction",
    "against_consensus": "against the consensus",
    "uniform": "baseline: uniform",
    "everybody": "baseline: everybody's mix",
}

LEAKS: Mapping[str, str] = {
    "model": "members, model",
    "upload": "members, upload",
    "consensus": "members, consensus",
    "labels": "labels, first upload",
    "inversion": "inverted beyond control",
    "stealing": "stolen",
}
"""What is told of a run in one number each: area under the ROC curve of `LEADING` from three
places; KL of a client's label mix as its first upload tells it, in nats; share of classes that were
inverted, less that of the control; agreement of a stolen model with the client's."""


def leak_of(found: Mapping[str, Any], leak: str) -> float | None:
    """Return one of `LEAKS` of a run; None where there is no such figure."""
    if leak in PLACES:
        place = found.get("membership", {}).get("places", {}).get(leak, {})
        for figures in place.get("figures", ()):
            if figures["attack"] == LEADING:
                return float(figures["auc"][0])
        return None
    if leak == "labels":
        of_upload = found.get("labels", {}).get("first", {})
        value = of_upload.get("mean_prediction")
    elif leak == "inversion":
        inverted = found.get("inversion", {})
        if inverted.get("success") is None:
            return None
        return float(inverted["success"][0] - inverted["control"][0])
    else:
        rounds = found.get("stealing", {}).get("rounds", ())
        value = rounds[-1]["agreement"] if rounds else None
    return None if value is None else float(value[0])


# -- one run -------------------------------------------------------------------------------------


def attack_tables(found: Mapping[str, Any]) -> list[FittedTable]:
    """Return the tables of one run, and in words what is missing."""
    tables = []
    if found.get("membership", {}).get("places"):
        tables.append(_membership_table(found["membership"]))
    if "labels" in found:
        tables.append(_labels_table(found["labels"]))
    if found.get("inversion", {}).get("success") is not None:
        tables.append(_inversion_table(found["inversion"]))
    if found.get("stealing", {}).get("rounds"):
        tables.append(_stealing_table(found["stealing"]))
    return tables


def missing_in(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for everything that there is no figure of."""
    said: list[str] = []
    membership = found.get("membership", {})
    for place, own in membership.get("places", {}).items():
        missing = own["missing"]
        if isinstance(missing, str):
            said.append(f"membership from the {place}: {missing}")
        else:
            said += [f"membership from the {place}, {name}: {why}" for name, why in missing.items()]
    for place, own in found.get("labels", {}).items():
        if "missing" in own:
            said.append(f"labels from the {place}: {own['missing']}")
    for kind in ("membership", "inversion", "stealing"):
        if "missing" in found.get(kind, {}):
            said.append(f"{kind}: {found[kind]['missing']}")
    return said


def _membership_table(found: Row) -> FittedTable:
    places = {**found["places"], **{CONTROLS[n]: own for n, own in found["controls"].items()}}
    rows = [(title, each) for title, own in places.items() for each in own.get("figures", ())]
    rates = list(rows[0][1]["rates"]) if rows else []
    return FittedTable(
        label="place, attack",
        labels=[f"{title}, {_SHORT[each['attack']]}" for title, each in rows],
        columns=[
            Column(title="AUC", cells=[_plain(each["auc"]) for _, each in rows], rank=0),
            *(
                Column(
                    title=f"TPR at {100 * float(rate):g} %",
                    cells=[_share(each["rates"][rate]) for _, each in rows],
                    rank=1 + place,
                )
                for place, rate in enumerate(rates)
            ),
            Column(title="members", cells=[str(each["members"]) for _, each in rows], rank=4),
            Column(title="others", cells=[str(each["others"]) for _, each in rows], rank=5),
        ],
        title="membership",
        caption="AUC: area under the ROC curve, 0.5 is guessing; TPR: share of members found at a "
        "false-positive rate, left out where fewer than 10 non-members would pass; 95 % intervals; "
        "controls: models that know their rows by heart; membership drawn at random; models that "
        "learnt from half of both sides, where only the look of rows could tell",
    )


def _labels_table(found: Row) -> FittedTable:
    def cells(place: str) -> list[str]:
        own = found.get(place, {})
        return [_mean(own.get(name)) for name in ESTIMATES]

    return FittedTable(
        label="estimate",
        labels=list(ESTIMATES.values()),
        columns=[
            Column(title=title, cells=cells(place), rank=rank)
            for rank, (place, title) in enumerate(MOMENTS.items())
        ],
        title="label distribution",
        caption="KL(true || estimated) in nats, mean of the clients with a 95 % t-interval; below "
        "the baselines it tells of the client",
    )


def _inversion_table(found: Row) -> FittedTable:
    return FittedTable(
        label="inversion from paired logits",
        labels=["this client", "control: everybody's logits alone"],
        columns=[
            Column(
                title="inverted",
                cells=[_share(found["success"]), _share(found.get("control"))],
                rank=0,
            ),
            Column(
                title="too close to public",
                cells=[_share(found.get("too_close")), NOTHING],
                rank=2,
            ),
            Column(title="SSIM", cells=[_mean(found.get("ssim")), NOTHING], rank=1),
        ],
        title="inversion",
        caption="share of the clients' classes whose reconstruction is closest, by SSIM, to the "
        "mean of the client's own rows of the class, among all means of private and public rows; "
        "closest to a public mean does not count",
    )


def _stealing_table(found: Row) -> FittedTable:
    rounds = found["rounds"]
    return FittedTable(
        label="rounds seen",
        labels=[str(each["seen"]) for each in rounds],
        columns=[
            Column(title="agreement", cells=[_share(each["agreement"]) for each in rounds], rank=0)
        ],
        title="model stealing",
        caption="share of test rows to which a student of the client's soft labels gives the class "
        "that the client's model gives",
    )


def _plain(value: Sequence[float] | None) -> str:
    return NOTHING if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _share(value: Sequence[float] | None) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value[0]:.1f} % [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"


def _mean(value: Sequence[float | None] | None) -> str:
    if value is None or value[0] is None:
        return NOTHING
    low, high = value[1:]
    return f"{value[0]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


# -- a study -------------------------------------------------------------------------------------


def is_attacked(runs: Mapping[str, Sequence[RunRecord]]) -> bool:
    """Tell whether attacks were made on any run."""
    return any(run.attacks for of_arm in runs.values() for run in of_arm)


def leak_estimate(runs: Sequence[RunRecord], leak: str) -> Estimate | None:
    """Return the mean of one of `LEAKS` over the seeds of an arm."""
    found = [value for run in counted(runs) if (value := leak_of(run.attacks, leak)) is not None]
    bounds = {"labels": (0.0, math.inf), "inversion": SHARE_DIFFERENCES}
    return estimate(found, bounds.get(leak, SHARES)) if found else None


def leakage_cells(runs: Mapping[str, Sequence[RunRecord]]) -> dict[str, list[str]]:
    """Return a column for accuracy, bytes, epsilon and each of `LEAKS`, a cell for each arm."""
    cells: dict[str, list[str]] = {name: [] for name in ("accuracy", "kB", "epsilon")}
    cells |= {title: [] for title in LEAKS.values()}
    for of_arm in runs.values():
        chosen = counted(of_arm)
        accuracies = [float(run.last["accuracy"]) for run in chosen if "accuracy" in run.last]
        cells["accuracy"].append(percent(estimate(accuracies, SHARES)) if accuracies else NOTHING)
        sizes = [
            (sum(run.bytes_up.values()) + sum(run.bytes_down.values())) / run.num_clients
            for run in chosen
        ]
        cells["kB"].append(kilobytes(fmean(sizes)) if sizes else NOTHING)
        epsilons = [run.epsilon for run in chosen if run.epsilon is not None]
        cells["epsilon"].append(epsilon_text(max(epsilons, default=None)))
        for leak, title in LEAKS.items():
            cells[title].append(_leak_text(leak_estimate(of_arm, leak), leak))
    return cells


def _leak_text(value: Estimate | None, leak: str) -> str:
    if value is None:
        return NOTHING
    if leak in ("inversion", "stealing"):
        return percent(value, signed=leak == "inversion")
    half = value.half_width
    if half is not None:
        return f"{value.mean:.3f} ±{half:.3f}"
    if value.low is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def leakage_table(runs: Mapping[str, Sequence[RunRecord]]) -> FittedTable:
    """Return accuracy, cost and leaks of each arm; of those that were refused nothing."""
    return FittedTable(
        label="arm",
        labels=[arm if of_arm else f"{arm} (refused)" for arm, of_arm in runs.items()],
        columns=[
            Column(title=title, cells=cells, rank=rank)
            for rank, (title, cells) in enumerate(leakage_cells(runs).items())
        ],
        title="what leaks",
        caption=LEAKAGE_CAPTION,
    )


LEAKAGE_CAPTION = (
    "kB: sent and received per client; members: area under the ROC curve of LiRA (online) for "
    "membership of a client's rows, 0.5 is guessing; labels: KL of its true mix to what its first "
    "upload tells, in nats, larger tells less; inverted: share of classes, less that of the "
    "control; stolen: agreement; of both larger tells more; means over seeds with 95 % t-intervals"
)
