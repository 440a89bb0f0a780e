"""With every direction off an algorithm is `local`, bit for bit, whatever the backend."""

import pytest

from fedkd.training import ClientState, weights_digest
from sim.engine.cohorts import CohortCutter

# Alone a step of the CNNs is small enough to be stacked; with the public rows it would not be.
CLIENTS = {
    "count": 8,
    "models": [
        {"name": "mlp", "options": {"hidden": [8], "dropout": 0.2}},
        {"name": "cnn", "options": {"channels": [64]}},
    ],
    "batch_size": 16,
    "local": {"epochs": 1},
    "optimizer": {"name": "adam", "lr": 0.01},
}
ROWS = (12, 13, 9, 17, 12, 11, 14, 10)
LABELLED = ("fedgems",)
"""Algorithms that need labels of public rows."""

OFF_AND_ON = {"kind": "step", "values": [0.0, 0.0], "milestones": [0.5]}
BIG_MEME = {"name": "mlp", "options": {"hidden": [3000]}}
CASES = {
    "codistillation, no direction": ("codistillation", {"directions": []}),
    "codistillation, burning in": ("codistillation", {"burn_in": 3}),
    "comet, no direction": ("comet", {"directions": []}),
    "comet, the server's alone": ("comet", {"directions": ["server"], "server_model": "mlp"}),
    "cronus, no direction": ("cronus", {"directions": [], "ce_weight": 0.5}),
    "ktpfl, no direction": ("ktpfl", {"directions": []}),
    "ktpfl, no weight": ("ktpfl", {"kd_weight": OFF_AND_ON}),
    "selective_fd, no direction": ("selective_fd", {"directions": []}),
    "dml": ("dml", {"kd_weight": 0.0}),
    "dml, a schedule": ("dml", {"kd_weight": OFF_AND_ON}),
    "dml, terms": ("dml", {"objective": {"ce": 1.0, "kd": 0.0}}),
    "dml, a term that mixes rows": ("dml", {"objective": {"ce": 1.0, "dist": 0.0}}),
    "dml, no direction": ("dml", {"directions": [], "ce_weight": 0.5}),
    "dml, a ring": ("dml", {"peers": "ring", "kd_weight": 0.0}),
    "kdcl": ("kdcl", {"kd_weight": 0.0}),
    "kdcl, no direction": ("kdcl", {"directions": []}),
    "okddip": ("okddip", {"kd_weight": 0.0}),
    "okddip, the leader only": ("okddip", {"directions": ["leader"], "leader": "mlp"}),
    "one, no direction": ("one", {"directions": []}),
    "one_way": ("one_way", {"kd_weight": 0.0, "teacher_epochs": 1}),
    "one_way, a server": ("one_way", {"kd_weight": 0.0, "direction": "server_to_clients"}),
    "one_way, upwards only": ("one_way", {"direction": "clients_to_server"}),
    "fedgems": ("fedgems", {"directions": []}),
    "fedgems, upwards only": ("fedgems", {"directions": ["server"]}),
    "fedmd": ("fedmd", {"digest_epochs": 0}),
    "cfd, no direction": ("cfd", {"directions": []}),
    "cfd, upwards only": ("cfd", {"directions": ["server"]}),
    "fccl, no direction": ("fccl", {"directions": []}),
    "rhfl, no direction": ("rhfl", {"directions": []}),
    "fedkd, no direction": ("fedkd", {"directions": []}),
    "fedmd, no direction": ("fedmd", {"directions": []}),
    "fml": ("fml", {"objective": {"ce": 1.0, "kd": 0.0}}),
    "fml, no direction": ("fml", {"directions": []}),
    "fml, neither way": ("fml", {"objective": {"ce": 1.0}, "meme_objective": {"ce": 1.0}}),
    "fml, a term that mixes rows": ("fml", {"objective": {"ce": 1.0, "rkd_distance": 0.0}}),
    "fml, a meme that is not worth stacking": (
        "fml",
        {"objective": {"ce": 1.0, "kd": 0.0}, "meme": BIG_MEME},
    ),
    "proxyfl": ("proxyfl", {"objective": {"ce": 1.0, "kd": 0.0}}),
    "proxyfl, no direction": ("proxyfl", {"directions": []}),
    "proxyfl, a proxy that learns from the private model": ("proxyfl", {"directions": ["proxy"]}),
    "pcl": ("pcl", {"kd_weight": 0.0}),
    "pcl, no direction": ("pcl", {"directions": [], "ce_weight": 0.5}),
}


def digest_of_the_judged(states):
    """The digest of what is judged of a client: its first model, under one name."""
    return weights_digest(
        ClientState({"model": next(iter(state.models.values()))}) for state in states
    )


@pytest.fixture(scope="module")
def digests():
    return {}


@pytest.mark.parametrize("vectorize", ["auto", "loop", "vmap"])
@pytest.mark.parametrize(("strategy", "options"), CASES.values(), ids=CASES.keys())
def test_with_every_direction_off_the_digest_is_that_of_local(
    strategy, options, vectorize, tiny_settings, tiny_data, simulate, digests
):
    data = tiny_data(rows=ROWS, labelled=strategy in LABELLED)
    engine = {"backend": "inline", "vectorize": vectorize}

    def run(name, **chosen):
        return simulate(
            tiny_settings(name, clients=CLIENTS, engine=engine, rounds=2, **chosen), data
        )

    if vectorize not in digests:
        digests[vectorize] = digest_of_the_judged(run("local").states)
    off = run(strategy, options=options)
    assert digest_of_the_judged(off.states) == digests[vectorize]
    assert not [event for event in off.events if event["event"] == "stack split"]


@pytest.mark.parametrize(("strategy", "options"), CASES.values(), ids=CASES.keys())
def test_the_rule_stacks_those_who_learn_alone_as_it_stacks_local(
    strategy, options, tiny_settings, tiny_data, parts
):
    def backends(name, **chosen):
        settings = tiny_settings(name, clients=CLIENTS, **chosen)
        data = tiny_data(rows=ROWS, labelled=name in LABELLED)
        return CohortCutter(settings, data, parts(settings, data)[0]).cut(range(8), "train")

    assert backends(strategy, options=options) == backends("local")
    assert {backend for _, backend in backends("local")} == {"vmap"}


def test_who_learns_from_others_has_a_backend_of_its_own(tiny_settings, tiny_data, parts):
    # The public rows count where they are used, or the stack would be slower than the loop.
    settings, data = tiny_settings("dml", clients=CLIENTS), tiny_data(rows=ROWS)
    cohorts = CohortCutter(settings, data, parts(settings, data)[0]).cut(range(8), "train")
    assert {backend for _, backend in cohorts} == {"vmap", "loop"}
