"""What stacking clients into one model gains over training them one after the other.

64 clients with a 64-64-10 multilayer perceptron on 8x8 images, batch 32, Adam: one call of
`Cohort.fit` of 8 steps by the loop backend against the same by the vmap backend, by turns, one
thread. Batches are drawn, cut and gathered on both sides; both end with the same weights, or the
comparison is void. Beside it, what evaluation gains where all clients see the same rows.

Then the rule of `choose_backend`: for each family and number of clients both backends are timed,
and the one that the rule chooses may take 10 % longer than the other at most.

    python benchmarks/vectorized.py              # about 3 minutes
    python benchmarks/vectorized.py --check      # exit status 1 where the rule or the gain is off
    python benchmarks/vectorized.py --quick      # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    Backend,
    Cohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Streams,
    TrainingData,
    choose_backend,
    open_cohort,
    supervised,
)

CLASSES = 10
SHARED_ROWS = (50, 1000)
"""Rows that all clients predict: few go through the stack, many through one client's after the
other, because there one client alone keeps a CPU busy."""
TOLERANCE = 1.10
"""How much longer the chosen backend may take than the other one."""
SAME_WEIGHTS = 1e-4
"""Largest difference that the order of floating-point sums explains; other steps exceed it."""
ADAM = OptimizerSettings(name="adam", lr=1e-3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the rule's table."""

    model: str
    clients: int
    side: int = 8
    batch_rows: int = 32

    @property
    def label(self) -> str:
        image = f"{self.side}x{self.side}"
        return f"{self.model:12}{image:>6}, batch {self.batch_rows:2}, {self.clients:2} clients"


RULE = [
    *(
        Case(model=model, clients=clients)
        for model in ("mlp", "cnn", "gru", "transformer")
        for clients in (4, 16, 64)
    ),
    Case(model="lenet", clients=16),
    Case(model="lenet", clients=16, side=28),
    Case(model="lenet", clients=16, side=28, batch_rows=10),
    Case(model="cnn", clients=16, side=28),
    Case(model="mlp", clients=16, side=28),
    Case(model="gru", clients=16, side=28),
    Case(model="transformer", clients=16, side=28),
    Case(model="mlp", clients=2),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps of one fit")
    add_common_arguments(parser, repeats=7, at_most=1 / 8)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps = 1, 2
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    before = machine()
    main_case = Case(model="mlp", clients=4 if options.quick else 64)
    times = Duel(main_case, steps=options.steps).fight(options.repeats)
    table = [main_case] if options.quick else RULE
    print(f"fit of {options.steps} steps, {main_case.label}, seconds:")
    print(f"  loop  {times.loop.text()}")
    print(f"  vmap  {times.vmap.text()}")
    duel = Duel(main_case, steps=1)
    for rows in SHARED_ROWS:
        shared = duel.fight_over_shared_rows(rows, options.repeats)
        print(f"logits of {rows} shared rows, the same clients, seconds:")
        print(f"  loop  {shared.loop.text()}")
        print(f"  vmap  {shared.vmap.text()}, {shared.gain.text()} times as fast")
    print(f"largest difference between the weights of the two: {times.difference:g}")
    print("the rule, one thread (loop / vmap: how many times as fast the stack is):")
    rule = [judged(case, options) for case in table]
    off = [line["case"] for line in rule if line["loss"] > TOLERANCE]
    ratio = ratios(times.vmap, times.loop)
    print(describe(before, os.getloadavg()[0]))
    if off and not options.quick:
        print(f"the rule is off by more than {TOLERANCE - 1:.0%} for: {'; '.join(off)}")
    row(
        "B4",
        f"a fit of {main_case.clients} stacked MLP clients, against one after the other",
        f"{times.gain.text()} times as fast",
        f"at least {1 / options.at_most:g} times",
        ratio.median <= options.at_most,
        options,
    )
    worst = max(line["loss"] for line in rule)
    row(
        "B4",
        f"what `auto` loses to the better backend, {len(rule)} cases of MLP, CNN, GRU, transformer",
        f"at most {worst - 1:.0%}",
        f"at most {TOLERANCE - 1:.0%}",
        not off,
        options,
    )
    if options.json:
        tables = {"loop": times.loop.to_table(), "vmap": times.vmap.to_table()}
        print(json.dumps({**before, **tables, "ratio": ratio.to_table(), "rule": rule}))
    print(f"ratio {ratio.text(4)}, {times.gain.text()} times as fast; {verdict(ratio, options)}")
    if times.difference > SAME_WEIGHTS:
        print("the two did not compute the same: the ratio is void")
        return 1
    return exit_status(ratio, options) or int(bool(off) and options.check and not options.quick)


def judged(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Time a case in both backends, print a line, and say what the rule's choice costs."""
    steps = 2 if options.quick else 3
    times = Duel(case, steps=steps).fight(options.repeats)
    chosen = choose_backend(
        ModelSettings(name=case.model),
        input_shape=(1, case.side, case.side),
        num_classes=CLASSES,
        members=case.clients,
        batch_rows=case.batch_rows,
        device="cpu",
    )
    gain = times.gain.median
    loss = max(gain, 1.0) if chosen == "loop" else max(1 / gain, 1.0)
    print(f"  {case.label}: {times.gain.text()}; chosen {chosen}, {loss - 1:.0%} lost")
    return {"case": case.label, "gain": times.gain.to_table(), "chosen": chosen, "loss": loss}


@dataclass(frozen=True)
class Times:
    """Seconds of both backends, and how far apart their weights ended."""

    loop: Samples
    vmap: Samples
    difference: float = 0.0

    @property
    def gain(self) -> Samples:
        return ratios(self.loop, self.vmap)


class Duel:
    """The same clients in both backends."""

    def __init__(self, case: Case, *, steps: int) -> None:
        rows = steps * case.batch_rows
        draw = torch.Generator().manual_seed(0)
        shape = (1, case.side, case.side)
        data = TrainingData(
            train_inputs=torch.randn(rows * case.clients, *shape, generator=draw),
            train_labels=torch.randint(CLASSES, (rows * case.clients,), generator=draw),
            public_inputs=torch.randn(max(SHARED_ROWS), *shape, generator=draw),
            public_labels=None,
            num_classes=CLASSES,
        )
        self._passes = Passes(batch_size=case.batch_rows)
        members = [
            Member(client, np.arange(client * rows, (client + 1) * rows))
            for client in range(case.clients)
        ]
        self._cohorts = [self._open(backend, members, case, data) for backend in ("loop", "vmap")]

    @staticmethod
    def _open(
        backend: Backend, members: Sequence[Member], case: Case, data: TrainingData
    ) -> Cohort:
        return open_cohort(
            members,
            backend=backend,
            model=ModelSettings(name=case.model),
            optimizer=ADAM,
            data=data,
            pool=ModelPool(data, ADAM),
            streams=Streams(seed=0),
        )

    def fight(self, repeats: int) -> Times:
        """Train by turns; the first turn of each warms up."""
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats + 1):
            for cohort, taken in zip(self._cohorts, seconds, strict=True):
                with stopwatch(taken):
                    cohort.fit(supervised, private=self._passes)
        loop, vmap = (cohort.weights() for cohort in self._cohorts)
        difference = max(
            float(np.abs(array - other[name]).max())
            for weights, other in zip(loop, vmap, strict=True)
            for name, array in weights.items()
        )
        return Times(Samples(seconds[0][1:]), Samples(seconds[1][1:]), difference)

    def fight_over_shared_rows(self, count: int, repeats: int) -> Times:
        """Let all clients predict the same rows, by turns."""
        seconds: list[list[float]] = [[], []]
        rows = np.arange(count)
        for _ in range(repeats + 1):
            for cohort, taken in zip(self._cohorts, seconds, strict=True):
                with stopwatch(taken):
                    cohort.predict_public(rows)
        return Times(Samples(seconds[0][1:]), Samples(seconds[1][1:]))


if __name__ == "__main__":
    sys.exit(main())
