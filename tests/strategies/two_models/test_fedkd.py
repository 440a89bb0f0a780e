"""FedKD: what a mentor and a mentee learn from each other, and how updates of the mentee travel."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import LowRank
from fedkd.objectives import Parts
from fedkd.training import Batch, Outputs, WholeStep
from strategies.contract import Upload
from strategies.two_models.fedkd import MENTEE, MENTOR, FedKDSettings, adaptive, mutual

# The mentor says t, the mentee s.
S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
H_T = [[1.0, 0, 2], [0, 1, 1]]
H_S = [[1.0, 1], [0, 2]]
W = [[1.0, 0, 1], [0, 1, 0]]
LABELS = torch.tensor([2, 0])
DENOMINATOR = 2.83452613
KL_TO_MENTOR, KL_TO_MENTEE = 0.18976181, 0.12034999
"""KL(s || t), which the mentor minimises, and KL(t || s)."""
ALIKE = {
    "clients": {"models": [{"name": "mlp", "options": {"hidden": [8]}}], "batch_size": 6},
    "options": {"mentee": {"name": "mlp", "options": {"hidden": [12]}}},
}


def golden(**options):
    leaves = [
        torch.tensor(each, dtype=torch.float64).requires_grad_() for each in (T, S, H_T, H_S, W)
    ]
    mentor, mentee, deep_mentor, deep_mentee, projection = leaves
    outputs = {
        MENTOR: Outputs(private=mentor, features={"penultimate": deep_mentor}),
        MENTEE: Outputs(private=mentee, features={"penultimate": deep_mentee}),
    }
    parts = Parts(lambda name, features: features @ projection)
    return mutual(outputs, Batch(labels=LABELS, parts=parts), **options), leaves


def value(loss):
    return loss.value if isinstance(loss, WholeStep) else loss.mean()


# -- the losses --------------------------------------------------------------------------------


def test_both_losses_are_those_computed_by_hand():
    losses, _ = golden()
    assert {name: value(loss).item() for name, loss in losses.items()} == pytest.approx(
        {
            "ce": 1.69325649,
            "mentee/ce": 1.14126964,
            "kd": KL_TO_MENTOR / DENOMINATOR,
            "mentee/kd": KL_TO_MENTEE / DENOMINATOR,
            "hidden": 0.66666667 / DENOMINATOR,
            "mentee/hidden": 0.66666667 / DENOMINATOR,
        },
        abs=1e-8,
    )
    mentor = sum(value(loss) for name, loss in losses.items() if "/" not in name)
    mentee = sum(value(loss) for name, loss in losses.items() if "/" in name)
    assert mentor.item() == pytest.approx(1.99539817, abs=1e-8)
    assert mentee.item() == pytest.approx(1.41892334, abs=1e-8)


def test_what_divides_rewards_nobody_for_a_larger_cross_entropy():
    """Published fault: gradients flow through 1 / (CE_t + CE_s), and reward a larger CE."""
    losses, (mentor, mentee, *_) = golden()
    (own,) = torch.autograd.grad(value(losses["kd"]), mentor, retain_graph=True)
    # The gradient of KL(s || t) alone, (softmax(t) - softmax(s)) / rows, divided by a constant.
    alone = (mentor.softmax(-1) - mentee.softmax(-1)) / 2
    torch.testing.assert_close(own, alone / DENOMINATOR, atol=1e-8, rtol=1e-6)
    assert torch.autograd.grad(value(losses["kd"]), mentee, allow_unused=True) == (None,)

    as_published, (mentor, mentee, *_) = golden(detach_denominator=False)
    assert value(as_published["kd"]).item() == pytest.approx(value(losses["kd"]).item())
    (its,) = torch.autograd.grad(value(as_published["kd"]), mentor, retain_graph=True)
    hot = torch.nn.functional.one_hot(LABELS, 4)
    of_ce = (mentor.softmax(-1) - hot) / 2
    reward = -KL_TO_MENTOR / DENOMINATOR**2 * of_ce
    torch.testing.assert_close(its, alone / DENOMINATOR + reward, atol=1e-7, rtol=1e-6)


def test_each_model_learns_from_a_constant_and_the_projection_with_the_mentee():
    losses, (mentor, mentee, deep_mentor, deep_mentee, projection) = golden()
    own = value(losses["hidden"])
    others = torch.autograd.grad(
        own, [deep_mentee, projection, mentee], allow_unused=True, retain_graph=True
    )
    assert others == (None, None, None)
    assert torch.autograd.grad(own, deep_mentor, retain_graph=True)[0].abs().sum() > 0
    its = value(losses["mentee/hidden"])
    moved = torch.autograd.grad(its, [deep_mentee, projection], retain_graph=True)
    assert all(each.abs().sum() > 0 for each in moved)
    assert torch.autograd.grad(its, [deep_mentor, mentor], allow_unused=True) == (None, None)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("off", [MENTOR, MENTEE])
def test_who_does_not_learn_from_the_other_learns_from_labels_alone(off, detach):
    on = MENTEE if off == MENTOR else MENTOR
    losses, leaves = golden(learners=[on], detach_denominator=detach)
    logits, features = (leaves[0], leaves[2]) if off == MENTOR else (leaves[1], leaves[3])
    total = sum(value(loss) for loss in losses.values())
    gradient, deep = torch.autograd.grad(total, [logits, features], allow_unused=True)
    hot = torch.nn.functional.one_hot(LABELS, 4)
    torch.testing.assert_close(gradient, (logits.softmax(-1) - hot) / 2)
    assert deep is None
    # The projection learns either way: the mentor could not learn from one that nobody fits.
    losses, leaves = golden(learners=[on])
    total = sum(value(loss) for loss in losses.values())
    assert torch.autograd.grad(total, leaves[4])[0].abs().sum() > 0


# -- thresholds and rounds -----------------------------------------------------------------------


def test_the_threshold_rises_over_the_run():
    energy = FedKDSettings().energy
    assert [energy.at(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([0.95, 0.965, 0.98])


@pytest.mark.parametrize("energy", [1.5, {"kind": "linear", "start": -0.1, "end": 0.5}])
def test_a_threshold_is_a_share(energy):
    with pytest.raises(ValueError, match="must be >= 0 and <= 1"):
        FedKDSettings(energy=energy)


def weights_of(states):
    return [state.models[MENTEE].weights for state in states]


@pytest.mark.parametrize("energy", [0.5, 1.0])
def test_mentees_of_clients_and_server_stay_equal_to_the_bit(
    energy, tiny_settings, tiny_data, simulate
):
    options = {**ALIKE["options"], "energy": energy}
    settings = tiny_settings("fedkd", clients=ALIKE["clients"], rounds=4, options=options)
    run = simulate(settings, tiny_data())
    kinds = {row["kind"] for row in run.exchange}
    assert kinds == {"low_rank"}
    # Everybody has trained in every round and holds the mentee that the last round began with.
    first, *others = weights_of(run.states)
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first)
    assert {int(state.arrays[MENTEE]) for state in run.states} == {4}
    whole, news = (
        {row["bytes"] for row in run.exchange if row["direction"] == "down" and row["round"] == at}
        for at in (1, 4)
    )
    assert (max(news) < min(whole)) == (energy < 1)


def test_at_full_energy_the_mean_mentee_is_the_mean_of_the_mentees(home):
    strategy, server = home(energy=1.0, weighting="equal")
    state = strategy.begin(server)
    before = state.model.weights
    rng = np.random.default_rng(0)
    after = [
        {
            name: (array + rng.normal(size=array.shape)).astype(array.dtype)
            for name, array in before.items()
        }
        for _ in range(2)
    ]
    uploads = [
        Upload(client, LowRank.between(before, own, energy=1.0, base=1), 10)
        for client, own in enumerate(after)
    ]
    assert all(
        upload.payload.problem(strategy.asks(state, 0, strategy.federation.round(1), server))
        is None
        for upload in uploads
    )
    new = strategy.aggregate(state, uploads, strategy.federation.round(1), server)
    for name, array in new.model.weights.items():
        np.testing.assert_allclose(array, (after[0][name] + after[1][name]) / 2, atol=1e-6)
    assert not new.news.ranks()


@pytest.fixture
def home(parts, tiny_settings, tiny_data):
    def build(**options):
        chosen = {**ALIKE["options"], **options}
        settings = tiny_settings("fedkd", clients=ALIKE["clients"], options=chosen)
        return parts(settings, tiny_data())

    return build


def changed(state, base=None):
    after = {name: array + array.dtype.type(0.5) for name, array in state.model.weights.items()}
    return LowRank.between(state.model.weights, after, energy=0.9, base=base or state.number)


def test_who_missed_a_mentee_gets_all_of_it_and_who_has_it_nothing(home):
    strategy, server = home()
    first = strategy.begin(server)
    round = strategy.federation.round(1)

    def received(state):
        return [strategy.receives(state, client, round) for client in range(3)]

    assert received(first) == [MENTEE] * 3
    second = strategy.aggregate(first, [Upload(0, changed(first), 10)], round, server)
    assert [strategy.receives(second, client, round) for client in range(3)] == [
        "news",
        MENTEE,
        MENTEE,
    ]
    third = strategy.aggregate(second, [Upload(1, changed(second), 10)], round, server)
    assert [strategy.receives(third, client, round) for client in range(3)] == [
        MENTEE,
        "news",
        MENTEE,
    ]
    # Whoever has the whole has the bits of who had the news.
    news = third.news.added_to(second.model.weights)
    whole = strategy.payload(third, MENTEE).added_to({})
    assert all(np.array_equal(news[name], whole[name]) for name in whole)
    assert third.news.payload_bytes < strategy.payload(third, MENTEE).payload_bytes
    # Client 1 answered with the third mentee; a round without an answer keeps it as it is.
    assert strategy.aggregate(third, [], round, server) is third
    ahead = replace(third, held={**third.held, 1: third.number})
    assert strategy.receives(ahead, 1, round) is None


def test_an_update_of_another_mentee_is_refused(home):
    strategy, server = home()
    state = strategy.aggregate(
        strategy.begin(server),
        [Upload(0, changed(strategy.begin(server)), 10)],
        strategy.federation.round(1),
        server,
    )
    asked = strategy.asks(state, 0, strategy.federation.round(1), server)
    assert changed(state).problem(asked) is None
    assert changed(state, base=1).problem(asked) == "an update of weights 1, expected of 2"


@pytest.mark.parametrize("known", [None, 1, 2, 3])
def test_news_are_added_once_and_only_to_what_they_are_of(known, home, tiny_settings, tiny_data):
    from sim.engine.runtime import ClientRuntime
    from sim.wire.messages import CohortCall
    from strategies.contract import Call, Received

    settings = tiny_settings(
        "fedkd", clients={**ALIKE["clients"], "local": {"epochs": 0}}, options=ALIKE["options"]
    )
    strategy, server = home()
    first = strategy.begin(server)
    second = strategy.aggregate(
        first, [Upload(0, changed(first), 10)], strategy.federation.round(1), server
    )
    runtime = ClientRuntime(settings, tiny_data())
    cohort = runtime._cohort(CohortCall("train", 2, (0,), "loop"), [None])
    own = (second if known == 2 else first).model.weights
    cohort.load_weights(own, model=MENTEE)
    if known is not None:
        cohort.keep(MENTEE, [np.array(known)])
    received = Received([second.news])
    (sent,) = runtime._strategy.client(cohort, received, Call(runtime._federation, 2))
    has = cohort.weights(model=MENTEE)[0]
    is_second = all(np.array_equal(has[name], second.model.weights[name]) for name in has)
    assert is_second == (known in (1, 2))
    # A client that lost its state answers with an update of nothing, which is refused.
    assert sent.base == {None: 0, 1: 2, 2: 2, 3: 3}[known]
    asked = strategy.asks(second, 0, strategy.federation.round(1), server)
    assert (sent.problem(asked) is None) == (known in (1, 2))


def test_a_loop_and_a_stack_learn_alike(tiny_settings, tiny_data, simulate):
    loop, stack = (
        simulate(
            tiny_settings(
                "fedkd",
                rounds=3,
                engine={"backend": "inline", "vectorize": how},
                **ALIKE,
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        mine, others = one.to_arrays(), other.to_arrays()
        assert mine.keys() == others.keys()
        assert any("projection" in name for name in mine)
        for name, array in mine.items():
            np.testing.assert_allclose(array, others[name], atol=1e-5)


def test_models_without_features_are_refused_where_features_are_compared(home, monkeypatch):
    import strategies.shared.features as features

    strategy, _ = home()
    monkeypatch.setattr(features, "layer_shapes", lambda *_: {})
    with pytest.raises(ValueError, match=r"clients\.models: mlp.* has no linear layer"):
        strategy.check((1, 8, 8))
    home(hidden_weight=0)[0].check((1, 8, 8))


def test_what_divides_may_be_zero():
    # Where both models know every row by heart the sum of their cross-entropies rounds to 0.
    whole = adaptive(torch.tensor([0.0, 1e-9]), torch.zeros(()), detach_denominator=True)
    assert torch.isfinite(whole.value)
