"""Questions to studies that are finished: ``cost``, ``ranks``."""

from pathlib import Path
from typing import Annotated

import typer

from sim.commands.cli.printing import print_table, print_words
from sim.commands.cli.shell import AsJson, Wide

Measure = Annotated[
    str, typer.Option(metavar="KEY", help="Whose accuracy, by its name in metrics.jsonl.")
]


def cost(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study's folder, or a run's.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="PERCENT,...", help="Accuracies: what does each arm spend to them?"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="COST=AMOUNT,...",
            help="Budgets: how good is each arm within them? rounds, steps, bytes (B, kB, MB, GB; "
            "of a client), time (s, min, h; simulated), gflop.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ARM", help="The arm that the others are compared with."),
    ] = None,
    measure: Measure = "accuracy",
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Say what arms spend to reach an accuracy, and how good they are within a budget.

    An accuracy is reached at the first judged round that has it; a budget buys the last judged
    round that keeps to it. Runs that never get there are counted. Without options: the highest
    whole percent that every run reached.

    Examples:
    - `fedkd cost runs/quickstart`
    - `fedkd cost runs/quickstart --to 60,80`
    - `fedkd cost runs/quickstart --at bytes=200kB,steps=2000`
    - `fedkd cost runs/quickstart --at rounds=5 --measure worst_accuracy --json`
    """
    from sim.keeping.records import to_json
    from sim.reports.costs import cost as cost_of

    found = cost_of(
        study,
        to=[_percent(text) for text in _words(to)],
        at=_words(at),
        baseline=baseline,
        measure=measure,
    )
    if json:
        typer.echo(to_json(found.to_row()))
        return
    for place, table in enumerate(found.tables()):
        if place:
            typer.echo()
        print_table(table, wide=wide)


def ranks(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="STUDY...", help="Folders of studies, each of them a data set."),
    ],
    over: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING,...",
            help="Settings of a sweep whose values are data sets; all of data.* by default.",
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw the critical-difference diagram as .svg, .pdf or .png."),
    ] = None,
    measure: Measure = "accuracy",
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Rank arms over several data sets, with Friedman's test and critical differences.

    A study is a data set; one that sweeps over settings of the data is one for each of their
    values. Arms that a data set lacks are left out. Pairs are compared by Wilcoxon's signed-rank
    test, corrected by Holm.

    Examples:
    - `fedkd ranks runs/digits runs/mnist runs/cifar`
    - `fedkd ranks runs/sweep` : one that sweeps over data.partition.alpha
    - `fedkd ranks runs/sweep --over clients.count --figure ranks.svg`
    """
    from sim.keeping.records import storing, to_json
    from sim.reports.rankings import pairs_table, ranks_row, ranks_table, ranks_words
    from sim.reports.rankings import ranks as rank_arms

    formats = (".svg", ".pdf", ".png")
    if figure is not None and figure.suffix.lower() not in formats:
        from sim.settings import SettingsError

        raise SettingsError(f"--figure must end in {', '.join(formats)}, got {str(figure)!r}")
    ranking = rank_arms(studies, over=_words(over), measure=measure)
    if figure is not None:
        from fedkd.figures.saving import save_figure
        from sim.reports.rank_figures import critical_difference_diagram

        with storing(figure.parent, goes_on="the same command with another --figure"):
            save_figure(critical_difference_diagram(ranking), figure)
    if json:
        typer.echo(to_json(ranks_row(ranking)))
        return
    print_table(ranks_table(ranking), wide=wide)
    typer.echo()
    print_table(pairs_table(ranking), wide=wide)
    print_words("", *ranks_words(ranking))
    if figure is not None:
        typer.echo(f"figure {figure}")


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _percent(text: str) -> float:
    from sim.settings import SettingsError

    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        raise SettingsError(
            f"--to takes accuracies in percent, such as 60,80, got {text!r}"
        ) from None
    if 0 < percent <= 1 and not text.endswith("%"):
        raise SettingsError(
            f"--to takes accuracies in percent: write {100 * percent:g}, or {text}% if you mean "
            f"it, got {text!r}"
        )
    return percent
