"""A byte budget is never exceeded, and greedy never expects a larger error than uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.budget import (
    BITS,
    EXACT,
    LADDER,
    NOTHING,
    Allotted,
    BudgetError,
    Demand,
    Form,
    Levels,
    Plan,
    allocated,
    bytes_of,
    example_of,
    expected_error,
    smallest_budget,
)
from fedkd.exchange.payloads import (
    Bundle,
    ClassTable,
    LowRank,
    Numbers,
    Predictions,
    Prototypes,
    Weights,
)
from fedkd.exchange.pipeline import ClientTurn, ExchangeState, ServerTurn, Stages, Standing

ASKED = Predictions.asked(np.arange(50), 10, scale="probabilities")
SOFT = Form.of(example_of(ASKED), ASKED)
LOGITS_ASKED = Predictions.asked(np.arange(50), 10)
LOGITS = Form.of(example_of(LOGITS_ASKED), LOGITS_ASKED)


def test_a_form_knows_the_exact_bytes_of_each_level():
    # 50 rows of 10 classes: 4 bits name a class; b bits each; 4 + 10 bytes a row; 2 and 4 bytes.
    assert SOFT.sizes == (25, *(-(-50 * 10 * bits // 8) for bits in range(2, 9)), 700, 1000, 2000)
    assert [BITS[level] for level in SOFT.levels] == [*range(1, 9), 8, 16, 32]
    assert LOGITS.sizes == (50 * 14, 1000, 2000)
    assert [LADDER[level].kind for level in LOGITS.levels] == ["int8", "float16", "float32"]
    for form in (SOFT, LOGITS):
        assert list(form.errors) == sorted(form.errors, reverse=True)
        assert form.errors[-1] == 0


@pytest.mark.parametrize(
    "asked",
    [
        ASKED,
        Predictions.asked(np.arange(9), 3, ids="subset", weighted=True),
        Weights.asked({"w": np.ones((3, 4), np.float32), "n": np.array(2)}),
        ClassTable.asked(4, counts=True),
        Bundle.asked(a=ASKED, b=Numbers.asked(2)),
    ],
)
def test_an_example_is_a_good_answer_as_large_as_it_can_be(asked):
    example = example_of(asked)
    assert example.problem(asked) is None
    assert Form.of(example, asked).sizes[-1] == example.payload_bytes


def test_what_has_no_size_before_the_run_is_named():
    with pytest.raises(BudgetError, match="the size of prototypes is not known before a run"):
        example_of(Prototypes.asked(3, 4))
    like = {"w": np.ones((3, 4), np.float32)}
    assert Form.of(LowRank.itself(like, made=1)).levels == (EXACT,)


# -- allocation ----------------------------------------------------------------------------------

TWO = Form((0, 1, EXACT), (10, 30, 100), (0.5, 0.1, 0.0))


def test_greedy_takes_what_helps_most_for_a_byte_as_worked_out_by_hand():
    # The first step saves .4 for 20 bytes, the second .1 for 70; of weight 3 the latter is worth
    # .3 / 70 = .0043, still below .4 / 20 = .02 of weight 1.
    demands = [Demand(TWO, 3.0, 1), Demand(TWO, 1.0, 2)]
    assert smallest_budget(demands) == 30
    assert allocated(demands, 30, "greedy") == [Allotted(0), Allotted(0)]
    assert allocated(demands, 50, "greedy") == [Allotted(1), Allotted(0)]
    assert allocated(demands, 89, "greedy") == [Allotted(1), Allotted(0, 1)]
    assert allocated(demands, 90, "greedy") == [Allotted(1), Allotted(1)]
    assert allocated(demands, 160, "greedy") == [Allotted(2), Allotted(1)]
    assert allocated(demands, 160, "uniform") == [Allotted(1), Allotted(1)]
    with pytest.raises(BudgetError, match="30 bytes are the least, got 29"):
        allocated(demands, 29, "greedy")


def form(seed: int) -> Form:
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 6)
    levels, sizes = rng.permutation(len(LADDER))[:steps], rng.permutation(np.arange(1, 400))[:steps]
    errors = rng.uniform(0, 2, steps) ** rng.integers(1, 6)
    return Form(
        tuple(sorted(map(int, levels))),
        tuple(sorted(map(int, sizes))),
        tuple(sorted(map(float, errors), reverse=True)),
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 999), st.floats(0, 10), st.integers(1, 30)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 5000),
)
def test_no_allocation_exceeds_its_budget_and_greedy_is_never_worse(drawn, more):
    demands = [Demand(form(seed), weight, number) for seed, weight, number in drawn]
    budget = smallest_budget(demands) + more
    uniform, greedy = (allocated(demands, budget, rule) for rule in ("uniform", "greedy"))
    for steps in (uniform, greedy):
        assert bytes_of(demands, steps) <= budget
    assert expected_error(demands, greedy) <= expected_error(demands, uniform)
    assert greedy == allocated(demands, budget, "greedy")


def test_a_larger_budget_is_used():
    demands = [Demand(SOFT, 0.01, 40), Demand(SOFT, 0.1, 40)]
    errors = [
        expected_error(demands, allocated(demands, budget, "greedy"))
        for budget in (2000, 5000, 20000, 160000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


# -- over a whole run ----------------------------------------------------------------------------


def plan(budget, *, rounds=6, rule="greedy", clients=5, drawn=3):
    rng = np.random.default_rng(1)
    participants = [sorted(map(int, rng.permutation(clients)[:drawn])) for _ in range(rounds)]
    return Plan(
        budget=budget,
        rule=rule,
        participants=participants,
        up=dict.fromkeys(range(clients), SOFT),
        down=dict.fromkeys(range(clients), SOFT),
        weights={client: (client + 1) / 15 for client in range(clients)},
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60_000), st.sampled_from(["greedy", "uniform"]), st.data())
def test_a_run_never_spends_more_whatever_gets_lost_or_is_asked_again(more, rule, data):
    least = plan(0).smallest
    assert least == 6 * 3 * 2 * 25
    planned = plan(least + more, rule=rule)
    spent = 0
    for number, clients in enumerate(planned.participants, 1):
        purse = planned.purse(number, clients, spent)
        first = dict(purse.shares)
        answered = data.draw(st.sets(st.sampled_from(clients)))
        for client in clients:
            spent += first[client].down_bytes + first[client].up_bytes * (client in answered)
        for client in purse.again([client for client in clients if client not in answered]):
            spent += purse.shares[client].down_bytes + purse.shares[client].up_bytes
        assert spent <= planned.budget


def test_what_is_left_over_goes_to_the_rounds_that_are_left():
    planned = plan(20_000)
    clients = planned.participants[4]
    poor, rich = (planned.purse(5, clients, spent).shares for spent in (19_000, 1000))
    assert all(rich[client].up_bytes > poor[client].up_bytes for client in clients)
    # Who counts more in the mean has no fewer bits.
    ups = [rich[client].up_bytes for client in clients]
    assert ups == sorted(ups)


def test_a_plan_goes_on_alike_wherever_it_is_taken_up():
    whole, resumed = plan(15_000), plan(15_000)
    for number, clients in enumerate(whole.participants[:4], 1):
        shares = whole.purse(number, clients, 100 * number).shares
    assert resumed.purse(4, resumed.participants[3], 400).shares == shares


def test_a_budget_that_cannot_be_kept_is_refused_with_the_smallest_that_can():
    with pytest.raises(BudgetError, match=r"exchange.budget_kb must be at least 0.9 .* got 0.5"):
        plan(500).check()
    plan(900).check()


# -- in the pipeline -----------------------------------------------------------------------------


def turns(share):
    return ServerTurn(Stages(), ExchangeState(), seed=0, round=1, shares={2: share})


def test_both_sides_use_the_levels_that_the_server_chose():
    planned = plan(25 * 36 + 3000)
    share = planned.purse(6, [2], planned.budget - 700).shares[2]
    server = turns(share)
    mean = example_of(ASKED)
    sent = server.send(2, "mean", lambda _: mean, asked=ASKED)
    assert sent.payload.payload_bytes <= share.down_bytes
    standing = Standing(levels=sent.levels)
    client = ClientTurn(Stages(), seed=0, round=1, attempt=1, clients={2: standing})
    opened = client.open({2: sent.payload})[2]
    bits = BITS[sent.levels.down]
    assert 1 < bits < 32
    assert np.abs(opened.values - mean.values).max() <= 1 / (2**bits - 1)
    answer = client.send({2: mean})[2]
    assert answer.payload_bytes == share.up_bytes
    received = server.receive(2, answer, ASKED)
    assert np.abs(received.values - mean.values).max() <= 1 / (2 ** BITS[sent.levels.up] - 1)


def test_orders_beside_it_leave_less_for_a_payload():
    planned = plan(25 * 36 + 3000)
    share = planned.purse(6, [2], planned.budget - 1400).shares[2]
    mean = example_of(ASKED)
    whole = turns(share).send(2, "mean", lambda _: mean, asked=ASKED)
    less = turns(share).send(2, "mean", lambda _: mean, asked=ASKED, beside=1)
    assert less.levels.down < whole.levels.down
    with pytest.raises(BudgetError, match=r"needs 25 bytes, and \d+ are left"):
        turns(share).send(2, "mean", lambda _: mean, asked=ASKED, beside=share.down_bytes - 3)
    with pytest.raises(BudgetError, match="orders for a client have 3 bytes more"):
        turns(share).send(2, None, lambda _: mean, asked=ASKED, beside=share.down_bytes + 3)


def test_what_no_codec_takes_stays_at_home():
    """Numbers that are none would travel in full and take what others are to have."""
    standing = Standing(levels=Levels(EXACT, 0, 25))
    client = ClientTurn(Stages(), seed=0, round=1, attempt=1, clients={2: standing})
    broken = Predictions(
        rows=np.arange(50), values=np.full((50, 10), np.nan, np.float32), scale="probabilities"
    )
    assert client.send({2: broken}) == {2: None}


def test_nothing_costs_nothing():
    assert NOTHING.sizes == (0,)
    demands = [Demand(NOTHING, 1.0, 5)]
    assert allocated(demands, 0, "greedy") == [Allotted(0)]
