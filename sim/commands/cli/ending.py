"""How a command ends: a mistake or a failure that has a name is one line and an exit code."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

import click
import typer

from fedkd.names import printable
from fedkd_start import find_last
from sim.commands.cli.shell import app
from sim.commands.cli.stopping import StoppedError
from sim.commands.interruption import Interruption, interruptible

if TYPE_CHECKING:
    pass


EXIT_BAD_INPUT = 2
EXIT_FAILED = 1


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
    except StoppedError as stop:
        _fail(str(stop), stop.exit_code)
    except KeyboardInterrupt as stop:
        _fail("interrupted", Interruption.of(stop).exit_code)
    except Exception as error:
        if _is_authors(error):
            # Their traceback, and nothing of ours around it.
            typer.echo(f"fedkd: {error}", err=True)
            sys.exit(EXIT_FAILED)
        code = code_of(error)
        if code is None:
            raise
        _fail("; ".join([str(error), *getattr(error, "__notes__", [])]), code)


def _is_authors(error: Exception) -> bool:
    """Tell whether the code of an algorithm or of a model failed, and not ours."""
    from sim.server.validation import AuthorError

    return isinstance(error, AuthorError)


def code_of(error: Exception) -> int | None:
    """Return the exit code of an error that speaks for itself; None for a mistake of ours."""
    from fedkd.trained.exporting import ExportError
    from sim.engine.grid import EngineLostError, StatesLostError
    from sim.keeping.checkpoints import CheckpointError
    from sim.keeping.parts import DamagedFileError
    from sim.keeping.records import FolderBusyError, StorageError
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
