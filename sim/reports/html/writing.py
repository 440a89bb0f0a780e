"""`write_report`: one HTML file that needs nothing else, and its figures beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from sim.keeping.records import make_folder, write_text
from sim.reports.counterfactual import VALUE_WORDS
from sim.reports.families import Families, questions_of
from sim.reports.grids import Grid
from sim.reports.html import arms, clients, comparisons, origins, protection
from sim.reports.html.pages import template
from sim.reports.html.pictures import Picture, picture, write_figures
from sim.reports.html.settings import differing_table, split_settings
from sim.reports.html.tables import Table
from sim.reports.power import PRECISION
from sim.reports.runs import RunRecord
from sim.reports.statistics import measured_title, summarize
from sim.reports.tables import FEW
from sim.reports.terminal import NOTHING
from sim.settings import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedkd.figures.saving import Style

REPORT_FILE = "report.html"

MOST_BY_ARM = 24
"""With more arms a sweep has no figure with a line for each, and no table of every pair."""

TITLES: Mapping[str, str] = {
    "accuracy_in_grid": "Accuracy of every arm of the sweep",
    "accuracy_by_value": "Accuracy against a number that is swept over",
    "accuracy_by_round": "Mean client accuracy by round",
    "accuracy_by_exchange": "Mean client accuracy against kilobytes exchanged",
    "accuracy_by_time": "Mean client accuracy against simulated seconds",
    "accuracy_by_epsilon": "Mean client accuracy against epsilon, and kilobytes",
    "accuracy_by_client": "Accuracy of every client in the last round",
    "targets_by_round": "What clients are taught by round",
    "accuracy_by_seed": "Mean client accuracy of every run",
    "clients_by_round": "Accuracy of every client by round, and their mean; first seed",
    "reliability_by_arm": "What clients' confidence is worth, last round",
    "agreement_by_arm": "Test rows on which two clients answer alike (%), last round, first seed",
    "pareto_fronts": "Mean client accuracy (%) against its costs; grey: what so much buys at best",
    "membership_roc": "Membership: true against false positives, from where an attacker looks",
    "accuracy_by_leak": "Mean client accuracy against what attacks found",
}
"""What figures show that have no title of their own."""


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
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` and ``figures/<name>.svg`` and return the path of the former.

    Args:
        runs: of each arm, one a seed.
        folder: is made if it does not exist; an older report in it is replaced.
        title: the heading.
        baseline: the arm that the others are compared with; the first by default.
        refused: arms that could not run, each with the reason.
        grid: how arms that come from a sweep lie side by side.
        families: arms that belong to one question; where there are any only their pairs are shown.
        precision: the half width of an interval that is wanted, a share.
        notes: what a reader has to know, a sentence each.

    Raises:
        SettingsError: if there is no run, an arm has two runs with one seed, the baseline is none
            of the arms, or the folder cannot be written.
    """
    order = [arm for arm, of_arm in runs.items() if of_arm or arm in refused]
    runs = {arm: tuple(of_arm) for arm, of_arm in runs.items() if of_arm}
    if not runs:
        raise SettingsError("a report needs at least one run, got none")
    summaries = [summarize(arm, of_arm) for arm, of_arm in runs.items()]
    questions = questions_of(families, grid, baseline)
    crowded = is_crowded(runs, grid)
    pictures, files = _drawn(runs, grid)
    differing, common = split_settings(runs)
    environments = [run.environment for of_arm in runs.values() for run in of_arm]
    text = template("report.html").render(
        title=title,
        notes=notes,
        overview=arms.overview(summaries, runs),
        answer=comparisons.answer(runs, summaries, baseline, precision, questions),
        accuracies=arms.accuracy_table(summaries, order),
        selected=arms.selected_table(summaries),
        qualities=arms.quality_table(summaries),
        costs=arms.cost_table(summaries, order),
        needed=arms.needed_table(runs, baseline),
        refused=_refused_table(refused),
        planes=arms.sweep_tables(runs, grid, refused) if grid is not None else [],
        measured=measured_title(runs),
        crowded=MOST_BY_ARM if crowded else 0,
        differences=comparisons.difference_table(runs, baseline, precision),
        pairs=None if crowded or questions else comparisons.pair_table(runs, precision),
        families=comparisons.family_tables(runs, questions, precision),
        by_seed=arms.seed_table(runs),
        privacy=protection.privacy_table(runs),
        promises=protection.promises_of(runs),
        audits=protection.audits_of(runs),
        leakage=protection.leakage_table(runs),
        attacks=protection.found_tables(runs),
        values=protection.worth_tables(runs),
        value_words=VALUE_WORDS,
        precision=f"{100 * precision:g}",
        pictures=pictures,
        sizes=clients.size_table(runs),
        split=clients.split_table(clients.first_run(runs)),
        pages=clients.client_pages(runs),
        paged_seed=clients.first_run(runs).seed,
        clients=[clients.clients_table(arm, of_arm) for arm, of_arm in runs.items()],
        arms=list(runs),
        differing=differing_table(list(runs), differing),
        common=common,
        models=origins.model_table(runs),
        run_table=origins.run_table(runs, folder),
        commands=origins.commands_of(runs, folder),
        references=origins.references_of(runs),
        machines=origins.machines_of(environments),
        versions=origins.versions_of(environments),
        many_seeds=any(len(summary.seeds) > 1 for summary in summaries),
        few=FEW,
        nothing=NOTHING,
    )
    make_folder(folder, folder)
    write_figures(folder, files)
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def draw_report(
    runs: Mapping[str, Sequence[RunRecord]],
    grid: Grid | None,
    columns: int | None = None,
    style: "Style | None" = None,
) -> "dict[str, Figure]":
    """Draw all figures of a report, by name and in its order.

    Args:
        runs: of each arm.
        grid: how arms that come from a sweep lie side by side.
        columns: panels side by side; as on a screen by default.
        style: the report's by default.
    """
    # matplotlib takes a second, and whoever reads or lists runs draws nothing.
    from sim.reports.attack_figures import draw_attacks
    from sim.reports.figures import STYLE, WIDE, draw_figures
    from sim.reports.grid_figures import draw_grid
    from sim.reports.peer_figures import draw_peers
    from sim.reports.study_figures import draw_study

    columns = WIDE if columns is None else columns
    style = STYLE if style is None else style
    return (
        (draw_grid(runs, grid, columns, style) if grid is not None else {})
        | draw_study(runs, style, columns)
        | draw_attacks(runs, style, columns)
        | ({} if is_crowded(runs, grid) else draw_figures(runs, style, columns))
        | ({} if is_crowded(runs, grid) else draw_peers(runs, style, columns))
    )


def is_crowded(runs: Mapping[str, Sequence[RunRecord]], grid: Grid | None) -> bool:
    """Return whether a sweep has too many arms for a line each."""
    return grid is not None and len(runs) > MOST_BY_ARM


def _drawn(
    runs: Mapping[str, Sequence[RunRecord]], grid: Grid | None
) -> tuple[dict[str, Picture], dict[str, str]]:
    """Return all figures to embed, and the texts of their files, by name."""
    from sim.reports.figures import NARROW, WIDE

    wide, narrow = (draw_report(runs, grid, columns) for columns in (WIDE, NARROW))
    pictures, files = {}, {}
    for name, figure in wide.items():
        pictures[name], files[name] = picture(name, TITLES[name], figure, narrow[name])
    return pictures, files


def _refused_table(refused: Mapping[str, str]) -> Table | None:
    if not refused:
        return None
    return Table(
        ["arm", "reason"], [[*each] for each in refused.items()], left=2, caption="Refused arms"
    )
