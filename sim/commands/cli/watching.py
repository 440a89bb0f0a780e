"""``fedkd watch``: how far a study is, in the terminal, in a log or in the browser."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console

from sim.commands.cli.printing import say
from sim.commands.cli.shell import AsJson
from sim.commands.cli.stopping import stoppable

if TYPE_CHECKING:
    from sim.watching.studies import Sight

SIGN_OF_LIFE_S = 30.0
"""A log gets a line of a run's rounds no more often than that."""


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The folder of a study or of a run.")
    ],
    port: Annotated[
        int | None,
        typer.Argument(
            metavar="[PORT]",
            min=1,
            max=65535,
            show_default=False,
            help="With --serve: where; by default 8420, or another if that is taken.",
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show it in the browser, on this machine alone."),
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Print how far it is, and end.")] = False,
    json: AsJson = False,
) -> None:
    """Follow a study or a run that another process makes: arms, rounds, time left, curves.

    Only files in its folder are read, so it does not disturb what runs, and may begin and end at
    any time. It ends with the study: exit status 0 if all runs are finished, and else 1 with a line
    that says what happened. Into a file or a pipe it writes a line for each change; with --json an
    object for each, the last of which is all there is.

    Examples:
    - `fedkd watch runs/quickstart`
    - `fedkd watch runs/quickstart --once`
    - `fedkd watch runs/default/20260101-120000-1a2b3c` : a single run
    - `fedkd watch runs/quickstart | tee log` : a line for each change
    - `fedkd watch runs/quickstart --serve` : in the browser, until Ctrl-C
    """
    if serve:
        _serve(folder, port, once=once, json=json)
        return
    if port is not None:
        raise click.UsageError(f"PORT {port} is for --serve: fedkd watch {folder} --serve {port}")
    from sim.commands.watch import watch as look_at

    console = Console()
    with stoppable("what was watched goes on"):
        if once:
            sight = next(look_at(folder))
            _print_once(sight, console, json=json)
        elif json or not console.is_interactive:
            sight = _follow_in_lines(folder, json=json)
        else:
            sight = _follow_live(folder, console)
    if sight.condition not in ("finished", *(("running",) if once else ())):
        say(sight.ended())
        raise typer.Exit(1)


def _serve(folder: Path, port: int | None, *, once: bool, json: bool) -> None:
    """Serve it until Ctrl-C, which is how this ends."""
    from sim.watching.serving import StudyServer

    for option, given in (("--once", once), ("--json", json)):
        if given:
            raise click.UsageError(f"{option} and --serve exclude each other")
    with StudyServer(folder, port) as server:
        typer.echo(f"{server.url} shows {folder} to this machine; Ctrl-C ends it")
        # Whoever waits for the line may read a pipe.
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended; what was watched goes on")


def _print_once(sight: "Sight", console: Console, *, json: bool) -> None:
    from sim.keeping.records import to_json
    from sim.watching.terminal import view

    if json:
        typer.echo(to_json(sight.to_row()))
    else:
        console.print(view(sight))


def _follow_live(folder: Path, console: Console) -> "Sight":
    """Show it in place until it is over, and leave the last of it."""
    from rich.live import Live

    from sim.commands.watch import watch as look_at
    from sim.watching.terminal import view

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for sight in look_at(folder):
            live.update(view(sight, height=console.height), refresh=True)
    console.print(view(sight))
    return sight


def _follow_in_lines(folder: Path, *, json: bool) -> "Sight":
    """Write a line for each change until it is over."""
    from sim.commands.watch import watch as look_at
    from sim.keeping.records import to_json
    from sim.watching.terminal import change_words, changes

    before: Sight | None = None
    spoke = time.monotonic()
    for sight in look_at(folder):
        if before is None and not json and sight.condition == "running":
            typer.echo(f"{sight.name}: {sight.told()}")
        for row in changes(before, sight):
            if json:
                typer.echo(to_json(row))
            elif row["change"] != "round" or time.monotonic() - spoke >= SIGN_OF_LIFE_S:
                typer.echo(change_words(row))
                spoke = time.monotonic()
        before = sight
    typer.echo(to_json(sight.to_row()) if json else f"{sight.name}: {sight.told()}")
    return sight
