"""What fused updates and channels_last save of a step, against the plain formula.

A step is a forward pass, the cross-entropy, a backward pass and an update, on noise in the shape of
MNIST, batch 10, one thread. Ours is a `Slot`, as the loop backend trains it; the slow twin is the
same model as it was built, with torch's plain update, a tensor at a time. For a stack of 32 clients
the update alone is timed, for nothing else of its step differs. Sides take turns in one process,
CPU time; both must end with the same weights, or the comparison is void.

    python benchmarks/kernels.py              # about a minute
    python benchmarks/kernels.py --check      # exit status 1 above the target
    python benchmarks/kernels.py --quick      # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
from torch import Tensor, nn

from fedkd.models import ModelSettings, build_model
from fedkd.training import OptimizerSettings
from fedkd.training.optimizers import Optimizer
from fedkd.training.pool import Slot

SHAPE = (1, 28, 28)
CLASSES = 10
BATCH_ROWS = 10
STACKED_CLIENTS = 32
MODELS = ("mlp", "lenet", "cnn")
OPTIMIZERS = {
    "SGD": OptimizerSettings(name="sgd", lr=0.01),
    "momentum": OptimizerSettings(name="sgd", lr=0.01, momentum=0.9),
    "Adam": OptimizerSettings(name="adam", lr=1e-3),
    "AdamW": OptimizerSettings(name="adamw", lr=1e-3, weight_decay=0.01),
}
HEADLINE = ("lenet", "Adam")
SAME_WEIGHTS = 1e-3
"""Largest difference that rounding explains after so many steps; other arithmetic exceeds it."""

Side = Callable[[], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of one measurement")
    add_common_arguments(parser, repeats=15, at_most=1 / 1.4)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps = 1, 1
    return options


@dataclass(frozen=True)
class Duel:
    """Two sides that do the same work.

    Attributes:
        ours, plain: take one step.
        weights: of either side.
    """

    ours: Side
    plain: Side
    weights: tuple[Sequence[Tensor], Sequence[Tensor]]

    def fight(self, steps: int, repeats: int) -> tuple[Samples, Samples]:
        """Return seconds of CPU time a step of both, by turns; the first turn of each warms up."""
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for side, taken in zip((self.ours, self.plain), seconds, strict=True):
                started = time.process_time()
                for _ in range(steps):
                    side()
                taken.append((time.process_time() - started) / steps)
        return Samples(seconds[0][1:]), Samples(seconds[1][1:])

    @property
    def difference(self) -> float:
        """The largest absolute difference between weights of the two."""
        with torch.no_grad():
            return max(
                float((one - other).abs().max()) for one, other in zip(*self.weights, strict=True)
            )


def in_the_loop(name: str, optimizer: OptimizerSettings) -> Duel:
    """Return one client's step, through a slot and as plain as torch makes it."""
    settings = ModelSettings(name=name)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH_ROWS, *SHAPE, generator=draw)
    labels = torch.randint(CLASSES, (BATCH_ROWS,), generator=draw)
    module, twin = (
        build_model(settings, input_shape=SHAPE, num_classes=CLASSES, seed=0) for _ in range(2)
    )
    slot = Slot(module, optimizer, torch.device("cpu"), channels_last=settings.channels_last)
    plain = optimizer.build(twin.parameters())

    def step_of(model: nn.Module, updates: Optimizer) -> Side:
        def step() -> None:
            updates.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            updates.step()

        return step

    return Duel(
        step_of(slot.module, slot.optimizer),
        step_of(twin, plain),
        (slot.learnt, list(twin.parameters())),
    )


def in_a_stack(name: str, optimizer: OptimizerSettings) -> Duel:
    """Return the update of many clients' weights, one tensor for each weight of all of them."""
    module = build_model(ModelSettings(name=name), input_shape=SHAPE, num_classes=CLASSES, seed=0)
    stacked = [
        torch.stack([parameter.detach()] * STACKED_CLIENTS) for parameter in module.parameters()
    ]
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(tensor.shape, generator=draw) for tensor in stacked]
    sides = []
    for fused in (True, False):
        weights = [nn.Parameter(tensor.clone()) for tensor in stacked]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        sides.append((optimizer.build(weights, fused=fused).step, weights))
    (ours, our_weights), (plain, plain_weights) = sides
    return Duel(ours, plain, (our_weights, plain_weights))


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    before = machine()
    table: dict[str, Any] = {}
    headline, worst = Samples(), 0.0
    for where, make in (("loop, step", in_the_loop), ("stack, update", in_a_stack)):
        for name in MODELS:
            for label, optimizer in OPTIMIZERS.items():
                duel = make(name, optimizer)
                ours, plain = duel.fight(options.steps, options.repeats)
                gain = ratios(plain, ours)
                worst = max(worst, duel.difference)
                table[f"{where} {name} {label}"] = gain.to_table()
                print(
                    f"  {where:14}{name:6}{label:9} {plain.median * 1e6:7.0f} us plain, "
                    f"{ours.median * 1e6:7.0f} us ours: {gain.text()} times as fast"
                )
                if (make, name, label) == (in_the_loop, *HEADLINE):
                    headline = ratios(ours, plain)
    print(describe(before, os.getloadavg()[0]))
    print(f"largest difference between the weights of two sides: {worst:g}")
    row(
        "B10",
        "a LeNet step with Adam, batch 10, fused and channels_last, against the plain formula",
        f"{Samples([1 / value for value in headline.values]).text()} times as fast",
        f"at least {1 / options.at_most:.2g} times",
        headline.median <= options.at_most,
        options,
    )
    print(f"ratio {headline.text(4)}; {verdict(headline, options)}")
    if options.json:
        print(json.dumps({**before, "gains": table, "weight_difference": worst}))
    if worst > SAME_WEIGHTS:
        print("two sides did not compute the same: the ratios are void")
        return 1
    return exit_status(headline, options)


if __name__ == "__main__":
    sys.exit(main())
