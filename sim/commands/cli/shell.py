"""The shell around all commands: how words are read, what options they share, ``fedkd --help``."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from sim.commands.cli.stopping import stoppable

if TYPE_CHECKING:
    pass


class Commands(TyperGroup):
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
        with stoppable():
            return super().invoke(ctx)


class Command(TyperCommand):
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


class ManyTimes(Command):
    """A command some of whose options may be given several times."""

    repeatable = (
        *("--without-client", "--flip-labels", "--set"),
        *("--sweep", "--together", "--only", "--without"),
    )


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
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
NO_SETTINGS = (
    "report",
    "predict",
    "export",
    "replay",
    "value",
    "new",
    "watch",
    "cost",
    "ranks",
    "table",
    "figures",
    "cite",
    "bundle",
)
"""Commands that take no settings."""
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
    - `fedkd watch runs/quickstart` : how far it is, from another window
    - `fedkd distill` : one machine, a teacher, a student
    - `fedkd data conf/quickstart.yaml` : who holds which rows
    - `fedkd doctor conf/quickstart.yaml` : will its public set serve
    - `fedkd algorithms` : who learns from whom, what travels
    - `fedkd museum` : what faults of published code cost
    - `fedkd attack RUN` : what a run tells of private rows
    - `fedkd replay RUN --without-client 3` : what would have been
    - `fedkd report runs/quickstart` : the report again, or over several runs
    - `fedkd cost runs/quickstart --to 0.8` : what an accuracy costs each arm
    - `fedkd ranks runs/a runs/b runs/c` : ranks of arms over data sets
    - `fedkd table runs/quickstart` : a study as LaTeX, Markdown, CSV or Parquet
    - `fedkd figures runs/quickstart` : its figures as PDF, SVG or PNG
    - `fedkd cite runs/quickstart` : BibTeX, or a methods paragraph
    - `fedkd bundle runs/quickstart` : one archive with what a reviewer needs
    - `fedkd predict RUN FILES` : what a run's model sees in files
    - `fedkd export RUN` : a run's model as ONNX or torch.export
    - `fedkd new my_method` : a package for an algorithm of your own
    """
