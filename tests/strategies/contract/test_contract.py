"""What every algorithm of the table keeps to, whatever it does."""

import copy
import dataclasses
import importlib
import inspect
import json
import pkgutil

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from strategies.base import DistillationStrategy
from strategies.knowledge import ClientUpload, Predictions, read_knowledge, write_knowledge
from strategies.memory import Memory, recall_broadcast, remember_broadcast
from strategies.plan import Federation
from strategies.server import Server

import strategies
from fedkd.training import LoopCohort, Member, ModelPool, Streams, TrainingData, weights_digest
from sim.engine.runtime import ClientRuntime
from sim.settings import Settings
from sim.wire.messages import read_reply
from strategies import STRATEGIES

VARIANTS = {
    "dml": [
        {},
        {"include_self": True, "average": "logit"},
        {"confidence_threshold": 0.5},
        {"objective": {"ce": 1.0, "kd": {"learned": True}, "sp": {"weight": 1, "on": "logits"}}},
    ],
    "fedavg": [{}, {"weighting": "equal"}],
    "fedmd": [{}, {"digest_loss": "kl", "weighting": "examples"}],
    "fml": [
        {},
        {"meme": "cnn", "weighting": "examples"},
        {"objective": {"ce": 1.0, "hint": 0.3}, "meme_objective": {"ce": 1.0, "rkd_angle": 0.1}},
        {"objective": {"ce": 1.0, "crd": 0.1, "adversarial": 0.1}},
    ],
    "one_way": [
        {},
        {"direction": "server_to_clients"},
        {"direction": "clients_to_server"},
        {"direction": "server_to_clients", "objective": {"ce": 1.0, "kd": {"learned": True}}},
    ],
}
"""Settings worth running besides the defaults; a new row of the table runs with its defaults."""

CASES = [
    pytest.param(name, options, id=" ".join([name, *map(str, options.values())]))
    for name in STRATEGIES
    for options in VARIANTS.get(name, [{}])
]

every_strategy = pytest.mark.parametrize("name", STRATEGIES)
every_case = pytest.mark.parametrize(("name", "options"), CASES)


# -- the table ---------------------------------------------------------------------------------


def test_every_algorithm_in_the_folder_is_in_the_table():
    found = set()
    for module_info in pkgutil.iter_modules(strategies.__path__):
        module = importlib.import_module(f"strategies.{module_info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(kind, DistillationStrategy)
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
def test_builds_with_its_defaults(name, tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings(name), tiny_data())
    assert type(strategy) is STRATEGIES[name]


@every_case
def test_settings_survive_the_way_through_a_file(name, options, tiny_settings):
    settings = tiny_settings(name, options=options)
    again = Settings.model_validate_json(settings.model_dump_json())
    assert again == settings
    assert type(again.strategy) is STRATEGIES[name].Settings
    assert Settings.model_validate(settings.to_table()) == settings


@every_strategy
def test_settings_are_frozen_and_refuse_what_they_do_not_know(name):
    settings = STRATEGIES[name].Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "other"
    with pytest.raises(ValueError, match="Extra inputs"):
        STRATEGIES[name].Settings.model_validate({"temprature": 2.0})


# -- a whole federation ------------------------------------------------------------------------


@every_case
def test_mixed_architectures_learn_for_three_rounds(
    name, options, tiny_settings, tiny_data, simulate
):
    run = simulate(tiny_settings(name, options=options), tiny_data())
    assert [row["round"] for row in run.history.federation] == [1, 2, 3]
    assert run.events == []
    assert sorted(run.history.clients) == [0, 1, 2, 3]
    assert all(row["round"] == 3 for row in run.history.clients.values())
    first, last = (run.history.federation[i]["accuracy"] for i in (0, -1))
    assert 0 <= first <= 1
    assert last > 1 / 3  # better than chance


@every_case
def test_the_same_seed_gives_the_same_bits_and_another_others(
    name, options, tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    one, same, other = (
        simulate(tiny_settings(name, options=options, rounds=2, seed=seed), data)
        for seed in (3, 3, 4)
    )
    assert one.digest == same.digest
    assert one.digest != other.digest
    timeless = [
        [
            {key: value for key, value in row.items() if "seconds" not in key}
            for row in run.history.federation
        ]
        for run in (one, same)
    ]
    assert timeless[0] == timeless[1]


@every_case
def test_results_do_not_depend_on_how_cohorts_are_cut(
    name, options, tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    digests = {
        simulate(
            tiny_settings(
                name, options=options, rounds=2, engine={"backend": "inline", "cohort_size": size}
            ),
            data,
        ).digest
        for size in (1, 16)
    }
    assert len(digests) == 1


@every_case
@pytest.mark.parametrize("participants", [1, 2])
def test_few_participants_are_enough(
    name, options, participants, tiny_settings, tiny_data, simulate, parts
):
    settings = tiny_settings(name, options=options, clients={"participants": participants})
    data = tiny_data()
    strategy, _ = parts(settings, data)
    drawn = [strategy.participants(strategy.federation.plan(number)) for number in (1, 2, 3)]
    run = simulate(settings, data)
    assert [row["participants"] for row in run.history.federation] == [len(d) for d in drawn]
    assert [row["replies"] for row in run.history.federation] == [len(d) for d in drawn]
    trained = {
        row["client"] for row in run.metrics if row["scope"] == "client" and "loss/ce" in row
    }
    assert trained <= {client for clients in drawn for client in clients}
    # Everybody is judged, also who was never asked.
    assert sorted(run.history.clients) == [0, 1, 2, 3]


@every_case
def test_a_federation_of_one_runs(name, options, tiny_settings, tiny_data, simulate):
    settings = tiny_settings(name, options=options, rounds=2, clients={"count": 1})
    run = simulate(settings, tiny_data(rows=(20,)))
    assert [row["replies"] for row in run.history.federation] == [1, 1]


# -- uploads -----------------------------------------------------------------------------------


@every_case
def test_uploads_fit_the_plan_and_their_bytes_are_counted(
    name, options, tiny_settings, tiny_data, simulate, listening_grid, parts
):
    settings = tiny_settings(name, options=options, rounds=2, exchange={"rows_per_round": 9})
    data = tiny_data()
    grid = listening_grid(settings, data)
    strategy, server = parts(settings, data)
    federation = strategy.federation
    strategy.prepare(server)
    run = simulate(settings, data, grid)
    assert run.events == []
    counted = {
        (row["round"], row["client"], row["direction"]): row["bytes"] for row in run.exchange
    }
    expected = {}
    for number in range(2):
        plan = federation.plan(number + 1)
        for client, reply in grid.replies["train"][number].items():
            knowledge = read_reply(reply.content).knowledge
            if knowledge is not None:
                expected[number + 1, client, "up"] = size_by_hand(knowledge)
            if isinstance(knowledge, Predictions):
                assert knowledge.kind == "logits"
                assert np.array_equal(knowledge.rows, plan.public_rows)
                assert knowledge.values.shape == (9, 3)
                assert knowledge.values.dtype == np.float32
                assert np.isfinite(knowledge.values).all()
            elif knowledge is not None:
                like = strategy.uploaded_weights(client, server)
                assert {key: (a.shape, a.dtype) for key, a in knowledge.arrays.items()} == {
                    key: (a.shape, a.dtype) for key, a in like.items()
                }
        for client, knowledge in grid.sent["train"][number].items():
            if knowledge is not None:
                expected[number + 1, client, "down"] = size_by_hand(knowledge)
    assert counted == expected
    for direction, totals in (("up", run.history.bytes_up), ("down", run.history.bytes_down)):
        for client, total in totals.items():
            assert total == sum(
                size
                for (_, who, way), size in expected.items()
                if (who, way) == (client, direction)
            )


def size_by_hand(knowledge):
    if isinstance(knowledge, Predictions):
        rows, classes = knowledge.values.shape
        return rows * classes * 4
    return sum(array.size * array.dtype.itemsize for array in knowledge.arrays.values())


@every_case
def test_everything_that_travels_survives_it_bit_for_bit(
    name, options, tiny_settings, tiny_data, simulate, listening_grid, parts, same_knowledge
):
    settings, data = tiny_settings(name, options=options, rounds=1), tiny_data()
    grid = listening_grid(settings, data)
    simulate(settings, data, grid)
    uploads = uploads_of(grid, data, 0)
    strategy, server = parts(settings, data)
    travelling = [*strategy.prepare(server), *(upload.knowledge for upload in uploads)]
    travelling += strategy.aggregate(uploads, strategy.federation.plan(1), server)
    for knowledge in travelling:
        records = RecordDict()
        write_knowledge(records, knowledge)
        arrived = read_knowledge(records)
        assert same_knowledge(arrived, knowledge)
        assert arrived.payload_bytes == knowledge.payload_bytes == size_by_hand(knowledge)


def uploads_of(grid, data, number, *, without=None):
    """Return a training phase's uploads as the aggregator sees them."""
    uploads = []
    for client, reply in sorted(grid.replies["train"][number].items()):
        knowledge = None if client == without else read_reply(reply.content).knowledge
        if knowledge is not None:
            uploads.append(ClientUpload(client, knowledge, len(data.client_rows[client])))
    return uploads


# -- lost clients ------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("how", ["lost", "spoilt"])
def test_a_client_that_is_left_out_leaves_the_aggregate_of_the_rest(
    name,
    options,
    how,
    tiny_settings,
    tiny_data,
    simulate,
    listening_grid,
    lose,
    parts,
    same_knowledge,
):
    settings, data = tiny_settings(name, options=options, rounds=2), tiny_data()
    strategy, server = parts(settings, data)
    asked = strategy.participants(strategy.federation.plan(1))
    lost = asked[-1]
    grid = listening_grid(settings, data, lose([lost], how))
    run = simulate(settings, data, grid)
    assert [(event["client"], event["event"]) for event in run.events] == [(lost, "rejected")]
    assert run.history.federation[0]["replies"] == len(asked) - 1

    strategy.prepare(server)
    rest = uploads_of(grid, data, 0, without=lost)
    expected = strategy.aggregate(rest, strategy.federation.plan(1), server)
    for client, received in grid.sent["train"][1].items():
        assert same_knowledge(received, expected.to(client)), client


# -- memory ------------------------------------------------------------------------------------


class EnoughError(Exception):
    """Ends a run between two rounds."""


@pytest.fixture
def stop_after(tiny_settings):
    """Run the first rounds; return the boundary and the states they end with, copied."""
    from sim.engine.inline import InlineGrid
    from sim.server.rounds import RoundLoop

    def run(settings, data, rounds):
        grid = InlineGrid(settings, data)
        loop = RoundLoop(grid, settings, data, [])

        def enough():
            if loop.boundary.round == rounds:
                raise EnoughError

        with pytest.raises(EnoughError):
            loop.run(enough)
        clients = grid.trained_clients()
        states = list(zip(clients, grid.client_states(clients), strict=True))
        return loop, copy.deepcopy(states)

    return run


def through_a_file(memory):
    """Return a memory as a file would give it back."""
    arrays = {name: np.array(array) for name, array in memory.arrays.items()}
    return Memory(arrays, json.loads(json.dumps(memory.values)))


@every_case
def test_what_is_remembered_is_all_that_is_needed_to_go_on(
    name, options, tiny_settings, tiny_data, simulate, stop_after
):
    from sim.engine.inline import InlineGrid
    from sim.server.history import History
    from sim.server.rounds import Boundary, RoundLoop

    settings, data = tiny_settings(name, options=options, rounds=4), tiny_data()
    whole = simulate(settings, data)
    before, states = stop_after(settings, data, 2)
    grid = InlineGrid(settings, data)
    grid.load_states(states)
    loop = RoundLoop(grid, settings, data, [])
    broadcast = through_a_file(remember_broadcast(before.boundary.broadcast))
    loop.go_back(
        Boundary(
            2,
            recall_broadcast(broadcast, loop.architectures),
            through_a_file(before.boundary.memory),
        ),
        History(),
    )
    # Whatever an algorithm keeps between rounds has to come back, needed in these rounds or not.
    assert plain(vars(loop._strategy)) == plain(vars(before._strategy))
    loop.run()
    assert timeless(loop.history.federation) == timeless(whole.history.federation[2:])
    runtime = ClientRuntime(settings, data)
    ends = [
        state or runtime.initial_state(client)
        for client, state in enumerate(grid.client_states(range(4)))
    ]
    assert weights_digest(ends) == whole.digest
    remembered = (final.boundary.memory for final in (loop, whole.loop))
    assert len({repr(plain(memory)) for memory in remembered}) == 1


def plain(value):
    """Turn objects into what can be compared: tables of attributes, and the bytes of arrays."""
    if isinstance(value, np.ndarray | torch.Tensor):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Server | Federation):
        return type(value).__name__
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        return {field: plain(getattr(value, field)) for field in fields}
    return plain(vars(value)) if hasattr(value, "__dict__") else value


def timeless(rows):
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows]


@every_case
def test_a_round_that_is_left_out_leaves_no_trace_in_the_memory(
    name, options, tiny_settings, tiny_data, simulate, listening_grid, parts
):
    settings, data = tiny_settings(name, options=options, rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    simulate(settings, data, grid)
    strategy, server = parts(settings, data)
    strategy.prepare(server)
    memory = strategy.memory()
    remembered = copy.deepcopy(plain(memory))
    plan = strategy.federation.plan
    once = strategy.aggregate(uploads_of(grid, data, 0), plan(1), server)
    assert plain(memory) == remembered, "a memory must not change when the algorithm goes on"
    strategy.recall(memory, server)
    again = strategy.aggregate(uploads_of(grid, data, 0), plan(1), server)
    assert plain(remember_broadcast(once)) == plain(remember_broadcast(again))


# -- halves ------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("halves", ["one object", "a new client half every time"])
def test_client_rounds_use_nothing_but_their_arguments(
    name, options, halves, tiny_settings, tiny_data, simulate, parts
):
    settings, data = tiny_settings(name, options=options, rounds=2), tiny_data()
    strategy, server = parts(settings, data)
    clients_half = strategy
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    pool = ModelPool(tensors, settings.clients.optimizer)
    states = {}
    broadcast = strategy.prepare(server)
    for number in (1, 2):
        plan = strategy.federation.plan(number)
        uploads = []
        for client in strategy.participants(plan):
            if halves == "a new client half every time":
                clients_half = parts(settings, data)[0]
            cohort = LoopCohort(
                [Member(client, clients_half.private_rows(client, data), states.get(client))],
                model=clients_half.architecture(client),
                optimizer=settings.clients.optimizer,
                data=tensors,
                pool=pool,
                streams=Streams(seed=settings.seed, round=number, rounds=settings.rounds),
            )
            answers = clients_half.client_round(cohort, broadcast.to(client), plan)
            states[client] = cohort.states()[0]
            uploads += [
                ClientUpload(client, answer, len(data.client_rows[client])) for answer in answers
            ]
        broadcast = strategy.aggregate(uploads, plan, server)
    runtime = ClientRuntime(settings, data)
    every_state = [
        states[client] if client in states else runtime.initial_state(client)
        for client in range(settings.clients.count)
    ]
    assert weights_digest(every_state) == simulate(settings, data).digest


@every_case
def test_an_aggregate_depends_on_earlier_ones_only_through_the_servers_model(
    name, options, tiny_settings, tiny_data, simulate, listening_grid, parts, same_knowledge
):
    settings, data = tiny_settings(name, options=options, rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    simulate(settings, data, grid)
    earlier, uploads = (uploads_of(grid, data, number) for number in (0, 1))
    results = []
    for history in ([], [earlier], [earlier, earlier]):
        strategy, server = parts(settings, data)
        strategy.prepare(server)
        plan = strategy.federation.plan
        for past in history:
            strategy.aggregate(past, plan(1), server)
        model = strategy.server_model()
        knows = model.predict_public(np.arange(20)).tobytes() if model and history else None
        results.append(strategy.aggregate(uploads, plan(2), server))
        if knows and model.predict_public(np.arange(20)).tobytes() != knows:
            pytest.skip("the server's model learns from every round")
    for result in results[1:]:
        for client in range(4):
            assert same_knowledge(result.to(client), results[0].to(client))


@every_case
def test_uploads_are_not_changed_by_aggregating_them(
    name, options, tiny_settings, tiny_data, simulate, listening_grid, parts, same_knowledge
):
    settings, data = tiny_settings(name, options=options, rounds=1), tiny_data()
    grid = listening_grid(settings, data)
    simulate(settings, data, grid)
    strategy, server = parts(settings, data)
    strategy.prepare(server)
    uploads, untouched = (uploads_of(grid, data, 0) for _ in range(2))
    for upload in uploads:
        arrays = (
            [upload.knowledge.values]
            if isinstance(upload.knowledge, Predictions)
            else upload.knowledge.arrays.values()
        )
        for array in arrays:
            if array.flags.owndata:
                array.flags.writeable = False
    strategy.aggregate(iter(uploads), strategy.federation.plan(1), server)
    for one, other in zip(uploads, untouched, strict=True):
        assert same_knowledge(one.knowledge, other.knowledge)
