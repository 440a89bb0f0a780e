"""TensorBoard: event files that its page shows."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedkd.bounds import PathText
from sim.trackers.base import Tracked, Tracker, TrackerRun


class TensorBoard(Tracker):
    """Event files in each run's folder, or all in one folder by the runs' names."""

    needs: ClassVar[str] = "tensorboard"

    kind: Literal["tensorboard"] = "tensorboard"
    folder: PathText | None = Field(
        None, description="where event files are written; none: a folder in each run's own"
    )

    def open(self, run: Tracked) -> TrackerRun:
        """Add an event file; those of earlier processes stay, and TensorBoard reads all of them."""
        from torch.utils.tensorboard import SummaryWriter

        inside = run.folder.name
        if run.folder.is_relative_to(run.output):
            inside = str(run.folder.relative_to(run.output))
        place = run.folder / "tensorboard" if self.folder is None else self.folder / inside
        writer = SummaryWriter(str(place))
        if run.known_as is None:
            writer.add_text("settings", _table({**run.labels, **self.tags, **run.settings}), 0)
            writer.flush()
        return _Run(writer, str(place))


class _Run(TrackerRun):
    def __init__(self, writer: Any, place: str) -> None:
        self._writer = writer
        self._last = 0
        self.known_as = place

    def log(self, round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._last = round
        self._writer.flush()

    def note(self, round: int, lines: Sequence[str]) -> None:
        self._writer.add_text("events", "\n\n".join(lines), round)

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        self._writer.add_text("result", f"```\n{json.dumps(result, indent=1)}\n```", self._last)
        self._writer.close()


def _table(values: Mapping[str, Any]) -> str:
    """Write values as a table in Markdown, which TensorBoard shows."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
