"""``strategy.directions`` names who learns from others, and no one else."""

import pytest

from strategies import STRATEGIES


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
