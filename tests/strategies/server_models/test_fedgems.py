"""FedGEMS: whom the server believes, what it asks for, and what it learns where nobody knows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.payloads import Predictions
from fedkd.training import Batch, Outputs
from strategies.contract import Upload
from strategies.server_models.fedgems import (
    KNOWN,
    TAUGHT,
    ReliableMean,
    _taught_and_labelled,
    reliability,
)

S = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.5, -1.0, 0.0, 2.0]])
T = torch.tensor([[2.0, 1.0, 4.0, -1.0], [0.0, 0.0, 1.0, 3.0]])
U = torch.tensor([[-4.0, 3.0, 1.0, 1.0], [2.0, 0.0, -1.0, 1.0]])
SERVER = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
LABELS = torch.tensor([2, 0])


def mixed(clients, labels=LABELS):
    mean = ReliableMean(labels, clients[0].shape[1])
    for logits in clients:
        mean.add(logits.numpy())
    return mean.mean()


def server_loss(taught, known=(1.0, 1.0)):
    logits = SERVER.clone().requires_grad_()
    tables = {TAUGHT: torch.softmax(taught, -1), KNOWN: torch.tensor(known)}
    batch = Batch(public_labels=LABELS, tables=tables)
    losses = _taught_and_labelled(Outputs(public=logits), batch, ce_share=0.75)
    return sum(loss.mean() for loss in losses.values()).item()


# -- whom the server believes ------------------------------------------------------------------


def test_clients_count_by_the_softmax_of_one_over_their_entropy_by_hand():
    entropies = [[0.94753696, 0.87828118], [0.55619883, 0.67207839], [0.67100441, 0.94753696]]
    right = [[1, 0], [1, 0], [0, 1]]
    for logits, nats, mask in zip((S, T, U), entropies, right, strict=True):
        expected = [1 / h if is_right else -np.inf for h, is_right in zip(nats, mask, strict=True)]
        assert reliability(logits, LABELS).tolist() == pytest.approx(expected, rel=1e-7)
    scores = torch.stack([reliability(logits, LABELS) for logits in (S, T, U)])
    shares = torch.softmax(scores, dim=0)
    assert shares[:, 0].tolist() == pytest.approx([0.32244669, 0.67755331, 0.0], abs=1e-8)
    assert shares[:, 1].tolist() == [0.0, 0.0, 1.0]


def test_reliable_clients_logits_are_mixed_by_hand():
    expected = [[1.67755331, 1.32244669, 3.67755331, -0.67755331], [2, 0, -1, 1]]
    for order in ((S, T, U), (U, T, S), (T, U, S)):
        logits, known = mixed(order)
        assert logits == pytest.approx(np.array(expected), abs=1e-6)
        assert known.tolist() == [True, True]


def test_who_is_wrong_counts_nothing():
    # Published fault: a softmax over all clients, with a score of 0 for those that are wrong,
    # leaves them a tenth to a fifth of the weight here.
    expected, _ = mixed((S, T, U))
    odd = U.clone()
    odd[0] = torch.tensor([9.0, 1.0, -7.0, 3.0])
    assert (mixed((S, T, odd))[0] == expected).all()
    assert (mixed((S, T, U, -S))[0] == expected).all()


def test_a_row_that_nobody_gets_right_has_no_teacher():
    logits, known = mixed((S, T), torch.tensor([0, 0]))
    assert known.tolist() == [False, False]
    assert np.isfinite(logits).all()
    logits, known = ReliableMean(LABELS, 4).mean()
    assert known.tolist() == [False, False]


def test_clients_without_doubt_do_not_overflow():
    sure = torch.tensor([[0.0, 0.0, 1e4, 0.0], [1e4, 0.0, 0.0, 0.0]])
    surer = torch.tensor([[0.0, 3.0, 1e4, 0.0], [1e4, 0.0, 2.0, 0.0]])
    logits, known = mixed((S, sure, surer))
    assert known.all()
    # An entropy of 0 counts as .001 nats: both are equally sure, and all others count nothing.
    assert logits == pytest.approx(((sure + surer) / 2).numpy())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6))
def test_the_mean_is_that_of_all_clients_at_once(seed, clients):
    rng = np.random.default_rng(seed)
    sent = torch.as_tensor(rng.normal(0, 3, (clients, 5, 4)).astype(np.float32))
    labels = torch.as_tensor(rng.integers(0, 4, 5))
    scores = torch.stack([reliability(own, labels) for own in sent])
    logits, known = mixed(list(sent), labels)
    assert known.tolist() == (scores > -torch.inf).any(0).tolist()
    shares = torch.softmax(scores[:, known], dim=0)
    expected = torch.einsum("kr,krc->rc", shares, sent[:, known].double())
    assert logits[known] == pytest.approx(expected.numpy(), abs=1e-5)


# -- what the server learns --------------------------------------------------------------------


def test_the_servers_loss_by_hand():
    # Published fault: teacher and student of the divergence exchanged, and a mean over all its
    # terms, where it is a sum over classes.
    assert server_loss(torch.as_tensor(mixed((S, T, U))[0])) == pytest.approx(0.83525786, rel=1e-7)
    pool = torch.tensor([[0.0, 0, 3, 0], [4, 0, 0, 1]])
    assert server_loss(pool) == pytest.approx(0.91091567, rel=1e-7)


def test_a_row_without_a_teacher_learns_its_label_alone():
    labels_alone = torch.nn.functional.cross_entropy(SERVER, LABELS).item()
    assert server_loss(U, known=(0.0, 0.0)) == pytest.approx(labels_alone)
    one = server_loss(T, known=(1.0, 0.0))
    rows = torch.nn.functional.cross_entropy(SERVER, LABELS, reduction="none")
    divergence = torch.nn.functional.kl_div(
        SERVER[0].log_softmax(-1), T[0].softmax(-1), reduction="sum"
    )
    expected = (0.75 * rows[0] + 0.25 * divergence + rows[1]) / 2
    assert one == pytest.approx(expected.item())


# -- what it asks for --------------------------------------------------------------------------


@pytest.fixture
def made(tiny_settings, tiny_data, parts):
    def build(**options):
        return parts(tiny_settings("fedgems", options=options), tiny_data(labelled=True))

    return build


def uploads(strategy, state, values=None):
    rows = state.asked
    return [
        Upload(
            client,
            Predictions(
                rows=rows,
                values=np.random.default_rng(client).normal(0, 2, (len(rows), 3)).astype("f4")
                if values is None
                else values,
            ),
            10,
        )
        for client in (0, 1)
    ]


def test_it_asks_for_rows_that_neither_it_nor_its_pool_gets_right(made):
    strategy, server = made()
    state = strategy.begin(server)
    labels = server.data.public_labels
    first = strategy.federation.round(1)
    logits = server.predict_public(state.model, first.public_rows)
    right = logits.argmax(-1) == labels
    assert 0 < right.sum() < len(right)
    assert state.asked.tolist() == np.flatnonzero(~right).tolist()
    assert strategy.orders(state, 0, first).rows.tolist() == state.asked.tolist()
    assert (state.pool[right] == logits[right]).all()
    assert state.pooled.tolist() == right.tolist()
    # What it once got right teaches it, and is not asked for again.
    forgotten = replace(state, right=np.zeros_like(right))
    assert forgotten.asked.tolist() == state.asked.tolist()


def test_the_pool_teaches_what_was_forgotten_and_clients_teach_the_rest(made, monkeypatch):
    strategy, server = made()
    state = strategy.begin(server)
    state = replace(state, right=np.zeros_like(state.right))
    asked, seen = state.asked, {}
    told = server.fit

    def listen(model, objective, **more):
        seen.update({name: table.values for name, table in more["tables"].items()})
        return told(model, objective, **more)

    monkeypatch.setattr(server, "fit", listen)
    labels = server.data.public_labels
    sure = np.eye(3, dtype=np.float32)[labels[asked]] * 5
    sure[0] = -sure[0]
    round = strategy.federation.round(1)
    after = strategy.aggregate(state, uploads(strategy, state, sure), round, server)
    assert seen[KNOWN][state.pooled].all()
    pooled = torch.softmax(torch.as_tensor(state.pool[state.pooled]), -1)
    assert seen[TAUGHT][state.pooled] == pytest.approx(pooled.numpy())
    assert seen[KNOWN][asked].tolist() == [0.0] + [1.0] * (len(asked) - 1)
    by_clients = torch.softmax(torch.as_tensor(sure[1:]), -1).numpy()
    assert seen[TAUGHT][asked[1:]] == pytest.approx(by_clients)
    assert after.taught
    assert strategy.receives(state, 0, round) is None
    lesson = strategy.payload(after, strategy.receives(after, 0, round.next()))
    assert (lesson.values == server.predict_public(after.model, after.rows)).all()


def test_where_nobody_answers_nothing_moves(made):
    strategy, server = made()
    state = strategy.begin(server)
    assert strategy.aggregate(state, [], strategy.federation.round(1), server) is state


def test_a_server_that_learns_from_nobody_asks_for_nothing(made):
    strategy, server = made(directions=["clients"])
    state = strategy.begin(server)
    round = strategy.federation.round(1)
    assert strategy.asks(state, 0, round, server) is None
    assert strategy.orders(state, 0, round) is None
    after = strategy.aggregate(state, [], round, server)
    assert after.taught
    # Its labels still teach it.
    assert any(
        (array != state.model.weights[name]).any() for name, array in after.model.weights.items()
    )
    assert strategy.receives(after, 0, round.next()) == "lesson"


def test_needs_labelled_public_rows(tiny_settings, tiny_data, parts):
    message = r"strategy\.name: fedgems .* needs the labels of public rows"
    with pytest.raises(ValueError, match=message):
        parts(tiny_settings("fedgems"), tiny_data())


# -- runs --------------------------------------------------------------------------------------


def test_only_what_is_asked_for_goes_up(tiny_settings, tiny_data, simulate):
    options = {"server_epochs": 5, "optimizer": {"name": "adam", "lr": 0.01}}
    run = simulate(tiny_settings("fedgems", options=options), tiny_data(labelled=True))
    assert run.events == []
    sizes = {}
    for row in run.exchange:
        sizes.setdefault((row["direction"], row["round"]), set()).add(row["bytes"])
    rows = len(run.loop.boundary.state.rows)
    # The lesson, beside the bits that say which rows are asked for.
    assert max(sizes["down", 1]) <= -(-rows // 8)
    assert max(sizes["down", 2]) == rows * 3 * 4
    ups = [max(sizes["up", number]) for number in (1, 2)]
    assert ups[1] < ups[0] < rows * 3 * 4
    assert run.history.federation[-1]["server_accuracy"] > 0.5


@pytest.mark.parametrize("directions", [["clients"], ["server"]])
def test_each_direction_alone(directions, tiny_settings, tiny_data, simulate):
    options = {"directions": directions}
    data = tiny_data(labelled=True)
    run = simulate(tiny_settings("fedgems", options=options), data)
    ways = {row["direction"] for row in run.exchange if row["bytes"]}
    alone = simulate(tiny_settings("local"), data).digest
    if directions == ["server"]:
        assert run.digest == alone
        assert "up" in ways
    else:
        assert run.digest != alone
        assert ways == {"down"}


def test_stacked_clients_learn_what_clients_learn_one_by_one(tiny_settings, tiny_data, simulate):
    one_by_one, stacked = (
        simulate(
            tiny_settings(
                "fedgems",
                clients={
                    "models": [{"name": "mlp", "options": {"hidden": [8]}}],
                    "optimizer": {"name": "sgd", "lr": 0.1},
                },
                engine={"backend": "inline", "vectorize": vectorize},
            ),
            tiny_data(labelled=True),
        )
        for vectorize in ("loop", "vmap")
    )
    for one, other in zip(one_by_one.states, stacked.states, strict=True):
        for name, array in one.models["model"].weights.items():
            assert np.allclose(array, other.models["model"].weights[name], atol=1e-5)
