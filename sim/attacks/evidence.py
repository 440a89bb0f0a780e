"""What there is to attack: a run's exchange and its clients' last models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.data import FederatedData
from fedkd.exchange.payload import Payload
from fedkd.training import Arrays
from sim.commands.running import clients_digest, load_data, open_grid
from sim.engine.inline import InlineGrid
from sim.keeping.exchange import (
    ExchangeFolder,
    clients_models,
    keep_clients,
    read_clients,
    read_exchange,
)
from sim.keeping.records import read_result
from sim.server.exchanged import Exchanged, Noting
from sim.server.observers import Observer, Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings, SettingsError

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Evidence:
    """What a run left.

    Attributes:
        rounds: what travelled in each.
        models: weights of the judged model of every client that trained.
    """

    rounds: Sequence[Exchanged]
    models: Mapping[int, Arrays]

    def last_sent(self, client: int) -> Payload | None:
        """Return what a client sent last; None: never anything."""
        found = (each.sent(client) for each in reversed(self.rounds))
        return next((payload for payload in found if payload is not None), None)

    def last(self) -> "Evidence":
        """Return the same, of the exchange only what each client sent and received last."""
        noted = Noting(self.rounds[-1].round if self.rounds else 0)
        for client in {c for each in self.rounds for c in (*each.up, *each.down)}:
            sent, received = self.last_sent(client), self.last_received(client)
            if sent is not None:
                noted.came(client, sent)
            if received is not None:
                noted.going(client, received)
        return Evidence([noted.exchanged()], self.models)

    def last_received(self, client: int) -> Payload | None:
        """Return what a client received last; None: never anything."""
        found = (each.received(client) for each in reversed(self.rounds))
        return next((payload for payload in found if payload is not None), None)


class _Memory(Observer):
    """Keeps what travels in this process."""

    def __init__(self) -> None:
        self.rounds: list[Exchanged] = []

    def travelled(self, exchanged: Exchanged) -> None:
        self.rounds.append(exchanged)


class Counter(Observer):
    """Tells how far a run is.

    Args:
        rounds: that it has.
        tell: is told.
        what: runs.
    """

    def __init__(self, rounds: int, tell: Tell, what: str) -> None:
        self._rounds = rounds
        self._tell = tell
        self._what = what

    def completed(self, round: int) -> None:
        """Tell it."""
        self._tell(f"{self._what}, round {round} of {self._rounds}")


def with_kept(settings: Settings, **changes: Any) -> Settings:
    """Return the settings of the same run that keeps what travels, with changes of sections."""
    exchange = settings.exchange.model_copy(update={"keep": True})
    return settings.model_copy(update={"exchange": exchange, **changes})


def observed(settings: Settings, data: FederatedData) -> Evidence:
    """Run a federation in this process and return what it leaves; nothing is written."""
    memory = _Memory()
    engine = settings.engine.model_copy(update={"backend": "inline"})
    settings = with_kept(settings, engine=engine)
    grid = InlineGrid(settings, data)
    loop = RoundLoop(grid, settings, data, [memory])
    loop.run()
    return Evidence(memory.rounds, clients_models(loop, grid))


def evidence_of(folder: Path, settings: Settings, data: FederatedData, tell: Tell) -> Evidence:
    """Return what a finished run left; what was not kept is made again, and kept then.

    So it is where some rounds are missing, as of a run that was told to keep what travels when it
    was resumed: what came first would not be the first.

    Args:
        folder: of the run.
        settings: of the run.
        data: of the run.
        tell: is told of progress.

    Raises:
        SettingsError: the repeated run ends with other weights.
        DamagedFileError: what was kept cannot be read.
    """
    models, rounds = read_clients(folder), list(read_exchange(folder))
    all_rounds = range(1, 1 + int(read_result(folder).get("rounds", settings.rounds)))
    if models is None or [each.round for each in rounds] != list(all_rounds):
        _run_again(folder, settings, data, tell)
        models, rounds = read_clients(folder) or {}, list(read_exchange(folder))
    return Evidence(rounds, models)


def _run_again(folder: Path, settings: Settings, data: FederatedData, tell: Tell) -> None:
    """Repeat a run from its seed; its bits are equal."""
    result: Row = read_result(folder)
    memory = _Memory()
    kept = with_kept(settings)
    tell("what travelled was not kept (exchange.keep): the run is repeated from its seed")
    with open_grid(kept, data) as grid:
        loop = RoundLoop(grid, kept, data, [memory, Counter(settings.rounds, tell, "run again")])
        loop.run()
        digest, models = clients_digest(grid, settings), clients_models(loop, grid)
    if digest != result.get("weights_sha256"):
        raise SettingsError(
            f"{folder}: repeated from its seed the run ends with other weights "
            f"({digest[:16]}, it had {str(result.get('weights_sha256'))[:16]}): code, libraries or "
            "the type of processor have changed since. Run it again with exchange.keep=true, "
            "which keeps what an attack needs"
        )
    writer = ExchangeFolder(folder)
    for exchanged in memory.rounds:
        writer.travelled(exchanged)
    # The last file says that all is there.
    keep_clients(folder, models)


def attacked_data(settings: Settings) -> FederatedData:
    """Return a run's data.

    Raises:
        SettingsError: names the setting that keeps its rows from being attacked.
    """
    data = load_data(settings)
    if data.views:
        raise SettingsError(
            "data.views: attacks are made on runs whose clients have inputs of one kind, got "
            f"{1 + len(data.views)} kinds"
        )
    if data.client_shifts is not None:
        raise SettingsError(
            "data.feature_shift: test rows have no shift, so that a shift would tell members from "
            "others; attack a run without"
        )
    return data
