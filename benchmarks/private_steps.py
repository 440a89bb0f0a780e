"""What a step of DP-SGD costs beside a plain one, for stacked clients.

32 clients with an MLP (784 inputs, one hidden layer of 64) and 320 rows each, batches of 32 rows,
on average where they are drawn, SGD; a fit of the vmap backend is ten steps. Fits on plain cohorts,
on private ones, and on private ones without noise alternate in one run; every fit has a cohort of
its own. What is told beside the ratio: what clipping and the draws cost, and what noise adds.

    python benchmarks/private_steps.py            # about a minute
    python benchmarks/private_steps.py --check    # exit status 1 above the target
    python benchmarks/private_steps.py --quick    # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys

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
    stopwatch,
    verdict,
)

from fedkd.models import ModelSettings
from fedkd.training import (
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    PrivateLearning,
    Streams,
    TrainingData,
    open_cohort,
    supervised,
)

OPTIMIZER = OptimizerSettings(name="sgd", lr=0.05)
NOISE = {"plain": None, "private": 1.0, "without noise": 0.0}


def data_of(clients: int, rows: int) -> TrainingData:
    draw = torch.Generator().manual_seed(0)
    return TrainingData(
        train_inputs=torch.randn(clients * rows, 1, 28, 28, generator=draw),
        train_labels=torch.randint(10, (clients * rows,), generator=draw),
        public_inputs=torch.zeros(0, 1, 28, 28),
        public_labels=None,
        num_classes=10,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=15, at_most=3.0)
    options = parser.parse_args()
    clients, rows, batch = (3, 8, 4) if options.quick else (32, 320, 32)
    if options.quick:
        options.repeats = 1
    before = machine()
    torch.set_num_threads(1)
    data = data_of(clients, rows)
    pool = ModelPool(data, OPTIMIZER)
    passes = Passes(batch_size=batch, steps=2 if options.quick else 10)

    def fit(noise: float | None, seconds: list[float]) -> float:
        private = None
        if noise is not None:
            private = PrivateLearning(
                clip=1.0,
                batch_size=batch,
                noise_multipliers=(noise,) * clients,
                most_steps=(passes.count(rows),) * clients,
            )
        cohort = open_cohort(
            [Member(client, np.arange(rows) + rows * client) for client in range(clients)],
            backend="vmap",
            model=ModelSettings(name="mlp", options={"hidden": [64]}),
            optimizer=OPTIMIZER,
            data=data,
            pool=pool,
            streams=Streams(seed=7),
            private=private,
        )
        start = cohort.weights()[0]
        with stopwatch(seconds):
            cohort.fit(supervised, private=passes)
        now = cohort.weights()[0]
        return float(sum(np.square(now[name] - start[name]).sum() for name in start) ** 0.5)

    moved = {name: fit(noise, []) for name, noise in NOISE.items()}
    seconds: dict[str, list[float]] = {name: [] for name in NOISE}
    for _ in range(options.repeats):
        for name, noise in NOISE.items():
            fit(noise, seconds[name])
    samples = {name: Samples(values) for name, values in seconds.items()}
    ratio = ratios(samples["private"], samples["plain"])
    clipped = ratios(samples["without noise"], samples["plain"])
    print(describe(before, os.getloadavg()[0]))
    print(f"{passes.count(rows)} steps of {clients} stacked clients, seconds:")
    for name, sample in samples.items():
        print(f"  {name:13}  {sample.text()}; the first client moves by {moved[name]:.3g}")
    row(
        "G2",
        f"steps of DP-SGD, {clients} stacked MLPs, against plain ones",
        ratio.text(2),
        f"at most {options.at_most:g}",
        ratio.median <= options.at_most,
        options,
    )
    print(
        f"private {ratio.text(2)}, without noise {clipped.text(2)} of plain; "
        f"{verdict(ratio, options)}"
    )
    if options.json:
        tables = {name: sample.to_table() for name, sample in samples.items()}
        print(json.dumps({**before, **tables, "ratio": ratio.to_table()}))
    if not moved["without noise"] < moved["private"]:
        print("noise did not move the weights: the ratio is void")
        return 1
    return exit_status(ratio, options)


if __name__ == "__main__":
    sys.exit(main())
