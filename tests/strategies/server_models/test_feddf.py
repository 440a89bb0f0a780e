"""FedDF: students start from averages, and all clients' models teach them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import digest
from fedkd.exchange.views import RunningMean
from fedkd.models import build_model
from fedkd.targets import StreamingMean, Targets
from fedkd.training import Batch, Outputs, Passes, PublicLesson, supervised, towards_targets
from strategies.contract import ServerModelSettings, ServerTools, Upload
from strategies.server_models.feddf import teachers_say

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
LINEAR = {"name": "mlp", "options": {"hidden": []}}
SMALL = {"name": "mlp", "options": {"hidden": [8]}}


# -- what is taught ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0.03049393, 0.31446133, 0.61248703, 0.04255771]]),
        ({"drop_worst": True}, [[0.01040554, 0.56812320, 0.34458414, 0.07688711]]),
        (
            {"drop_worst": True, "by_accuracy": True},
            [[0.02353650, 0.45262962, 0.46257712, 0.06125676]],
        ),
    ],
)
def test_the_ensemble_is_the_softmax_of_mean_logits(settings, expected):
    # Of s, t, u the second guesses worse than chance.
    mean = StreamingMean()
    for logits, accuracy in ((S, 0.62), (T, 0.08), (U, 0.30)):
        rule = {"by_accuracy": False, "drop_worst": False, **settings}
        say = teachers_say(accuracy, chance=0.1, **rule)
        if say:
            mean.add(np.array(logits), say)
    target = Targets(mean.pop_mean()).probabilities(1.0)
    assert np.allclose(target[:1], expected, atol=1e-6)


def test_a_student_pays_the_divergence_from_the_ensemble():
    mean = (torch.tensor(S) + torch.tensor(T) + torch.tensor(U)) / 3
    losses = towards_targets(Outputs(public=torch.tensor(S)), Batch(targets=Targets(mean)))
    total = sum(float(loss.mean()) for loss in losses.values())
    assert total == pytest.approx(0.02787743, abs=1e-7)


def test_who_guesses_as_well_as_chance_teaches():
    assert teachers_say(0.25, chance=0.25, by_accuracy=False, drop_worst=True) == 1
    assert teachers_say(0.24, chance=0.25, by_accuracy=False, drop_worst=True) == 0
    assert teachers_say(0.0, chance=0.25, by_accuracy=True, drop_worst=False) == 0


# -- the server --------------------------------------------------------------------------------


@pytest.fixture
def home(tiny_settings, tiny_data, parts):
    """Make (strategy, server tools, uploads of the clients' first weights, data)."""

    def build(models=(SMALL, {"name": "cnn", "options": {"channels": [4]}}), **options):
        chosen = tiny_settings("feddf", options=options, clients={"models": list(models)})
        data = tiny_data()
        strategy, server = parts(chosen, data)
        uploads = [
            Upload(client, Weights(arrays=server.initial_weights(client)), 10)
            for client in range(4)
        ]
        return strategy, server, uploads, data

    return build


def logits_of(model, weights, data):
    module = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    module.eval()
    with torch.no_grad():
        return module(torch.from_numpy(data.public_inputs))


def test_a_step_towards_all_clients_models_is_as_computed_by_hand(home, monkeypatch):
    # One architecture, one step over all public rows.
    optimizer = {"name": "sgd", "lr": 0.5}
    strategy, server, uploads, data = home(
        [LINEAR], optimizer=optimizer, server_steps=1, validate_every=1, weighting="equal"
    )
    strategy.federation.__dict__["local"] = Passes(batch_size=50)
    model = strategy.federation.models[0]
    start = RunningMean()
    for upload in uploads:
        start.add(upload.payload, 1)
    logits = [logits_of(model, upload.payload.arrays, data) for upload in uploads]
    target = F.softmax(torch.stack(logits).mean(0), -1)
    module = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
    module.load_state_dict({n: torch.from_numpy(a) for n, a in start.mean().arrays.items()})
    loss = F.kl_div(
        F.log_softmax(module(torch.from_numpy(data.public_inputs)), -1),
        target,
        reduction="batchmean",
    )
    loss.backward()
    expected = {n: (p - 0.5 * p.grad).detach().numpy() for n, p in module.named_parameters()}
    # Whatever the validation rows say, the step is for the better.
    better = iter([0.1, 0.2])
    monkeypatch.setattr(ServerTools, "_accuracy", lambda self, cohort: next(better))
    round = strategy.federation.round(1)
    after = strategy.aggregate(strategy.begin(server), uploads, round, server)
    for name, array in expected.items():
        assert np.allclose(after.models[model.key].arrays[name], array, atol=1e-6)


def test_architectures_that_sent_nothing_learn_from_the_others(home):
    strategy, server, uploads, _ = home(validate_every=20)
    state = strategy.begin(server)
    mlp, cnn = strategy.federation.models[:2]
    after = strategy.aggregate(state, [uploads[0]], strategy.federation.round(1), server)
    assert after.models.keys() == {mlp.key, cnn.key}


def test_without_a_teacher_the_averages_stay(home):
    strategy, server, uploads, data = home([SMALL], drop_worst=True, teachers="accuracy")
    predicted = server.predict_with(
        strategy.federation.models[0], uploads[0].payload.arrays, np.arange(15)
    )
    server.data.validation_inputs[:] = data.public_inputs[:15]
    server.data.validation_labels[:] = (predicted.argmax(-1) + 1) % 3
    round = strategy.federation.round(1)
    after = strategy.aggregate(strategy.begin(server), [uploads[0]], round, server)
    for name, array in uploads[0].payload.arrays.items():
        assert np.array_equal(after.models[strategy.federation.models[0].key].arrays[name], array)


def test_students_are_trained_by_an_optimizer_of_their_own(home):
    strategy, *_ = home(optimizer={"name": "sgd", "lr": 0.5})
    assert all(each.optimizer.name == "sgd" for each in strategy.server_models().values())


# -- early stopping ----------------------------------------------------------------------------


@pytest.fixture
def tools(tiny_settings, tiny_data, parts):
    settings, data = tiny_settings("feddf", clients={"models": [SMALL]}), tiny_data(labelled=True)
    strategy, _ = parts(settings, data)
    server = ServerTools(
        federation=strategy.federation,
        data=data,
        optimizer=settings.clients.optimizer,
        device=torch.device("cpu"),
        models={"student": ServerModelSettings(strategy.federation.models[0])},
    )
    return strategy.federation.round(1), server


def lesson_of(steps, targets):
    rows = np.arange(20)
    return PublicLesson(rows=rows, targets=targets, passes=Passes(batch_size=10, steps=steps))


def taught(server, round, *, classes, **how):
    targets = Targets(20 * np.eye(3, dtype=np.float32)[classes])
    return server.fit_while_better(
        server.new("student"),
        towards_targets,
        round=round,
        public=lesson_of(how.pop("steps", 100), targets),
        **{"patience": 100, "every": 10, **how},
    )


def test_a_model_that_gets_better_is_kept(tools):
    round, server = tools
    before = server.new("student")
    after = taught(server, round, classes=server.data.public_labels)
    assert server.validation_accuracy(after.model) > server.validation_accuracy(before)


def test_a_model_that_only_gets_worse_stays_what_it_was(tools):
    round, server = tools
    good = taught(server, round, classes=server.data.public_labels).model
    assert server.validation_accuracy(good) == 1
    wrong = Targets(20 * np.eye(3, dtype=np.float32)[(server.data.public_labels + 1) % 3])
    after = server.fit_while_better(
        good, towards_targets, round=round, public=lesson_of(60, wrong), patience=30, every=10
    )
    assert after.model is good


@pytest.mark.parametrize(("patience", "steps"), [(10, 10), (25, 30), (1000, 100)])
def test_training_stops_once_patience_is_at_an_end(patience, steps, tools, monkeypatch):
    from fedkd.training import LoopCohort

    round, server = tools
    taken = []
    fit = LoopCohort.fit

    def counting(self, objective, *, public):
        taken.append(public.passes.steps)
        return fit(self, objective, public=public)

    monkeypatch.setattr(LoopCohort, "fit", counting)
    monkeypatch.setattr(ServerTools, "_accuracy", lambda self, cohort: 0.5)
    taught(server, round, classes=server.data.public_labels, patience=patience)
    assert sum(taken) == steps


def test_steps_between_two_looks_take_other_batches(tools, monkeypatch):
    round, server = tools
    seen = []

    def watching(outputs, batch):
        seen.append(tuple(batch.public_rows.tolist()))
        return towards_targets(outputs, batch)

    monkeypatch.setattr(ServerTools, "_accuracy", lambda self, cohort: 0.5)
    targets = Targets(np.zeros((20, 3), np.float32))
    server.fit_while_better(
        server.new("student"),
        watching,
        round=round,
        public=lesson_of(40, targets),
        patience=100,
        every=2,
    )
    assert len(set(seen)) == 40


# -- the whole ---------------------------------------------------------------------------------


def test_students_teach_every_architecture(tiny_settings, tiny_data, simulate):
    options = {"server_steps": 60, "validate_every": 20, "optimizer": {"name": "adam", "lr": 0.01}}
    run = simulate(tiny_settings("feddf", options=options, rounds=4), tiny_data())
    assert run.history.federation[-1]["accuracy"] > 0.8


def test_a_loop_and_a_stack_learn_alike(tiny_settings, tiny_data, simulate):
    options = {"server_steps": 20, "validate_every": 10}
    loop, stack = (
        simulate(
            tiny_settings(
                "feddf",
                options=options,
                clients={"models": [SMALL], "participants": 3},
                rounds=2,
                engine={"backend": "inline", "vectorize": how},
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        for name, weights in one.models["model"].weights.items():
            assert np.allclose(weights, other.models["model"].weights[name], atol=1e-5)


def test_supervision_is_all_that_clients_do(spy, home):
    from strategies.contract import Call, Received

    strategy, *_ = home()
    cohort = spy((0,))
    received = Received([Weights(arrays={"w": np.zeros(1, np.float32)})])
    strategy.client(cohort, received, Call(strategy.federation, 1))
    assert cohort.order == ["load_weights", "reset_optimizers", "fit", "weights"]
    assert cohort.fits[0]["objective"] is supervised


def test_a_client_whose_weights_make_no_numbers_of_a_picture_is_passed_over(home):
    deep = {"name": "mlp", "options": {"hidden": [8, 8, 8, 8]}}
    strategy, server, uploads, _ = home([deep], server_steps=2, validate_every=1)
    huge = {name: np.full_like(array, 1e8) for name, array in uploads[0].payload.arrays.items()}
    spoilt = [replace(uploads[0], payload=Weights(arrays=huge)), *uploads[1:]]
    round = strategy.federation.round(1)
    one, other = (
        strategy.aggregate(strategy.begin(server), given, round, server)
        for given in (spoilt, uploads[1:])
    )
    assert digest(one) == digest(other)
    refused = r"strategy\.optimizer of feddf must have a constant rate, got warm_up 0\.1"
    with pytest.raises(ValueError, match=refused):
        home([deep], optimizer={"warm_up": 0.1})
