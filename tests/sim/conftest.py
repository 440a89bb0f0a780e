"""Small runs that finish in a second or two."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.settings import Settings, load_settings

SMALL = (
    "rounds=2",
    "clients.count=4",
    "clients.models=[mlp,cnn]",
    "clients.local.epochs=1",
    "data.private_rows=200",
    "data.test_rows=100",
    "data.public.size=60",
    "data.partition.min_rows=2",
    "engine.backend=inline",
)


@pytest.fixture
def small_words() -> tuple[str, ...]:
    return SMALL


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Settings]:
    def settings(*overrides: str) -> Settings:
        return load_settings(None, [*SMALL, f"output={tmp_path / 'runs'}", *overrides])

    return settings
