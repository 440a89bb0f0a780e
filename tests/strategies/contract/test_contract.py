"""What every algorithm of the table keeps to, whatever it does: see `sim.contract`."""

import importlib
import inspect
import pkgutil

import pytest

import strategies
from sim.contract import sections_of
from sim.contract.claims import CLAIMS, Case
from strategies import STRATEGIES
from strategies.contract import Strategy

VARIANTS = {
    # Ten epochs show no more than two do.
    "cfd": [{"distil_epochs": 2, "server_epochs": 2}],
    "comet": [
        {},
        {"group": "clients", "distil": "beside", "server_model": "mlp"},
        {"clusters": 3},
    ],
    "cronus": [{}, {"aggregation": "geometric_median", "temperature": 2.0, "trust_rate": 1.0}],
    "dml": [
        {},
        {"include_self": True, "average": "logit"},
        {"confidence_threshold": 0.5},
        {"peers": "exponential"},
        {"peers": "random-k", "k": 1},
        {"peers": "best-k", "include_self": True},
        {"aggregation": "median", "trust_rate": 1.0},
        {"objective": {"ce": 1.0, "kd": {"learned": True}, "sp": {"weight": 1, "on": "logits"}}},
    ],
    "dsfl": [{}, {"sharpening": "sa", "server_model": "mlp"}],
    # Fifty epochs of pretraining show no more than two do.
    "fccl": [{"pretrain_epochs": 2}],
    "fd": [{}, {"collect": "evaluation", "weighting": "count"}],
    "fedavg": [{}, {"weighting": "equal"}],
    "feddistill_plus": [{}, {"leave_one_out": True, "collect": "evaluation"}],
    # Hundreds of steps of a server show no more than twenty do.
    "feddf": [{"server_steps": 20}, {}],
    "fedet": [
        {"server_steps": 20},
        {},
        {"model": "mlp", "share_head": False, "weighting": "equal"},
    ],
    "fedgems": [{}, {"directions": ["clients"]}, {"ce_share": 0.1, "server_epochs": 3}],
    "fedgen": [
        {"generator_steps": 10},
        {},
        {"share": "head", "teacher": "logits"},
        {"latent_weight": 0.0},
    ],
    "fedgkd": [{}, {"teacher": "vote", "last": 2}, {"distance": "mse", "last": 1}],
    # Half of a round went into the singular values of a wide model's weights.
    "fedkd": [
        {"mentee": {"name": "mlp", "options": {"hidden": [16]}}},
        {},
        {"mentee": "cnn", "energy": 0.5, "directions": ["mentor"]},
    ],
    "fedmd": [
        {},
        {"digest_loss": "kl", "weighting": "examples"},
        {"private_transfer_epochs": 2},
    ],
    "fedntd": [{}, {"temperature": 3}],
    "fedprox": [{}, {"mu": 1}],
    "fedproto": [{}, {"judge": "head", "features": 4}],
    "fedtgp": [
        {"server_epochs": 10},
        {},
        {"judge": "head", "features": 4, "collect": "last_epoch"},
    ],
    "fml": [
        {},
        {"meme": "cnn", "weighting": "examples"},
        {"objective": {"ce": 1.0, "hint": 0.3}, "meme_objective": {"ce": 1.0, "rkd_angle": 0.1}},
        {"objective": {"ce": 1.0, "crd": 0.1, "adversarial": 0.1}},
    ],
    "codistillation": [{}, {"interval": 1}],
    "okddip": [{}, {"average": "probability", "leader": "mlp"}, {"include_self": False}],
    "one": [{}, {"gate": "equal"}],
    "ktpfl": [{}, {"project": "softmax5", "step": 0.5, "scale_by_t2": False}],
    "one_way": [
        {},
        {"direction": "server_to_clients"},
        {"direction": "clients_to_server"},
        {"direction": "server_to_clients", "objective": {"ce": 1.0, "kd": {"learned": True}}},
    ],
    "scarlet": [{}, {"aggregation": "outlier_check", "factor": 1.0, "trust_rate": 1.0}],
    "selective_fd": [
        {},
        {"ambiguous": None, "quantile": 0.0, "width": 2.0},
        {"aggregation": "filter", "dishonest": 0.9},
    ],
}
"""Settings worth running, the quick ones first; a new row of the table runs with its defaults."""

CASES = [
    pytest.param(
        name,
        options,
        id=" ".join([name, *map(str, options.values())]),
        # Every algorithm goes through all claims by its first settings; others take their time.
        # One process runs them all: claims look at one and the same run.
        marks=[pytest.mark.xdist_group(f"contract {name}"), *[pytest.mark.slow] * bool(number)],
    )
    for name in STRATEGIES
    for number, options in enumerate(VARIANTS.get(name, [{}]))
]


def case_of(name, options):
    """A case of an algorithm with the settings that it needs."""
    return Case(name, options, sections_of(STRATEGIES[name].card.needs))


every_strategy = pytest.mark.parametrize("name", STRATEGIES)
every_case = pytest.mark.parametrize(("name", "options"), CASES)


# -- the table ---------------------------------------------------------------------------------


def test_every_algorithm_in_the_folder_is_in_the_table():
    found = set()
    for module_info in pkgutil.walk_packages(strategies.__path__, "strategies."):
        module = importlib.import_module(module_info.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(kind, Strategy)
                and kind.__module__ == module.__name__
                and not inspect.isabstract(kind)
            ):
                found.add(kind)
    assert found == set(STRATEGIES.values())


@every_strategy
def test_a_row_is_the_settings_name_and_the_module_says_whose_idea_it_is(name):
    strategy = STRATEGIES[name]
    assert strategy.Settings().name == name
    assert importlib.import_module(strategy.__module__).__doc__
    assert strategy.__doc__


@every_strategy
def test_builds_with_its_defaults(name, parts):
    case = case_of(name, {})
    strategy, _ = parts(case.settings(), case.data())
    assert type(strategy) is STRATEGIES[name]


LONG = ("few_participants_are_enough", "results_do_not_depend_on_how_cohorts_are_cut")
"""Claims that take most rounds; in the quick suite they are looked at for a few algorithms."""
QUICK = ("dml", "fedavg", "fedgkt", "fedkd", "scarlet")


@every_case
@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim not in LONG])
def test_keeps_to_the_contract(claim, name, options):
    CLAIMS[claim](case_of(name, options))


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("claim", LONG)
def test_keeps_to_what_takes_long(claim, name):
    CLAIMS[claim](case_of(name, VARIANTS.get(name, [{}])[0]))


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("claim", LONG)
def test_every_algorithm_keeps_to_what_takes_long(claim, name, options):
    CLAIMS[claim](case_of(name, options))
