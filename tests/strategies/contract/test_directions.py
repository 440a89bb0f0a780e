"""``strategy.directions`` names who learns from others, and no one else."""

import pytest

from sim.contract import sections_of
from sim.contract.claims import Case
from strategies import STRATEGIES
from strategies.contract import CLIENTS


@pytest.fixture
def made(parts, tiny_settings, tiny_data):
    return lambda name, options=None: parts(
        tiny_settings(name, options=options or {}), tiny_data()
    )[0]


def test_a_learner_that_is_not_named_does_not_learn_from_others(made):
    assert made("fml").learns("meme")
    assert made("fml", {"directions": ["private"]}).learns("private")
    assert not made("fml", {"directions": ["private"]}).learns("meme")
    assert not made("fml", {"directions": []}).learns("private")


def test_a_learner_that_is_none_is_refused_with_those_that_are(made):
    strategy = made("fml", {"directions": ["server"]})
    told = r"strategy.directions of fml must be some of private \(from the meme\), meme \(from"
    with pytest.raises(ValueError, match=told):
        strategy.check((1, 4, 4))


@pytest.mark.parametrize("name", [n for n, kind in STRATEGIES.items() if not kind.directions])
def test_an_algorithm_without_directions_takes_none(made, name):
    with pytest.raises(ValueError, match=rf"strategy.directions of {name} must be null, got"):
        made(name, {"directions": []}).check((1, 8, 8))


OF_CLIENTS = [name for name, kind in STRATEGIES.items() if CLIENTS in kind.directions]


@pytest.mark.parametrize("name", OF_CLIENTS)
def test_clients_that_learn_from_nobody_are_sent_nothing_to_learn_from(name, simulate):
    case = Case(name, {"directions": []}, sections_of(STRATEGIES[name].card.needs))
    run = simulate(case.settings(), case.data())
    assert [row["bytes"] for row in run.exchange if row["direction"] == "down"] == []
