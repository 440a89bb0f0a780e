"""Which backend trains a cohort: one model after the other, or all of them in one."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import nn

from fedkd.inputs import Shape
from fedkd.models import ModelSettings, build_model, count_parameters, known_models
from fedkd.randomness import Purpose
from fedkd.training.batches import Passes
from fedkd.training.binding import stacking_of
from fedkd.training.cohort import (
    Architecture,
    Cohort,
    Member,
    Streams,
    TrainingData,
    named_models,
)
from fedkd.training.learners import ComposedObjective
from fedkd.training.loop import LoopCohort
from fedkd.training.objectives import supervised
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import ModelPool
from fedkd.training.private import PrivateLearning
from fedkd.training.stacking import VmapUnsupportedError
from fedkd.training.vmap import VmapCohort

Backend = Literal["loop", "vmap"]
"""``loop``: one model after the other; ``vmap``: all members' models stacked into one."""

KINDS: dict[Backend, type[LoopCohort] | type[VmapCohort]] = {
    "loop": LoopCohort,
    "vmap": VmapCohort,
}


def open_cohort(
    members: Sequence[Member],
    *,
    backend: Backend,
    model: Architecture,
    optimizer: OptimizerSettings,
    data: TrainingData,
    pool: ModelPool,
    streams: Streams,
    private: PrivateLearning | None = None,
) -> Cohort:
    """Load the members' states and return them as a cohort.

    Args:
        members: clients of one architecture.
        backend: how they train.
        model: what each of them trains: one model, or several by name.
        optimizer: of every model.
        data: the rows of all clients, and the public ones.
        pool: models to reuse.
        streams: where random numbers come from.
        private: how members learn from their own rows in this call, whatever rule and walk
            through them a fit asks for: by DP-SGD. What tells of the rows in another way is
            refused with a `PrivacyError`, see `fedkd.training.private`. None: as asked for.

    Raises:
        VmapUnsupportedError: if ``backend`` is ``vmap`` and a model cannot be stacked.
    """
    return KINDS[backend](
        members,
        model=model,
        optimizer=optimizer,
        data=data,
        pool=pool,
        streams=streams,
        private=private,
    )


# -- the rule ----------------------------------------------------------------------------------

FEWEST_MEMBERS = 4
"""Below it the overhead of stacking eats what it gains."""

MOST_PARAMETERS = {"cpu": 150_000, "cuda": 1_000_000}
"""Parameters of one model up to which stacks are worth while: beyond, a client alone keeps the
processor busy, and a stack falls out of its caches."""

MOST_ACTIVATIONS = 100_000
"""On a CPU: rows times numbers that a model's first convolution makes of one row, up to which
stacks are worth while. Beyond, torch's grouped convolutions are slower than one after the other."""


def choose_backend(
    model: Architecture,
    *,
    input_shape: Shape,
    num_classes: int,
    members: int,
    batch_rows: int,
    device: str,
    objective: ComposedObjective | None = None,
) -> Backend:
    """Return the backend for a cohort, by a rule that knows no clock: same input, same answer.

    The thresholds come from ``benchmarks/vectorized.py``, one thread of a CPU; for ``cuda`` they
    are a guess that nobody has measured. A model of one's own trains in the loop, because the
    rule knows nothing of it; ``engine.vectorize: measure`` or ``vmap`` stacks it. Of several
    models each has to be worth while.

    Args:
        model: what each client trains: one model, or several by name.
        input_shape: of a row.
        num_classes: logits a row.
        members: clients in the cohort, >= 1.
        batch_rows: rows of a step, >= 1.
        device: ``cpu`` or ``cuda``.
        objective: what they minimise, where it is made of terms. Where one of its terms compares
            the rows of a batch with each other, or keeps something from step to step, they
            train in the loop: rows that pad a stack's batches would take part.

    Raises:
        ValueError: if the objective does not fit the models.
    """
    models = named_models(model)
    if members < FEWEST_MEMBERS or any(own.name not in known_models() for own in models.values()):
        return "loop"
    for own in models.values():
        size = _size_of(own, input_shape, num_classes)
        if size.parameters > MOST_PARAMETERS[device]:
            return "loop"
        if device == "cpu" and batch_rows * size.activations > MOST_ACTIVATIONS:
            return "loop"
    if objective is not None:
        stacking = stacking_of(
            objective, tuple(models.items()), input_shape=input_shape, num_classes=num_classes
        )
        if stacking.obstacle or stacking.mixes_rows:
            return "loop"
    return "vmap"


class _Size(NamedTuple):
    """Trainable numbers of a model, and numbers that its first convolution makes of a row."""

    parameters: int
    activations: int


@lru_cache(maxsize=256)
def _size_of(model: ModelSettings, input_shape: Shape, num_classes: int) -> _Size:
    with torch.device("meta"):
        network = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    filters = convolutions[0].out_channels if convolutions else 0
    return _Size(count_parameters(network), filters * prod(tuple(input_shape)[1:]))


# -- the stop-watch ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BackendTimes:
    """Seconds of a few steps of a cohort in either backend, and the faster one.

    Attributes:
        loop_s, vmap_s: medians; infinite for a model that cannot be stacked.
        choice: the faster one.
        reason: why there was no choice, or empty.
    """

    loop_s: float
    vmap_s: float
    choice: Backend
    reason: str = ""


def measure_backends(
    members: Sequence[Member],
    *,
    model: Architecture,
    optimizer: OptimizerSettings,
    data: TrainingData,
    pool: ModelPool,
    passes: Passes,
    seed: int,
    objective: ComposedObjective | None = None,
    steps: int = 3,
    repeats: int = 3,
) -> BackendTimes:
    """Time both backends on a few real batches of these members, by turns.

    Args:
        members: the clients whose first steps are tried; what they learn is thrown away.
        model: what each of them trains.
        optimizer: of every model.
        data: the rows of all clients.
        pool: models to reuse.
        passes: how the clients train on private rows; the batch size matters, not the length.
        seed: the run's.
        objective: what they minimise where several models learn together; None: the
            cross-entropy of the first model.
        steps: steps of one measurement, after a first one that warms up; >= 1.
        repeats: measurements of each backend, >= 1.
    """
    seconds: dict[Backend, list[float]] = {"loop": [], "vmap": []}
    few = replace(passes, steps=steps)
    for repeat in range(repeats + 1):
        for backend, times in seconds.items():
            try:
                cohort = open_cohort(
                    members,
                    backend=backend,
                    model=model,
                    optimizer=optimizer,
                    data=data,
                    pool=pool,
                    streams=Streams(seed=seed, purpose=Purpose.TRAIN),
                )
                started = time.perf_counter()
                cohort.fit(objective or supervised, private=few)
            except VmapUnsupportedError as error:
                loop_s = statistics.median(seconds["loop"]) if seconds["loop"] else 0.0
                return BackendTimes(loop_s, float("inf"), "loop", str(error))
            if repeat:
                times.append(time.perf_counter() - started)
    loop_s, vmap_s = (statistics.median(seconds[backend]) for backend in ("loop", "vmap"))
    return BackendTimes(loop_s, vmap_s, "vmap" if vmap_s < loop_s else "loop")
