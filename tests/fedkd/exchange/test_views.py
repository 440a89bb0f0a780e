import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, ClassTable, Orders, Predictions, Weights
from fedkd.exchange.views import All, RunningMean, Sum, Upload

ROWS = np.array([2, 5, 7])
ONE = np.array([[1, 0], [2, 0], [3, 0]], np.float32)
TWO = np.array([[5, 4], [6, 4], [7, 4]], np.float32)


def together(_client: int) -> None:
    return None


def mean_of(*weighted: tuple[Payload, int | float]) -> Payload:
    mean = RunningMean()
    for payload, weight in weighted:
        mean.add(payload, weight)
    return mean.mean()


def test_weights_have_the_mean_worked_out_by_hand_and_counters_are_rounded():
    first = {"w": np.array([1.0, 3.0], np.float32), "n": np.array(2)}
    second = {"w": np.array([5.0, 3.0], np.float32), "n": np.array(3)}
    mean = mean_of((Weights(arrays=first), 1), (Weights(arrays=second), 3)).arrays
    # (1 + 3 x 5) / 4 = 4; (2 + 3 x 3) / 4 = 2.75, which is 3.
    assert mean["w"].tolist() == [4, 3]
    assert (mean["w"].dtype, mean["n"].dtype, mean["n"].shape) == (np.float32, np.int64, ())
    assert mean["n"] == 3


def test_a_constant_with_infinity_keeps_its_bits():
    mask = np.array([0.0, -np.inf], np.float32)
    mean = mean_of(*((Weights(arrays={"mask": mask}), weight) for weight in (0.3, 7)))
    assert mean.arrays["mask"].tobytes() == mask.tobytes()


def test_predictions_of_the_same_rows_have_a_plain_mean():
    mean = mean_of(*((Predictions(rows=ROWS, values=values), 1) for values in (ONE, TWO)))
    assert mean.values.tolist() == [[3, 2], [4, 2], [5, 2]]
    assert (mean.averaged, mean.weights, mean.values.dtype) == (True, None, np.float32)
    assert mean.payload_bytes == Predictions(rows=ROWS, values=ONE).payload_bytes


def test_a_row_that_not_everybody_sent_is_averaged_over_those_who_did():
    first = Predictions(rows=ROWS[:2], values=ONE[:2], ids="subset", planned=3)
    second = Predictions(rows=ROWS[1:], values=TWO[1:], ids="subset", planned=3)
    mean = mean_of((first, 1), (second, 3))
    assert mean.rows.tolist() == [2, 5, 7]
    # Row 5 was sent by both: (2 + 3 x 6) / 4 = 5.
    assert mean.values.tolist() == [[1, 0], [5, 3], [7, 4]]
    assert mean.weights.tolist() == [0.25, 1, 0.75]
    assert (mean.ids, mean.planned) == ("subset", 3)


def test_weights_of_rows_count_and_a_row_of_nobody_is_zero():
    weights = np.array([1, 0, 2], np.float32)
    first = Predictions(rows=ROWS, values=ONE, weights=weights)
    second = Predictions(rows=ROWS, values=TWO, weights=weights[::-1].copy())
    mean = mean_of((first, 1), (second, 1))
    # Row 2: (1 x 1 + 2 x 5) / 3.
    assert mean.values[0] == pytest.approx([11 / 3, 8 / 3])
    assert mean.values[1].tolist() == [0, 0]
    assert mean.weights.tolist() == [1.5, 0, 1.5]


def test_a_mean_of_group_means_is_the_mean_of_all():
    sent = [
        Predictions(rows=ROWS[:2], values=ONE[:2], ids="subset", planned=3),
        Predictions(rows=ROWS[1:], values=TWO[1:], ids="subset", planned=3),
        Predictions(rows=ROWS, values=TWO, ids="subset", planned=3),
    ]
    whole = mean_of((sent[0], 2), (sent[1], 3), (sent[2], 4))
    group = mean_of((sent[0], 2), (sent[1], 3))
    both = mean_of((group, 5), (sent[2], 4))
    assert both.values == pytest.approx(whole.values, abs=1e-6)
    assert both.weights == pytest.approx(whole.weights, abs=1e-6)


def test_every_part_of_a_bundle_has_its_mean():
    parts = [
        Bundle(
            parts={
                "p": Predictions(rows=ROWS, values=values),
                "w": Weights(arrays={"w": values[0], "n": np.array(1)}),
            }
        )
        for values in (ONE, TWO)
    ]
    mean = mean_of((parts[0], 1), (parts[1], 1))
    assert mean["p"].values.tolist() == [[3, 2], [4, 2], [5, 2]]
    assert mean["w"].arrays["w"].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Weights(arrays={"w": ONE}), Weights(arrays={"v": ONE})),
        (Predictions(rows=ROWS, values=ONE), Predictions(rows=ROWS, values=TWO, temperature=2.0)),
        (
            Bundle(parts={"a": Weights(arrays={"w": ONE})}),
            Bundle(parts={"b": Weights(arrays={"w": ONE})}),
        ),
    ],
)
def test_two_forms_are_not_added_up(one, other):
    with pytest.raises(ValueError, match="cannot be added up"):
        mean_of((one, 1), (other, 1))


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_has_to_be_positive(weight):
    with pytest.raises(ValueError, match="weight must be > 0"):
        RunningMean().add(Weights(arrays={}), weight)
    with pytest.raises(ValueError, match="no mean"):
        RunningMean().mean()


def uploads_of(*counts: int) -> list[Upload]:
    rng = np.random.default_rng(len(counts))
    return [
        Upload(
            client,
            Weights(
                arrays={
                    "w": rng.normal(size=(3, 2)).astype(np.float32) * 100,
                    "n": np.array(client * 7),
                }
            ),
            count,
        )
        for client, count in enumerate(counts)
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.sampled_from(["examples", "equal"])
)
def test_the_mean_over_a_sum_is_the_mean_over_all(counts, sums):
    uploads = uploads_of(*counts)

    def mean(view, group):
        return mean_of(
            *((upload.payload, upload.weight(sums)) for upload in view.shown(uploads, sums, group))
        ).arrays

    whole = mean(All(), together)
    summed = mean(Sum(), together)
    assert np.abs(summed["w"] - whole["w"]).max() <= 1e-6 * np.abs(whole["w"]).max()
    assert summed["n"] == whole["n"]


def test_a_sum_is_one_upload_a_group_with_all_examples_and_clients():
    uploads = uploads_of(10, 20, 30, 40)
    shown = list(Sum().shown(uploads[::-1], "examples", lambda client: client % 2))
    assert [(u.client, u.num_examples, u.clients) for u in shown] == [(0, 40, 2), (1, 60, 2)]
    odd = mean_of((uploads[1].payload, 20), (uploads[3].payload, 40))
    assert shown[1].payload.arrays["w"] == pytest.approx(odd.arrays["w"], rel=1e-6)
    assert (shown[1].weight("examples"), shown[1].weight("equal")) == (60, 2)


def test_all_hands_on_the_same_objects_one_by_one():
    taken = []

    def stream() -> Iterator[Upload]:
        for upload in uploads_of(1, 2, 3):
            taken.append(upload)
            yield upload

    shown = All().shown(stream(), None, together)
    assert next(shown) is taken[0]
    assert len(taken) == 1


def test_a_sum_keeps_one_payload_and_not_one_a_client():
    sent: list[weakref.ref[Payload]] = []

    def stream() -> Iterator[Upload]:
        for client in range(20):
            payload = Weights(arrays={"w": np.ones(4, np.float32)})
            sent.append(weakref.ref(payload))
            yield Upload(client, payload, 1)
            del payload
            # The first, for its types, and the last.
            assert sum(ref() is not None for ref in sent) <= 2

    (shown,) = Sum().shown(stream(), "equal", together)
    assert shown.clients == 20


def test_what_has_no_sum_is_refused_by_name():
    assert "needs each client's answer" in str(Sum().refuses(Weights, None))
    assert "a sum of class_table says nothing" in str(Sum().refuses(ClassTable, "equal"))
    assert "orders" in str(Sum().refuses(Orders, "equal"))
    assert Sum().refuses(Predictions, "equal") is None
    assert All().refuses(ClassTable, None) is None
    asked = Bundle.asked(a=Weights.asked({}), b=ClassTable.asked(3))
    assert "class_table" in str(Sum().refuses_asked(asked))
    assert Sum().refuses_asked(Bundle.asked(a=Weights.asked({}))) is None
    with pytest.raises(ValueError, match="takes sums"):
        list(Sum().shown([], None, together))


def test_a_round_without_answers_has_no_sum_to_show():
    assert list(Sum().shown([], "equal", together)) == []


def test_the_sum_of_probabilities_is_a_distribution_again():
    soft = [
        Predictions(rows=ROWS, values=np.array(v, np.float32), scale="probabilities")
        for v in ([[0.9, 0.1]] * 3, [[0.2, 0.8]] * 3)
    ]
    mean = mean_of((soft[0], 3), (soft[1], 4))
    asked = Predictions.asked(ROWS, 2, scale="probabilities")
    assert replace(mean, averaged=False).problem(asked) is None


# -- means of models ---------------------------------------------------------------------------


def model(weight, counter=0):
    return Weights(
        arrays={
            "weight": np.array(weight, np.float32),
            "num_batches_tracked": np.array(counter, np.int64),
        }
    )


def test_mean_is_weighted_by_hand():
    mean = RunningMean()
    mean.add(model([1.0, 10.0]), 1)
    mean.add(model([5.0, -2.0]), 3)
    # (1 + 3 * 5) / 4 and (10 - 3 * 2) / 4
    assert mean.mean().arrays["weight"].tolist() == [4.0, 1.0]


def test_counters_are_rounded_and_stay_counters():
    mean = RunningMean()
    mean.add(model([0.0], counter=10), 1)
    mean.add(model([0.0], counter=13), 2)
    assert mean.mean().arrays["num_batches_tracked"] == 12
    mean.add(model([0.0], counter=14), 2)
    averaged = mean.mean().arrays["num_batches_tracked"]  # 64 / 5 = 12.8
    assert averaged == 13
    assert averaged.dtype == np.int64
    assert mean.mean().arrays["weight"].dtype == np.float32


def test_the_mean_of_arrays_without_dimensions_has_none_either():
    mean = RunningMean()
    for scale, counter, flag in ((1.0, 3, True), (4.0, 6, True), (4.0, 9, False)):
        arrays = {"scale": np.float32(scale), "counter": np.int64(counter), "flag": np.bool_(flag)}
        mean.add(Weights(arrays={name: np.asarray(a) for name, a in arrays.items()}), 1)
    means = mean.mean().arrays
    assert {name: (type(a), a.shape, a.item()) for name, a in means.items()} == {
        "scale": (np.ndarray, (), 3.0),
        "counter": (np.ndarray, (), 6),
        # True for the majority, and not for whatever is more than nothing.
        "flag": (np.ndarray, (), True),
    }
    assert means["flag"].dtype == bool
    mean.add(Weights(arrays={**means, "flag": np.array(False)}), 9)
    assert not mean.mean().arrays["flag"]


def test_one_model_is_its_own_mean_bit_for_bit():
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    mean = RunningMean()
    mean.add(Weights(arrays={"weight": weights}), 17)
    assert mean.mean().arrays["weight"].tobytes() == weights.tobytes()


def test_what_was_added_is_not_written_to():
    first, second = model([1.0, 2.0]), model([3.0, 4.0])
    mean = RunningMean()
    mean.add(first, 1)
    mean.add(second, 1)
    mean.mean()
    assert first.arrays["weight"].tolist() == [1.0, 2.0]
    assert second.arrays["weight"].tolist() == [3.0, 4.0]


def test_weights_of_two_models_have_no_mean():
    mean = RunningMean()
    mean.add(model([1.0]), 1)
    with pytest.raises(ValueError, match="two forms"):
        mean.add(Weights(arrays={"weight": np.zeros(1, np.float32)}), 1)
