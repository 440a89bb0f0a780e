"""One-way distillation: who teaches whom, and that the teacher does not learn from it."""

import numpy as np
import pytest

from fedkd.exchange.payloads import Predictions
from fedkd.training import Passes, supervised, supervised_public
from strategies.contract import ServerModel, ServerTools, Trained
from strategies.server_models.one_way import Teaching


class FakeServer(ServerTools):
    """Writes down how its model is trained; a model predicts its number of fits."""

    def __init__(self, server) -> None:
        self.federation, self.data = server.federation, server.data
        self.made, self.fits = [], []

    def new(self, name, weights=None):
        self.made.append(name)
        return ServerModel(name, {"fits": np.zeros(1)})

    def fit(self, model, objective, **told):
        self.fits.append({"objective": objective, **told})
        return Trained(ServerModel(model.name, {"fits": model.arrays["fits"] + 1}))

    def predict_public(self, model, rows):
        return np.full((len(rows), 3), model.arrays["fits"], np.float32)


@pytest.fixture
def one_way(tiny_settings, tiny_data, parts):
    """Make (strategy, fake server) of three rounds with some options."""

    def build(direction="teacher_to_clients", labelled=False, **options):
        options = {
            "direction": direction,
            "temperature": {"kind": "linear", "start": 3.0, "end": 1.0},
            **options,
        }
        settings = tiny_settings("one_way", options=options)
        strategy, server = parts(settings, tiny_data(labelled=labelled))
        return strategy, FakeServer(server)

    return build


# -- teacher to clients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher_data", "labelled", "expected"),
    [
        ("public", True, "public"),
        ("auto", True, "public"),
        ("auto", False, "largest"),
        ("largest_client", True, "largest"),
        ("pooled", True, "pooled"),
    ],
)
def test_what_the_teacher_learns_from(one_way, teacher_data, labelled, expected):
    strategy, server = one_way(labelled=labelled, teacher_data=teacher_data, teacher_epochs=7)
    strategy.begin(server)
    assert server.made == ["teacher"]
    (fit,) = server.fits
    assert fit["round"] is None
    passes = Passes(batch_size=8, epochs=7)
    if expected == "public":
        assert fit["objective"] is supervised_public
        assert not {"private", "rows"} & fit.keys()
        assert fit["public"].rows.tolist() == list(range(20))
        assert fit["public"].targets is None
        assert fit["public"].passes == passes
        return
    rows = {
        "largest": server.data.client_rows[3].tolist(),  # 17 rows, the others 12, 13 and 9
        "pooled": list(range(12 + 13 + 9 + 17)),
    }[expected]
    assert fit["rows"].tolist() == rows
    assert fit["objective"] is supervised
    assert fit["private"] == passes
    assert "public" not in fit


def test_public_without_labels_is_refused(one_way):
    with pytest.raises(ValueError, match=r"teacher_data: public needs the labels of public rows"):
        one_way(teacher_data="public")


def test_the_teacher_is_trained_once_and_shared_every_round(one_way, told):
    strategy, server = one_way()
    states = [strategy.begin(server)]
    for number in (1, 2, 3):
        round = strategy.federation.round(number)
        states.append(strategy.aggregate(states[-1], [], round, server))
    assert len(server.fits) == 1
    # Of the round that learns from it: 3, 2, 1, and the last once more.
    assert [told(strategy, state)(0).temperature for state in states] == [3, 2, 1, 1]
    for state in states:
        receives = told(strategy, state)
        assert receives(0).label == "logits"
        assert set(receives(0).values.ravel()) == {1.0}
        assert all(receives(client) is receives(0) for client in range(4))
        assert strategy.judged_models(state) == {"teacher": states[0].model}


@pytest.mark.parametrize("every_row", [True, False])
def test_the_teacher_never_changes_in_a_run(
    tiny_settings, tiny_data, simulate, listening_grid, every_row
):
    options = {"teacher_epochs": 3, "temperature": 2.0}
    exchange = {} if every_row else {"rows_per_round": 7}
    settings, data = tiny_settings("one_way", options=options, exchange=exchange), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    model = run.loop.boundary.state.model
    now = run.loop._server.predict_public(model, np.arange(20))
    for received in grid.sent["train"]:
        for lesson in received.values():
            np.testing.assert_allclose(lesson.values, now[lesson.rows], rtol=1e-5, atol=1e-6)
    accuracies = [row["accuracy"] for row in run.metrics if row["scope"] == "server"]
    assert accuracies == [run.history.server["accuracy"]] * 3
    # Students upload nothing in this direction.
    assert {row["direction"] for row in run.exchange} == {"down"}


def test_a_teacher_of_everything_knows_what_it_was_taught(tiny_settings, tiny_data, simulate):
    options = {"teacher_data": "pooled", "teacher_epochs": 10}
    run = simulate(tiny_settings("one_way", options=options, rounds=1), tiny_data())
    assert run.history.server["accuracy"] == 1.0


# -- clients to server, and back ---------------------------------------------------------------


@pytest.mark.parametrize("direction", ["server_to_clients", "clients_to_server"])
def test_the_ensemble_teaches_the_server_model(one_way, scores, direction):
    strategy, server = one_way(direction, server_epochs=2, scale_by_t2=False)
    before = strategy.begin(server)
    round = strategy.federation.round(2)
    assert strategy.receives(before, 0, round) is None
    uploads = scores(round, [0, 1, 3])
    strategy.aggregate(before, uploads, round, server)
    (fit,) = server.fits
    assert fit["round"] is round
    assert not {"private", "rows"} & fit.keys()
    (kd,) = fit["objective"].learners["model"].objective.terms.values()
    assert (kd.kind, kd.scale_by_t2, kd.temperature.at(round.progress)) == ("kd", False, 2.0)
    powers = np.exp(np.stack([u.payload.values for u in uploads]).astype(np.float64) / 2.0)
    by_hand = (powers / powers.sum(-1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(fit["public"].targets.values, by_hand, atol=1e-6)
    assert np.array_equal(fit["public"].rows, round.public_rows)
    assert fit["public"].passes == Passes(batch_size=8, epochs=2)


def test_clients_receive_the_server_s_scores_only_where_it_teaches_back(one_way, scores, told):
    for direction, teaches in (("server_to_clients", True), ("clients_to_server", False)):
        strategy, server = one_way(direction)
        round = strategy.federation.round(1)
        before = strategy.begin(server)
        state = strategy.aggregate(before, scores(round, [0, 1]), round, server)
        receives = told(strategy, state, round.next())
        if not teaches:
            assert state == Teaching(state.model, taught=True)
            assert [receives(client) for client in range(4)] == [None] * 4
            continue
        assert receives(0).label == "logits"
        assert receives(0).temperature == 2.0
        # After its first lesson, not before.
        assert set(receives(0).values.ravel()) == {1.0}
        assert all(receives(client) is receives(0) for client in range(4))


@pytest.mark.parametrize(
    ("direction", "downloads", "uploads"),
    [
        ("teacher_to_clients", [1, 2, 3], []),
        ("server_to_clients", [2, 3], [1, 2, 3]),
        ("clients_to_server", [], [1, 2, 3]),
    ],
)
def test_who_sends_in_which_round(
    tiny_settings, tiny_data, simulate, direction, downloads, uploads
):
    options = {"direction": direction, "teacher_epochs": 2}
    run = simulate(tiny_settings("one_way", options=options), tiny_data())
    for way, rounds in (("down", downloads), ("up", uploads)):
        assert [
            (row["round"], row["client"], row["bytes"])
            for row in run.exchange
            if row["direction"] == way
        ] == [(number, client, 20 * 3 * 4) for number in rounds for client in range(4)]


def test_clients_that_are_not_taught_back_learn_alone(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    run = simulate(tiny_settings("one_way", options={"direction": "clients_to_server"}), data)
    assert run.digest == simulate(tiny_settings("local"), data).digest
    assert all("ensemble_accuracy" in row for row in run.history.federation)


def test_the_server_learns_from_its_clients(tiny_settings, tiny_data, simulate):
    options = {"direction": "clients_to_server", "server_epochs": 10}
    run = simulate(tiny_settings("one_way", options=options, rounds=4), tiny_data())
    accuracies = [row["accuracy"] for row in run.metrics if row["scope"] == "server"]
    assert accuracies[-1] > 0.8
    assert [row["server_accuracy"] for row in run.history.federation] == accuracies


# -- what a client does ------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["teacher_to_clients", "server_to_clients"])
def test_a_client_learns_from_labels_and_teacher_at_once(spy, one_way, learn, direction):
    strategy, _ = one_way(direction, ce_weight=0.5, kd_weight=2.0, public_epochs=3)
    cohort, round = spy(), strategy.federation.round(2)
    received = Predictions(
        rows=round.public_rows,
        values=np.zeros((20, 3), np.float32),
        temperature=2.5,
    )
    answers = learn(strategy, cohort, received, 2)
    (fit,) = cohort.fits
    assert fit["objective"].learners["model"].objective == strategy.settings.terms
    weights = [term.weight.at(0.5) for term in strategy.settings.terms.terms.values()]
    assert weights == [0.5, 2.0]
    assert fit["objective"].confidence_threshold == 0.0
    assert fit["private"] == round.local
    assert fit["public"].targets.values is received.values
    assert fit["public"].passes == Passes(batch_size=8, epochs=3)
    assert len(answers) == (direction == "server_to_clients")


@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_a_client_without_a_lesson_learns_from_its_labels(spy, one_way, learn, kd_weight):
    strategy, _ = one_way("server_to_clients", kd_weight=kd_weight, ce_weight=0.5)
    cohort, round = spy(), strategy.federation.round(1)
    learn(strategy, cohort, None)
    (fit,) = cohort.fits
    (term,) = fit["objective"].learners["model"].objective.terms.values()
    assert (term.kind, term.weight.at(0.0)) == ("ce", 0.5)
    assert (fit["private"], fit["public"]) == (round.local, None)
    assert cohort.order == ["fit", "predict_public"]


def test_without_weight_for_the_teacher_it_is_local_learning(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    options = {"kd_weight": 0.0, "teacher_epochs": 1}
    run = simulate(tiny_settings("one_way", options=options), data)
    assert run.digest == simulate(tiny_settings("local"), data).digest
