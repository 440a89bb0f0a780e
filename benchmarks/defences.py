"""What rules against clients that lie cost the server, beside the plain mean, with many clients.

100 clients, 500 public rows and 10 classes of float32 logits: `strategies.shared.robust.Consensus`
takes in all tables and makes one of them, under each rule in turn, again and again; and, with 20
clients, one for each client of what the others say. CPU time; ratios are to the mean of the same
turn.

    python benchmarks/defences.py            # about a minute
    python benchmarks/defences.py --check    # exit status 1 where the target is missed
    python benchmarks/defences.py --quick    # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
import time
from typing import get_args

import numpy as np
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    verdict,
)

from strategies.shared.robust import Consensus, Rule, TrustingSettings

OTHERS_OF = 20
"""Clients that each get what the others say; every rule is applied so many times."""

VARIANTS = {
    **{rule: {"aggregation": rule} for rule in get_args(Rule)},
    "trust": {"trust_rate": 1.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=7, at_most=200)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()
    if options.quick:
        options.clients, options.rows, options.repeats = 6, 20, 2
    before = machine()
    tables = np.random.default_rng(0).normal(0, 2, (options.clients, options.rows, options.classes))
    tables = tables.astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    others: dict[str, list[float]] = {name: [] for name in VARIANTS}
    # What is done first is slow for reasons of its own.
    for turn in range(-1, options.repeats):
        for name, chosen in VARIANTS.items():
            settings = TrustingSettings.model_validate({"name": name, **chosen})
            begun = time.process_time()
            of_all(tables, settings)
            between = time.process_time()
            of_others(tables[:OTHERS_OF], settings)
            seconds[name].append(between - begun)
            others[name].append(time.process_time() - between)
        if turn < 0:
            seconds, others = ({name: [] for name in VARIANTS} for _ in range(2))
    print(describe(before, os.getloadavg()[0]))
    mean, mean_of_others = Samples(seconds["mean"]), Samples(others["mean"])
    beside = {name: ratios(Samples(taken), mean) for name, taken in seconds.items()}
    beside_others = {name: ratios(Samples(taken), mean_of_others) for name, taken in others.items()}
    print(f"mean of {options.clients}: {mean.median * 1e3:.2f} ms")
    print(f"mean of the others, for each of {OTHERS_OF}: {mean_of_others.median * 1e3:.2f} ms")
    for name in VARIANTS:
        print(f"{name}: {beside[name].text()} of all, {beside_others[name].text()} of the others")
    costly = max(beside, key=lambda name: beside[name].median)
    ratio = beside[costly]
    row(
        "L1",
        f"the costliest rule of {options.clients} clients ({costly}) against the mean",
        f"{ratio.median:.3g} times",
        f"at most {options.at_most:g} times",
        ratio.median <= options.at_most,
        options,
    )
    print(verdict(ratio, options))
    if options.json:
        print(json.dumps({**before, **{name: own.to_table() for name, own in beside.items()}}))
    return exit_status(ratio, options)


def of_all(tables: np.ndarray, settings: TrustingSettings) -> None:
    with Consensus(settings, scale="logits", clients=len(tables)) as consensus:
        for client, values in enumerate(tables):
            consensus.add(client, values)
        consensus.pop_of_all()


def of_others(tables: np.ndarray, settings: TrustingSettings) -> None:
    with Consensus(settings, scale="logits", clients=len(tables)) as consensus:
        for client, values in enumerate(tables):
            consensus.add(client, values, among_others=True)
        for client in range(len(tables)):
            consensus.of_others(client)


if __name__ == "__main__":
    sys.exit(main())
