"""How well clients of very unequal size fill two workers, and what repeatable bits cost.

Balance: 60 LeNet clients whose private rows follow Zipf's law (the largest holds a fifth of all),
`dml` on 28x28 noise. The seconds of a round's training phase against the longest-first bound: the
makespan of the schedule that gives each client, longest first, to the worker that is free first,
computed from the seconds that the clients took in that very round.

Repeatability: rounds as they are against rounds without what makes bits repeat. Replies are then
reduced as they arrive instead of in client order (the rounds of the two kinds alternate), and from
their seconds is taken off what it costs to give every fit random numbers of its own (measured by
itself). And the weights of runs with one and two workers must be equal to the last bit.

    python benchmarks/balance.py           # about 4 minutes
    python benchmarks/balance.py --check   # exit status 1 beyond a target
    python benchmarks/balance.py --quick   # tiny, to see that it runs; says nothing
"""

import argparse
import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from measurement import Samples, describe, machine, ratios, row, stopwatch

from fedkd.data import FederatedData
from fedkd.randomness import Purpose, generator_for, seeded_torch
from fedkd.training import weights_digest
from sim.commands.running import open_grid
from sim.engine.grid import FIRST_NODE_ID, reply_message
from sim.engine.ray_grid import RayGrid
from sim.engine.resources import available_cpus
from sim.engine.session import RaySession
from sim.server.observers import Observer
from sim.server.rounds import RoundLoop
from sim.settings import Settings, settings_from_table

BALANCE_AT_MOST = 1.10
REPEATABLE_AT_MOST = 1.05
PUBLIC_ROWS = 100


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--rows", type=int, default=6000, help="private rows of all clients")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds of each kind")
    parser.add_argument("--check", action="store_true", help="exit status 1 beyond a target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.rows, options.repeats = 4, 100, 1
    return options


def main() -> int:
    options = arguments()
    before = machine()
    data = zipf_data(options.clients, options.rows)
    balance, repeatable, digests = measure(options, data)
    print(describe(before, os.getloadavg()[0]))
    good = (
        balance.median <= BALANCE_AT_MOST
        and repeatable.median <= REPEATABLE_AT_MOST
        and len(set(digests)) == 1
    )
    print(f"a round beside the longest-first bound: {balance.text()}")
    print(f"a repeatable round beside one that is not: {repeatable.text()}")
    print(f"weights with 1 and 2 workers: {' and '.join(digest[:16] for digest in digests)}")
    row(
        "B8",
        f"{options.clients} Zipf-sized clients, 2 workers, against the longest-first bound",
        balance.text(),
        f"at most {BALANCE_AT_MOST:g}",
        balance.median <= BALANCE_AT_MOST,
        options,
    )
    row(
        "B9",
        "repeatable rounds (equal bits with 1 and 2 workers) against careless ones",
        f"{repeatable.text()}, bits {'equal' if len(set(digests)) == 1 else 'DIFFER'}",
        f"at most {REPEATABLE_AT_MOST:g}",
        repeatable.median <= REPEATABLE_AT_MOST and len(set(digests)) == 1,
        options,
    )
    if options.quick:
        print("no verdict: --quick measures nothing but whether the script runs")
        return 0
    print(
        f"targets: at most {BALANCE_AT_MOST:g} and {REPEATABLE_AT_MOST:g}, equal weights: "
        f"{'met' if good else 'MISSED'}"
    )
    if options.json:
        tables = {"balance": balance.to_table(), "repeatable": repeatable.to_table()}
        print(json.dumps({**before, **tables}))
    return int(options.check and not good)


def measure(options: argparse.Namespace, data: FederatedData) -> tuple[Samples, Samples, list[str]]:
    settings = settings_of(options.clients, rounds=2 + 2 * options.repeats, workers=2)
    with RaySession(settings.engine) as session:
        grid = ArrivalGrid(session, settings, data)
        rounds = Rounds(grid, workers=2)
        RoundLoop(grid, settings, data, [rounds]).run()
        grid.close()
    ordered, arrived = Samples(rounds.seconds[False]), Samples(rounds.seconds[True])
    streams = seconds_of_streams() * options.clients / 2
    balance = ratios(ordered, Samples(rounds.bounds[False]))
    repeatable = ratios(ordered, Samples([seconds - streams for seconds in arrived.values]))
    digests = []
    for workers in (1, 2):
        settings = settings_of(options.clients, rounds=2, workers=workers)
        with RaySession(settings.engine) as session, open_grid(settings, data, session) as grid:
            RoundLoop(grid, settings, data, []).run()
            states = grid.client_states(range(options.clients))
            digests.append(weights_digest(state for state in states if state is not None))
    return balance, repeatable, digests


def settings_of(clients: int, *, rounds: int, workers: int) -> Settings:
    return settings_from_table(
        {
            "rounds": rounds,
            "data": {"public": {"size": PUBLIC_ROWS}},
            "clients": {
                "count": clients,
                "models": ["lenet"],
                "batch_size": 10,
                "local": {"epochs": 1},
            },
            "strategy": {"name": "dml"},
            "evaluation": {"every": rounds},
            "engine": {"cpus_per_worker": available_cpus() / workers, "vectorize": "loop"},
        }
    )


class Rounds(Observer):
    """Keeps each round's seconds and its bound, and lets the two kinds take turns."""

    def __init__(self, grid: "ArrivalGrid", workers: int) -> None:
        self._grid = grid
        self._workers = workers
        self._round = 0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.bounds: dict[bool, list[float]] = {True: [], False: []}

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        times = [row["seconds"] for row in rows if row["scope"] == "client" and "seconds" in row]
        # The first round warms up, and the last one is judged.
        if self._round and "accuracy" not in rows[0]:
            self.seconds[self._grid.careless].append(rows[0]["train_seconds"])
            self.bounds[self._grid.careless].append(longest_first(times, self._workers))
        self._round += 1
        self._grid.careless = not self._grid.careless


def longest_first(seconds: Iterable[float], workers: int) -> float:
    """Return the makespan of giving each job, longest first, to the worker that is free first."""
    free = [0.0] * workers
    for job in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + job)
    return max(free)


class ArrivalGrid(RayGrid):
    """A `RayGrid` that hands replies over as they arrive while it is told to be careless."""

    careless = False

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        if not self.careless:
            yield from super().send_and_receive(messages, timeout=timeout)
            return
        by_client = {message.metadata.dst_node_id - FIRST_NODE_ID: message for message in messages}
        calls = self._pack(by_client, {})
        for position, outcome in self._execute(calls):
            for client, reply in zip(calls[position].call.clients, outcome.replies, strict=True):
                yield reply_message(by_client[client], reply)


def seconds_of_streams(fits: int = 2000) -> float:
    """Return what it takes to give one fit random numbers of its own."""
    seconds: list[float] = []
    with stopwatch(seconds):
        for fit in range(fits):
            rng = generator_for(0, Purpose.TRAIN, 1, 0, fit)
            with seeded_torch(int(rng.integers(2**62))):
                pass
    return seconds[0] / fits


def zipf_data(clients: int, rows: int) -> FederatedData:
    """Return noise of 28x28 pixels, dealt out by Zipf's law, at least 4 rows a client."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, clients + 1)
    sizes = np.maximum(4, np.round(rows * shares / shares.sum())).astype(int)
    # The largest is neither first nor last.
    sizes = rng.permutation(sizes)
    total = int(sizes.sum())

    def images(count: int) -> np.ndarray:
        return rng.standard_normal((count, 1, 28, 28), dtype=np.float32)

    return FederatedData(
        name="zipf",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images(total),
        train_labels=rng.integers(10, size=total),
        client_rows=tuple(np.split(np.arange(total), np.cumsum(sizes)[:-1])),
        public_inputs=images(PUBLIC_ROWS),
        public_labels=None,
        validation_inputs=images(10),
        validation_labels=np.arange(10),
        test_inputs=images(10),
        test_labels=np.arange(10),
    )


if __name__ == "__main__":
    sys.exit(main())
