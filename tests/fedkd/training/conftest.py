from collections.abc import Callable, Iterator
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


@pytest.fixture
def float64() -> Iterator[None]:
    """Compute in float64, where only different arithmetic makes a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def both_kinds() -> Callable[..., Any]:
    """Make a `LoopCohort` and a `VmapCohort` of the same clients: [loop, vmap].

    Client i has as many private rows as the i-th size says; there are 20 labelled public rows.
    """
    from fedkd.models import ModelSettings
    from fedkd.training import (
        LoopCohort,
        Member,
        ModelPool,
        OptimizerSettings,
        Streams,
        TrainingData,
        VmapCohort,
    )

    def build(
        sizes: tuple[int, ...] = (13, 21, 5),
        *,
        model: Any = None,
        optimizer: Any = None,
        states: Any = None,
        labelled: bool = True,
        seed: int = 7,
        round: int = 1,
        rounds: int = 1,
    ) -> list[Any]:
        draw = torch.Generator().manual_seed(0)
        rows, dtype = sum(sizes), torch.get_default_dtype()
        data = TrainingData(
            train_inputs=torch.randn(rows, 1, 8, 8, generator=draw, dtype=dtype),
            train_labels=torch.randint(3, (rows,), generator=draw),
            public_inputs=torch.randn(20, 1, 8, 8, generator=draw, dtype=dtype),
            public_labels=torch.randint(3, (20,), generator=draw) if labelled else None,
            num_classes=3,
        )
        optimizer = optimizer or OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
        ends = np.cumsum(sizes)
        return [
            kind(
                [
                    Member(client, np.arange(end - size, end), state)
                    for client, (end, size, state) in enumerate(
                        zip(ends, sizes, states or [None] * len(sizes), strict=True)
                    )
                ],
                model=model or ModelSettings(name="mlp", options={"hidden": [16]}),
                optimizer=optimizer,
                data=data,
                pool=ModelPool(data, optimizer),
                streams=Streams(seed=seed, round=round, rounds=rounds),
            )
            for kind in (LoopCohort, VmapCohort)
        ]

    return build


@pytest.fixture
def largest_difference() -> Callable[[Any, Any], float]:
    """Return the largest difference of any number in two things of the same make."""

    def compare(one: Any, other: Any) -> float:
        from fedkd.training import ClientState, RowOutputs

        if isinstance(one, ClientState):
            return compare(one.to_arrays(), other.to_arrays())
        if isinstance(one, RowOutputs):
            assert (one.labels is None) == (other.labels is None)
            fields = ("rows", "labels", "logits", "features")
            return compare(*({f: getattr(each, f) for f in fields} for each in (one, other)))
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            return max((compare(one[name], other[name]) for name in one), default=0.0)
        if isinstance(one, list | tuple):
            assert len(one) == len(other)
            return max((compare(*pair) for pair in zip(one, other, strict=True)), default=0.0)
        if one is None:
            assert other is None
            return 0.0
        assert np.shape(one) == np.shape(other)
        if not np.size(one):
            return 0.0
        return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).max())

    return compare


@pytest.fixture
def public_lesson() -> Callable[..., Any]:
    """Make a lesson of soft labels on public rows."""
    from fedkd.targets import Targets
    from fedkd.training import Passes, PublicLesson

    def build(rows: Any = (1, 2, 4, 5, 8, 9, 11, 12), *, seed: int = 3, **options: Any) -> Any:
        def soft(count: int, own: int) -> Any:
            draw = torch.Generator().manual_seed(seed + own)
            scores = torch.randn(count, 3, generator=draw)
            return Targets(torch.softmax(scores, -1).numpy(), scale="probabilities")

        options.setdefault("passes", Passes(batch_size=4))
        if isinstance(rows, list):
            own = [np.array(each, np.int64) for each in rows]
            targets = [soft(len(each), number) for number, each in enumerate(own)]
            return PublicLesson(rows=own, targets=targets, **options)
        return PublicLesson(rows=np.array(rows), targets=soft(len(rows), 0), **options)

    return build
