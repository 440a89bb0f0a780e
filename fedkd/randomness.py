"""Every random draw has its own stream, derived from the run's seed and what the draw is for.

Derived, never stored: a retried or resumed task draws the same numbers again, and results do
not depend on how many workers there are or in which order they answer.
"""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream is drawn for; the numbers are part of a run's bits and never change."""

    SPLIT = 1
    PARTITION = 2
    MODEL = 3
    PARTICIPANTS = 4
    PUBLIC_ROWS = 5
    TRAIN = 6
    TEACHER = 7
    SERVER = 8
    EVALUATION = 9
    FAULTS = 10
    DISTILL = 11
    AUGMENT = 12
    TRAIN_PUBLIC = 13
    RELEASE = 14
    ADVERSARY = 15
    CODEC = 16
    ALGORITHM = 17
    DEVICES = 18
    PRESENCE = 19
    LABEL_NOISE = 20
    FEATURE_SHIFT = 21
    PRIVATE_NOISE = 22
    ATTACK = 23
    CANARIES = 24


def _sequence(seed: int, purpose: Purpose, key: tuple[int, ...]) -> np.random.SeedSequence:
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *key))


def generator_for(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Return the NumPy stream of one purpose; ``key`` is, for example, (round, client)."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, key)))


def torch_seed_for(seed: int, purpose: Purpose, *key: int) -> int:
    """Return the 63-bit seed of one purpose for a ``torch.Generator`` or `seeded_torch`."""
    return int(_sequence(seed, purpose, key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    """Return a torch stream of its own, on the CPU unless a device is named."""
    return torch.Generator(device or torch.device("cpu")).manual_seed(seed)


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and put their old state back after it.

    Weight initialisers and dropout draw from the global generators and take no other, so this
    is the one place that touches them; two clients in one process still never share a stream.
    """
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    # Not torch.manual_seed: it visits every kind of accelerator there could be, which takes a
    # hundred times as long as the seeding, and every fit of every client comes through here.
    torch.default_generator.manual_seed(seed)
    if cuda_states is not None:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def seeded_everything(seed: int) -> Iterator[None]:
    """The same for Python's and NumPy's global generators as well.

    For code that is not ours, which draws from wherever it likes; ours draws from none of them.
    """
    python_state = random.getstate()
    numpy_bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    random.seed(seed)
    # Another generator in its place: to copy the state of this one takes ten times as long.
    np.random.set_bit_generator(np.random.MT19937(seed))  # type: ignore[attr-defined]
    try:
        with seeded_torch(seed):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_bits)  # type: ignore[attr-defined]


def seeded_for(*, own_code: bool, seed: int) -> AbstractContextManager[None]:
    """Return `seeded_everything` where code of a user's own runs, else `seeded_torch`."""
    return seeded_everything(seed) if own_code else seeded_torch(seed)
