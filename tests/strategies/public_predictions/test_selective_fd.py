"""Selective-FD: clients speak of rows like their own; what stays ambiguous is not taught."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payload import ids_bytes
from fedkd.exchange.payloads import Predictions
from fedkd.models import ModelSettings
from fedkd.targets import ambiguity
from fedkd.training import Passes, supervised, towards_targets
from strategies.contract import Federation, ServerTools, Upload
from strategies.public_predictions.selective_fd import (
    CLAIMED,
    SelectiveFD,
    SelectiveFDSettings,
    claimed_rows,
    consensus,
    hardened,
    robust_consensus,
)
from strategies.shared.lessons import Lesson

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
CONSENSUS = [
    [0.10034697, 0.13932769, 0.74146938, 0.01885595],
    [0.04031637, 0.04031637, 0.10959126, 0.80977599],
]

NO_TOOLS = object.__new__(ServerTools)
"""For a server half that uses none."""


def selective(classes=4, **settings):
    federation = Federation(
        seed=0,
        rounds=3,
        participation=1.0,
        models=(ModelSettings(name="mlp"),) * 3,
        local=Passes(batch_size=8),
        public_size=2,
        rows_per_round=2,
        public_labelled=False,
        num_classes=classes,
        input_shape=(1, 8, 8),
        num_examples=(5,) * 3,
    )
    return SelectiveFD(SelectiveFDSettings(**settings), federation)


def upload(client, logits, mask, *, clients=1, weights=None):
    rows = np.flatnonzero(mask)
    soft = torch.softmax(torch.tensor(logits), -1).numpy()[rows]
    sent = Predictions(
        rows=rows,
        values=soft,
        scale="probabilities",
        ids="subset",
        planned=len(mask),
        weights=weights,
    )
    return Upload(client, sent, 5, clients)


SENT = [upload(0, S, (1, 0)), upload(1, T, (1, 1)), upload(2, U, (0, 0))]


def lesson(strategy, sent, state=None):
    return strategy.aggregate(state or Lesson(), sent, strategy.federation.round(1), NO_TOOLS)


# -- the server --------------------------------------------------------------------------------


def test_each_row_is_the_mean_of_those_who_claim_it():
    means, claims = consensus(SENT, np.arange(2), 4)
    assert np.allclose(means, CONSENSUS, atol=1e-8)
    assert claims.tolist() == [2, 1]
    assert np.allclose(ambiguity(torch.tensor(means)), [0.51706123, 0.38044802], atol=1e-8)


@pytest.mark.parametrize(
    ("ambiguous", "kept"), [(None, [0, 1]), (0.6, [0, 1]), (0.5, []), (0.3, [])]
)
def test_rows_whose_mean_is_ambiguous_are_not_taught(ambiguous, kept):
    # With 0.5 one of the two would be left, which is too few for BatchNorm.
    told = lesson(selective(ambiguous=ambiguous), SENT).predictions
    assert ([] if told is None else told.rows.tolist()) == kept
    if kept:
        assert np.allclose(told.values, CONSENSUS, atol=1e-7)
        assert told.averaged


def test_rows_that_nobody_claims_are_not_taught():
    strategy = selective(ambiguous=None)
    strategy.federation = type(strategy.federation)(
        **{**vars(strategy.federation), "public_size": 4, "rows_per_round": 4}
    )
    sent = upload(1, [*T, *T], (1, 0, 1, 0))
    told = lesson(strategy, [sent]).predictions
    assert told.rows.tolist() == [0, 2]
    assert np.isfinite(told.values).all()
    # A bit for each of the round's rows says which they are.
    assert told.payload_bytes == told.values.nbytes + ids_bytes("subset", 2, 4)
    assert sent.payload.payload_bytes == told.payload_bytes


@pytest.mark.parametrize(("classes", "most"), [(2, 1.0), (4, 1.5), (10, 1.8)])
def test_a_threshold_that_can_leave_out_nothing_is_refused(classes, most):
    """Published fault: 2.0, which no distance from a one-hot label reaches."""
    uniform = torch.full((1, classes), 1 / classes)
    assert float(ambiguity(uniform)) == pytest.approx(most)
    for given in (most, 2.0):
        with pytest.raises(ValueError, match=rf"ambiguous must be below .* = {most:g}, .*got"):
            selective(classes, ambiguous=given)
    selective(classes, ambiguous=most - 1e-3)
    selective(classes)


def test_where_nobody_claims_anything_the_last_lesson_stays():
    strategy = selective()
    before = lesson(strategy, SENT)
    assert lesson(strategy, [], before) is before
    assert lesson(strategy, [upload(0, S, (0, 0))], before) is before


def test_a_mean_of_clients_counts_as_they_would_one_by_one():
    rows = np.arange(2)
    apart, _ = consensus(SENT, rows, 4)
    together = upload(0, S, (1, 1), clients=3, weights=np.array([2 / 3, 1 / 3], np.float32))
    object.__setattr__(together.payload, "values", np.array(CONSENSUS, np.float32))
    means, claims = consensus([together], rows, 4)
    assert np.allclose(means, apart, atol=1e-6)
    assert np.allclose(claims, [2, 1])


def test_a_client_cannot_give_itself_weight():
    loud = upload(0, S, (1, 0), weights=np.array([1e6], np.float32))
    means, _ = consensus([loud, *SENT[1:]], np.arange(2), 4)
    assert np.allclose(means, CONSENSUS, atol=1e-8)


# -- the client --------------------------------------------------------------------------------


def two_kinds(rows=80, features=6):
    generator = torch.Generator().manual_seed(0)
    one, alike, other = 0.3 * torch.randn(3, rows, features, generator=generator)
    return one + 1, alike + 1, other - 1


def test_a_client_claims_rows_like_its_own():
    private, alike, other = two_kinds()
    claimed = claimed_rows(
        private, torch.cat([alike, other]), SelectiveFDSettings(), np.random.default_rng(0)
    )
    assert claimed[80:].sum() == 0
    # About three quarters, as of its own rows.
    assert 0.55 < claimed[:80].mean() < 0.95


def test_a_higher_quantile_claims_less():
    private, alike, _ = two_kinds()
    shares = [
        claimed_rows(
            private, alike, SelectiveFDSettings(quantile=quantile), np.random.default_rng(0)
        ).mean()
        for quantile in (0.0, 0.25, 0.6, 0.9)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.3


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_or_equal_private_rows_are_enough(rows):
    private, alike, _ = two_kinds()
    for own in (private[:rows], private[:1].repeat(rows, 1)):
        claimed = claimed_rows(own, alike, SelectiveFDSettings(), np.random.default_rng(0))
        assert claimed.shape == (80,)
        assert claimed.dtype == bool


def test_a_client_distils_what_is_kept_before_it_trains_at_home(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    """Published fault: the authors' baseline revisits its own rows before it digests."""
    from fedkd.training import LoopCohort

    asked, fit = [], LoopCohort.fit
    monkeypatch.setattr(
        LoopCohort,
        "fit",
        lambda self, objective, **how: (asked.append(objective), fit(self, objective, **how))[1],
    )
    options = {"ambiguous": None}
    engine = {"backend": "inline", "vectorize": "loop"}
    settings = tiny_settings(
        "selective_fd", options=options, rounds=2, engine=engine, clients={"count": 1}
    )
    simulate(settings, tiny_data(rows=(12,)))
    assert asked == [supervised, towards_targets, supervised]


def test_a_mask_is_made_once_and_stays_with_the_client(tiny_settings, tiny_data, simulate):
    runs = [
        simulate(tiny_settings("selective_fd", rounds=rounds), tiny_data()) for rounds in (1, 3)
    ]
    for one, other in zip(runs[0].states, runs[1].states, strict=True):
        assert one.arrays[CLAIMED].dtype == bool
        assert np.array_equal(one.arrays[CLAIMED], other.arrays[CLAIMED])
        assert 0 < one.arrays[CLAIMED].sum() < len(one.arrays[CLAIMED])


def test_bytes_are_those_of_the_claimed_rows_and_their_mask(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("selective_fd", rounds=1), tiny_data())
    claimed = [state.arrays[CLAIMED] for state in run.states]
    expected = sum(
        4 * 3 * int(mask.sum()) + ids_bytes("subset", int(mask.sum()), len(mask))
        for mask in claimed
    )
    assert run.history.federation[0]["bytes_up"] == expected


def test_a_server_that_sees_only_sums_teaches_the_same(tiny_settings, tiny_data, simulate):
    runs = [
        simulate(tiny_settings("selective_fd", rounds=2, exchange={"view": view}), tiny_data())
        for view in ("all", "sum")
    ]
    for one, other in zip(runs[0].states, runs[1].states, strict=True):
        for name, weights in one.models["model"].weights.items():
            assert np.allclose(weights, other.models["model"].weights[name], atol=1e-4)


def test_hard_labels_are_votes_and_cost_a_byte_a_row(tiny_settings, tiny_data, simulate):
    hard = hardened(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]))
    np.testing.assert_array_equal(hard, [[0, 1, 0], [1, 0, 0]])
    run = simulate(
        tiny_settings(
            "selective_fd",
            options={"labels": "hard"},
            exchange={"up": {"kind": "cfd", "bits": 1}},
            rounds=2,
        ),
        tiny_data(),
    )
    soft = simulate(tiny_settings("selective_fd", rounds=2), tiny_data())
    assert run.history.federation[0]["bytes_up"] < soft.history.federation[0]["bytes_up"] / 4
    assert run.history.federation[1]["bytes_down"] > 0


@pytest.mark.parametrize(
    ("rule", "expected", "claims"),
    [
        ("median", [[0.8, 0.2], [0.4, 0.6]], [3, 2]),
        ("trimmed_mean", [[0.8, 0.2], [0.4, 0.6]], [3, 2]),
        ("outlier_check", [[0.85, 0.15], [0.6, 0.4]], [2, 1]),
    ],
)
def test_a_robust_rule_counts_those_who_claim_a_row(rule, expected, claims):
    rows = np.array([3, 8])
    sent = [
        ([3], [[0.9, 0.1]]),
        ([3, 8], [[0.8, 0.2], [0.6, 0.4]]),
        ([3, 8], [[0.0, 1.0], [0.2, 0.8]]),
    ]
    uploads = [
        Upload(
            client,
            Predictions(
                rows=np.array(own),
                values=np.array(values, np.float32),
                scale="probabilities",
                ids="subset",
                planned=2,
            ),
            5,
        )
        for client, (own, values) in enumerate([*sent, ([], np.empty((0, 2)))])
    ]
    settings = SelectiveFDSettings(aggregation=rule, trim=0.4, factor=1.5)
    means, counted = robust_consensus(iter(uploads), rows, 2, settings)
    assert np.allclose(means, expected, atol=1e-6)
    assert counted.tolist() == claims
    none, nobody = robust_consensus(iter(uploads[3:]), rows, 2, settings)
    assert (none.sum(), nobody.sum()) == (0, 0)
