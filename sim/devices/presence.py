"""Who can be reached when: late joiners, clients that come and go, and a file of times.

Who is absent in a round is not asked; a round's clients are drawn among those who are there. All of
it is a pure function of settings, seed and round, and with a trace of the time at which a round
begins.

A trace is a text file of one of two kinds. **Intervals**, as CSV with the header ``client,from,to``
or as a JSON list of tables with these keys: a client is there from one moment of the simulated
time, in seconds from the beginning of the run, until just before another; without an interval
never. **Hours**, as CSV with the header ``client,0,1,...,23``: the probability that a client is
there in a round which begins in that hour of the day; drawn for each round and client. The client
``*`` of a line stands for all clients that no other line names.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedkd.bounds import Count, PathText, Real, Share, shown
from fedkd.randomness import Purpose, generator_for

LARGEST_FILE = 64 * 2**20
"""Bytes of a trace."""
MOST_LINES = 2_000_000
LAST_SECOND = 3.2e9
"""A hundred years."""
HOUR_S, HOURS = 3600, 24
EVERYBODY = "*"


class PresenceSettings(BaseModel):
    """Who can be reached when (``presence``); everybody always where nothing is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    join_rounds: tuple[Count, ...] | None = Field(
        None,
        max_length=100_000,
        description="the round from which on a client is there, dealt out in turn; none: all of "
        "them from the first",
    )
    leave: Share = Field(
        0.0, description="probability that a client that is there has left by the next round"
    )
    come_back: Share = Field(
        0.5, description="probability that one that had left is there again in the next round"
    )
    trace: PathText | None = Field(
        None, description="file of who is there when: intervals, or a probability for each hour"
    )
    repeat_s: Real | None = Field(
        None,
        ge=1e-3,
        le=LAST_SECOND,
        description="a trace of intervals begins anew after so many seconds, such as 86400",
    )
    round_s: Real = Field(
        3600.0,
        ge=1e-3,
        le=LAST_SECOND,
        description="seconds that a round lasts in which nobody is there; without a clock, every "
        "round",
    )

    @field_validator("join_rounds", mode="before")
    @classmethod
    def _some(cls, value: object) -> object:
        if value in ([], ()):
            raise ValueError("needs at least one round, got none")
        return value

    @model_validator(mode="after")
    def _somebody_comes(self) -> "PresenceSettings":
        if self.leave and not self.come_back:
            raise ValueError(
                f"presence.come_back must be > 0 where clients leave (presence.leave = "
                f"{self.leave:g}), got 0: sooner or later nobody would be there"
            )
        if self.repeat_s is not None and self.trace is None:
            raise ValueError("presence.repeat_s needs presence.trace, which it repeats")
        return self

    @property
    def on(self) -> bool:
        """Whether anybody is ever absent."""
        return bool(self.join_rounds or self.leave or self.trace)


@runtime_checkable
class Trace(Protocol):
    """Who is there by the clock."""

    def there(self, time_s: float, round: int) -> np.ndarray:
        """Return for each client whether it is there at a moment: bool ``[clients]``."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """When clients are there.

    Attributes:
        clients: int64, whose each interval is.
        starts, ends: seconds; an interval holds its start and not its end.
        count: of all clients.
        repeat_s: after which it begins anew; None: never.
    """

    clients: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    count: int
    repeat_s: float | None = None

    def there(self, time_s: float, round: int) -> np.ndarray:
        """Those in one of whose intervals the moment lies."""
        if self.repeat_s is not None:
            time_s %= self.repeat_s
        found = np.zeros(self.count, np.bool_)
        found[self.clients[(self.starts <= time_s) & (time_s < self.ends)]] = True
        return found


@dataclass(frozen=True, eq=False)
class HoursOfDay:
    """How likely clients are there.

    Attributes:
        shares: float64 ``[clients, 24]``, probabilities.
        seed: of the run.
    """

    shares: np.ndarray
    seed: int

    def there(self, time_s: float, round: int) -> np.ndarray:
        """Those whom the round's draw lets be there in that hour of the day."""
        hour = int(time_s // HOUR_S) % HOURS
        draws = generator_for(self.seed, Purpose.PRESENCE, 1, round).random(len(self.shares))
        there: np.ndarray = draws < self.shares[:, hour]
        return there


class Presence:
    """Says who is there in a round.

    Args:
        settings: somebody may be absent.
        clients: how many there are.
        seed: of the run.

    Raises:
        ValueError: the trace cannot be read, naming the line.
    """

    def __init__(self, settings: PresenceSettings, *, clients: int, seed: int) -> None:
        self._settings = settings
        self._clients = clients
        self._seed = seed
        self._trace = (
            None
            if settings.trace is None
            else read_trace(settings.trace, clients=clients, seed=seed, repeat_s=settings.repeat_s)
        )
        self._joined = np.resize(np.array(settings.join_rounds or (1,), np.int64), clients)
        self._chain = 0, np.ones(clients, np.bool_)

    def there(self, round: int, time_s: float) -> tuple[int, ...]:
        """Return the clients that are there: sorted, perhaps none.

        Args:
            round: 1-based.
            time_s: at which it begins, in seconds of simulated time.
        """
        found = (self._joined <= round) & self._not_left(round)
        if self._trace is not None:
            found &= self._trace.there(time_s, round)
        return tuple(np.flatnonzero(found).tolist())

    def _not_left(self, round: int) -> np.ndarray:
        """Return who is there by the chain of coming and leaving.

        In the first round as many are there as in the long run: ``come_back / (leave +
        come_back)``. A client that joins late has a chain nevertheless.
        """
        leave, come_back = self._settings.leave, self._settings.come_back
        if not leave:
            return np.ones(self._clients, np.bool_)
        number, there = self._chain
        if number > round:
            number, there = 0, np.ones(self._clients, np.bool_)
        while number < round:
            number += 1
            draws = generator_for(self._seed, Purpose.PRESENCE, 0, number).random(self._clients)
            if number == 1:
                there = draws < come_back / (leave + come_back)
            else:
                there = np.where(there, draws >= leave, draws < come_back)
        self._chain = number, there
        return there


def read_trace(path: Path, *, clients: int, seed: int, repeat_s: float | None) -> Trace:
    """Read who is there when; see the module for what the file is.

    Args:
        path: of the file; JSON where its name ends so, else CSV.
        clients: how many there are.
        seed: of the run, by which hours are drawn.
        repeat_s: after which intervals begin anew.

    Raises:
        ValueError: names the file, the line and what would work.
    """
    where = f"presence.trace {str(path)!r}"
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else None
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from None
    if content is None:
        raise ValueError(f"{where}: must have at most {LARGEST_FILE // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: must be text in UTF-8: {error.reason}") from None
    lines = _json_lines(text, where) if path.suffix.lower() == ".json" else _csv_lines(text, where)
    header = next(lines, (1, []))[1]
    if header == ["client", "from", "to"]:
        return _intervals(lines, where, clients, repeat_s)
    if header == ["client", *map(str, range(HOURS))]:
        if repeat_s is not None:
            raise ValueError(f"{where}: hours repeat every day; presence.repeat_s is of intervals")
        return _hours(lines, where, clients, seed)
    raise ValueError(
        f"{where}: line 1 must be client,from,to or client,0,1,...,{HOURS - 1}, got "
        f"{shown(','.join(map(str, header)))}"
    )


Line = tuple[int, Sequence[Any]]
"""The number of a line, from 1 on, and its cells."""


def _csv_lines(text: str, where: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if reader.line_num > MOST_LINES:
                raise ValueError(f"{where}: must have at most {MOST_LINES} lines")
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"{where}: line {reader.line_num} is no CSV: {error}") from None


def _json_lines(text: str, where: str) -> Iterator[Line]:
    """Yield entries of a list as lines, whose numbers are those of the entries."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON: {error}") from None
    keys = ["client", "from", "to"]
    if not isinstance(entries, list) or len(entries) > MOST_LINES:
        raise ValueError(f"{where}: must be a list of at most {MOST_LINES} tables")
    yield 0, keys
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping) or sorted(entry) != keys:
            raise ValueError(
                f"{where}: line {number} (entry of the list) must be a table with client, from "
                f"and to, got {shown(entry)}"
            )
        yield number, [entry[key] for key in keys]


def _intervals(
    lines: Iterable[Line], where: str, clients: int, repeat_s: float | None
) -> Intervals:
    until = LAST_SECOND if repeat_s is None else repeat_s
    named: set[int] = set()
    found: list[tuple[int, float, float]] = []
    of_others: list[tuple[float, float]] = []
    for number, cells in lines:
        at = f"{where}: line {number}"
        if len(cells) != 3:
            raise ValueError(f"{at} must have 3 cells, got {len(cells)}")
        client = _client(cells[0], clients, at)
        start = _number(cells[1], 0.0, until, at, "from")
        end = _number(cells[2], 0.0, until, at, "to")
        if not start < end:
            raise ValueError(f"{at}: from must be before to, got {start:g} and {end:g}")
        if client is None:
            of_others.append((start, end))
        else:
            named.add(client)
            found.append((client, start, end))
    others = [client for client in range(clients) if client not in named] if of_others else []
    if len(others) * len(of_others) > 10 * MOST_LINES:
        raise ValueError(f"{where}: too many intervals for {EVERYBODY}, got {len(of_others)}")
    found += [(client, *interval) for client in others for interval in of_others]
    if not found:
        raise ValueError(f"{where}: nobody is ever there: it has no interval")
    table = np.array(found, np.float64)
    return Intervals(table[:, 0].astype(np.int64), table[:, 1], table[:, 2], clients, repeat_s)


def _hours(lines: Iterable[Line], where: str, clients: int, seed: int) -> HoursOfDay:
    shares = np.zeros((clients, HOURS))
    named: set[int] = set()
    of_others: list[float] | None = None
    for number, cells in lines:
        at = f"{where}: line {number}"
        if len(cells) != 1 + HOURS:
            raise ValueError(f"{at} must have {1 + HOURS} cells, got {len(cells)}")
        client = _client(cells[0], clients, at)
        row = [_number(cell, 0.0, 1.0, at, f"hour {hour}") for hour, cell in enumerate(cells[1:])]
        if client in named or (client is None and of_others is not None):
            raise ValueError(f"{at}: a second line of client {cells[0]}")
        if client is None:
            of_others = row
        else:
            named.add(client)
            shares[client] = row
    if of_others is not None:
        others = np.ones(clients, np.bool_)
        others[list(named)] = False
        shares[others] = of_others
    if not shares.any():
        raise ValueError(f"{where}: nobody is ever there: every probability is 0")
    return HoursOfDay(shares, seed)


def _client(cell: object, clients: int, at: str) -> int | None:
    """Return a client's number; None for everybody else."""
    if cell == EVERYBODY:
        return None
    try:
        client = int(cell) if isinstance(cell, str) else cell
    except ValueError:
        client = None
    if type(client) is not int or not 0 <= client < clients:
        raise ValueError(
            f"{at}: client must be 0 to {clients - 1} or {EVERYBODY}, got {shown(cell)}"
        )
    return client


def _number(cell: object, low: float, high: float, at: str, what: str) -> float:
    try:
        value = float(cell) if isinstance(cell, str | int | float) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if isinstance(cell, bool) or not low <= value <= high:
        raise ValueError(
            f"{at}: {what} must be a number from {low:g} to {high:g}, got {shown(cell)}"
        )
    return value
