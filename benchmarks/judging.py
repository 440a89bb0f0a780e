"""What judging costs beside the rounds: never, in each round, by ``evaluation.every=auto``.

20 clients with a multilayer perceptron on 28x28 images of noise, 50 private rows each, batch 10,
one local epoch, Adam, ``dml`` over 200 public rows, and 10,000 test rows; on the inline backend. A
side is a run whose rounds from the third to the last but one are timed, by the processor's time and
by the clock; sides take turns. Under ``auto`` so many rounds are timed that one of them is judged.

    python benchmarks/judging.py            # about five minutes
    python benchmarks/judging.py --check    # exit status 1 above the target
    python benchmarks/judging.py --quick    # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
import time

import numpy as np
import torch
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

from fedkd.data import FederatedData
from sim.engine.inline import InlineGrid
from sim.server.judging import COUNTED_ROUND, rounds_between
from sim.server.rounds import RoundLoop
from sim.settings import settings_from_table

CLIENTS, ROWS_PER_CLIENT, PUBLIC_ROWS = 20, 50, 200
NEVER, ALWAYS, AUTO = "judged at the end", "judged in each round", "auto"


def data_of(test_rows: int) -> FederatedData:
    """Return noise of MNIST's shape."""
    rng = np.random.default_rng(0)

    def images(rows: int) -> np.ndarray:
        return rng.normal(size=(rows, 1, 28, 28)).astype(np.float32)

    private = CLIENTS * ROWS_PER_CLIENT
    return FederatedData(
        name="noise",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images(private),
        train_labels=rng.integers(10, size=private),
        client_rows=tuple(np.arange(private).reshape(CLIENTS, -1)),
        public_inputs=images(PUBLIC_ROWS),
        public_labels=None,
        validation_inputs=images(10),
        validation_labels=np.arange(10),
        test_inputs=images(test_rows),
        test_labels=rng.integers(10, size=test_rows),
    )


def seconds_of(data: FederatedData, rounds: int, every: int | str) -> tuple[float, float, int]:
    """Return CPU and wall seconds of a timed round, and how many rounds ``auto`` lets pass."""
    settings = settings_from_table(
        {
            "rounds": rounds,
            "strategy": {"name": "dml"},
            "clients": {
                "count": CLIENTS,
                "models": [{"name": "mlp"}],
                "batch_size": 10,
                "local": {"epochs": 1},
            },
            "data": {"public": {"size": PUBLIC_ROWS}},
            "evaluation": {"every": every},
            "engine": {"backend": "inline"},
        }
    )
    loop = RoundLoop(InlineGrid(settings, data), settings, data, [])
    marks: list[tuple[float, float]] = []
    loop.run(lambda: marks.append((time.process_time(), time.perf_counter())))
    first, last = marks[COUNTED_ROUND - 1], marks[-2]
    count = len(marks) - 1 - COUNTED_ROUND
    judged_rows = CLIENTS * (len(data.test_labels) + len(data.validation_labels))
    cpu_s, wall_s = ((end - start) / count for start, end in zip(first, last, strict=True))
    return cpu_s, wall_s, rounds_between(loop.history.federation, judged_rows)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=7, at_most=1.6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test_rows = 10_000
    if options.quick:
        options.repeats, test_rows = 1, 200
    before = machine()
    data = data_of(test_rows)
    # To warm up, and to learn how many rounds have one that is judged.
    *_, every = seconds_of(data, 4, 1)
    rounds = {NEVER: 10, ALWAYS: 10, AUTO: COUNTED_ROUND + every + 1}
    cpu, wall = ({side: Samples() for side in rounds} for _ in range(2))
    for _ in range(options.repeats):
        for side, word in ((NEVER, 1000), (ALWAYS, 1), (AUTO, "auto")):
            cpu_s, wall_s, _ = seconds_of(data, rounds[side], word)
            cpu[side].values.append(cpu_s)
            wall[side].values.append(wall_s)
    print(describe(before, os.getloadavg()[0]))
    print(f"{CLIENTS} clients, {test_rows} test rows; auto: every {every} rounds; seconds a round:")
    for side in rounds:
        print(f"  {side}: CPU {cpu[side].text()}, wall {wall[side].text()}")
    always, auto = (ratios(cpu[side], cpu[NEVER]) for side in (ALWAYS, AUTO))
    print(f"  {ALWAYS} / {NEVER}, CPU: {always.text()}; {verdict(always, options)}")
    print(f"  {AUTO} / {NEVER}, CPU: {auto.text()}; {verdict(auto, options)}")
    if options.json:
        print(json.dumps({side: cpu[side].values for side in rounds}))
    target = f"at most {options.at_most:g} times"
    for what, found in ((ALWAYS, always), (f"evaluation.every={AUTO}", auto)):
        row(
            "E1",
            f"round of {CLIENTS} MLPs, {test_rows} test rows, {what}, against one without",
            found.text(),
            target,
            found.median <= options.at_most,
            options,
        )
    return max(exit_status(each, options) for each in (always, auto))


if __name__ == "__main__":
    sys.exit(main())
