"""``fedkd distill``: one machine, a teacher, a student."""

import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sim.commands.cli.printing import print_table, print_words, say, say_where
from sim.commands.cli.reporting import report_on
from sim.commands.cli.shell import (
    AcceptCode,
    Allow,
    AsJson,
    ConfigAndOverrides,
    Quiet,
    Wide,
    WithReport,
)
from sim.commands.cli.stopping import stoppable
from sim.commands.cli.words import refuse_accepting, split_words

if TYPE_CHECKING:
    from fedkd.distillation.run.search import Trial
    from fedkd.distillation.settings import DistillSettings
    from sim.commands.progress import Signs


def distill(
    arguments: ConfigAndOverrides = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Try search.temperatures x search.weights on validation rows."
        ),
    ] = False,
    list_: Annotated[
        bool,
        typer.Option("--list", help="Name all that can be chosen, with sources and defaults."),
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Paired repetitions: seed, seed + 1, ...; of the search, too."
        ),
    ] = None,
    with_report: WithReport = False,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Train or load a teacher, distil a student, and compare it with its undistilled twin.

    Examples:
    - `fedkd distill`
    - `fedkd distill student.model=cnn objective.kd.temperature=2`
    - `fedkd distill 'objective={ce: 1, kd: {weight: 1, temperature: 4}, mse: 0.1}'`
    - `fedkd distill conf/distill.yaml --seeds 10` : means with intervals, a paired test
    - `fedkd distill --search` : temperature and weight, chosen on validation rows
    - `fedkd distill conf/tutorial.yaml data.source=path/to/mnist`
    - `fedkd distill teacher.weights=runs/distill/20260101-120000-1a2b3c/models/teacher.safetensors`
    - `fedkd distill --list`
    """
    if list_:
        _list_components(arguments, json=json)
        return
    from sim.commands.progress import FitProgress, signs_of_life
    from sim.settings import load_distill_settings

    config, overrides = split_words(arguments)
    settings = load_distill_settings(config, overrides, allow=allow or ())
    if accept_code and not search and (seeds or settings.seeds) == 1:
        refuse_accepting()
    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="epochs", json=json)
    if search:
        _search(settings, seeds, signs, accept_code=accept_code, quiet=quiet, wide=wide, json=json)
        return
    if seeds is not None:
        settings = settings.model_copy(update={"seeds": seeds})
    from sim.commands.distilling.running import distill as distill_once
    from sim.commands.distilling.studying import repeat
    from sim.keeping.records import to_json
    from sim.reports.distillation import distill_remarks, distill_table, load_distillation

    if settings.seeds > 1:
        with signs, stoppable(f"the same command goes on in {settings.output / settings.name}"):
            study = repeat(
                settings,
                accept_code=accept_code,
                tell=say,
                observer_of=lambda seed: FitProgress(signs, f"seed {seed}"),
            )
        if json:
            typer.echo(to_json(study.to_row()))
        elif not quiet:
            print_table(distill_table(study.runs), wide=wide)
            print_words(*distill_remarks(study.runs))
            typer.echo(f"runs   {study.folder}\nreport {study.report}")
        return
    with signs, stoppable(partial_in="what was measured until then is in {folder}"):
        result = distill_once(settings, observe=FitProgress(signs))
    row = dict(result.row)
    if with_report:
        row["report"] = str(report_on(result.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        print_table(distill_table([load_distillation(result.folder)]), wide=wide)
        say_where(result.folder, row)


def _search(
    settings: "DistillSettings",
    seeds: int | None,
    signs: "Signs",
    *,
    accept_code: bool,
    quiet: bool,
    wide: bool,
    json: bool,
) -> None:
    from sim.commands.distilling.searching import search
    from sim.commands.progress import FitProgress
    from sim.keeping.records import to_json

    if seeds is not None:
        grid = settings.search.model_copy(update={"seeds": seeds})
        settings = settings.model_copy(update={"search": grid})

    def observer_of(trial: "Trial") -> FitProgress:
        of_seed = f"seed {trial.seed}, " if settings.search.seeds > 1 else ""
        return FitProgress(signs, f"{of_seed}T={trial.temperature:g}, w={trial.weight:g}")

    with signs, stoppable(f"the same command goes on in {settings.output / settings.name}"):
        found = search(settings, accept_code=accept_code, tell=say, observer_of=observer_of)
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        print_table(found.table(), wide=wide)
        print_words(found.remark())
        typer.echo(f"search {found.folder}\nbest   {' '.join(found.words)}")
        given = [word for word in sys.argv[1:] if word != "--search"]
        typer.echo(f"use it: {shlex.join(['fedkd', *given, *found.words])}")


def _list_components(arguments: Sequence[str] | None, *, json: bool) -> None:
    from fedkd.distillation.run.listing import list_components
    from sim.keeping.records import to_json
    from sim.settings import SettingsError

    if arguments:
        raise SettingsError(f"--list takes no settings, got {' '.join(arguments)}")
    sections = list_components()
    if json:
        rows = {name: [each._asdict() for each in of_name] for name, of_name in sections.items()}
        typer.echo(to_json(rows))
        return
    width = min(100, Console().width) if sys.stdout.isatty() else 100
    for number, (name, entries) in enumerate(sections.items()):
        typer.secho(("\n" if number else "") + name, bold=True)
        for entry in entries:
            typer.secho(f"  {entry.name}", bold=True)
            for line in entry.lines():
                typer.echo(
                    textwrap.fill(line, width, initial_indent=" " * 6, subsequent_indent=" " * 8)
                )
