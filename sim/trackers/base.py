"""What a tracker is: settings that open a run in somebody's records, and what is told there."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from fedkd.bounds import Text
from fedkd.exchange.kinds import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run that is tracked.

    Attributes:
        folder: of the run.
        output: the folder of all runs.
        name: what runs of one study, or of one command, have in common.
        arm: of a study; empty outside of one.
        seed: of the run.
        settings: all of them, plain values by their dotted names.
        known_as: by what the tracker finds the run of an earlier process again; None: it is new.
    """

    folder: Path
    output: Path
    name: str
    arm: str
    seed: int
    settings: Mapping[str, Any]
    known_as: str | None = None

    @property
    def title(self) -> str:
        """Name the run among those of its name."""
        return f"{self.arm} seed {self.seed}" if self.arm else self.folder.name

    @property
    def labels(self) -> dict[str, str]:
        """Say where the run belongs."""
        study = {"study": self.name, "arm": self.arm} if self.arm else {"name": self.name}
        return {**study, "seed": str(self.seed), "folder": str(self.folder)}


class TrackerRun(ABC):
    """A run in a tracker. Each round is told once, when it is final, and rounds rise.

    Attributes:
        known_as: by what a later process finds it again.
    """

    known_as: str = ""

    @abstractmethod
    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Write what a round measured.

        Args:
            round: from 1.
            values: as ``federation/accuracy``, ``client_accuracy/3``; finite numbers.
        """

    @abstractmethod
    def note(self, round: int, lines: Sequence[str]) -> None:
        """Write what happened in a round, such as rejected replies, a line each."""

    @abstractmethod
    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        """Write how the run ended, and close.

        Args:
            status: ``finished``, ``interrupted`` or ``failed``; the latter may be gone on with.
            result: what ``result.json`` says, plain values.
        """


class Tracker(Stage, ABC):
    """A tracker's settings. One of another package is named by ``package.module:Class``.

    Attributes:
        needs: the module that has to be installed; empty: nothing beside fedkd.
        clients: whether each client's rows are told as well.
        tags: that every run gets.
    """

    needs: ClassVar[str] = ""

    clients: bool = Field(True, description="tell each client's rows as well")
    tags: dict[str, Text] = Field(
        default_factory=dict, max_length=50, description="that every run gets, by name"
    )

    def check(self) -> None:
        """See whether it can be used.

        Raises:
            ValueError: it is not installed; names the extra that installs it.
        """
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise ValueError(
                f"trackers: {self.kind} is not installed: pip install 'fedkd[{self.kind}]'"
            )

    @abstractmethod
    def open(self, run: Tracked) -> TrackerRun:
        """Begin a run, or go on with the one that it is known as."""
