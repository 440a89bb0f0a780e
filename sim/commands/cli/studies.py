"""Commands on studies: ``compare``, ``museum``."""

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sim.commands.cli.printing import print_table, print_words, say
from sim.commands.cli.shell import AcceptCode, Allow, AsJson, ConfigAndOverrides, Quiet, Wide
from sim.commands.cli.stopping import stoppable
from sim.commands.cli.words import split_words, sweep_words

if TYPE_CHECKING:
    from sim.commands.arms import Study
    from sim.commands.study import StudyPlan


def compare(
    arguments: ConfigAndOverrides = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Which arms, separated by commas: names from study.arms, strategies, or arms that "
            "study.sweep makes."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ARM",
            help="The arm that the others are compared with; study.baseline by default, or the "
            "first.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Paired seeds; study.seeds by default.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,...",
            help="Make an arm of each value of a setting, of every combination where there are "
            "several; instead of the file's values of this setting.",
        ),
    ] = None,
    together: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING,SETTING",
            help="Settings of the sweep that change together, and not in every combination.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,...",
            help="Make only these combinations of the sweep; arm=NAME is one of the settings.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,...", help="Leave out these combinations of the sweep."
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="steps|bytes",
            help="Set each arm's rounds so that all take as many optimizer steps, or bytes, as the "
            "baseline; study.match_to names another arm.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would run, how long it takes and how many bytes clients exchange; "
            "nothing is written.",
        ),
    ] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="How many small runs are made at a time, or auto; study.parallel by default.",
        ),
    ] = None,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Run arms x paired seeds and print a table with intervals and paired tests.

    What is done is not done again: an interrupted study goes on where it stopped. What is said
    here holds for every arm that has the setting.

    Examples:
    - `fedkd compare conf/quickstart.yaml`
    - `fedkd compare conf/quickstart.yaml --arms local,dml --seeds 10`
    - `fedkd compare --arms local,fedmd,dml rounds=10`
    - `fedkd compare --arms one_way,dml strategy.temperature=8`
    - `fedkd compare --arms one_way,dml --sweep strategy.temperature=1,2,4 --sweep rounds=5,10`
    - `fedkd compare --sweep rounds=20,10 --sweep clients.local.epochs=1,2
      --together rounds,clients.local.epochs`
    - `fedkd compare --arms one_way,dml --match steps` : rounds set so that budgets are equal
    - `fedkd compare conf/quickstart.yaml --baseline local`
    - `fedkd compare conf/quickstart.yaml --parallel 4` : four small runs at a time
    - `fedkd compare conf/examples/byzantine.yaml --dry-run` : runs, time and bytes beforehand
    """
    from sim.commands.arms import load_study

    chosen = [name.strip() for name in arms.split(",")] if arms else None
    config, words = split_words(arguments, arms or "")
    words += sweep_words(sweep, together, only, without)
    if parallel is not None:
        words.append(f"study.parallel={parallel}")
    if match is not None:
        words.append(f"study.match={match}")
    planned = load_study(config, words, arms=chosen, allow=allow or ())
    if dry_run:
        _foresee(planned, seeds, baseline, accept_code, quiet=quiet, wide=wide, json=json)
        return
    from sim.commands.packing import forked_nursery
    from sim.commands.progress import StudyProgress, signs_of_life
    from sim.commands.study import compare as compare_arms
    from sim.keeping.records import to_json
    from sim.reports import plane_tables, summary_table, verdicts
    from sim.reports.attacks import is_attacked, leakage_table
    from sim.reports.families import family_tables
    from sim.reports.verdicts import answers

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    progress = StudyProgress(signs)
    folder = planned.settings.output / planned.settings.name
    goes_on = f"the same command goes on in {folder}"
    # Ray prints to standard output when a worker dies; what is printed there is for programs.
    with (
        forked_nursery() as nursery,
        signs,
        stoppable(goes_on),
        redirect_stdout(sys.stderr),
    ):
        told: list[str] = []

        def tell(note: str) -> None:
            told.append(note)
            say(note)

        def planned_now(plan: "StudyPlan") -> None:
            progress.planned([run.settings.rounds for run in plan.left])
            if not (quiet or json):
                say(plan.told())

        study = compare_arms(
            planned,
            seeds=seeds,
            baseline=baseline,
            accept_code=accept_code,
            tell=tell,
            planned=planned_now,
            observer_of=progress.observers,
            nursery=nursery,
        )
    if json:
        typer.echo(to_json(study.to_row()))
    elif not quiet:
        print_table(summary_table(study.runs, study.baseline, study.refused), wide=wide)
        if is_attacked(study.runs):
            print_table(leakage_table(study.runs), wide=wide)
        matched = study.matching.sentences() if study.matching is not None else []
        print_words(*matched, *(note for note in study.notes if note not in [*told, *matched]))
        typer.echo(f"report {study.report}")
        # Last, because it is what the study was for.
        planes = plane_tables(study.runs, study.grid, study.refused) if study.grid else []
        families = family_tables(study.runs, study.questions, study.precision)
        for table in [*([] if study.families else planes), *families]:
            typer.echo()
            print_table(table, wide=wide)
        if study.grid is None and not study.families:
            print_words("", *verdicts(study.runs, study.baseline, study.precision))
        elif not study.families and (
            sentences := answers(study.runs, study.questions, study.precision)
        ):
            print_words("", *sentences)


def museum(
    arguments: ConfigAndOverrides = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Only these faults, or those of these algorithms: svd_rank_zero,fml.",
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="Say what each fault is and where it was read; run nothing."),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Paired seeds; study.seeds by default.")
    ] = None,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Measure what the faults of published code cost, each against the same done right.

    Every fault that an algorithm can commit (strategy.as_published) is run and not run, over paired
    seeds, in a small setting in which it can show. It takes about ten minutes; the same command
    goes on with a museum that was stopped.

    Examples:
    - `fedkd museum --list` : what there is, and where it was read
    - `fedkd museum`
    - `fedkd museum --only fml,svd_rank_zero --seeds 10`
    - `fedkd museum --only kl_mean data.partition.alpha=0.1 rounds=20`
    - `fedkd run strategy.name=fml 'strategy.as_published=[kl_mean]'` : one of them in a run
    """
    from sim.commands.museum import exhibits, load_museum
    from sim.commands.museum import museum as run_museum
    from sim.keeping.records import to_json

    chosen = [name.strip() for name in only.split(",")] if only else []
    if list_:
        shown = exhibits(chosen)
        if json:
            typer.echo(to_json({"faults": [show.to_row() for show in shown]}))
        else:
            print_words(*(line for show in shown for line in show.lines()))
        return
    planned = load_museum(*split_words(arguments), only=chosen, allow=allow or ())
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.reports.museum import museum_table, museum_words

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    folder = planned.settings.output / planned.settings.name
    with (
        signs,
        stoppable(f"the same command goes on in {folder}"),
        redirect_stdout(sys.stderr),
    ):
        found = run_museum(
            planned,
            only=chosen,
            seeds=seeds,
            accept_code=accept_code,
            tell=say,
            observer_of=lambda arm, seed: [ProgressObserver(signs, f"{arm} seed {seed}")],
        )
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        print_table(museum_table(found.findings), wide=wide)
        print_words("", *museum_words(found.findings))
        typer.echo(f"runs   {found.study.folder}")


def _foresee(
    study: "Study",
    seeds: int | None,
    baseline: str | None,
    accept_code: bool,
    *,
    quiet: bool,
    wide: bool,
    json: bool,
) -> None:
    """Print what a study would run."""
    from sim.commands.planning import foresee
    from sim.commands.progress import signs_of_life
    from sim.keeping.records import to_json

    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="arms", json=json)
    with signs, stoppable(), redirect_stdout(sys.stderr):
        task = signs.begin("trying two rounds")
        outlook = foresee(
            study,
            seeds=seeds,
            baseline=baseline,
            accept_code=accept_code,
            tell=say,
            trying=lambda arm, done, of: signs.reached(task, done, of, arm),
        )
    if json:
        typer.echo(to_json(outlook.to_row()))
        return
    print_table(outlook.table(), wide=wide)
    print_words(*outlook.sentences())
