"""What clipping the gradient of each row costs beside a plain step, for stacked clients.

32 clients with an MLP (784 inputs, one hidden layer of 64) and 320 rows each, batch 32, SGD; a fit
of the vmap backend is one epoch. Fits by the plain rule, by `Clipped` with ``method="norms"``
and with ``method="vmap"`` alternate in one run, on cohorts that begin alike. After the first
fit both methods must hold the same weights, or the comparison is void.

    python benchmarks/gradients.py            # about half a minute
    python benchmarks/gradients.py --check    # exit status 1 above the target
    python benchmarks/gradients.py --quick    # tiny, to see that it runs; says nothing
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
    PLAIN,
    Clipped,
    GradientRule,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Streams,
    TrainingData,
    VmapCohort,
    supervised,
)

SAME_WEIGHTS = 1e-4
"""Largest difference that the order of floating-point sums explains."""


def cohort_of(clients: int, rows: int) -> VmapCohort:
    draw = torch.Generator().manual_seed(0)
    data = TrainingData(
        train_inputs=torch.randn(clients * rows, 1, 28, 28, generator=draw),
        train_labels=torch.randint(10, (clients * rows,), generator=draw),
        public_inputs=torch.zeros(0, 1, 28, 28),
        public_labels=None,
        num_classes=10,
    )
    optimizer = OptimizerSettings(name="sgd", lr=0.05)
    return VmapCohort(
        [Member(client, np.arange(rows) + rows * client) for client in range(clients)],
        model=ModelSettings(name="mlp", options={"hidden": [64]}),
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(seed=7),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=15, at_most=2.0)
    options = parser.parse_args()
    clients, rows, batch = (3, 8, 4) if options.quick else (32, 320, 32)
    if options.quick:
        options.repeats = 1
    before = machine()
    torch.set_num_threads(1)
    rules: dict[str, GradientRule] = {
        "plain": PLAIN,
        "norms": Clipped(norm=1.0, expected_batch=batch),
        "vmap": Clipped(norm=1.0, expected_batch=batch, method="vmap"),
    }
    cohorts = {name: cohort_of(clients, rows) for name in rules}
    passes = Passes(batch_size=batch)
    for name, rule in rules.items():
        cohorts[name].fit(supervised, private=passes, gradient=rule)
    difference = max(
        float(np.abs(one[name] - other[name]).max())
        for one, other in zip(cohorts["norms"].weights(), cohorts["vmap"].weights(), strict=True)
        for name in one
    )
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(options.repeats):
        for name, rule in rules.items():
            with stopwatch(seconds[name]):
                cohorts[name].fit(supervised, private=passes, gradient=rule)
    samples = {name: Samples(values) for name, values in seconds.items()}
    ratio = ratios(samples["norms"], samples["plain"])
    slow = ratios(samples["vmap"], samples["plain"])
    print(describe(before, os.getloadavg()[0]))
    print(f"an epoch of {clients} stacked clients, seconds:")
    for name, sample in samples.items():
        print(f"  {name:5}  {sample.text()}")
    print(f"largest difference between the weights of the two methods: {difference:g}")
    row(
        "G1",
        f"gradients of rows clipped by norms, {clients} stacked MLPs, against a plain fit",
        ratio.text(2),
        f"at most {options.at_most:g}",
        ratio.median <= options.at_most,
        options,
    )
    print(f"norms {ratio.text(2)}, vmap {slow.text(2)} of plain; {verdict(ratio, options)}")
    if options.json:
        tables = {name: sample.to_table() for name, sample in samples.items()}
        print(json.dumps({**before, **tables, "ratio": ratio.to_table(), "vmap": slow.to_table()}))
    if difference > SAME_WEIGHTS:
        print("the two methods did not compute the same: the ratio is void")
        return 1
    return exit_status(ratio, options)


if __name__ == "__main__":
    sys.exit(main())
