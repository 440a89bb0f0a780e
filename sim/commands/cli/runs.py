"""Commands on a run: ``run``, ``attack``, ``replay``, ``value``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sim.commands.cli.printing import print_table, print_words, run_table, say_where
from sim.commands.cli.reporting import report_on, write_report
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
from sim.commands.cli.words import read_settings, refuse_accepting, settings_to_resume

if TYPE_CHECKING:
    pass


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
        refuse_accepting()
    settings = (
        read_settings(arguments, allow)
        if resume is None
        else settings_to_resume(resume, arguments, allow)
    )
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.commands.running import run as run_federation
    from sim.keeping.records import is_finished, to_json
    from sim.settings.permission import allow_flags

    signs = signs_of_life(Console(stderr=True), quiet=quiet, json=json)
    if resume is not None and not quiet and is_finished(resume):
        typer.echo(f"{resume} is finished already", err=True)
    with signs, stoppable(flags=allow_flags(settings)), redirect_stdout(sys.stderr):
        result = run_federation(
            settings,
            resume=resume,
            accept_code=accept_code,
            observers=[ProgressObserver(signs, settings.strategy.name)],
        )
    row = result.to_row()
    if with_report:
        row["report"] = str(report_on(result.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        print_table(run_table(result), wide=wide)
        say_where(result.folder, row)


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
    with signs, stoppable(hint), redirect_stdout(sys.stderr):
        progress = AttackProgress(signs, run.name)
        found = attack_run(run, settings, wanted, tell=progress)
        progress.ended()
    if json:
        typer.echo(to_json(found.row))
    elif not quiet:
        for table in attack_tables(found.row):
            print_table(table, wide=wide)
            typer.echo("")
        print_words(*missing_in(found.row))
        typer.echo(f"kept   {found.path}\ndraw   fedkd report {run}")


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
    with signs, stoppable(hint), redirect_stdout(sys.stderr):
        found = replay_run(
            run,
            wanted,
            accept_code=accept_code,
            allow=allow or (),
            observers=[ProgressObserver(signs, "replay")],
        )
    row = dict(found.row)
    if with_report:
        row["report"] = str(write_report([run, found.folder], found.folder))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        print_table(replay_table(found.row), wide=wide)
        print_words(*replay_words(found.row))
        typer.echo(f"replay {found.folder}")
        if "report" in row:
            typer.echo(f"report {row['report']}")


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
    with signs, stoppable(hint), redirect_stdout(sys.stderr):
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
        row["report"] = str(report_on(run))
    if json:
        typer.echo(to_json(row))
    elif not quiet:
        print_table(value_table(found.row), wide=wide)
        print_words(VALUE_WORDS)
        typer.echo(f"kept   {found.path}")
        typer.echo(f"report {row['report']}" if "report" in row else f"draw   fedkd report {run}")
