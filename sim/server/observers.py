"""Who is told what happens in a run: the run folder, the progress bar, trackers, tests."""

from collections.abc import Sequence
from typing import Any

from fedkd.data import FederatedData
from sim.server.exchanged import Exchanged
from sim.settings import Settings

Row = dict[str, Any]
"""What is written down as one line: plain values by name."""


def event_words(row: Row) -> str:
    """Say in a line what an event is; of its reason the last line."""
    where = f"round {row['round']}"
    if "client" in row:
        where += f", client {row['client']}"
    last_line = str(row.get("reason", "")).strip().splitlines()[-1:] or [""]
    return f"{where}: {row['event']}: {last_line[0]}"


class Observer:
    """Is told what happens in a run; override what you care about."""

    def started(self, settings: Settings, data: FederatedData) -> None:
        """The data is loaded and the first round is about to start."""

    def returned(self, round: int) -> None:
        """The run goes on after this round: it was resumed, or had to go back to a checkpoint."""

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round's metrics, one row for each scope."""

    def exchange(self, rows: Sequence[Row]) -> None:
        """A round's bytes, one row for each client and direction."""

    def charges(self, rows: Sequence[Row]) -> None:
        """What a round released of whose data and what that costs, one row for each charge."""

    def travelled(self, exchanged: Exchanged) -> None:
        """What was sent and received in a round; told only under ``exchange.keep``."""

    def compared(self, row: Row) -> None:
        """How clients' models compare in the last round; see `sim.server.peers.Peers`."""

    def event(self, row: Row) -> None:
        """Something worth knowing, such as a rejected reply."""

    def attacking(self, what: str) -> None:
        """The run is finished and is attacked; this is what goes on."""

    def attacked(self) -> None:
        """All attacks on it are over."""

    def completed(self, round: int) -> None:
        """The round is over for good; what was told of it is final."""
