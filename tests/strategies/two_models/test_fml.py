"""FML: two models of a client learn from each other, and only one of them travels."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Weights
from fedkd.models import build_model
from fedkd.training import (
    PARTS,
    LoopCohort,
    Member,
    ModelPool,
    Streams,
    TrainingData,
    initial_model_seed,
    weights_digest,
)
from strategies.contract import Upload
from strategies.two_models.fml import MEME, FMLSettings
from strategies.two_models.pairs import PRIVATE

LIHINT = {"name": "mlp", "options": {"hidden": []}}
SGD = {"name": "sgd", "lr": 0.1}
HINT = {"objective": {"ce": 1.0, "hint": 0.3}}


@pytest.fixture
def home(tiny_settings, tiny_data, parts):
    """Make (strategy, server, a function that opens one client's cohort)."""

    def build(*, options=None, **settings):
        chosen = tiny_settings("fml", options=options, **settings)
        data = tiny_data()
        strategy, server = parts(chosen, data)
        tensors = TrainingData.from_arrays(data, torch.device("cpu"))
        pool = ModelPool(tensors, chosen.clients.optimizer)

        def open_client(client=0, state=None, round=1):
            return LoopCohort(
                [Member(client, data.client_rows[client], state)],
                model=strategy.architecture(client),
                optimizer=chosen.clients.optimizer,
                data=tensors,
                pool=pool,
                streams=Streams(seed=chosen.seed, round=round, rounds=chosen.rounds),
            )

        return strategy, server, open_client

    return build


# -- the client --------------------------------------------------------------------------------


def test_a_step_is_that_of_the_paper_computed_by_hand(home, tiny_data, learn, told):
    # alpha = 0.7, beta = 0.4; one step of SGD over all rows of client 0, with linear models.
    options = {
        "meme": LIHINT,
        "objective": {"ce": 0.7, "kd": {"weight": 0.3, "temperature": 1.0}},
        "meme_objective": {"ce": 0.4, "kd": {"weight": 0.6, "temperature": 1.0}},
    }
    clients = {"models": [LIHINT], "optimizer": SGD, "batch_size": 50, "local": {"epochs": 1}}
    strategy, server, open_client = home(options=options, clients=clients)
    received = told(strategy, strategy.begin(server))(0)
    cohort = open_client()
    (upload,) = learn(strategy, cohort, received)

    data = tiny_data()
    rows = data.client_rows[0]
    inputs = torch.from_numpy(data.train_inputs[rows]).flatten(1)
    labels = torch.from_numpy(data.train_labels[rows])
    private = build_model(
        strategy.architecture(0)[PRIVATE],
        input_shape=(1, 8, 8),
        num_classes=3,
        seed=initial_model_seed(strategy.federation.seed, 0),
    )
    meme = copy.deepcopy(private)
    meme.load_state_dict({n: torch.from_numpy(a) for n, a in received.arrays.items()})
    of_private, of_meme = (
        F.log_softmax(model(inputs.reshape(-1, 1, 8, 8)), -1) for model in (private, meme)
    )

    def kl(teacher, student):
        constant = teacher.detach()
        return (constant.exp() * (constant - student)).sum() / len(rows)

    picked = torch.arange(len(rows)), labels
    loss = 0.7 * -of_private[picked].mean() + 0.3 * kl(of_meme, of_private)
    meme_loss = 0.4 * -of_meme[picked].mean() + 0.6 * kl(of_private, of_meme)
    for model, its_loss, now in (
        (private, loss, cohort.states()[0].models[PRIVATE].weights),
        (meme, meme_loss, upload.arrays),
    ):
        gradients = torch.autograd.grad(its_loss, model.parameters(), retain_graph=True)
        for (name, before), gradient in zip(model.named_parameters(), gradients, strict=True):
            expected = before - 0.1 * gradient
            torch.testing.assert_close(torch.from_numpy(now[name]), expected.detach())


def test_the_published_losses_are_the_default():
    terms = FMLSettings().objective.terms
    assert FMLSettings().meme_objective == FMLSettings().objective
    assert {name: term.weight.at(0.3) for name, term in terms.items()} == {"ce": 0.5, "kd": 0.5}
    assert terms["kd"].temperature.at(0.3) == 1.0


def test_a_round_begins_with_the_global_meme_without_its_momentum(home, learn, told):
    strategy, server, open_client = home()
    received = told(strategy, strategy.begin(server))(0)
    cohort = open_client()
    learn(strategy, cohort, received)
    state = cohort.states()[0]
    # 12 rows, batches of 8: two steps a round.
    cohort = open_client(state=state, round=2)
    learn(strategy, cohort, received, 2)
    counters = {
        name: {float(value) for key, value in own.optimizer.items() if key.startswith("step/")}
        for name, own in cohort.states()[0].models.items()
    }
    assert counters == {PRIVATE: {4.0}, MEME: {2.0}}
    # What the client's meme was before has no say in what it sends.
    other = copy.deepcopy(state)
    for array in other.models[MEME].weights.values():
        array += 1.0
    uploads = []
    for given in (state, other):
        cohort = open_client(state=given, round=2)
        uploads += learn(strategy, cohort, received, 2)
    for name, array in uploads[0].arrays.items():
        assert np.array_equal(array, uploads[1].arrays[name])


def test_two_models_of_one_architecture_do_not_start_alike(home):
    _, _, open_client = home(options={"meme": LIHINT}, clients={"models": [LIHINT]})
    models = open_client().states()[0].models
    assert not np.array_equal(models[PRIVATE].weights["1.weight"], models[MEME].weights["1.weight"])


def test_without_a_share_of_the_meme_the_private_model_learns_as_if_alone(
    tiny_settings, tiny_data, simulate, same
):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data)
    beside = simulate(tiny_settings("fml", options={"objective": {"ce": 1.0, "kd": 0.0}}), data)
    for one, other in zip(alone.states, beside.states, strict=True):
        assert same(
            Weights(arrays=one.models["model"].weights),
            Weights(arrays=other.models[PRIVATE].weights),
        )


def test_a_private_model_whose_direction_is_off_learns_as_in_local_and_its_meme_still_from_it(
    tiny_settings, tiny_data, simulate, same
):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data)
    off = {"objective": {"ce": 0.3, "kd": 0.7}, "directions": [MEME]}
    beside = simulate(tiny_settings("fml", options=off), data)
    neither = simulate(tiny_settings("fml", options={**off, "directions": []}), data)
    for one, other, last in zip(alone.states, beside.states, neither.states, strict=True):
        own = Weights(arrays=one.models["model"].weights)
        assert same(own, Weights(arrays=other.models[PRIVATE].weights))
        assert same(own, Weights(arrays=last.models[PRIVATE].weights))
        assert not same(
            Weights(arrays=other.models[MEME].weights), Weights(arrays=last.models[MEME].weights)
        )


def test_a_meme_whose_direction_is_off_learns_from_labels_only(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    settings = tiny_settings("fml", options={"directions": [PRIVATE]})
    written = tiny_settings("fml", options={"meme_objective": {"ce": 1.0}})
    one, other = simulate(settings, data), simulate(written, data)
    assert weights_digest(one.states) == weights_digest(other.states)


# -- what travels ------------------------------------------------------------------------------


def test_memes_travel_and_projectors_and_private_models_stay_at_home(
    tiny_settings, tiny_data, simulate, listening_grid
):
    from sim.wire.messages import read_reply

    clients = {"models": ["cnn"]}
    settings, data = tiny_settings("fml", options=HINT, clients=clients, rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    # A hidden layer of 64, biases included, in float32.
    size = 4 * (64 * 64 + 64 + 64 * 3 + 3)
    assert {row["bytes"] for row in run.exchange} == {size}
    assert {row["kind"] for row in run.exchange} == {"weights"}
    for replies in grid.replies["train"]:
        for reply in replies.values():
            names = read_reply(reply.content).payload.arrays.keys()
            assert names == {"1.weight", "1.bias", "3.weight", "3.bias"}
    for state in run.states:
        assert state.models.keys() == {PRIVATE, MEME, PARTS}
        assert any("projector" in name for name in state.models[PARTS].weights)


# -- the server --------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "expected"), [("equal", 3.0), ("examples", 1 + 4 * 13 / 25)])
def test_memes_are_averaged_by_hand(home, told, same, weighting, expected):
    strategy, server, _ = home(options={"weighting": weighting})
    start = strategy.begin(server)
    like = told(strategy, start)(0).arrays
    uploads = [
        Upload(
            client,
            Weights(arrays={name: np.full_like(array, value) for name, array in like.items()}),
            strategy.federation.num_examples[client],
        )
        for client, value in ((0, 1.0), (1, 5.0))  # 12 and 13 rows
    ]
    state = strategy.aggregate(start, uploads, strategy.federation.round(1), server)
    receives = told(strategy, state)
    for client in range(4):
        assert receives(client) is receives(0)
    for array in receives(0).arrays.values():
        np.testing.assert_allclose(array, expected, rtol=1e-6)
    (judged,) = strategy.judged_models(state).values()
    assert same(Weights(arrays=judged.weights), receives(0))


def test_a_meme_with_batch_norm_goes_through_every_round(tiny_settings, tiny_data, simulate):
    meme = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}
    engine = {"backend": "inline", "vectorize": "loop"}
    settings = tiny_settings("fml", options={"meme": meme}, engine=engine)
    run = simulate(settings, tiny_data())
    assert run.events == []
    # 12, 13, 9 and 17 rows in batches of 8 are 2, 2, 1 and 2 steps; their mean is rounded to 2.
    assert run.loop.boundary.state.model.weights["1.num_batches_tracked"] == 6


def test_without_uploads_the_global_meme_stays(home):
    strategy, server, _ = home()
    before = strategy.begin(server)
    assert strategy.aggregate(before, [], strategy.federation.round(1), server) is before


def test_private_models_are_judged_and_the_global_meme_beside_them(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    run = simulate(tiny_settings("fml", rounds=2), data)
    last = run.history.federation[-1]
    tested = torch.from_numpy(data.test_inputs)
    settings = run.loop._settings
    for client, state in enumerate(run.states):
        model = build_model(settings.model_of(client), input_shape=(1, 8, 8), num_classes=3, seed=0)
        weights = state.models[PRIVATE].weights
        model.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
        right = (model.eval()(tested).argmax(-1).numpy() == data.test_labels).mean()
        assert run.history.clients[client]["accuracy"] == pytest.approx(right)
    meme = run.loop.boundary.state.model
    right = (run.loop._server.predict(meme, tested).argmax(-1) == data.test_labels).mean()
    assert last["server_accuracy"] == pytest.approx(right)


# -- how clients are trained -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "backend"),
    [
        ({"ce": 1.0, "kd": 1.0}, "vmap"),
        ({"ce": 1.0, "hint": 1.0}, "vmap"),
        ({"ce": 1.0, "rkd_distance": 1.0}, "loop"),
    ],
    ids=["response", "feature", "relation"],
)
def test_the_grid_stacks_what_can_be_stacked(
    objective, backend, tiny_settings, tiny_data, simulate, monkeypatch
):
    from sim.engine import runtime

    opened = []
    original = runtime.open_cohort

    def spy(members, **options):
        opened.append(options["backend"])
        return original(members, **options)

    settings = tiny_settings(
        "fml",
        options={"objective": objective},
        clients={"count": 8, "models": ["mlp"]},
        rounds=2,
    )
    data = tiny_data(rows=(12, 13, 9, 17, 12, 11, 14, 10))
    monkeypatch.setattr(runtime, "open_cohort", spy)
    runs = [simulate(settings, data) for _ in range(2)]
    assert set(opened) == {backend}
    assert runs[0].events == []
    assert runs[0].digest == runs[1].digest


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": {"hint": {"layers": ["nowhere"]}}},
            r"strategy\.objective\.hint: .*no layer 'nowhere'; it has",
        ),
        (
            {"meme_objective": {"hint": {"layers": {"penultimate": "nowhere"}}}},
            r"strategy\.meme_objective\.hint: .*no layer 'nowhere'; it has",
        ),
    ],
    ids=["objective", "meme objective"],
)
def test_what_does_not_fit_is_found_before_the_first_round(home, options, message):
    strategy, _, _ = home(options=options)
    with pytest.raises(ValueError, match=message):
        strategy.check((1, 8, 8))
