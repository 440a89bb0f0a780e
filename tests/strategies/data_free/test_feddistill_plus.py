"""FedDistill+: mean logits of each class by hand, beside FedAvg's mean of the weights."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Bundle, ClassTable, Weights
from fedkd.models import build_model
from fedkd.training import MODEL, Batch, Outputs
from sim.wire.messages import read_reply
from strategies.contract import Upload
from strategies.data_free.fd import TAUGHT
from strategies.data_free.feddistill_plus import TABLE, targets_of

MLP = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}
ONE = [[2.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 3.0]]
OTHER = [[4.0, 1.0, -2.0], [-1.0, 2.0, 1.0], [0.0, 0.0, 0.0]]


def sent(value, table):
    parts = {
        MODEL: Weights(arrays={"w": np.array([value], np.float32)}),
        TABLE: ClassTable(values=np.array(table, np.float32), scale="logits"),
    }
    return Bundle(parts=parts)


def uploads():
    return [Upload(0, sent(1.0, ONE), 10), Upload(1, sent(4.0, OTHER), 20)]


@pytest.fixture
def made(tiny_settings, tiny_data, parts):
    def build(**options):
        settings = tiny_settings("feddistill_plus", options=options, clients=MLP)
        return parts(settings, tiny_data())

    return build


@pytest.fixture
def received(made, told):
    """What clients are told in round 2, after these uploads in round 1."""

    def build(answers=None, **options):
        strategy, server = made(**options)
        first = strategy.federation.round(1)
        state = strategy.aggregate(strategy.begin(server), answers or uploads(), first, server)
        return told(strategy, state, first.next())

    return build


# -- the server's means ------------------------------------------------------------------------


def test_logits_of_a_class_are_averaged_over_its_holders(received):
    # Published fault: a client without a class uploads a row of zeros, which is averaged in.
    tell = received()
    assert tell(0)[TABLE].values.tolist() == [[3, 0, -1], [-1, 2, 1], [0, 1, 3]]
    assert tell(0)[MODEL].arrays["w"].tolist() == [3.0]
    assert tell(0) is tell(1) is tell(3)


def test_a_client_can_be_left_out_of_its_own_lesson(received):
    tell = received(leave_one_out=True)
    assert tell(0)[TABLE].values.tolist() == [[4, 1, -2], [-1, 2, 1], [0, 0, 0]]
    assert tell(1)[TABLE].values.tolist() == [[2, -1, 0], [0, 0, 0], [0, 1, 3]]
    # Who sent nothing has nothing to be left out.
    assert tell(2)[TABLE].values.tolist() == [[3, 0, -1], [-1, 2, 1], [0, 1, 3]]
    assert tell(0)[MODEL].arrays["w"].tolist() == [3.0]


def test_a_class_without_a_holder_has_no_mean(received):
    tell = received([Upload(0, sent(1.0, ONE), 10)])
    assert tell(0)[TABLE].held.tolist() == [True, False, True]
    alone = received([Upload(0, sent(1.0, ONE), 10)], leave_one_out=True)
    assert not alone(0)[TABLE].held.any()


def test_a_round_is_not_added_to_the_one_before(made, told):
    # Published fault: the tracker of logits is never reset, so early models are never forgotten.
    strategy, server = made()
    first, second = (strategy.federation.round(number) for number in (1, 2))
    state = strategy.aggregate(strategy.begin(server), uploads(), first, server)
    state = strategy.aggregate(state, [Upload(1, sent(4.0, OTHER), 20)], second, server)
    assert told(strategy, state, second.next())(0)[TABLE].values.tolist() == OTHER
    assert strategy.aggregate(state, [], second.next(), server) is state


# -- clients -----------------------------------------------------------------------------------


def test_the_lesson_is_the_softmax_of_a_classs_mean_logits_by_hand(made):
    strategy, _ = made()
    table = ClassTable(
        values=np.array([[np.log(6), np.log(3), 0], [0] * 3, [0] * 3]), scale="logits"
    )
    targets = targets_of(table)
    assert targets[0] == pytest.approx([0.6, 0.3, 0.1])
    assert not targets[1:].any()
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
    batch = Batch(labels=torch.tensor([0, 1]), tables={TAUGHT: torch.as_tensor(targets)})
    losses = strategy._learn(Outputs(private=logits), batch, weight=0.5)
    # -sum p log softmax(1, 0, -1): .6 x .40760596 + .3 x 1.40760596 + .1 x 2.40760596 = .90760596;
    # the second row's class has no mean.
    assert losses["kd"].mean().item() == pytest.approx(0.5 * 0.90760596 / 2, rel=1e-6)
    losses["kd"].mean().backward()
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_clients_send_the_mean_logits_of_the_rows_of_a_class(
    tiny_settings, tiny_data, simulate, listening_grid
):
    # Published fault: counts of rows begin at 1, so that the mean of a class with a single row is
    # half of its logits.
    data = tiny_data(rows=(12, 13, 9, 2))
    options = {"collect": "evaluation"}
    settings = tiny_settings("feddistill_plus", options=options, clients=MLP, rounds=1)
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    assert run.events == []
    answer = read_reply(grid.replies["train"][0][3].content).payload
    labels = data.train_labels[data.client_rows[3]]
    assert answer[TABLE].held.tolist() == [label in labels for label in range(3)]
    module = build_model(settings.model_of(3), input_shape=(1, 8, 8), num_classes=3, seed=0)
    module.load_state_dict({n: torch.as_tensor(a) for n, a in answer[MODEL].arrays.items()})
    with torch.no_grad():
        logits = module.eval()(torch.as_tensor(data.train_inputs[data.client_rows[3]])).numpy()
    for label in np.unique(labels):
        mean = logits[labels == label].mean(0)
        assert answer[TABLE].values[label] == pytest.approx(mean, abs=1e-5)


# -- runs --------------------------------------------------------------------------------------


def test_without_weight_it_is_fedavg(tiny_settings, tiny_data, simulate):
    fedavg = simulate(tiny_settings("fedavg"), tiny_data()).digest
    options = {"kd_weight": 0.0}
    alone = simulate(tiny_settings("feddistill_plus", options=options), tiny_data())
    assert alone.digest == fedavg
    taught = simulate(tiny_settings("feddistill_plus"), tiny_data())
    assert taught.digest != fedavg
    rows = {(row["round"], row["direction"]): row["bytes"] for row in taught.exchange}
    assert rows[2, "down"] == rows[1, "down"] + 9 * 4 == rows[2, "up"]
