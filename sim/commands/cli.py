"""The command line: ``fedkd run``, ``compare``, ``distill``, ``data``, ``predict``, ``export``, ...

Every command is a thin shell around the function of the same name in `sim`. Heavy imports wait
until a command needs them, so that ``--help`` and mistakes answer at once.
"""

import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from fedkd.names import printable
from fedkd_start import find_last
from sim.commands.interruption import Interruption, interruptible

if TYPE_CHECKING:
    from fedkd.distillation.run.search import Trial
    from fedkd.distillation.settings import DistillSettings
    from sim.commands.arms import Study
    from sim.commands.progress import Signs
    from sim.commands.running import RunResult
    from sim.reports.terminal import FittedTable
    from sim.server.observers import Row
    from sim.settings import Settings


class _Commands(TyperGroup):
    """The commands; a first word that is none of them is answered with what to type instead."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            from sim.settings import SettingsError
            from sim.settings.hints import command_hint
            from strategies import STRATEGIES

            raise SettingsError(command_hint(args[0], list(self.commands), list(STRATEGIES)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a signal ends it in one line, be it at imports, settings or data."""
        with _stoppable():
            return super().invoke(ctx)


class _Command(TyperCommand):
    """A command that takes settings as words, no option twice, and knows what its options are."""

    repeatable: tuple[str, ...] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words."""
        words = list(args)
        try:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for option in given:
                repeats = option.opts[0] in self.repeatable
                if option.param_type_name == "option" and given.count(option) > 1 and not repeats:
                    raise click.UsageError(_given_twice(option.opts[0], words), ctx)
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(_no_such_option(error, words, self.params, ctx), ctx) from None


class _ManyTimes(_Command):
    """A command some of whose options may be given several times."""

    repeatable = ("--without-client", "--flip-labels", "--set")


def _given_twice(option: str, words: Sequence[str]) -> str:
    values = [
        word.partition("=")[2] if word.startswith(f"{option}=") else following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word == option or word.startswith(f"{option}=")
    ]
    instead = f"; arms are separated by commas: --arms {','.join(values)}"
    return f"{option} is given {len(values)} times, give it once" + instead * (option == "--arms")


def _no_such_option(
    error: click.NoSuchOption,
    words: Sequence[str],
    params: Sequence[click.Parameter],
    ctx: click.Context,
) -> str:
    from fedkd.distillation.settings import DistillSettings
    from sim.settings import Settings
    from sim.settings.hints import option_hint

    # Of -rounds=3 Click only tells that there is no -r.
    asked = error.option_name
    word = next((word for word in words if word.startswith(asked)), asked)
    option, _, value = word.partition("=")
    position = words.index(word) + 1 if word in words else len(words)
    if not value and position < len(words) and not words[position].startswith("-"):
        value = words[position]
    command = ctx.info_name or ""
    return option_hint(
        option,
        value,
        known=[param.opts[0] for param in params if param.param_type_name == "option"],
        kind={"distill": DistillSettings, **dict.fromkeys(NO_SETTINGS)}.get(command, Settings),
        command=command,
    )


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

NO_SETTINGS = ("report", "predict", "export", "replay", "value")
"""Commands that take no settings."""

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, then settings that override it.",
        show_default=False,
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PACKAGE",
        help="Packages, or package.module:callable, whose code a file may name; also in the "
        "environment's FEDKD_ALLOW.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
AcceptCode = Annotated[
    bool,
    typer.Option(
        "--accept-code",
        help="Take earlier runs as they are although code or libraries have changed since.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
WithReport = Annotated[
    bool, typer.Option("--report", help="Draw the report, as fedkd report does later.")
]
Wide = Annotated[
    bool, typer.Option("--wide", help="All columns of tables, however narrow the terminal is.")
]


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"fedkd {version('fedkd')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Federated learning by knowledge exchange: simulate, compare, distil, report.

    Examples:
    - `fedkd run` : the digits default
    - `fedkd run strategy.name=fedmd rounds=10 seed=7`
    - `fedkd compare conf/quickstart.yaml` : arms x seeds, a table and a report
    - `fedkd distill` : one machine, a teacher, a student
    - `fedkd data conf/quickstart.yaml` : who holds which rows
    - `fedkd algorithms` : who learns from whom, what travels
    - `fedkd museum` : what faults of published code cost
    - `fedkd attack RUN` : what a run tells of private rows
    - `fedkd replay RUN --without-client 3` : what would have been
    - `fedkd report runs/quickstart` : the report again, or over several runs
    - `fedkd predict RUN FILES` : what a run's model sees in files
    - `fedkd export RUN` : a run's model as ONNX or torch.export
    """


@app.command(cls=_Command)
def run(
    arguments: ConfigAndOverrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with the run of this folder, bit for bit."),
    ] = None,
    with_report: WithReport = False,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Run one federation and leave a run folder.

    Examples:
    - `fedkd run`
    - `fedkd run strategy.name=dml rounds=5 seed=7 --json`
    - `fedkd run conf/quickstart.yaml clients.count=20 data.partition.alpha=0.1`
    - `fedkd run clients.local.steps=1 rounds=200` : exchange at every step
    - `fedkd run engine.backend=inline` : in this process, for debugging
    - `fedkd run --resume runs/default/20260101-120000-1a2b3c` : where it was stopped
    """
    if accept_code and resume is None:
        _refuse_accepting()
    settings = (
        _settings(arguments, allow)
        if resume is None
        else _settings_to_resume(resume, arguments, allow)
    )
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.commands.running import run as run_federation
    from sim.keeping.records import is_finished, to_json
    from sim.settings.permission import allow_flags

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    if resume is not None and not quiet and is_finished(resume):
        typer.echo(f"{resume} is finished already", err=True)
    with signs, _stoppable(flags=allow_flags(settings)), redirect_stdout(sys.stderr):
        result = run_federation(
            settings,
            resume=resume,
            accept_code=accept_code,
            observers=[ProgressObserver(signs, settings.strategy.name)],
        )
    row = result.to_row()
    if with_report:
        row["report"] = str(_report_on(result.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        _print(_run_table(result), wide=wide)
        _say_where(result.folder, row)


@app.command(cls=_Command)
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would run, how long it takes and how many bytes clients exchange; "
            "nothing is written.",
        ),
    ] = False,
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
    - `fedkd compare conf/quickstart.yaml --baseline local`
    - `fedkd compare conf/examples/byzantine.yaml --dry-run` : runs, time and bytes beforehand
    """
    from sim.commands.arms import load_study

    chosen = [name.strip() for name in arms.split(",")] if arms else None
    planned = load_study(*_split(arguments, arms or ""), arms=chosen, allow=allow or ())
    if dry_run:
        _foresee(planned, seeds, baseline, accept_code, quiet=quiet, wide=wide, json=json)
        return
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.commands.study import compare as compare_arms
    from sim.keeping.records import to_json
    from sim.reports import plane_tables, summary_table, verdicts
    from sim.reports.attacks import is_attacked, leakage_table
    from sim.reports.families import family_tables

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    folder = planned.settings.output / planned.settings.name
    goes_on = f"the same command goes on in {folder}"
    # Ray prints to standard output when a worker dies; what is printed there is for programs.
    with signs, _stoppable(goes_on), redirect_stdout(sys.stderr):
        told: list[str] = []

        def tell(note: str) -> None:
            told.append(note)
            _tell(note)

        study = compare_arms(
            planned,
            seeds=seeds,
            baseline=baseline,
            accept_code=accept_code,
            tell=tell,
            planned=lambda plan: None if quiet or json else _tell(plan.told()),
            observer_of=lambda arm, seed: [ProgressObserver(signs, f"{arm} seed {seed}")],
        )
    if json:
        typer.echo(to_json(study.to_row()))
    elif not quiet:
        _print(summary_table(study.runs, study.baseline, study.refused), wide=wide)
        if is_attacked(study.runs):
            _print(leakage_table(study.runs), wide=wide)
        _print_words(*(note for note in study.notes if note not in told))
        typer.echo(f"report {study.report}")
        # Last, because it is what the study was for.
        for table in family_tables(study.runs, study.families):
            typer.echo()
            _print(table, wide=wide)
        if study.families:
            return
        if study.grid is None:
            _print_words("", *verdicts(study.runs, study.baseline))
            return
        for table in plane_tables(study.runs, study.grid, study.refused):
            typer.echo()
            _print(table, wide=wide)


@app.command(cls=_Command)
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
            _print_words(*(line for show in shown for line in show.lines()))
        return
    planned = load_museum(*_split(arguments), only=chosen, allow=allow or ())
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.reports.museum import museum_table, museum_words

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    folder = planned.settings.output / planned.settings.name
    with (
        signs,
        _stoppable(f"the same command goes on in {folder}"),
        redirect_stdout(sys.stderr),
    ):
        found = run_museum(
            planned,
            only=chosen,
            seeds=seeds,
            accept_code=accept_code,
            tell=_tell,
            observer_of=lambda arm, seed: [ProgressObserver(signs, f"{arm} seed {seed}")],
        )
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        _print(museum_table(found.findings), wide=wide)
        _print_words("", *museum_words(found.findings))
        typer.echo(f"runs   {found.study.folder}")


@app.command(cls=_Command)
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

    config, overrides = _split(arguments)
    settings = load_distill_settings(config, overrides, allow=allow or ())
    if accept_code and not search and (seeds or settings.seeds) == 1:
        _refuse_accepting()
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
        with signs, _stoppable(f"the same command goes on in {settings.output / settings.name}"):
            study = repeat(
                settings,
                accept_code=accept_code,
                tell=_tell,
                observer_of=lambda seed: FitProgress(signs, f"seed {seed}"),
            )
        if json:
            typer.echo(to_json(study.to_row()))
        elif not quiet:
            _print(distill_table(study.runs), wide=wide)
            _print_words(*distill_remarks(study.runs))
            typer.echo(f"runs   {study.folder}\nreport {study.report}")
        return
    with signs, _stoppable(partial_in="what was measured until then is in {folder}"):
        result = distill_once(settings, observe=FitProgress(signs))
    row = dict(result.row)
    if with_report:
        row["report"] = str(_report_on(result.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        _print(distill_table([load_distillation(result.folder)]), wide=wide)
        _say_where(result.folder, row)


@app.command(cls=_Command)
def data(
    arguments: ConfigAndOverrides = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where to draw it; by default OUTPUT/NAME/split.png.")
    ] = None,
    wide: Wide = False,
    allow: Allow = None,
    json: AsJson = False,
) -> None:
    """Show how the rows are split: a table, and a figure.

    Examples:
    - `fedkd data`
    - `fedkd data conf/quickstart.yaml data.partition.alpha=0.1`
    - `fedkd data data.partition.kind=natural data.partition.column=speaker data.source=speech`
    - `fedkd data data.source=path/to/mnist data.private_rows=4000 --figure split.png`
    """
    from sim.commands.overview import data as overview
    from sim.keeping.records import to_json
    from sim.settings import check_code_of_data, read_settings

    config, words = _split(arguments)
    settings = read_settings(config, words)
    check_code_of_data(settings.data, words, allow or ())

    shown = overview(settings, figure=figure)
    if json:
        typer.echo(to_json(shown.to_row()))
        return
    _print(shown.table(), wide=wide)
    typer.echo(f"figure {shown.figure}")


@app.command(cls=_Command)
def privacy(
    arguments: ConfigAndOverrides = None,
    wide: Wide = False,
    allow: Allow = None,
    json: AsJson = False,
) -> None:
    """Say what a run would spend of each client's privacy, without running it.

    Epsilon of each client over the whole run, and the noise that a wanted epsilon takes; what that
    rests on, in words. What would break the promise is refused, with what would be sound. Of a
    study every arm.

    Examples:
    - `fedkd privacy privacy.mechanism=dp_sgd privacy.epsilon=8`
    - `fedkd privacy conf/examples/dp.yaml privacy.epsilon=1`
    - `fedkd privacy strategy.name=fedmd privacy.mechanism=gaussian privacy.noise=4 rounds=50`
    - `fedkd privacy conf/examples/privacy-tradeoff.yaml`
    """
    from sim.commands.arms import load_study, refused_notes
    from sim.commands.privacy import privacy as outlook_of
    from sim.keeping.records import to_json
    from sim.settings import SettingsError, load_settings, read_settings

    config, words = _split(arguments)
    asked = read_settings(config, words).study
    arms = asked.arms or asked.sweep
    refused: dict[str, str] = {}
    if arms:
        study = load_study(config, words, arms=None, allow=allow or ())
        outlooks = []
        for name, own in study.arms.items():
            try:
                outlooks.append(outlook_of(own, name))
            except SettingsError as error:
                if asked.refused == "stop":
                    raise
                refused[name] = str(error)
    else:
        outlooks = [outlook_of(load_settings(config, words, allow=allow or ()))]
    if json:
        rows = [outlook.to_row() for outlook in outlooks]
        typer.echo(to_json(rows[0] if not arms else {"arms": rows, "refused": refused}))
        return
    said: dict[str, None] = {}
    for outlook in outlooks:
        if outlook.groups:
            _print(outlook.table(), wide=wide)
            most = f"largest epsilon of any client: {outlook.epsilon:.4g}"
            budget = "" if outlook.budget is None else f"; the run ends at {outlook.budget:g}"
            _print_words(most + budget)
        else:
            _print_words(f"{outlook.name or 'this run'}: no guarantee")
        said |= dict.fromkeys(outlook.assumptions)
    _print_words(*refused_notes(refused))
    _print_words("", *said)


@app.command(cls=_Command)
def attack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[attacks.KEY=VALUE]...", help="Settings of attacks.", show_default=False
        ),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Which attacks, separated by commas: membership, labels, inversion, stealing; all "
            "by default.",
        ),
    ] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Attack a finished run: what do models, uploads and the consensus tell of private rows?

    From three places: a client's model, what it sent, what another client received. Membership
    comes with a positive control (models that know their rows by heart) and a negative one
    (membership drawn at random). What travelled is read from the run's folder where
    exchange.keep=true kept it, and else the run is repeated from its seed first.

    Examples:
    - `fedkd attack runs/default/20260101-120000-1a2b3c`
    - `fedkd attack runs/default/20260101-120000-1a2b3c --attack membership attacks.shadows=64`
    - `fedkd attack runs/default/20260101-120000-1a2b3c --attack labels,stealing`
    - `fedkd compare conf/examples/leakage.yaml` : attacks on every run of a study
    """
    from sim.attacks.running import attack as attack_run
    from sim.attacks.settings import KINDS
    from sim.commands.progress import AttackProgress, signs_of_life
    from sim.commands.running import settings_of_run
    from sim.keeping.records import to_json
    from sim.reports.attacks import attack_tables, missing_in

    asked = [*(words or [])]
    kinds = [kind.strip() for kind in (attack or "").split(",") if kind.strip()]
    if kinds:
        asked.append(f"attacks.kinds=[{','.join(kinds)}]")
    settings = settings_of_run(run, asked, allow=allow or ())
    wanted = settings.attacks
    if not wanted.kinds:
        wanted = wanted.model_copy(update={"kinds": KINDS})
    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    hint = f"the same command begins anew; the run in {run} is whole"
    with signs, _stoppable(hint), redirect_stdout(sys.stderr):
        progress = AttackProgress(signs, run.name)
        found = attack_run(run, settings, wanted, tell=progress)
        progress.ended()
    if json:
        typer.echo(to_json(found.row))
    elif not quiet:
        for table in attack_tables(found.row):
            _print(table, wide=wide)
            typer.echo("")
        _print_words(*missing_in(found.row))
        typer.echo(f"kept   {found.path}\ndraw   fedkd report {run}")


@app.command(cls=_ManyTimes)
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    without_client: Annotated[
        list[str] | None,
        typer.Option(metavar="CLIENT", help="Leave a client out; several times, or 3,5."),
    ] = None,
    flip_labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLIENT",
            help="Flip a client's private labels, c of C to C - 1 - c; several times, or 3,5.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; several times."),
    ] = None,
    from_round: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1_000_000,
            help="Go on from the checkpoint of this round; by default from the start.",
        ),
    ] = None,
    with_report: WithReport = False,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Repeat a finished run with one thing otherwise: what would have been?

    Nobody else moves: split, draws, participants and cohorts are those of the run, so every client
    is compared with itself. A client that is left out keeps its place and goes on learning; what it
    sends is dropped, and nobody else learns from its rows. With nothing otherwise a replay ends
    with the run's bits. The same command goes on with a replay that was stopped.

    Examples:
    - `fedkd replay RUN --without-client 3`
    - `fedkd replay RUN --without-client 3,5 --flip-labels 1`
    - `fedkd replay RUN --set exchange.up=int8 --set exchange.down=int8`
    - `fedkd replay RUN --without-client 3 --from-round 10` : it leaves after round 10
    - `fedkd replay RUN` : are the bits the same here and now?
    """
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.commands.replay import Wanted, numbers_in
    from sim.commands.replay import replay as replay_run
    from sim.keeping.records import to_json
    from sim.reports.counterfactual import replay_table, replay_words

    wanted = Wanted(
        without=numbers_in(without_client or (), "--without-client"),
        flipped=numbers_in(flip_labels or (), "--flip-labels"),
        words=tuple(set_ or ()),
        from_round=from_round,
    )
    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    hint = f"the same command goes on with the replay; the run in {run} is whole"
    with signs, _stoppable(hint), redirect_stdout(sys.stderr):
        found = replay_run(
            run,
            wanted,
            accept_code=accept_code,
            allow=allow or (),
            observers=[ProgressObserver(signs, "replay")],
        )
    row = dict(found.row)
    if with_report:
        row["report"] = str(_write_report([run, found.folder], found.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        _print(replay_table(found.row), wide=wide)
        _print_words(*replay_words(found.row))
        typer.echo(f"replay {found.folder}")
        if "report" in row:
            typer.echo(f"report {row['report']}")


@app.command(cls=_Command)
def value(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="loo|shapley|both",
            help="loo: as many runs as clients; shapley: many more, by sampled permutations.",
        ),
    ] = "loo",
    permutations: Annotated[
        int, typer.Option(help="Orders in which clients join, for Shapley values.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws these orders.")] = 0,
    of: Annotated[
        str,
        typer.Option(
            metavar="clients|server",
            help="Whose accuracy: the mean client's, or that of the server's model.",
        ),
    ] = "clients",
    split: Annotated[
        str,
        typer.Option(
            metavar="test|validation",
            help="Rows that accuracy is measured on; who is chosen by values is chosen on "
            "validation.",
        ),
    ] = "test",
    truncate: Annotated[
        float | None,
        typer.Option(
            metavar="ACCURACY",
            help="Once a coalition is so close to all, as 0.005, who joins later adds nothing.",
        ),
    ] = None,
    independent: Annotated[
        bool,
        typer.Option(
            "--independent",
            help="Draw every order by itself; by default every second one is the one before, "
            "backwards, which has less noise.",
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=1, max=256, help="Processes, each with a coalition; 1: the run's own engine."
        ),
    ] = 1,
    with_report: WithReport = False,
    accept_code: AcceptCode = False,
    allow: Allow = None,
    quiet: Quiet = False,
    wide: Wide = False,
    json: AsJson = False,
) -> None:
    """Say what each client of a finished run is worth: leave-one-out, and Shapley values.

    The whole federation runs again and again, each time with other clients who teach; everybody
    else is left out as by fedkd replay, goes on learning, and is judged as ever. Each coalition
    runs once and is kept in RUN/value, so what was stopped goes on, and more permutations add to
    what there is.

    Examples:
    - `fedkd value RUN`
    - `fedkd value RUN --method both --permutations 40 --workers 4`
    - `fedkd value RUN --split validation` : for choosing who takes part
    - `fedkd value RUN --method shapley --truncate 0.005`
    """
    from sim.commands.progress import CoalitionProgress, signs_of_life
    from sim.commands.value import Asked
    from sim.commands.value import value as value_of
    from sim.keeping.records import to_json
    from sim.reports.counterfactual import VALUE_WORDS, value_table

    asked = Asked(
        method=method,  # type: ignore[arg-type]
        permutations=permutations,
        seed=seed,
        of=of,  # type: ignore[arg-type]
        split=split,  # type: ignore[arg-type]
        tolerance=truncate,
        antithetic=not independent,
    )
    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="coalitions", json=json)
    hint = f"the same command goes on with what is in {run / 'value'}"
    with signs, _stoppable(hint), redirect_stdout(sys.stderr):
        found = value_of(
            run,
            asked,
            workers=workers,
            accept_code=accept_code,
            allow=allow or (),
            reached=CoalitionProgress(signs),
            tell=lambda words: signs.say_once("value", words),
        )
    row = dict(found.row)
    if with_report:
        row["report"] = str(_report_on(run))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        _print(value_table(found.row), wide=wide)
        _print_words(VALUE_WORDS)
        typer.echo(f"kept   {found.path}")
        typer.echo(f"report {row['report']}" if "report" in row else f"draw   fedkd report {run}")


Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which of the models of a run, such as client-3, where it kept several.",
    ),
]


@app.command(cls=_Command)
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's file.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Pictures; Parquet, CSV, NPZ; folders of them."),
    ],
    model: Model = None,
    column: Annotated[
        str | None,
        typer.Option(help="Of tables: where pictures or texts are; that of training by default."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A CSV file for all predictions, with every probability.")
    ] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Say what a trained model sees in files.

    Inputs are prepared as for its training: size, colours, columns, standardisation. What cannot
    be read is named, and the exit status is 1.

    Examples:
    - `fedkd predict runs/default/20260101-120000-1a2b3c pictures/`
    - `fedkd predict RUN seven.png three.png --json`
    - `fedkd predict RUN test.parquet --model client-3 --output predictions.csv`
    """
    from sim.commands.models import predict as predict_with
    from sim.commands.progress import signs_of_life
    from sim.keeping.records import to_json

    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="files", json=json)
    with signs, _stoppable():
        task = signs.begin("predicting")
        found = predict_with(
            run,
            files,
            model=model,
            column=column,
            output=output,
            allow=allow or (),
            keep_all=json,
            reached=lambda done, of: signs.reached(task, done, of, ""),
        )
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        if found.count:
            _print(found.table(), wide=False)
        if found.output is not None:
            typer.echo(f"output {found.output}")
    for each in found.problems:
        typer.echo(f"fedkd: {printable(f'{each.where}: {each.problem}')}", err=True)
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


@app.command(cls=_Command)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's file.")],
    format: Annotated[
        str, typer.Option(metavar="torch|onnx", help="torch.export, or ONNX (extra fedkd[onnx]).")
    ] = "onnx",
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option(help="The file; by default beside the model's.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Without the standardisation: the file takes its result."),
    ] = False,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Compare on inputs from this file or folder as well."),
    ] = None,
    allow: Allow = None,
    json: AsJson = False,
) -> None:
    """Write a trained model as ONNX or torch.export, and check that the file agrees with it.

    The file takes batches of any size, pixels in [0, 1] or features as they are, and gives logits.

    Examples:
    - `fedkd export runs/default/20260101-120000-1a2b3c`
    - `fedkd export RUN --format torch --model client-3 --output model.pt2`
    - `fedkd export RUN --inputs pictures/`
    """
    from sim.commands.models import export as export_as
    from sim.keeping.records import to_json

    with _stoppable(), redirect_stdout(sys.stderr):
        made = export_as(
            run,
            format=format,
            model=model,
            output=output,
            standardise=not raw,
            inputs=inputs or (),
            allow=allow or (),
        )
    if json:
        row = {
            "path": str(made.path),
            "largest_difference": made.largest_difference,
            "inputs": made.rows,
        }
        typer.echo(to_json(row))
        return
    difference = f"{made.largest_difference:.2g}"
    typer.echo(f"wrote  {made.path}")
    typer.echo(f"agrees with the model: {made.rows} inputs, logits differ by at most {difference}")


@app.command(cls=_Command)
def algorithms(
    name: Annotated[
        str | None,
        typer.Argument(help="One of them, or package.module:Class.", show_default=False),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show the federated algorithms: who learns from whom, what travels, where they are from.

    Examples:
    - `fedkd algorithms`
    - `fedkd algorithms fml` : its equation, source, differences and defaults
    - `fedkd algorithms my_package.my_module:MyMethod`
    """
    from sim.commands.algorithms import algorithms as described
    from sim.commands.algorithms import algorithms_table
    from sim.keeping.records import to_json
    from sim.settings import SettingsError

    try:
        shown = described(name)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if json:
        typer.echo(to_json({"algorithms": [each.to_row() for each in shown]}))
    elif name is None:
        Console().print(algorithms_table(shown))
        _print_words("", "fedkd algorithms NAME tells the rest of one")
    else:
        _print_words(*shown[0].lines())


@app.command(cls=_Command)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run or study folders.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; by default beside the runs.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ARM", help="The arm that the others are compared with."),
    ] = None,
) -> None:
    """Write report.html and its figures for runs or studies, grouped by arm.

    Examples:
    - `fedkd report runs/quickstart`
    - `fedkd report runs/distill/20260101-120000-1a2b3c` : a distillation
    - `fedkd report runs/a/20260101-120000-1a2b3c runs/b/20260101-120500-4d5e6f --output both`
    """
    typer.echo(f"report {_write_report(runs, output, baseline)}")


def _write_report(
    runs: Sequence[Path], output: Path | None = None, baseline: str | None = None
) -> Path:
    from sim.reports import report as write_report_on
    from sim.reports.distillation import is_distillation, report_distillations
    from sim.settings import SettingsError

    distillations = [run for run in runs if is_distillation(run)]
    if distillations and len(distillations) < len(runs):
        raise SettingsError(
            f"a report is on federations or on distillations, got both: {str(distillations[0])!r} "
            "is a distillation"
        )
    if not distillations:
        return write_report_on(runs, output, baseline=baseline)
    if baseline is not None:
        raise SettingsError(
            "--baseline is for federations: a distillation is compared with its undistilled twin"
        )
    return report_distillations(runs, output)


def _report_on(folder: Path) -> Path:
    """Draw the report of a run that has just ended; where it cannot, say how to do it later."""
    from sim.keeping.records import storing

    with storing(folder, goes_on=f"fedkd report {folder}"):
        return _write_report([folder])


def _say_where(folder: Path, row: "Row") -> None:
    """Name the run's folder, and its report or what would draw it."""
    drawn = f"report {row['report']}" if "report" in row else f"draw   fedkd report {folder}"
    typer.echo(f"run    {folder}\n{drawn}")


def _tell(note: str) -> None:
    """Say what decides numbers, in every mode: standard output is for tables and JSON."""
    typer.echo(f"fedkd: {printable(note)}", err=True)


def _refuse_accepting() -> NoReturn:
    from sim.settings import SettingsError

    raise SettingsError(
        "--accept-code is about earlier runs: it goes with run --resume, compare, distill --seeds "
        "and distill --search; a new run has none"
    )


def _print(table: "FittedTable", *, wide: bool) -> None:
    """Print the columns that the terminal has room for, or all of them.

    A file or a pipe has no width of its own: it gets all, unless COLUMNS says how wide it is.
    """
    console = Console()
    if wide or not (console.is_terminal or "COLUMNS" in os.environ):
        console = Console(width=max(table.natural_width, console.width))
    console.print(table)


def _print_words(*sentences: str) -> None:
    """Print sentences, broken between words where a terminal has a width."""
    console = Console(highlight=False)
    for sentence in sentences:
        console.print(printable(sentence), markup=False, soft_wrap=not console.is_terminal)


def _settings(
    arguments: Sequence[str] | None, allow: Sequence[str] | None, arms: str | None = None
) -> "Settings":
    """Read the settings of a federated run.

    Args:
        arguments: a file and words.
        allow: whose code the file may name.
        arms: what ``--arms`` was given, for the mistake of separating them by spaces; None where
            there is no such option.
    """
    from sim.settings import load_settings

    return load_settings(*_split(arguments, arms), allow=allow or ())


def _split(
    arguments: Sequence[str] | None, arms: str | None = None
) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] [KEY=VALUE]...``."""
    from sim.settings import SettingsError

    words = list(arguments or ())
    configs = [place for place, word in enumerate(words) if "=" not in word or word[0] == "="]
    for place in configs:
        if not Path(words[place]).exists():
            hint = _stray_hint(words, place, arms)
            if hint:
                raise SettingsError(f"config {words[place]!r} does not exist{hint}")
    if len(configs) > 1:
        raise SettingsError(
            f"give at most one config file, got {' and '.join(words[place] for place in configs)}; "
            "settings are written key=value"
        )
    overrides = [word for place, word in enumerate(words) if place not in configs]
    return words[configs[0]] if configs else None, overrides


def _stray_hint(words: Sequence[str], place: int, arms: str | None) -> str:
    from sim.settings.hints import stray_hint
    from strategies import STRATEGIES

    return stray_hint(words, place, arms=arms, known_arms=list(STRATEGIES))


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

    with signs, _stoppable(f"the same command goes on in {settings.output / settings.name}"):
        found = search(settings, accept_code=accept_code, tell=_tell, observer_of=observer_of)
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        _print(found.table(), wide=wide)
        _print_words(found.remark())
        typer.echo(f"search {found.folder}\nbest   {' '.join(found.words)}")
        given = [word for word in sys.argv[1:] if word != "--search"]
        typer.echo(f"use it: {shlex.join(['fedkd', *given, *found.words])}")


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
    with signs, _stoppable(), redirect_stdout(sys.stderr):
        task = signs.begin("trying two rounds")
        outlook = foresee(
            study,
            seeds=seeds,
            baseline=baseline,
            accept_code=accept_code,
            tell=_tell,
            trying=lambda arm, done, of: signs.reached(task, done, of, arm),
        )
    if json:
        typer.echo(to_json(outlook.to_row()))
        return
    _print(outlook.table(), wide=wide)
    _print_words(*outlook.sentences())


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


def _settings_to_resume(
    folder: Path, arguments: Sequence[str] | None, allow: Sequence[str] | None
) -> "Settings":
    """Read a run's own settings, with what is overridden for the rest of it."""
    from sim.commands.running import settings_of_run
    from sim.settings import SettingsError

    words = list(arguments or ())
    if any("=" not in word for word in words):
        raise SettingsError("--resume takes the settings of the run folder; leave the config out")
    return settings_of_run(folder, words, allow=allow or ())


def _run_table(result: "RunResult") -> "FittedTable":
    """Two columns of what a run ended with."""
    from sim.reports.runs import number
    from sim.reports.tables import kilobytes
    from sim.reports.terminal import NOTHING, Column, FittedTable

    row = result.to_row()
    last, selected = row["last"], row["selected"]
    names = {
        "accuracy": "mean client accuracy",
        "honest_accuracy": "mean accuracy of honest clients",
        "worst_accuracy": "worst client accuracy",
        "personal_accuracy": "accuracy under own label mix",
        "macro_recall": "macro recall",
        "ensemble_accuracy": "ensemble accuracy",
        "server_accuracy": "server model accuracy",
        "attack_success": "attack success, honest clients",
        "server_attack_success": "attack success, server model",
    }
    shown = [key for key in names if key in last]

    def column(title: str, of_round: Mapping[str, Any], rank: int) -> Column:
        values = [number(of_round, key) for key in shown]
        cells = [NOTHING if value is None else f"{100 * value:.1f} %" for value in values]
        return Column(title=f"{title} ({of_round.get('round', NOTHING)})", cells=cells, rank=rank)

    clients = max(len(row["clients"]), 1)
    sent = kilobytes(sum(row["bytes_up"]) / clients)
    received = kilobytes(sum(row["bytes_down"]) / clients)
    clock = (
        number(result.history.federation[-1], "simulated_s") if result.history.federation else None
    )
    simulated = "" if clock is None else f", {clock:,.4g} s by the simulated clock"
    budget = result.settings.exchange.budget_kb
    spent = ""
    if budget is not None:
        used = (sum(row["bytes_up"]) + sum(row["bytes_down"])) / 1e3
        spent = f"; {used:,.1f} of a budget of {budget:,.10g} kB{_bits_text(row.get('bits', {}))}"
    return FittedTable(
        label="test split",
        labels=[names[key] for key in shown],
        columns=[
            column("last round", last, 1),
            column("best by validation", selected, 2),
        ],
        title=f"{row['name']}: {row['strategy']}, seed {row['seed']}",
        caption=f"{sent} kB up and {received} kB down per client; {row['seconds']:.1f} s"
        + spent
        + _privacy_text(result.privacy)
        + simulated,
    )


def _privacy_text(privacy: Mapping[str, Any]) -> str:
    """Say what was spent of each client's privacy; nothing where nothing was promised."""
    from sim.reports.runs import number
    from sim.reports.tables import epsilon_text

    audit = _audit_text(privacy.get("audit"))
    if "mechanism" not in privacy:
        return audit
    epsilon, budget = number(privacy, "epsilon"), number(privacy, "budget")
    of = "" if budget is None else f" of {budget:,.10g}"
    delta = "" if (value := number(privacy, "delta")) is None else f", delta {value:g}"
    unit = privacy.get("unit", "client")
    return f"; epsilon {epsilon_text(epsilon)}{of} for each {unit}{delta}{audit}"


def _audit_text(audit: Mapping[str, Any] | None) -> str:
    """Say what an audit proved, and whether that contradicts what was claimed."""
    from sim.reports.tables import audit_text

    return "" if audit is None else f"; {audit_text(audit)}"


def _bits_text(bits: Mapping[str, Mapping[int, int]]) -> str:
    """Say how many bits a number had in each direction."""
    spans = {way: sorted(map(int, counts)) for way, counts in bits.items() if counts}
    return "".join(
        f", {way} {low if low == high else f'{low} to {high}'} bit{'s' * (high > 1)}"
        for way in ("up", "down")
        if way in spans
        for low, high in [(spans[way][0], spans[way][-1])]
    )


class _StoppedError(Exception):
    """SIGINT or SIGTERM during a run; of a KeyboardInterrupt Typer would not say a word."""

    def __init__(self, stop: Interruption, hint: str) -> None:
        super().__init__(f"interrupted{hint and '; '}{hint}")
        self.exit_code = stop.exit_code


@contextmanager
def _stoppable(hint: str = "", *, partial_in: str = "", flags: str = "") -> Iterator[None]:
    """Say how to go on, by default with the run that was stopped.

    Args:
        hint: how to go on.
        flags: what resuming needs besides the folder.
        partial_in: where what was done is, for what cannot go on; ``{folder}`` is filled in.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop = Interruption.of(stop)
        if not hint and stop.folder is not None:
            goes_on = f"fedkd run --resume {{folder}}{flags} goes on from there"
            hint = (partial_in or goes_on).format(folder=stop.folder)
        raise _StoppedError(stop, hint) from None


def main() -> None:
    """Run the command line; a mistake or a failure that has a name is one line.

    Exit codes: 2 for what the user has to change, 1 for a run that failed, 130 and 143 for one
    that SIGINT or SIGTERM stopped.
    """
    # A console script does not see the folder it is called in; `clients.models` may name a module
    # there. Last, so that nothing there hides what is installed.
    find_last(os.getcwd())
    try:
        with interruptible():
            code = app(standalone_mode=False)
        if code:
            sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except _StoppedError as stop:
        _fail(str(stop), stop.exit_code)
    except KeyboardInterrupt as stop:
        _fail("interrupted", Interruption.of(stop).exit_code)
    except Exception as error:
        if _is_authors(error):
            # Their traceback, and nothing of ours around it.
            typer.echo(f"fedkd: {error}", err=True)
            sys.exit(EXIT_FAILED)
        code = _code_of(error)
        if code is None:
            raise
        _fail("; ".join([str(error), *getattr(error, "__notes__", [])]), code)


def _is_authors(error: Exception) -> bool:
    """Tell whether the code of an algorithm or of a model failed, and not ours."""
    from sim.server.validation import AuthorError

    return isinstance(error, AuthorError)


def _code_of(error: Exception) -> int | None:
    """Return the exit code of an error that speaks for itself; None for a mistake of ours."""
    from fedkd.trained.exporting import ExportError
    from sim.engine.grid import EngineLostError, StatesLostError
    from sim.keeping.checkpoints import CheckpointError
    from sim.keeping.records import DamagedFileError, FolderBusyError, StorageError
    from sim.server.replies import QuorumError
    from sim.settings import SettingsError

    if isinstance(error, SettingsError):
        return EXIT_BAD_INPUT
    named: tuple[type[Exception], ...] = (
        CheckpointError,
        DamagedFileError,
        EngineLostError,
        ExportError,
        FolderBusyError,
        QuorumError,
        StatesLostError,
        StorageError,
    )
    return EXIT_FAILED if isinstance(error, named) else None


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"fedkd: {printable(message)}", err=True)
    sys.exit(code)
