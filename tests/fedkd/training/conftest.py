from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def tensors(tiny_data) -> Callable[..., Any]:
    """Make the `TrainingData` of a tiny federation."""
    from fedkd.training import TrainingData

    def build(**options: Any) -> Any:
        return TrainingData.from_arrays(tiny_data(**options), torch.device("cpu"))

    return build


@pytest.fixture
def make_cohort(tensors) -> Callable[..., Any]:
    """Make a `LoopCohort` of clients that hold 12 rows each: client i those from 12 i on."""
    from fedkd.models import ModelSettings
    from fedkd.training import LoopCohort, Member, ModelPool, OptimizerSettings, Streams

    def build(
        clients: tuple[int, ...] = (0,),
        *,
        model: Any = None,
        optimizer: Any = None,
        states: Any = None,
        rows: np.ndarray | None = None,
        data: Any = None,
        pool: Any = None,
        seed: int = 7,
        round: int = 1,
        rounds: int = 1,
    ) -> Any:
        data = data or tensors()
        optimizer = optimizer or OptimizerSettings(name="sgd", lr=0.1, momentum=0.9)
        return LoopCohort(
            [
                Member(client, np.arange(12) + 12 * client if rows is None else rows, state)
                for client, state in zip(clients, states or [None] * len(clients), strict=True)
            ],
            model=model or ModelSettings(name="mlp", options={"hidden": [8]}),
            optimizer=optimizer,
            data=data,
            pool=pool or ModelPool(data, optimizer),
            streams=Streams(seed=seed, round=round, rounds=rounds),
        )

    return build


@pytest.fixture
def same_bits() -> Callable[..., bool]:
    """Tell whether two tables of arrays have the same names, types, shapes and bits."""

    def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
        return one.keys() == other.keys() and all(
            one[name].dtype == other[name].dtype
            and one[name].shape == other[name].shape
            and one[name].tobytes() == other[name].tobytes()
            for name in one
        )

    return compare
