"""What encoding and decoding cost in a round of 100 LeNet clients, for each codec.

Every codec codes both ways of its algorithm in real rounds in this process, and short ones: one
pass over 300 private rows of 28 x 28 numbers, and one over 500 public rows where there are any. The
seconds spent in codecs, at clients and server together, are divided by those of the rest of the
same rounds, so that both share whatever else the machine does.

    python benchmarks/codecs.py
    python benchmarks/codecs.py --only fedavg --clients 20
    python benchmarks/codecs.py --only fedavg --epochs 5    # as many passes as by default
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    row,
    verdict,
)

from fedkd.data import FederatedData
from fedkd.exchange.codecs import CODECS
from sim.engine.inline import InlineGrid
from sim.server.rounds import RoundLoop
from sim.settings import Settings

SOFT = ("float16", "int8", {"kind": "top_k", "k": 3}, "one_bit", {"kind": "cfd", "bits": 4})
DELTAS = ("cfd_delta", {"kind": "cfd_delta", "bits": 4})
SETUPS: tuple[tuple[dict[str, Any], Any, Any], ...] = (
    *(({"name": "fedavg"}, codec, codec) for codec in ("float16", "int8")),
    ({"name": "fedavg"}, "low_rank", "float32"),
    *(({"name": "cfd", "distil_epochs": 1, "server_epochs": 1}, codec, codec) for codec in DELTAS),
    *(({"name": "dsfl", "distil_epochs": 1}, codec, codec) for codec in SOFT),
)


def watched(spent: list[float]) -> None:
    """Let all codecs add the seconds of their work to a list of one number."""

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    for name in CODECS:
        kind = CODECS.find(name)
        for method in ("encode", "decode", "bad"):
            # What is inherited is timed where it stands.
            if method in vars(kind):
                setattr(kind, method, timed(vars(kind)[method]))


def numbers(clients: int, rows: int, public: int) -> FederatedData:
    """Return pictures of noise around a pattern of their class."""
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((10, 1, 28, 28))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 10
        noise = rng.standard_normal((count, 1, 28, 28))
        return (patterns[labels] + noise).astype(np.float32), labels

    train_inputs, train_labels = draw(clients * rows)
    public_inputs, _ = draw(public)
    validation_inputs, validation_labels = draw(20)
    test_inputs, test_labels = draw(20)
    return FederatedData(
        name="noise",
        class_names=tuple("abcdefghij"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=train_inputs,
        train_labels=train_labels,
        client_rows=tuple(np.split(np.arange(clients * rows), clients)),
        public_inputs=public_inputs,
        public_labels=None,
        validation_inputs=validation_inputs,
        validation_labels=validation_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rows", type=int, default=300, help="private rows of a client")
    parser.add_argument("--epochs", type=int, default=1, help="passes of a client; a run's: 5")
    parser.add_argument("--public", type=int, default=500, help="public rows")
    parser.add_argument("--only", nargs="+", default=["fedavg", "cfd", "dsfl"], metavar="NAME")
    add_common_arguments(parser, repeats=3, at_most=0.05)
    options = parser.parse_args()
    clients, rows = (4, 40) if options.quick else (options.clients, options.rows)
    before = machine()
    data = numbers(clients, rows, options.public)
    spent = [0.0]
    watched(spent)
    worst = Samples([0.0])
    for strategy, up, down in (setup for setup in SETUPS if setup[0]["name"] in options.only):
        settings = Settings.model_validate(
            {
                "rounds": 1 + options.repeats,
                "clients": {
                    "count": clients,
                    "models": ["lenet"],
                    "local": {"epochs": options.epochs},
                },
                "data": {"public": {"size": options.public}},
                "strategy": strategy,
                "exchange": {"up": up, "down": down},
                "engine": {"backend": "inline"},
                "evaluation": {"every": 100, "clients": 1},
            }
        )
        grid = InlineGrid(settings, data)
        loop = RoundLoop(grid, settings, data, [])
        coding: list[float] = []

        def after_round(coding: list[float] = coding) -> None:
            coding.append(spent[0])
            spent[0] = 0.0

        loop.run(after_round)
        seconds = [line["train_seconds"] for line in loop.history.federation]
        # In the first round nothing comes down yet.
        pairs = list(zip(coding, seconds, strict=True))[1:]
        shares = Samples([own / (whole - own) for own, whole in pairs])
        milliseconds = Samples([1000 * own for own, _ in pairs])
        name = up if isinstance(up, str) else " ".join(map(str, up.values()))
        print(
            f"{strategy['name']} {name}: {100 * shares.median:.2f} % of a round, "
            f"{milliseconds.text()} ms of {seconds[-1]:.1f} s",
            flush=True,
        )
        worst = max(worst, shares, key=lambda samples: samples.median)
    print(verdict(worst, options))
    print(describe(before, os.getloadavg()[0]))
    row(
        "X1",
        "encoding and decoding in a round of 100 LeNet clients, the dearest codec",
        f"{100 * worst.median:.2f} %",
        "at most 5 %",
        worst.median <= options.at_most,
        options,
    )
    return exit_status(worst, options)


if __name__ == "__main__":
    sys.exit(main())
