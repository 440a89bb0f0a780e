"""Commands that write no run: ``data``, ``doctor``, ``privacy``, ``algorithms``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sim.commands.cli.printing import print_table, print_words
from sim.commands.cli.shell import Allow, AsJson, ConfigAndOverrides, Wide
from sim.commands.cli.words import split_words

if TYPE_CHECKING:
    pass


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

    config, words = split_words(arguments)
    settings = read_settings(config, words)
    check_code_of_data(settings.data, words, allow or ())

    shown = overview(settings, figure=figure)
    if json:
        typer.echo(to_json(shown.to_row()))
        return
    print_table(shown.table(), wide=wide)
    typer.echo(f"figure {shown.figure}")


def doctor(
    arguments: ConfigAndOverrides = None,
    epochs: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Passes over its private rows that a client learns for."
        ),
    ] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    wide: Wide = False,
    allow: Allow = None,
    json: AsJson = False,
) -> None:
    """Say how well a public set would serve, before anything is exchanged.

    Clients learn alone for a few epochs and answer the public rows. From these answers: are public
    rows like private ones, do clients agree, which classes nobody covers, what gain to expect, with
    an interval and what such forecasts were worth. Nothing is written. docs/doctor.md

    Examples:
    - `fedkd doctor conf/quickstart.yaml`
    - `fedkd doctor conf/quickstart.yaml data.public.size=40`
    - `fedkd doctor data.public.source=path/to/mnist data.public.size=300`
    - `fedkd doctor conf/mnist.yaml --epochs 2 --json`
    """
    from contextlib import redirect_stdout

    from sim.commands.doctor import doctor as examined
    from sim.commands.progress import ProgressObserver, signs_of_life
    from sim.keeping.records import to_json
    from sim.settings import load_settings

    config, words = split_words(arguments)
    settings = load_settings(config, words, allow=allow or ())
    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="epochs", json=json)
    # What a model of one's own prints is no part of the answer.
    with signs, redirect_stdout(sys.stderr):
        checkup = examined(
            settings,
            epochs=epochs,
            observers=[ProgressObserver(signs, "local")],
            tell=lambda what: signs.say_once("doctor", what),
        )
    if json:
        typer.echo(to_json(checkup.to_row()))
        return
    print_table(checkup.table(), wide=wide)
    print_words("", *checkup.sentences())


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

    config, words = split_words(arguments)
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
            print_table(outlook.table(), wide=wide)
            most = f"largest epsilon of any client: {outlook.epsilon:.4g}"
            budget = "" if outlook.budget is None else f"; the run ends at {outlook.budget:g}"
            print_words(most + budget)
        else:
            print_words(f"{outlook.name or 'this run'}: no guarantee")
        said |= dict.fromkeys(outlook.assumptions)
    print_words(*refused_notes(refused))
    print_words("", *said)


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
        print_words("", "fedkd algorithms NAME tells the rest of one")
    else:
        print_words(*shown[0].lines())
