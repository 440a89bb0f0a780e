"""The command line: ``fedkd run``, ``compare``, ``distill``, ``data``, ``predict``, ``export``, ...

Every command is a thin shell around the function of the same name in `sim`. Heavy imports wait
until a command needs them, so that ``--help`` and mistakes answer at once.
"""

from collections.abc import Callable

from sim.commands.cli.answers import cost, ranks
from sim.commands.cli.beginning import new
from sim.commands.cli.distillation import distill
from sim.commands.cli.ending import main
from sim.commands.cli.looking import algorithms, data, doctor, privacy
from sim.commands.cli.publishing import bundle, cite, figures, table
from sim.commands.cli.reporting import report
from sim.commands.cli.runs import attack, replay, run, value
from sim.commands.cli.shell import Command, ManyTimes, app
from sim.commands.cli.studies import compare, museum
from sim.commands.cli.trained import export, predict
from sim.commands.cli.watching import watch

__all__ = ["app", "main"]


COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    compare,
    museum,
    watch,
    distill,
    data,
    doctor,
    privacy,
    attack,
    replay,
    value,
    predict,
    export,
    algorithms,
    report,
    cost,
    ranks,
    table,
    figures,
    cite,
    bundle,
    new,
)
"""In the order of the help."""

for command in COMMANDS:
    app.command(cls=ManyTimes if command in (replay, compare) else Command)(command)
