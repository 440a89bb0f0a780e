"""Adversaries: whom they control, and what they send instead."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedkd.exchange.adversaries import (
    ADVERSARIES,
    CPA,
    FDLA,
    HIPS,
    LMA,
    FreeRider,
    Scaled,
    Seen,
    Shuffled,
    SignFlip,
)
from fedkd.exchange.adversaries.own_answers import reversed_ranks
from fedkd.exchange.adversaries.scores import Crowd, Scores, one_hot, scores_in
from fedkd.exchange.adversaries.sign_flip import second_class
from fedkd.exchange.adversaries.together import class_covariance, least_similar
from fedkd.exchange.payloads import (
    Bundle,
    ClassTable,
    Numbers,
    Predictions,
    Prototypes,
    RowFeatures,
    Weights,
)
from fedkd.exchange.values import digest

ROWS = np.arange(3)
NONE = {"fraction": 0.2}

# algorithm-facts.md, Cronus: the four honest clients of the example, whose mean is this.
HONEST = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1], [0.5, 0.3, 0.2]])
MEAN = np.array([[0.6125, 0.2625, 0.125]])


def rng(seed=0):
    return np.random.default_rng(seed)


def soft(values, rows=None, **more):
    table = np.asarray(values, np.float32)
    rows = np.arange(len(table)) if rows is None else np.asarray(rows)
    return Predictions(rows=rows, values=table, scale="probabilities", **more)


def logits(values, rows=None, **more):
    table = np.asarray(values, np.float32)
    rows = np.arange(len(table)) if rows is None else np.asarray(rows)
    return Predictions(rows=rows, values=table, **more)


def lie_of(adversary, own, others=(), *, received=None, seed=0):
    """What one client sends, beside honest ones that sent these."""
    seen = Seen(
        round=1,
        own={9: own},
        others=dict(enumerate(others)),
        received={} if received is None else {9: received},
    )
    (lie,) = adversary.replaces(seen, rng(seed)).values()
    return lie


# -- whom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "clients", "count"), [(0.29, 100, 29), (0.2, 10, 2), (0.4, 4, 1), (0.9, 1, 0)]
)
def test_a_share_is_rounded_down_to_whole_clients(fraction, clients, count):
    # 0.29 * 100 is 28.999999999999996.
    assert len(LMA(fraction=fraction).controlled(clients, seed=3)) == count


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 2**32 - 1))
def test_fewer_are_among_more_and_somebody_is_honest(clients, one, other, seed):
    low, high = sorted((one, other))
    fewer = LMA(fraction=low).controlled(clients, seed=seed)
    more = FDLA(fraction=high).controlled(clients, seed=seed)
    assert fewer <= more < frozenset(range(clients))


def test_the_seed_draws_them_and_nothing_else_does():
    drawn = {LMA(fraction=0.3).controlled(20, seed=seed) for seed in range(5)}
    assert len(drawn) == 5
    assert LMA(fraction=0.3, from_round=7).controlled(20, seed=1) in drawn
    assert FDLA(clients=(4, 2)).controlled(20, seed=1) == {2, 4}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "either fraction .* or clients .* got neither"),
        ({"fraction": 0.2, "clients": [1]}, "got both"),
        ({"clients": [1, 1]}, "names a client twice"),
        ({"fraction": 1.0}, "less than 1"),
    ],
)
def test_it_has_to_say_whom(given, told):
    with pytest.raises(ValidationError, match=told):
        LMA(**given)


def test_clients_that_there_are_not_and_nobody_honest_are_refused():
    with pytest.raises(ValueError, match=r"below clients.count \(4\), got 4"):
        LMA(clients=(1, 4)).check_clients(4)
    with pytest.raises(ValueError, match="leave an honest client, got all 2"):
        LMA(clients=(0, 1)).check_clients(2)
    LMA(clients=(0, 1)).check_clients(3)


def test_it_lies_from_a_round_on():
    assert [LMA(**NONE, from_round=3).lies_in(round) for round in (1, 2, 3, 4)] == [0, 0, 1, 1]


# -- golden values -------------------------------------------------------------------------------


def test_golden_values_of_the_honest_mean():
    others = [soft([row]) for row in HONEST]
    own = soft([[0.2, 0.3, 0.5]])
    assert Crowd.of(next(scores_in(each)) for each in others).mean == pytest.approx(MEAN)
    assert lie_of(LMA(**NONE), own, others).values.tolist() == [[0, 0, 1]]
    adversarial = SignFlip(**NONE, mode="adversarial")
    assert lie_of(adversarial, own, others).values.tolist() == [[0, 1, 0]]


def test_class_prior_chooses_what_varies_least_with_the_likeliest_class():
    # Classes 0 and 2 rise together, class 1 falls while class 0 rises, 3 hardly moves:
    # centred by (.4, .3, .2, .1): rows (+.2, -.2, +.1, -.1), (-.2, +.2, -.1, +.1).
    mean = np.array([[0.6, 0.1, 0.3, 0.0], [0.2, 0.5, 0.1, 0.2]])
    expected = [
        [0.04, -0.04, 0.02, -0.02],
        [-0.04, 0.04, -0.02, 0.02],
        [0.02, -0.02, 0.01, -0.01],
        [-0.02, 0.02, -0.01, 0.01],
    ]
    np.testing.assert_allclose(class_covariance(mean), expected, atol=1e-12)
    assert least_similar(mean).tolist() == [1, 0, 1, 0]
    lie = lie_of(CPA(**NONE), soft(np.full((2, 4), 0.25)), [soft(mean)])
    assert lie.values.argmax(1).tolist() == [1, 0]
    # Of a lone row nothing varies: any class but the likeliest.
    assert CPA(**NONE).chosen(mean[:1]).tolist() == [1]


def test_hips_sends_what_the_worst_honest_client_said():
    # Row 0: the mean believes in class 0; client 2 gives it least. Row 1: client 0 does.
    others = [
        soft([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]]),
        soft([[0.8, 0.1, 0.1], [0.9, 0.05, 0.05]]),
        soft([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1]]),
    ]
    own = soft([[0.3, 0.4, 0.3], [0.3, 0.4, 0.3]])
    lie = lie_of(HIPS(**NONE), own, others)
    np.testing.assert_array_equal(lie.values, np.float32([[0.1, 0.2, 0.7], [0.1, 0.5, 0.4]]))


def test_hips_weighs_the_mean_by_who_is_honest():
    # Shares .1, .4, .8 of the first class, mean h = .4333; a = 1/4. The mean would become
    # (.35, .65), (.425, .575), (.525, .475), with cross-entropies .6990, .6844, .7011: the third.
    # With the weights exchanged, (.1833, .8167) has .8499 and (.7083, .2917) has .8476: the first.
    crowd = Crowd.of(next(scores_in(soft([[first, 1 - first]]))) for first in (0.1, 0.4, 0.8))
    assert HIPS(**NONE).worst(crowd, 0.25).tolist() == [2]
    assert HIPS(**NONE).worst(crowd, 0.75).tolist() == [0]


def test_hips_by_class_prior_prefers_what_is_least_similar():
    mean_rows = np.array([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])
    other = np.array([[0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
    lie = lie_of(HIPS(**NONE, mode="cpa"), soft(mean_rows), [soft(mean_rows), soft(other)])
    # Of the mean (.35, .1, .55), (.25, .55, .2): S ~ d d^T of d = (.05, -.225, .175). Row 0 is of
    # class 2: S[2] ~ (.05, -.225, .175): .06 and .1225, so the first; row 1 is of class 1:
    # S[1] ~ -(.05, -.225, .175): .05 and .1025, so the first.
    np.testing.assert_array_equal(lie.values, np.float32(mean_rows))


def test_confidences_go_to_the_classes_in_the_reverse_order():
    table = np.array([[0.5, 0.1, 0.3, 0.1], [1.0, 2.0, 3.0, 0.0]])
    assert reversed_ranks(table).tolist() == [[0.1, 0.3, 0.1, 0.5], [2.0, 1.0, 0.0, 3.0]]
    assert lie_of(FDLA(**NONE), logits(table)).values[1].tolist() == [2, 1, 0, 3]


def test_the_second_class_is_the_next_one_where_classes_are_equal():
    assert second_class(np.array([[0.4, 0.2, 0.4], [0.2, 0.4, 0.4]])).tolist() == [2, 2]
    assert second_class(np.array([[1.0]])).tolist() == [0]


# -- alone ---------------------------------------------------------------------------------------


def test_naive_and_fixed_flips():
    own = soft(np.full((400, 4), 0.25))
    fixed = lie_of(SignFlip(**NONE, mode="fixed"), own)
    assert (fixed.values == [1, 0, 0, 0]).all()
    naive = lie_of(SignFlip(**NONE), own)
    counts = np.bincount(naive.values.argmax(1), minlength=4)
    assert counts.sum() == 400
    assert counts.min() > 60
    assert (naive.values.sum(1) == 1).all()


def test_a_one_hot_answer_in_logits_has_the_size_of_an_honest_one():
    honest = np.array([[2.0, -3.0, 0.5], [1.0, 1.0, 4.0]])
    lie = one_hot(honest, np.array([1, 0]), "logits")
    assert lie.tolist() == [[-3, 2, -3], [4, 1, 1]]


def test_scaled_soft_labels_are_those_of_scaled_logits():
    own = soft([[0.5, 0.25, 0.25]])
    # Squared: 4 : 1 : 1. Turned round: 1 : 2 : 2.
    assert lie_of(Scaled(**NONE, factor=2), own).values[0] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert lie_of(Scaled(**NONE, factor=-1), own).values[0] == pytest.approx([0.2, 0.4, 0.4])
    assert lie_of(Scaled(**NONE, factor=-2), logits([[1, 2]])).values.tolist() == [[-2, -4]]


def test_of_weights_only_what_may_be_negative_is_scaled():
    arrays = {
        "a": np.float32([1, 2]),
        "bn.running_var": np.float32([3]),
        "bn.num_batches_tracked": np.array(4),
        "mask": np.float32([-np.inf, 0]),
        "whole": np.array([5]),
    }
    lie = lie_of(Scaled(**NONE, factor=-3), Weights(arrays=arrays))
    assert lie.arrays["a"].tolist() == [-3, -6]
    for name in ("bn.running_var", "bn.num_batches_tracked", "mask", "whole"):
        assert lie.arrays[name] is arrays[name]
    assert lie.problem(Weights.asked(arrays)) is None
    prototypes = Prototypes(classes=ROWS, values=np.ones((3, 2), np.float32), num_classes=3)
    both = Bundle(parts={"w": Weights(arrays=arrays), "p": prototypes, "n": Numbers.of(7.0)})
    parts = lie_of(Scaled(**NONE, factor=-3), both).parts
    assert parts["w"].arrays["a"].tolist() == [-3, -6]
    assert (parts["p"].values == -3).all()
    assert parts["n"].values.tolist() == [7]


@pytest.mark.parametrize("what", ["rows", "classes"])
def test_shuffled_rows_and_classes(what):
    values = np.arange(60).reshape(12, 5)
    lie = lie_of(Shuffled(**NONE, what=what), logits(values), seed=1).values
    again = lie_of(Shuffled(**NONE, what=what), logits(values), seed=2).values
    assert (lie != again).any()
    if what == "classes":
        lie, values = lie.T, values.T
    assert (lie != values).any()
    assert sorted(map(tuple, lie)) == sorted(map(tuple, values))


def test_class_tables_keep_saying_which_classes_are_held():
    values = np.float32([[0.8, 0.1, 0.1], [0, 0, 0], [0.1, 0.2, 0.7]])
    table = ClassTable(values=values)
    lie = lie_of(SignFlip(**NONE, mode="fixed"), table)
    assert lie.values.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    lma = lie_of(LMA(**NONE), table, [table, ClassTable(values=np.float32(np.eye(3)))])
    # Means (.9, .05, .05) and (.05, .1, .85); class 1 is not this client's.
    assert lma.values.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


# -- the free rider ------------------------------------------------------------------------------


def test_before_anything_came_a_free_rider_sends_uniform_scores_with_noise():
    assert (lie_of(FreeRider(**NONE, std=0), soft(np.eye(4))).values == 0.25).all()
    assert (lie_of(FreeRider(**NONE, std=0), logits(np.eye(4))).values == 0).all()
    noise = lie_of(FreeRider(**NONE, std=0.5), logits(np.eye(100))).values
    # 10,000 draws: the mean within 4 standard errors, the deviation within 4 / sqrt(2 n).
    assert abs(noise.mean()) < 4 * 0.5 / 100
    assert noise.std() == pytest.approx(0.5, rel=4 / np.sqrt(20_000))


def test_a_free_rider_sends_back_what_it_received():
    came = soft([[0.7, 0.3], [0.1, 0.9]], rows=[1, 3])
    own = soft([[0.5, 0.5]] * 3, rows=[0, 1, 3])
    lie = lie_of(FreeRider(**NONE, std=0), own, received=came).values
    np.testing.assert_allclose(lie, [[0.5, 0.5], [0.7, 0.3], [0.1, 0.9]], atol=1e-6)
    noisy = lie_of(FreeRider(**NONE, std=0.2), own, received=came)
    assert noisy.problem(Predictions.asked(own.rows, 2, scale="probabilities")) is None
    assert np.abs(noisy.values[1:] - came.values).max() > 0.01


def test_a_free_rider_speaks_the_scale_that_is_asked_for():
    came = replace(soft([[0.8, 0.2]]), temperature=2.0)
    lie = lie_of(FreeRider(**NONE, std=0), logits([[3, 1]]), received=came).values
    # At temperature 2 the logits of (.8, .2) are 2 ln 4 apart.
    assert lie[0, 0] - lie[0, 1] == pytest.approx(2 * np.log(4), rel=1e-5)
    back = lie_of(FreeRider(**NONE, std=0), soft([[0.5, 0.5]]), received=logits([[0, np.log(3)]]))
    assert back.values == pytest.approx(np.array([[0.25, 0.75]]))


def test_a_free_rider_answers_each_part_with_the_part_of_its_place():
    own = Bundle(parts={"a": logits([[1, 2]]), "b": logits([[3, 4]])})
    came = Bundle(parts={"b": logits([[5, 6]]), "a": logits([[7, 8]])})
    lie = lie_of(FreeRider(**NONE, std=0), own, received=came)
    assert [lie["a"].values.tolist(), lie["b"].values.tolist()] == [[[7, 8]], [[5, 6]]]


# -- together ------------------------------------------------------------------------------------


def test_of_rows_that_nobody_honest_sent_it_says_what_it_would():
    """As where clients send some of the rows that were planned."""
    own = soft([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]], rows=[0, 2, 5], ids="subset", planned=6)
    others = [
        soft([[0.8, 0.2], [0.7, 0.3]], rows=[0, 1], ids="subset", planned=6),
        soft([[0.1, 0.9]], rows=[0], ids="subset", planned=6),
        soft(np.zeros((0, 2)), rows=np.zeros(0, np.int64), ids="subset", planned=6),
    ]
    # Row 0: mean (.45, .55). Rows 2 and 5 nobody sent. Of 4 answers 1 is a lie, so the mean would
    # become (.5375, .4625), cross-entropy .7035, or (.3625, .6375), .7042.
    lie = lie_of(LMA(**NONE), own, others)
    np.testing.assert_array_equal(lie.values, np.float32([[1, 0], [0.9, 0.1], [0.3, 0.7]]))
    worst = lie_of(HIPS(**NONE), own, others)
    np.testing.assert_array_equal(worst.values[0], np.float32([0.1, 0.9]))
    assert digest(lie_of(LMA(**NONE), own)) == digest(own)


def test_who_did_not_send_a_row_has_no_say_in_it():
    apart = [soft([[0.8, 0.2], [0.7, 0.3]], rows=[0, 1]), soft([[0.1, 0.9]], rows=[1])]
    crowd = Crowd.of(next(scores_in(each)) for each in apart)
    np.testing.assert_allclose(crowd.mean, [[0.8, 0.2], [0.4, 0.6]], atol=1e-7)
    # Of nothing instead of row 0 the cross-entropy would be larger.
    assert HIPS(**NONE).worst(crowd, 0.3)[0] == 0
    assert HIPS(**NONE, mode="cpa").worst(crowd, 0.3)[0] == 0


def test_the_honest_mean_is_one_of_distributions_also_of_logits():
    # Logits (10, 0, 9) count as (.73, .00003, .27), not with their size.
    others = [logits([[10, 0, 9]]), logits([[0, 1, 0]]), logits([[0, 1, 0]])]
    # Mean logits would be (3.3, .67, 3), least: 1. Mean shares: (.38, .38, .23), least: 2.
    assert lie_of(LMA(**NONE), logits([[1, 2, 3]]), others).values.tolist() == [[1, 1, 3]]


# -- any honest answer ---------------------------------------------------------------------------

KINDS = [
    *(SignFlip(**NONE, mode=mode) for mode in ("naive", "fixed", "adversarial")),
    *(LMA(**NONE), CPA(**NONE), FDLA(**NONE), FreeRider(**NONE), Scaled(**NONE, factor=-5)),
    *(HIPS(**NONE, mode=mode) for mode in ("lma", "cpa")),
    *(Shuffled(**NONE, what=what) for what in ("rows", "classes")),
]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["logits", "probabilities"]),
    st.integers(1, 6),
    st.integers(2, 5),
    st.integers(0, 4),
    st.integers(0, 10**6),
)
def test_lies_pass_for_answers(adversary, scale, rows, classes, honest, seed):
    draw = rng(seed)
    made = soft if scale == "probabilities" else logits

    def answer():
        values = draw.normal(size=(rows, classes)) * draw.choice([0.1, 3, 30])
        if scale == "probabilities":
            values = draw.dirichlet(np.full(classes, draw.choice([0.05, 1])), rows)
        return made(values)

    own, others = answer(), [answer() for _ in range(honest)]
    before = [digest(each) for each in (own, *others)]
    lie = lie_of(adversary, own, others, received=draw.choice([None, answer()]), seed=seed)
    assert lie.problem(Predictions.asked(np.arange(rows), classes, scale=scale)) is None
    assert lie.payload_bytes == own.payload_bytes
    assert [digest(each) for each in (own, *others)] == before


# -- what gives it nothing to lie about ----------------------------------------------------------


@pytest.mark.parametrize(
    ("adversary", "kinds"),
    [
        (LMA(**NONE), {Predictions, ClassTable, Bundle}),
        (SignFlip(**NONE, mode="adversarial"), {Predictions, ClassTable, Bundle}),
        (SignFlip(**NONE), {Predictions, ClassTable, RowFeatures, Bundle}),
        (FreeRider(**NONE), {Predictions, ClassTable, Bundle}),
        (
            Scaled(**NONE),
            {Predictions, ClassTable, RowFeatures, Weights, Prototypes, Bundle},
        ),
    ],
)
def test_it_is_refused_where_it_has_nothing_to_lie_about(adversary, kinds):
    every = {Predictions, ClassTable, RowFeatures, Weights, Prototypes, Numbers, Bundle}
    taken = {kind for kind in every if adversary.refuses(kind) is None}
    assert taken == kinds


def test_the_refusal_names_what_would_work():
    assert LMA(**NONE).refuses(Weights) == (
        "it has nothing to lie about in weights; use an algorithm that sends predictions or "
        "class_table"
    )
    asked = Bundle.asked(n=Numbers.asked(1), w=Weights.asked({"a": np.zeros(1)}))
    assert "in numbers" in LMA(**NONE).refuses_asked(asked)
    assert Scaled(**NONE).refuses_asked(asked) is None


@pytest.mark.parametrize("kind", list(ADVERSARIES))
def test_every_kind_comes_back_from_plain_settings(kind):
    made = ADVERSARIES.read({"kind": kind, **({} if kind == "none" else NONE)})
    assert ADVERSARIES.read(made.model_dump(mode="json")) == made
    assert made.kind == kind


def test_scores_know_their_probabilities():
    scores = Scores(
        place="values",
        of=Predictions,
        ids=np.arange(1),
        values=np.log(np.float32([[1, 3]])),
        scale="logits",
    )
    assert scores.probabilities == pytest.approx(np.array([[0.25, 0.75]]))
