"""Shared test settings: one thread, as in every worker, so that bits depend on no core count.

The project's packages are imported inside the fixtures: the hook that checks shapes has to be in
place before they are.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def tiny_data() -> Callable[..., Any]:
    """Make a `FederatedData` of noisy 8x8 pictures, one pattern a class, that learns in no time."""
    from sim.contract.toy import toy_data

    return toy_data


@pytest.fixture
def tiny_settings() -> Callable[..., Any]:
    """Make `Settings` for `tiny_data`: small MLPs and CNNs in turn, in this process."""
    from sim.contract.toy import toy_settings

    return toy_settings


@pytest.fixture
def simulate() -> Callable[..., Any]:
    """Run the rounds of some settings over an inline grid, and return what happened."""
    from sim.contract.toy import simulate

    return simulate


@pytest.fixture
def listening_grid() -> Callable[..., Any]:
    """Make an inline grid that keeps what went out and what came back."""
    from sim.contract.toy import ListeningGrid

    return ListeningGrid


@pytest.fixture
def lose() -> Callable[..., Any]:
    """Make a ``change`` that loses or spoils what some clients answer to their first training."""
    from sim.contract.toy import losing

    return losing
