"""A run of a study: whether it is begun or finished, and how it is made, whoever makes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sim.commands.running import run
from sim.keeping.records import SETTINGS_FILE, is_finished, make_folder, turn
from sim.server.observers import Observer
from sim.settings import Settings

if TYPE_CHECKING:
    from sim.engine.session import RaySession

ObserverOf = Callable[[str, int], Sequence[Observer]]
"""Returns who is told about the run of an arm and a seed."""


def nobody(_arm: str, _seed: int) -> Sequence[Observer]:
    """Tell nobody."""
    return ()


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run of a study that is still to be made, or to be gone on with.

    Attributes:
        arm: whose run it is.
        settings: with its seed.
        folder: where it is, or is going to be.
    """

    arm: str
    settings: Settings
    folder: Path

    @property
    def begun(self) -> bool:
        """Whether it was started before, so that it goes on where it stopped."""
        return is_begun(self.folder)

    @property
    def finished(self) -> bool:
        """Whether it is finished by now, with all attacks that are asked for."""
        return is_finished(self.folder) and _is_attacked(self.folder, self.settings)

    @property
    def label(self) -> str:
        """What it is called in a line."""
        return f"{self.arm} seed {self.settings.seed}"


def is_begun(folder: Path) -> bool:
    """Tell whether there is a run in a folder, finished or not."""
    return (folder / SETTINGS_FILE).is_file()


def _is_attacked(folder: Path, settings: Settings) -> bool:
    """Tell whether the attacks that a finished run's settings ask for were made."""
    if not settings.attacks.kinds:
        return True
    from sim.attacks.running import is_attacked

    return is_attacked(folder, settings.attacks)


def make_run(
    each: PlannedRun,
    observer_of: ObserverOf,
    *,
    accept_code: bool,
    waits: bool,
    tell: Callable[[str], None],
    session: "RaySession | None" = None,
    lost: str = "",
) -> bool:
    """Make a run of a study, or go on with it, unless another process has done so or does so.

    Args:
        each: the run.
        observer_of: see `sim.commands.study.compare`; not called where there is nothing to run.
        accept_code: see `sim.commands.study.compare`.
        waits: wait for another process that is making it.
        tell: is told that another process is waited for, or that it has made the run.
        session: of Ray, where the run needs one.
        lost: see `sim.commands.running.run`.

    Returns:
        Whether the run is finished; False where another process is making it, and was not waited
        for.
    """

    def waiting(process: str) -> None:
        tell(f"{each.label}: process {process} is making this run; waiting for it")

    make_folder(each.settings.output, each.folder)
    with turn(each.folder, waiting=waiting if waits else None) as ours:
        if not ours:
            return False
        if each.finished:
            tell(f"{each.label}: another command has made this run; it is taken as it is")
            return True
        run(
            each.settings,
            folder=each.folder,
            resume=each.folder if each.begun else None,
            accept_code=accept_code,
            observers=observer_of(each.arm, each.settings.seed),
            session=session,
            lost=lost,
            progress=False,
        )
    return True
