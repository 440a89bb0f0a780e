"""What each arm reached and what it cost: one table a question."""

from collections.abc import Mapping, Sequence

from sim.reports.costs import to_common_accuracy
from sim.reports.grids import Grid
from sim.reports.html.tables import Table, table_of
from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    ACCURACIES,
    MEASURES,
    ArmSummary,
    counted,
    values_by_seed,
)
from sim.reports.tables import (
    epsilon_text,
    kilobytes,
    measure_text,
    percent,
    plane_tables,
    points,
    seconds_to_target,
    simulated_seconds,
    target_title,
)
from sim.reports.terminal import NOTHING

SPENT = frozenset({"steps", "rows", "gflops", "server_steps", "bits_up", "bits_down"})
"""The keys of `MEASURES` that are costs."""


def accuracy_table(summaries: Sequence[ArmSummary], order: Sequence[str]) -> Table:
    """Return what arms reached on the test split; arms that could not run have no numbers."""
    shown = [
        key
        for key in ACCURACIES
        if key == "accuracy" or any(key in summary.last for summary in summaries)
    ]
    header = ["arm", "seeds", *(f"{ACCURACIES[key]} (%)" for key in shown)]
    return _by_arm(
        order,
        [*header, "last round"],
        {
            summary.arm: [
                _name(summary),
                _seeds(summary),
                *(percent(summary.last.get(key)) for key in shown),
                _span(summary.last_rounds),
            ]
            for summary in summaries
        },
        caption="Accuracy of each arm on the test split, last round",
    )


def selected_table(summaries: Sequence[ArmSummary]) -> Table | None:
    """Return accuracy where validation rows chose the round; None where they choose nothing."""
    if not any(summary.selected for summary in summaries):
        # Runs that promise privacy select no round by validation rows.
        return None
    shown = [key for key in ACCURACIES if any(key in each.selected for each in summaries)]
    return Table(
        ["arm", "same, at selected round (%)", "selected round"]
        + [f"{ACCURACIES[key]} (%)" for key in shown if key != "accuracy"],
        [
            [
                _name(summary),
                percent(summary.selected.get("accuracy")),
                _span(summary.selected_rounds),
                *(percent(summary.selected.get(key)) for key in shown if key != "accuracy"),
            ]
            for summary in summaries
        ],
        caption="Accuracy of each arm on the test split, at the round that validation rows chose",
    )


def cost_table(summaries: Sequence[ArmSummary], order: Sequence[str]) -> Table:
    """Return what arms spent: privacy, bytes, steps, operations and time."""
    spent = [key for key in _measures(summaries) if key in SPENT]
    private = any(summary.epsilon is not None for summary in summaries)
    clocked = any(summary.simulated_s is not None for summary in summaries)
    aimed = any(summary.targets for summary in summaries)
    header = ["arm", *["epsilon"] * private, "kB up", "kB down"]
    header += [*(MEASURES[key].title for key in spent), "seconds"]
    header += ["simulated s"] * clocked + [target_title(summaries)] * aimed
    return _by_arm(
        order,
        header,
        {
            summary.arm: [
                _name(summary),
                *[epsilon_text(summary.epsilon)] * private,
                kilobytes(summary.bytes_up),
                kilobytes(summary.bytes_down),
                *(measure_text(key, summary) for key in spent),
                NOTHING if summary.seconds is None else f"{summary.seconds.mean:.1f}",
                *[simulated_seconds(summary.simulated_s)] * clocked,
                *[seconds_to_target(summary)] * aimed,
            ]
            for summary in summaries
        },
        caption="What each arm spent",
    )


def needed_table(runs: Mapping[str, Sequence[RunRecord]], baseline: str | None) -> Table | None:
    """Return what arms spent to an accuracy that every run reached."""
    fitted = to_common_accuracy(runs, baseline)
    if fitted is None:
        return None
    return table_of(fitted, note=f"{fitted.title}; {fitted.caption}.")


def quality_table(summaries: Sequence[ArmSummary]) -> Table | None:
    """Return what else is known of the models: calibration, fairness, forgetting, diversity."""
    known = [key for key in _measures(summaries) if key not in SPENT]
    if not known:
        return None
    titles = [f"{MEASURES[key].title}{' (%)' if MEASURES[key].share else ''}" for key in known]
    return Table(
        ["arm", *titles],
        [[_name(each), *(measure_text(key, each) for key in known)] for each in summaries],
        caption="Calibration, fairness and diversity of each arm, last round",
    )


def seed_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Return the mean client accuracy of every run; None where each arm has one seed."""
    values = {arm: values_by_seed(of_arm, "accuracy", "last") for arm, of_arm in runs.items()}
    seeds = sorted({seed for of_arm in values.values() for seed in of_arm})
    if len(seeds) < 2:
        return None
    return Table(
        ["arm", *(f"seed {seed}" for seed in seeds)],
        [
            [
                arm,
                *(points(own[seed], signed=False) if seed in own else NOTHING for seed in seeds),
            ]
            for arm, own in values.items()
        ],
        caption="Mean client accuracy (%) of every run, last round",
        cards=False,
    )


def sweep_tables(
    runs: Mapping[str, Sequence[RunRecord]], grid: Grid, refused: Mapping[str, str]
) -> list[Table]:
    """Return accuracies by the values of a sweep."""
    return [table_of(plane, title=plane.title) for plane in plane_tables(runs, grid, refused)]


def overview(summaries: Sequence[ArmSummary], runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """Say how many runs, arms and seeds there are."""
    arms = len(summaries)
    total = sum(len(of_arm) for of_arm in runs.values())
    seeds = {run.seed for of_arm in runs.values() for run in counted(of_arm)}
    return (
        f"{total} run{'s' * (total != 1)}: {arms} arm{'s' * (arms != 1)}, "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} "
        f"({', '.join(map(str, sorted(seeds)[:10]))}{', ...' if len(seeds) > 10 else ''})"
    )


def _measures(summaries: Sequence[ArmSummary]) -> list[str]:
    return [key for key in MEASURES if any(key in each.measures for each in summaries)]


def _by_arm(
    order: Sequence[str], header: Sequence[str], rows: Mapping[str, list[str]], caption: str
) -> Table:
    empty = [NOTHING] * (len(header) - 1)
    return Table(
        header, [rows.get(arm, [f"{arm} (refused)", *empty]) for arm in order], caption=caption
    )


def _name(summary: ArmSummary) -> str:
    return summary.arm + ("" if summary.finished else " (interrupted)")


def _seeds(summary: ArmSummary) -> str:
    left_out = f" (+{summary.left_out} interrupted)" if summary.left_out else ""
    return f"{len(summary.seeds)}{left_out}"


def _span(rounds: Sequence[int | None]) -> str:
    known = [round for round in rounds if round is not None]
    if not known:
        return NOTHING
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low} to {high}"
