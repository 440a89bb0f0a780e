"""Randomness: one stream per purpose, the same on every machine, and no shared generator moved."""

import random

import numpy as np
import pytest
import torch

from fedkd.randomness import (
    Purpose,
    generator_for,
    seeded_everything,
    seeded_torch,
    torch_seed_for,
)


def draws(*address: int, purpose: Purpose = Purpose.TRAIN, seed: int = 0) -> list[float]:
    return generator_for(seed, purpose, *address).random(4).tolist()


def test_the_same_address_gives_the_same_stream():
    assert draws(3, 7) == draws(3, 7)
    assert torch_seed_for(0, Purpose.TRAIN, 3, 7) == torch_seed_for(0, Purpose.TRAIN, 3, 7)


def test_every_part_of_the_address_matters():
    streams = [
        draws(3, 7),
        draws(3, 8),
        draws(4, 7),
        draws(7, 3),
        draws(3),
        draws(3, 7, 0),
        draws(0, 3, 7),
        draws(),
        draws(3, 7, seed=1),
        draws(3, 7, purpose=Purpose.MODEL),
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_no_two_purposes_rounds_or_clients_share_a_seed():
    seeds = {
        torch_seed_for(seed, purpose, number, client)
        for seed in range(3)
        for purpose in Purpose
        for number in range(5)
        for client in range(5)
    }
    assert len(seeds) == 3 * len(Purpose) * 25


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    expected = draws(1)
    generator_for(0, Purpose.TRAIN, 1).random(1000)
    np.random.default_rng(0).random(10)
    torch.rand(10)
    assert draws(1) == expected


def test_streams_of_neighbours_are_not_correlated():
    first = generator_for(0, Purpose.TRAIN, 1, 1).standard_normal(4000)
    second = generator_for(0, Purpose.TRAIN, 1, 2).standard_normal(4000)
    # Four standard errors of a correlation of 4000 independent pairs.
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(4000)


def test_numbers_that_recorded_runs_depend_on():
    # Changing either of these changes the bits of every published run.
    assert {purpose.name: int(purpose) for purpose in Purpose}.items() >= {
        "SPLIT": 1,
        "PARTITION": 2,
        "MODEL": 3,
        "PARTICIPANTS": 4,
        "PUBLIC_ROWS": 5,
        "TRAIN": 6,
        "TEACHER": 7,
        "SERVER": 8,
    }.items()
    assert torch_seed_for(0, Purpose.TRAIN, 1, 2) == 3703409124829461984


def test_purposes_have_different_numbers():
    assert len({int(purpose) for purpose in Purpose.__members__.values()}) == len(
        Purpose.__members__
    )


def test_torch_seeds_fit_a_torch_generator():
    for client in range(200):
        seed = torch_seed_for(0, Purpose.MODEL, client)
        assert 0 <= seed < 2**63
        assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_refuses_a_negative_seed():
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        generator_for(-1, Purpose.SPLIT)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        torch_seed_for(-1, Purpose.SPLIT)


def test_seeded_torch_decides_what_is_drawn_inside():
    with seeded_torch(5):
        first = torch.rand(3)
    torch.rand(1)
    with seeded_torch(5):
        assert torch.equal(torch.rand(3), first)
    with seeded_torch(6):
        assert not torch.equal(torch.rand(3), first)


def test_seeded_torch_leaves_the_caller_s_stream_where_it_was():
    before = torch.get_rng_state()
    with seeded_torch(5):
        torch.rand(3)
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_torch_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), seeded_torch(5):
        torch.rand(3) + torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_torch_nests():
    with seeded_torch(5):
        expected = torch.rand(2)
    with seeded_torch(5):
        first = torch.rand(1)
        with seeded_torch(6):
            torch.rand(7)
        second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), expected)


def test_code_that_is_not_ours_is_seeded_whatever_it_draws_from():
    def drawn():
        numbers = random.random(), np.random.rand(), torch.rand(1)  # noqa: S311, NPY002
        return tuple(map(float, numbers))

    with seeded_everything(3):
        first = drawn()
    before = _global_states()
    with seeded_everything(3):
        assert drawn() == first
        # Whoever seeds for himself does so for the length of the block.
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
    with seeded_everything(4):
        assert not set(drawn()) & set(first)
    assert _global_states() == before


def _global_states():
    numpy_state = np.random.get_state()[1]  # noqa: NPY002
    return random.getstate(), numpy_state.tolist(), torch.get_rng_state().tolist()
