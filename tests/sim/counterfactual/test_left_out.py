"""Clients that are left out: they keep their places, and nothing of theirs reaches anybody."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedkd.data import FederatedData
from fedkd.exchange.values import flatten
from fedkd.training import ClientState, weights_digest
from sim.commands.running import load_data
from sim.contract import sections_of
from sim.contract.claims import Case
from sim.contract.toy import ListeningGrid, Simulated
from sim.keeping.identity import fingerprint, numbers_of
from sim.keeping.models import best_client
from sim.server.history import History
from sim.settings import Settings, SettingsError
from sim.wire.messages import read_reply
from strategies import STRATEGIES

Make = Callable[..., Any]

GHOST = 1
OTHERS = (0, 2, 3)
QUICK: dict[str, dict[str, Any]] = {
    "fccl": {"pretrain_epochs": 2},
    "feddf": {"server_steps": 20},
    "fedet": {"server_steps": 20},
    "fedgen": {"generator_steps": 10},
    "fedtgp": {"server_epochs": 10},
}
"""Where defaults would take long and show no more."""


def with_other_rows(data: FederatedData, client: int) -> FederatedData:
    """Give a client rows that look different and say something else, as many as before."""
    rows = data.client_rows[client]
    inputs, labels = data.train_inputs.copy(), data.train_labels.copy()
    inputs[rows] = inputs[rows][..., ::-1] + 1
    labels[rows] = data.num_classes - 1 - labels[rows]
    return replace(data, train_inputs=inputs, train_labels=labels)


def digest(states: list[ClientState], clients: tuple[int, ...] = OTHERS) -> str:
    """Return that of some clients' weights."""
    return weights_digest(states[client] for client in clients)


def what_others_have(found: Simulated) -> list[Any]:
    """Return others' weights, what they were judged by, and the server's state."""
    assert found.loop.boundary is not None
    state = flatten(found.loop.boundary.state)
    server = {name: array.tobytes() for name, array in state.arrays.items()}
    rows = [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in found.metrics
        if row.get("client") != GHOST
    ]
    return [digest(found.states), server, rows, found.exchange]


def left_out(*clients: int) -> dict[str, Any]:
    return {"counterfactual": {"without": list(clients)}}


# -- nothing of theirs reaches anybody ------------------------------------------------------------


# Under `pooled` client 1 trains for all of its architecture: another is left out below.
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "pooled"])
def test_under_no_algorithm_does_anybody_learn_what_one_that_is_left_out_holds(
    name: str, simulate: Make
) -> None:
    case = Case(name, QUICK.get(name, {}), sections_of(STRATEGIES[name].card.needs))
    settings, data = case.settings(**left_out(GHOST)), case.data()
    one, other = (simulate(settings, d) for d in (data, with_other_rows(data, GHOST)))
    assert digest(one.states, (GHOST,)) != digest(other.states, (GHOST,))
    assert what_others_have(one) == what_others_have(other)


@pytest.mark.parametrize("source", ["largest_client", "pooled"])
def test_a_teacher_learns_nothing_from_rows_of_one_that_is_left_out(
    source: str, tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    data = tiny_data(rows=(12, 40, 9, 17))
    options = {"teacher_data": source, "teacher_epochs": 2}
    settings = tiny_settings("one_way", options=options, **left_out(GHOST))
    one, other = (simulate(settings, d) for d in (data, with_other_rows(data, GHOST)))
    assert what_others_have(one) == what_others_have(other)
    whole = tiny_settings("one_way", options=options)
    assert digest(simulate(whole, data).states) != digest(one.states)


def test_an_upper_bound_learns_nothing_from_rows_of_one_that_is_left_out(
    tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    data, settings = tiny_data(), tiny_settings("pooled", **left_out(3))
    one, other = (simulate(settings, d) for d in (data, with_other_rows(data, 3)))
    assert digest(one.states, (0, 1, 2)) == digest(other.states, (0, 1, 2))
    assert digest(one.states) != digest(simulate(tiny_settings("pooled"), data).states)


def test_a_teacher_of_nobodys_rows_teaches_nothing(
    tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    data = tiny_data()
    everybody = tiny_settings(
        "one_way", options={"teacher_data": "pooled", "teacher_epochs": 1}, **left_out(0, 1, 2, 3)
    )
    assert simulate(everybody, data).digest == simulate(tiny_settings("local"), data).digest


@pytest.mark.parametrize("name", ["dml", "fd", "codistillation", "fedgkt"])
def test_where_everybody_is_left_out_clients_learn_alone(
    name: str, tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    data = tiny_data()
    nobody = simulate(tiny_settings(name, **left_out(0, 1, 2, 3)), data)
    assert nobody.digest == simulate(tiny_settings("local"), data).digest
    assert not any("accuracy" in row for row in nobody.history.federation)
    assert sorted(nobody.history.clients) == [0, 1, 2, 3]


# -- nothing else moves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("local", {}), ("dml", {"directions": []}), ("one_way", {"direction": "clients_to_server"})],
)
@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_where_no_answer_reaches_others_all_weights_stay_bit_for_bit(
    name: str,
    options: dict[str, Any],
    vectorize: str,
    tiny_data: Make,
    tiny_settings: Make,
    simulate: Make,
) -> None:
    data, engine = tiny_data(), {"backend": "inline", "vectorize": vectorize}
    whole = simulate(tiny_settings(name, options=options, engine=engine), data)
    without = simulate(tiny_settings(name, options=options, engine=engine, **left_out(1)), data)
    assert without.digest == whole.digest


def asked(grid: ListeningGrid) -> list[list[int]]:
    """Return who was asked in each exchange."""
    return [sorted(told) for told in grid.told["train"]]


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_who_takes_part_with_whom_stays(
    vectorize: str, tiny_data: Make, tiny_settings: Make, listening_grid: Make, simulate: Make
) -> None:
    data = tiny_data(rows=(12, 13, 9, 17, 12, 13, 9, 17))
    clients = {"count": 8, "participants": 5}
    engine = {"backend": "inline", "vectorize": vectorize, "cohort_size": 2}
    calls: list[list[Any]] = []
    who = []
    for extra in ({}, left_out(2, 5)):
        settings = tiny_settings(clients=clients, engine=engine, rounds=4, **extra)
        grid = listening_grid(settings, data)
        made: list[Any] = []
        execute = grid._execute

        def noted(packed: Any, made: list[Any] = made, execute: Any = execute) -> Any:
            made.extend(
                (each.call.round, each.call.clients, each.call.backend)
                for each in packed
                if each.call.phase == "train"
            )
            return execute(packed)

        grid._execute = noted
        simulate(settings, data, grid)
        calls.append(made)
        who.append(asked(grid))
    assert who[0] == who[1]
    assert calls[0] == calls[1]
    # With the client gone from the federation everybody else would be somebody else.
    smaller = tiny_settings(clients={"count": 7, "participants": 5}, engine=engine, rounds=4)
    fewer = tiny_data(rows=(12, 13, 17, 12, 13, 9, 17))
    grid = listening_grid(smaller, fewer)
    simulate(smaller, fewer, grid)
    assert asked(grid) != who[0]


# -- what the server half sees --------------------------------------------------------------------


def test_averages_are_of_those_who_remain(
    tiny_data: Make, tiny_settings: Make, listening_grid: Make, simulate: Make
) -> None:
    data = tiny_data()
    settings = tiny_settings("fedavg", clients={"models": ["mlp"]}, rounds=1, **left_out(GHOST))
    grid = listening_grid(settings, data)
    found = simulate(settings, data, grid)
    sent = {
        client: read_reply(message.content).payload.arrays
        for client, message in grid.replies["train"][0].items()
    }
    rows = {client: len(data.client_rows[client]) for client in OTHERS}
    assert found.loop.boundary is not None
    (mean,) = found.loop.boundary.state.models.values()  # type: ignore[attr-defined]
    for name, array in mean.arrays.items():
        of_rest = sum(rows[client] * sent[client][name] for client in OTHERS)
        np.testing.assert_allclose(array, of_rest / sum(rows.values()), atol=1e-6)


def test_who_is_left_out_is_no_failure(
    tiny_data: Make, tiny_settings: Make, listening_grid: Make, lose: Make, simulate: Make
) -> None:
    """Not by its absence, and not where it is lost itself: nobody is asked again."""
    data = tiny_data()
    engine = {"backend": "inline", "quorum": 1.0}
    for change in (None, lose([GHOST], "lost"), lose([GHOST], "spoilt")):
        settings = tiny_settings(engine=engine, **left_out(GHOST))
        grid = listening_grid(settings, data, change)
        found = simulate(settings, data, grid)
        assert [row["event"] for row in found.events] == ["left out"]
        assert len(grid.told["train"]) == settings.rounds
        assert [row["replies"] for row in found.history.federation] == [3, 3, 3]
        assert [row["participants"] for row in found.history.federation] == [3, 3, 3]


def test_it_cannot_make_up_for_others_who_fail(
    tiny_data: Make, tiny_settings: Make, listening_grid: Make, lose: Make, simulate: Make
) -> None:
    engine = {"backend": "inline", "quorum": 1.0}
    settings = tiny_settings(engine=engine, **left_out(GHOST))
    grid = listening_grid(settings, tiny_data(), lose([0]))
    simulate(settings, tiny_data(), grid)
    assert sorted(grid.told["train"][1]) == [0]


def test_nobody_in_time_is_said_only_where_nobody_was(
    tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    late = {"kind": "delay", "seconds": 100.0, "rounds": [1]}
    settings = tiny_settings(
        rounds=1,
        clock={"speed": 1e18, "deadline_s": 5.0},
        engine={"backend": "inline", "quorum": 0.5},
        # All at first; when they are asked again, without the ghost, all but one.
        faults=[late, {**late, "clients": [0, 2], "attempts": 2}],
        **left_out(GHOST),
    )
    events = [row["event"] for row in simulate(settings, tiny_data()).events]
    assert events == ["left out", "all rejected", "round retried", "rejected", "rejected"]


def test_what_is_judged_is_who_remains(
    tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    found = simulate(tiny_settings("feddf", options=QUICK["feddf"], **left_out(GHOST)), tiny_data())
    last = found.history.federation[-1]
    own = found.history.clients
    assert last["accuracy"] == pytest.approx(np.mean([own[c]["accuracy"] for c in OTHERS]))
    assert last["worst_accuracy"] == min(own[client]["accuracy"] for client in OTHERS)
    assert own[GHOST]["left_out"] is True
    assert not any("left_out" in own[client] for client in OTHERS)
    assert {row["client"] for row in found.exchange} == set(OTHERS)
    whole = simulate(tiny_settings("feddf", options=QUICK["feddf"]), tiny_data())
    steps = [run.history.federation[0]["client_steps"] for run in (found, whole)]
    assert 0 < steps[0] < steps[1]


@pytest.mark.parametrize(("name", "codec"), [("cfd", "cfd_delta"), ("fedmd", "int8")])
def test_codecs_that_remember_stay_in_step(
    name: str, codec: str, tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    exchange = {"up": codec, "down": codec}
    data = tiny_data()
    settings = tiny_settings(name, exchange=exchange, **left_out(GHOST))
    one, other = (simulate(settings, d) for d in (data, with_other_rows(data, GHOST)))
    assert what_others_have(one) == what_others_have(other)
    assert [row["event"] for row in one.events] == ["left out"]


def test_a_budget_is_shared_out_as_in_the_run(
    tiny_data: Make, tiny_settings: Make, simulate: Make
) -> None:
    """What one that is left out would have sent is spent as well, or others' bits would move."""
    data = tiny_data()
    whole, without = (
        simulate(tiny_settings("fedmd", exchange={"budget_kb": 3.0}, **extra), data)
        for extra in ({}, left_out(GHOST))
    )
    theirs = [row for row in whole.exchange if row["client"] != GHOST]
    assert len(theirs) < len(whole.exchange)
    assert without.exchange == theirs


# -- labels turned round --------------------------------------------------------------------------


def test_labels_are_turned_round_and_nothing_else_moves(small: Callable[..., Settings]) -> None:
    plain = load_data(small())
    data = load_data(small("counterfactual.flipped=[2]"))
    rows = data.client_rows[2]
    assert np.array_equal(data.train_labels[rows], 9 - plain.train_labels[rows])
    rest = np.setdiff1d(np.arange(len(plain.train_labels)), rows)
    assert np.array_equal(data.train_labels[rest], plain.train_labels[rest])
    assert np.array_equal(data.train_inputs, plain.train_inputs)
    for one, other in zip(data.client_rows, plain.client_rows, strict=True):
        assert np.array_equal(one, other)
    # Judged by the classes that its rows have.
    assert np.array_equal(data.label_counts(true=True), plain.label_counts())


# -- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["counterfactual.without=[4]"], "counterfactual.without must name clients below"),
        (["counterfactual.flipped=[9]"], "counterfactual.flipped must name clients below"),
        (["counterfactual.without=[1,1]"], "must name each client once, got 1 twice"),
        (
            [
                "counterfactual.without=[1]",
                "strategy.name=fedmd",
                "privacy.mechanism=gaussian",
                "privacy.noise=4",
            ],
            "counterfactual needs privacy.mechanism: none, got gaussian",
        ),
    ],
)
def test_what_cannot_be_is_named(
    small: Callable[..., Settings], words: list[str], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        small(*words)


def test_who_trains_for_everybody_cannot_be_left_out(small: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match="client 1 trains the model of its architecture"):
        load_data(small("strategy.name=pooled", "counterfactual.without=[1]"))
    load_data(small("strategy.name=pooled", "counterfactual.without=[3]"))


def test_where_nothing_is_otherwise_nothing_is_said_of_it(small: Callable[..., Settings]) -> None:
    """Identities of runs from before are theirs still."""
    assert "counterfactual" not in small().to_table()
    assert not any(path.startswith("counterfactual") for path in numbers_of(small()))
    assert fingerprint(small("counterfactual.without=[]")) == fingerprint(small())
    assert fingerprint(small("counterfactual.without=[1]")) != fingerprint(small())


def test_the_best_model_that_is_kept_is_none_of_theirs() -> None:
    history = History()
    history.clients = {
        0: {"round": 2, "validation_accuracy": 0.5},
        1: {"round": 2, "validation_accuracy": 0.9, "left_out": True},
    }
    assert best_client(history, [0, 1]) == [0]
