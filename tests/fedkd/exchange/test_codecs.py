from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import BaseModel, ValidationError

from fedkd.exchange.codecs import (
    CODECS,
    CodecField,
    Float16,
    Float32,
    HardLabels,
    Int8,
    LowRankChanges,
    OneBit,
    SoftLabelBits,
    SoftLabelDeltas,
    TopK,
)
from fedkd.exchange.entropy import changes_read, changes_written
from fedkd.exchange.payload import Asked
from fedkd.exchange.payloads import (
    Bundle,
    ClassTable,
    Encoded,
    Predictions,
    Prototypes,
    RowFeatures,
    Weights,
)
from fedkd.exchange.values import digest, flatten, unflatten

S = np.array([[1, 2, 3, 0], [0.5, -1, 0, 2]], np.float32)
T = np.array([[2, 1, 4, -1], [0, 0, 1, 3]], np.float32)
U = np.array([[-4, 3, 1, 1], [2, 0, -1, 1]], np.float32)
ROWS = np.array([3, 8])
RNG = np.random.default_rng(0)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


def predictions(values: np.ndarray, scale: Literal["logits", "probabilities"] = "logits"):
    return Predictions(rows=np.arange(len(values)), values=values, scale=scale)


def round_trip(codec, payload):
    encoded, _ = codec.encode(payload, {}, RNG)
    return codec.decode(encoded, {})[0]


# -- top-k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["logits", "probabilities"])
def test_top_k_gives_the_mean_worked_out_by_hand(scale):
    # algorithm-facts, "Top-k upload", k = 2, the tail spread evenly by each of three clients.
    sent = [softmax(x) if scale == "probabilities" else x for x in (S, T, U)]
    decoded = [round_trip(TopK(k=2), predictions(values, scale)).values for values in sent]
    soft = decoded if scale == "probabilities" else [softmax(values) for values in decoded]
    assert np.mean(soft, 0)[0] == pytest.approx(
        [0.07557498, 0.34900581, 0.52978979, 0.04562942], abs=1e-6
    )


def test_top_k_keeps_scores_exactly_and_shares_the_rest_evenly():
    # Of (.5, .3, .15, .05) the two largest travel; (.15 + .05) / 2 each for the others.
    values = np.array([[0.15, 0.5, 0.05, 0.3]], np.float32)
    encoded, _ = TopK(k=2).encode(predictions(values, "probabilities"), {}, RNG)
    assert encoded.array("values", "classes").tolist() == [[1, 3]]
    assert encoded.array("values", "top").tolist() == [[0.5, np.float32(0.3)]]
    assert encoded.coded.keys() == {"values/top", "values/classes"}
    decoded = TopK(k=2).decode(encoded, {})[0].values
    assert decoded[0] == pytest.approx([0.1, 0.5, 0.1, 0.3], abs=1e-7)


def test_of_equal_scores_the_first_classes_travel():
    encoded, _ = TopK(k=2).encode(predictions(np.ones((1, 4), np.float32)), {}, RNG)
    assert encoded.array("values", "classes").tolist() == [[0, 1]]


def test_top_k_bytes_are_a_score_and_a_byte_for_each_class_and_the_rest():
    # 2 rows: 2 x (4 + 1) and 4 for the rest of the logits; soft labels derive theirs.
    assert TopK(k=2).encode(predictions(S), {}, RNG)[0].payload_bytes == 2 * (2 * 5 + 4)
    soft = predictions(softmax(S), "probabilities")
    assert TopK(k=2).encode(soft, {}, RNG)[0].payload_bytes == 2 * 2 * 5
    wide = predictions(np.zeros((1, 300), np.float32))
    assert TopK(k=2).encode(wide, {}, RNG)[0].payload_bytes == 2 * 6 + 4


def test_rows_that_cost_bytes_cost_them_encoded_too():
    # Two of nine planned rows: two bytes of bits.
    subset = Predictions(rows=ROWS, values=S, ids="subset", planned=9)
    assert subset.payload_bytes == 32 + 2
    assert Float16().encode(subset, {}, RNG)[0].payload_bytes == 16 + 2
    assert TopK(k=1).encode(subset, {}, RNG)[0].payload_bytes == 2 * (5 + 4) + 2


@given(
    arrays(np.float32, (5, 4), elements=st.floats(-50, 50, width=32)),
    st.integers(1, 6),
    st.sampled_from(["logits", "probabilities"]),
)
def test_top_k_keeps_the_soft_labels_of_what_travels(logits, k, scale):
    values = logits if scale == "logits" else softmax(logits)
    decoded = round_trip(TopK(k=k), predictions(values, scale)).values
    soft, before = (softmax(decoded), softmax(logits)) if scale == "logits" else (decoded, values)
    assert soft.sum(-1) == pytest.approx(np.ones(5), abs=1e-5)
    order = np.argsort(-values, axis=-1, kind="stable")
    kept, others = order[:, :k], order[:, k:]
    assert np.take_along_axis(decoded, kept, -1).tolist() == (
        np.take_along_axis(values, kept, -1).tolist()
    )
    assert np.take_along_axis(soft, kept, -1) == pytest.approx(
        np.take_along_axis(before, kept, -1), abs=1e-4
    )
    if k < 4:
        rest = np.take_along_axis(decoded, others, -1)
        assert (rest == rest[:, :1]).all()


def test_as_many_classes_as_there_are_come_back_bit_for_bit():
    for k in (4, 9):
        assert digest(round_trip(TopK(k=k), predictions(S))) == digest(predictions(S))


def test_top_k_reaches_predictions_in_a_bundle_and_leaves_the_other_parts():
    table = ClassTable(values=np.full((4, 4), 0.25, np.float32))
    bundle = Bundle(parts={"a": predictions(S), "b": table})
    asked = Bundle.asked(a=Predictions.asked(np.arange(2), 4), b=ClassTable.asked(4))
    codec = TopK(k=1)
    encoded, _ = codec.encode(bundle, {}, RNG)
    assert encoded.problem(codec.asked(asked)) is None
    decoded, _ = codec.decode(encoded, {})
    assert decoded.problem(asked) is None
    assert decoded["b"].values is table.values
    assert decoded["a"].values.max(-1).tolist() == [3, 2]


def test_top_k_is_refused_by_name_where_there_are_no_scores():
    assert "got weights; use float32 or float16" in str(TopK(k=1).refuses(Weights))
    with pytest.raises(ValueError, match="got weights"):
        TopK(k=1).asked(Weights.asked({"w": S}))
    with pytest.raises(ValueError, match="got class_table without any"):
        TopK(k=1).asked(Bundle.asked(b=ClassTable.asked(4)))


# -- half precision ------------------------------------------------------------------------------


def test_half_precision_rounds_to_the_nearest():
    # Halves have 11 bits: between 1 and 2 steps of 1/1024; 1 + 1/2048 ties to even, which is 1.
    values = np.array([[1 + 1 / 2048, 1 + 3 / 2048, 2049.0]], np.float32)
    assert round_trip(Float16(), predictions(values)).values.tolist() == [[1, 1 + 4 / 2048, 2048]]


@given(arrays(np.float32, (3, 4), elements=st.floats(-65504, 65504, width=32)))
def test_half_precision_is_within_its_error_at_half_the_bytes(values):
    sent = predictions(values)
    encoded, memory = Float16().encode(sent, {}, RNG)
    assert encoded.payload_bytes * 2 == sent.payload_bytes
    decoded = Float16().decode(encoded, memory)[0]
    assert digest(replace(decoded, values=sent.values)) == digest(sent)
    error = np.abs(decoded.values.astype(np.float64) - values)
    assert (error <= np.maximum(np.abs(values) / 2048, 3e-8)).all()


def test_half_precision_leaves_counters_and_constants_and_bounds_huge_weights():
    given = {
        "w": np.array([1e6, -1e6, 0.5], np.float32),
        "mask": np.array([0.1, -np.inf], np.float32),
        "n": np.array(3),
        "scale": np.array(0.25, np.float32),
    }
    asked = Weights.asked(given)
    encoded, _ = Float16().encode(Weights(arrays=given), {}, RNG)
    assert encoded.problem(Float16().asked(asked)) is None
    decoded, _ = Float16().decode(encoded, {})
    assert decoded.problem(asked) is None
    assert decoded.arrays["w"].tolist() == [65504, -65504, 0.5]
    assert decoded.arrays["mask"].tobytes() == given["mask"].tobytes()
    assert decoded.arrays["scale"].shape == ()
    assert (decoded.arrays["n"], decoded.arrays["scale"]) == (3, 0.25)
    assert encoded.payload_bytes == 3 * 2 + 2 * 4 + 8 + 2


def test_the_default_is_the_same_object():
    sent, asked = predictions(S), Predictions.asked(np.arange(2), 4)
    assert Float32().encode(sent, {}, RNG)[0] is sent
    assert Float32().decode(sent, {})[0] is sent
    assert Float32().asked(asked) is asked


# -- soft labels in few bits ---------------------------------------------------------------------


def soft(*values: list[float]) -> Predictions:
    return predictions(np.array(values, np.float32), "probabilities")


def test_soft_labels_arrive_as_the_nearest_shares_that_sum_to_one():
    sent = soft([0.06713702, 0.35502569, 0.52978979, 0.04804750])
    for bits, units in ((1, [0, 0, 1, 0]), (2, [0, 1, 2, 0]), (4, [1, 5, 8, 1])):
        values = round_trip(SoftLabelBits(bits=bits), sent).values
        assert values[0] == pytest.approx(np.array(units) / (2**bits - 1), abs=1e-7)


def test_bytes_are_packed_bits():
    # 5 rows of 4 classes: a class takes 2 bits, or four shares 3 bits each.
    sent = soft(*[[0.25] * 4] * 5)
    for codec, size in ((SoftLabelBits(), 2), (SoftLabelBits(bits=3), 8)):
        assert codec.encode(sent, {}, RNG)[0].payload_bytes == size


@pytest.mark.parametrize("bits", [1, 3])
def test_only_rows_that_changed_travel_and_the_receiver_fills_in_the_others(bits):
    codec = SoftLabelDeltas(bits=bits)
    first = soft(*[[0.9, 0.1, 0, 0]] * 8)
    second = soft([0, 0, 1, 0], *[[0.9, 0.1, 0, 0]] * 6, [0, 1, 0, 0])
    sender, receiver = {}, {}
    sizes = []
    for number, sent in enumerate((first, second, second)):
        encoded, sender = codec.encode(sent, sender, RNG)
        encoded = replace(encoded, since=number)
        asked = codec.asked(Predictions.asked(np.arange(8), 4, scale="probabilities"))
        assert (encoded.problem(asked), codec.bad(encoded, asked)) == (None, None)
        decoded, receiver = codec.decode(encoded, receiver)
        sizes.append(encoded.payload_bytes)
        assert np.array_equal(decoded.values, round_trip(SoftLabelBits(bits=bits), sent).values)
    # 8 alike rows are learnt, 2 that changed cost more than none.
    assert sizes == ([1, 2, 1] if bits == 1 else [3, 3, 1])


def test_other_rows_than_before_travel_whole():
    codec = SoftLabelDeltas()
    sent = soft([1, 0], [0, 1])
    _, memory = codec.encode(sent, {}, RNG)
    encoded, _ = codec.encode(replace(sent, rows=np.array([4, 7])), memory, RNG)
    changed, _ = changes_read(encoded.array("values", "packed"), 2, largest=1, classes=None)
    assert changed.tolist() == [True, True]


def test_what_cannot_have_been_quantised_is_refused():
    few, delta = SoftLabelBits(bits=2), SoftLabelDeltas()
    asked = Predictions.asked(np.arange(2), 3, scale="probabilities")
    encoded, _ = few.encode(soft([1, 0, 0], [0, 1, 0]), {}, RNG)
    spoilt = encoded.with_arrays({"coded/values/packed": np.zeros(2, np.uint8)})
    assert few.bad(spoilt, few.asked(asked)) == "shares of a row that do not sum to 1"
    encoded, _ = SoftLabelBits().encode(soft([1, 0, 0], [0, 1, 0]), {}, RNG)
    beyond = encoded.with_arrays({"coded/values/packed": np.full(1, 255, np.uint8)})
    told = "a class beyond the 3 that there are"
    assert SoftLabelBits().bad(beyond, SoftLabelBits().asked(asked)) == told
    encoded, _ = delta.encode(soft([1, 0, 0], [0, 1, 0]), {}, RNG)
    some = changes_written(np.array([True, False]), np.array([0, 1]), largest=2)
    missing = encoded.with_arrays({"coded/values/packed": some})
    told = "rows are missing that did not travel before"
    assert delta.bad(missing, delta.asked(asked)) == told


def test_logits_are_no_shares():
    with pytest.raises(ValueError, match="cfd quantises soft labels, got logits; use top_k or"):
        SoftLabelBits().asked(Predictions.asked(np.arange(2), 4))
    assert round_trip(SoftLabelBits(), predictions(S)).values is not None
    assert np.array_equal(round_trip(SoftLabelBits(), predictions(S)).values, S)


# -- what is encoded is looked at before it is decoded -------------------------------------------

WEIGHTS = {"w": S, "n": np.array(1), "0.b": np.zeros(4, np.float32)}
KINDS = [
    (predictions(S), Predictions.asked(np.arange(2), 4)),
    (
        Predictions(rows=ROWS, values=S, ids="subset", planned=9, weights=np.ones(2, np.float32)),
        Predictions.asked(np.array([1, 3, 4, 5, 6, 8, 9, 10, 11]), 4, ids="subset", weighted=True),
    ),
    (
        predictions(softmax(S), "probabilities"),
        Predictions.asked(np.arange(2), 4, scale="probabilities"),
    ),
    (Weights(arrays=WEIGHTS), Weights.asked(WEIGHTS)),
    (ClassTable(values=np.full((4, 4), 0.25, np.float32)), ClassTable.asked(4)),
    (Prototypes(classes=np.array([1]), values=S[:1], num_classes=4), Prototypes.asked(4, 4)),
    (
        RowFeatures(rows=ROWS, features=S, logits=T, labels=np.array([2, 0])),
        RowFeatures.asked(5, (4,), 4),
    ),
    (
        Bundle(parts={"a": predictions(S), "w": Weights(arrays=WEIGHTS)}),
        Bundle.asked(a=Predictions.asked(np.arange(2), 4), w=Weights.asked(WEIGHTS)),
    ),
]
SOFT = [
    KINDS[2],
    (
        Predictions(rows=ROWS, values=softmax(S), scale="probabilities", ids="subset", planned=9),
        Predictions.asked(
            np.array([1, 3, 4, 5, 6, 8, 9, 10, 11]), 4, ids="subset", scale="probabilities"
        ),
    ),
    (
        Bundle(parts={"a": predictions(softmax(T), "probabilities"), "w": Weights(arrays=WEIGHTS)}),
        Bundle.asked(
            a=Predictions.asked(np.arange(2), 4, scale="probabilities"), w=Weights.asked(WEIGHTS)
        ),
    ),
]
QUANTISERS = [SoftLabelBits(), SoftLabelBits(bits=3), SoftLabelDeltas(), SoftLabelDeltas(bits=4)]
PAIRS = [
    (codec, payload, asked)
    for codec in (Float16(), Int8(), TopK(k=2))
    for payload, asked in KINDS
    if codec.refuses(type(payload)) is None
] + [(codec, payload, asked) for codec in QUANTISERS for payload, asked in SOFT]


@pytest.mark.parametrize(("codec", "payload", "asked"), PAIRS)
def test_a_good_answer_is_good_encoded_and_decoded_and_travels(codec, payload, asked):
    encoded, _ = codec.encode(payload, {}, RNG)
    wanted = codec.asked(asked)
    assert (encoded.problem(wanted), codec.bad(encoded, wanted)) == (None, None)
    assert set(flatten(encoded).arrays) <= set(wanted.limits)
    assert digest(unflatten(*flatten(encoded))) == digest(encoded)
    decoded, _ = codec.decode(encoded, {})
    assert decoded.problem(asked) is None
    assert flatten(decoded).plain == flatten(payload).plain


@pytest.mark.parametrize(("codec", "payload", "asked"), PAIRS)
def test_bytes_are_those_of_the_arrays_that_travel_without_what_is_derived(codec, payload, asked):
    encoded, _ = codec.encode(payload, {}, RNG)
    sent = sum(array.nbytes for array in flatten(encoded).arrays.values())
    whole = sum(array.nbytes for array in flatten(payload).arrays.values())
    assert encoded.payload_bytes - payload.payload_bytes == sent - whole
    assert codec.asked(asked).most_bytes >= sent


@pytest.mark.parametrize(("codec", "payload", "asked"), PAIRS)
def test_every_damaged_array_is_refused_before_it_is_decoded(codec, payload, asked):
    encoded, _ = codec.encode(payload, {}, RNG)
    wanted = codec.asked(asked)
    for place, array in flatten(encoded).arrays.items():
        damaged = [array[None], array.astype(np.complex64)]
        if array.ndim:
            damaged.append(np.concatenate([array, array, array]) if array.size else np.ones(7))
        if array.size and array.dtype.kind == "f":
            damaged += [np.full_like(array, bad) for bad in (np.nan, np.inf)]
        if place.endswith("values/classes"):
            damaged += [np.full_like(array, 200), np.zeros_like(array), array[:, ::-1].copy()]
        for other in damaged:
            spoilt = encoded.with_arrays({place: other})
            reason = spoilt.problem(wanted) or codec.bad(spoilt, wanted)
            assert reason is not None, (place, other)


@pytest.mark.parametrize(("codec", "payload", "asked"), PAIRS)
def test_arrays_that_are_missing_or_too_many_are_refused(codec, payload, asked):
    encoded, _ = codec.encode(payload, {}, RNG)
    wanted = codec.asked(asked)
    for name in encoded.coded:
        left = {other: array for other, array in encoded.coded.items() if other != name}
        assert replace(encoded, coded=left).problem(wanted) is not None, name
    more = {**encoded.coded, "backdoor": np.zeros(1, np.float32)}
    assert "backdoor" in str(replace(encoded, coded=more).problem(wanted))


def test_what_is_inside_and_who_coded_it_is_compared():
    encoded, _ = Float16().encode(predictions(S), {}, RNG)
    asked = Float16().asked(ClassTable.asked(4))
    assert encoded.problem(asked) == "predictions inside, expected class_table"
    other = TopK(k=2).asked(Predictions.asked(np.arange(2), 4))
    assert encoded.problem(other) == "coded by 'float16', expected 'top_k'"


@pytest.mark.parametrize("codec", [Float16(), Int8(), TopK(k=2)])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((2, 4), np.nan, np.float32), "NaN or infinity among the scores"),
        (np.ones((2, 4)), "dtype float64, expected float32"),
        (np.ones((2, 0), np.float32), "shape"),
        (np.array([["a"] * 4] * 2), "dtype <U1"),
    ],
)
def test_what_no_codec_takes_is_left_as_it_is_and_named(codec, values, told):
    encoded, _ = codec.encode(predictions(values), {}, RNG)
    asked = codec.asked(Predictions.asked(np.arange(2), 4))
    assert told in str(encoded.problem(asked))


def test_an_optional_array_comes_whole_or_not_at_all():
    sent = replace(predictions(S), weights=np.ones(2, np.float32))
    encoded, _ = Float16().encode(sent, {}, RNG)
    wanted = Float16().asked(Predictions.asked(np.arange(2), 4, weighted=True))
    assert encoded.problem(wanted) is None
    half = replace(encoded, inner=replace(encoded.inner, weights=None))
    assert half.problem(wanted) == "a part of 'weights' is missing"


@settings(max_examples=60)
@given(
    st.sampled_from(PAIRS),
    st.data(),
)
def test_whatever_passes_the_look_can_be_decoded(pair, data):
    codec, payload, asked = pair
    encoded, _ = codec.encode(payload, {}, RNG)
    whole = flatten(encoded).arrays
    place = data.draw(st.sampled_from(sorted(whole)))
    array = whole[place]
    spoilt = data.draw(
        arrays(
            array.dtype,
            array.shape,
            elements=st.integers(*((-128, 127) if array.dtype == np.int8 else (0, 255)))
            if array.dtype.kind in "iu"
            else st.floats(width=16, allow_nan=True),
        )
    )
    sent = encoded.with_arrays({place: spoilt})
    wanted = codec.asked(asked)
    if (sent.problem(wanted) or codec.bad(sent, wanted)) is None:
        decoded, _ = codec.decode(sent, {})
        assert isinstance(decoded.problem(asked), str | None)
        for name, limit in asked.limits.items():
            if name in flatten(decoded).arrays:
                assert flatten(decoded).arrays[name].dtype == limit.dtype


# -- every codec with every payload that it takes ------------------------------------------------

CODERS = [
    Float32(),
    Float16(),
    Int8(),
    TopK(k=2),
    OneBit(),
    HardLabels(),
    *(SoftLabelBits(bits=bits) for bits in (1, 2, 4, 8)),
    SoftLabelDeltas(),
    SoftLabelDeltas(bits=3),
    LowRankChanges(),
    LowRankChanges(energy=0.5),
    LowRankChanges(rank=1),
]


def drawn(kind: str, seed: int):
    """Return a good payload of many sizes, and what is asked for; NumPy draws its numbers."""
    rng = np.random.default_rng(seed)
    rows, classes, size = rng.integers(1, 9), rng.integers(1, 12), 10.0 ** rng.integers(-3, 3)
    planned = np.sort(rng.choice(40, rows, replace=False))
    shares = rng.dirichlet(np.full(classes, 10.0 ** rng.integers(-1, 2)), rows).astype(np.float32)
    scores = (size * rng.normal(size=(rows, classes))).astype(np.float32)
    weights = {
        "w": (size * rng.normal(size=(rows, classes, 3))).astype(np.float32),
        "b": rng.normal(size=rows).astype(np.float32),
        "seen": np.array(4),
    }
    soft = Predictions(rows=planned, values=shares, scale="probabilities")
    asked = {
        "logits": Predictions.asked(planned, int(classes)),
        "soft": Predictions.asked(planned, int(classes), scale="probabilities"),
        "weights": Weights.asked(weights),
    }
    made = {
        "logits": Predictions(rows=planned, values=scores),
        "soft": soft,
        "weights": Weights(arrays=weights),
    }
    if kind == "bundle":
        return Bundle(parts=made), Bundle.asked(**asked)
    if kind == "table":
        table = rng.dirichlet(np.ones(classes), classes).astype(np.float32)
        table[rng.random(classes) < 0.3] = 0
        return ClassTable(values=table), ClassTable.asked(int(classes))
    if kind == "prototypes":
        held = np.sort(rng.choice(12, rows, replace=False))
        values = scores.astype(np.float32)
        return (
            Prototypes(classes=held, values=values, num_classes=12),
            Prototypes.asked(12, int(classes)),
        )
    return made[kind], asked[kind]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CODERS),
    st.sampled_from(["logits", "soft", "weights", "bundle", "table", "prototypes"]),
    st.integers(0, 2**31),
)
def test_what_is_decoded_is_within_the_stated_error_and_counts_exact_bytes(codec, kind, seed):
    payload, asked = drawn(kind, seed)
    try:
        wanted = codec.asked(asked)
    except ValueError:
        assert codec.refuses(type(payload)) or kind in ("logits", "bundle", "weights")
        return
    # A bundle of two scales is taken by codecs of either alone.
    memory = {}
    if codec.follows:
        before = np.random.default_rng(seed + 1).normal(size=3)
        memory = {
            place: (array + before).astype(np.float32) if array.ndim == 3 else array
            for place, array in flatten(payload).arrays.items()
        }
    encoded, _ = codec.encode(payload, memory, RNG)
    if codec is not CODERS[0]:
        assert (encoded.problem(wanted), codec.bad(encoded, wanted)) == (None, None)
        left, whole = flatten(encoded).arrays, flatten(payload).arrays
        sent = sum(a.nbytes for a in left.values()) - sum(a.nbytes for a in whole.values())
        assert encoded.payload_bytes == payload.payload_bytes + sent
    decoded, _ = codec.decode(encoded, memory)
    assert decoded.problem(asked) is None
    errors = codec.largest_error(payload, memory)
    found = flatten(decoded).arrays
    for place, array in flatten(payload).arrays.items():
        if place in errors:
            off = np.abs(found[place].astype(np.float64) - array)
            assert (off <= errors[place]).all(), (place, (off - errors[place]).max())
        else:
            assert found[place].tobytes() == array.tobytes(), place


def test_the_stated_errors_are_small():
    """A bound that says nothing would hold as well."""
    soft, _ = drawn("soft", 3)
    for codec, most in ((Float16(), 5e-4), (Int8(), 0.06), (SoftLabelBits(bits=8), 0.004)):
        assert codec.largest_error(soft, {})["values"].max() <= most


@pytest.mark.parametrize("codec", [OneBit(), HardLabels()])
def test_one_bit_and_a_hard_label_are_one_code_of_two_names(codec):
    sent = soft([0.2, 0.5, 0.3], [0.4, 0.4, 0.2])
    mine, others = (c.encode(sent, {}, RNG)[0] for c in (codec, SoftLabelBits()))
    assert mine.array("values", "packed").tobytes() == others.array("values", "packed").tobytes()
    assert codec.decode(mine, {})[0].values.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert mine.label == f"probabilities ({codec.kind})"
    assert Section(up=codec.kind).up == codec
    with pytest.raises(ValidationError, match="bits: Input should be less than or equal to 1"):
        Section(up={"kind": codec.kind, "bits": 2})


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_mean_of_what_top_k_clients_send_is_a_distribution(k):
    sent = [softmax(values) for values in (S, T, U)]
    decoded = [round_trip(TopK(k=k), predictions(p, "probabilities")).values for p in sent]
    np.testing.assert_allclose(np.mean(decoded, 0).sum(-1), 1, atol=1e-6)
    padded = [np.where(p >= np.sort(p, -1)[:, -k:][:, :1], p, 0) for p in sent]
    assert (np.mean(padded, 0).sum(-1) < 0.99).any()


# -- int8 ----------------------------------------------------------------------------------------


def test_int8_rounds_to_the_units_of_a_row():
    encoded, _ = Int8().encode(
        predictions(np.array([[1, -2, 0.5], [0, 0, 0]], np.float32)), {}, RNG
    )
    # 127 x (1, -2, 0.5) / 2 = 63.5, -127, 31.75; halves go to the even unit.
    assert encoded.array("values", "units").tolist() == [[64, -127, 32], [0, 0, 0]]
    assert encoded.array("values", "scale").tolist() == [2, 0]
    decoded = Int8().decode(encoded, {})[0].values
    assert decoded == pytest.approx(np.array([[128 / 127, -2, 64 / 127], [0, 0, 0]]))
    assert encoded.payload_bytes == 2 * 3 + 2 * 4


def test_int8_has_a_scale_for_each_output_unit_and_one_for_a_bias():
    kernel = np.zeros((2, 3, 2, 2), np.float32)
    kernel[0], kernel[1] = 0.5, 8
    given = {"kernel": kernel, "bias": np.array([1, 100], np.float32), "count": np.array(7)}
    encoded, _ = Int8().encode(Weights(arrays=given), {}, RNG)
    assert encoded.array("arrays/kernel", "scale").tolist() == [0.5, 8]
    assert encoded.array("arrays/bias", "scale").tolist() == 100
    decoded = Int8().decode(encoded, {})[0].arrays
    assert np.array_equal(decoded["kernel"], kernel)
    assert decoded["bias"] == pytest.approx([100 / 127, 100])
    assert decoded["count"] == 7


NUMBERS = arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32))


@given(NUMBERS)
def test_int8_is_at_most_half_a_unit_off(values):
    decoded = round_trip(Int8(), predictions(values)).values
    largest = np.abs(values).max(-1, keepdims=True).astype(np.float64)
    assert (np.abs(decoded - values.astype(np.float64)) <= largest / 254 * (1 + 1e-5)).all()


@given(arrays(np.float32, (3, 4), elements=st.floats(-30, 30, width=32)))
def test_int8_leaves_soft_labels_distributions(logits):
    shares = softmax(logits)
    decoded = round_trip(Int8(), predictions(shares, "probabilities"))
    assert decoded.problem(Predictions.asked(np.arange(3), 4, scale="probabilities")) is None
    assert decoded.values.sum(-1) == pytest.approx(np.ones(3), abs=1e-6)
    # Half a unit each, and what dividing by the sum, at most 2 units off, moves.
    assert np.abs(decoded.values - shares).max() <= 3 * shares.max() / 254 + 1e-6


def test_int8_makes_no_soft_labels_of_what_are_none():
    asked = Predictions.asked(np.arange(2), 4, scale="probabilities")
    encoded, _ = Int8().encode(predictions(S, "probabilities"), {}, RNG)
    assert encoded.problem(Int8().asked(asked)) is not None
    good, _ = Int8().encode(predictions(softmax(S), "probabilities"), {}, RNG)
    assert (good.problem(Int8().asked(asked)), Int8().bad(good, Int8().asked(asked))) == (
        None,
        None,
    )
    nothing = good.with_arrays({"coded/values/units": np.zeros((2, 4), np.int8)})
    told = "soft labels of a row without any share, or with one below 0"
    assert Int8().bad(nothing, Int8().asked(asked)) == told


# -- settings ------------------------------------------------------------------------------------


class Section(BaseModel):
    up: CodecField = Float32()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("float16", Float16()),
        ({"kind": "top_k", "k": 3}, TopK(k=3)),
        (TopK(k=1), TopK(k=1)),
        ({"kind": "top_k", "k": 1e1}, TopK(k=10)),
    ],
)
def test_settings_name_a_codec_by_its_kind_or_with_its_settings(given, expected):
    section = Section(up=given)
    assert section.up == expected
    assert Section(**section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "flot16",
            "unknown codec 'flot16'; known: float32, float16, int8, top_k, one_bit, hard_label, "
            "cfd, cfd_delta, low_rank; or package.module:Class",
        ),
        ("flot16", "did you mean 'float16'?"),
        ({"k": 3}, "must be a kind of codec or a table with a kind"),
        (3, "must be a kind of codec or a table with a kind"),
        ({"kind": ["top_k"]}, "unknown codec"),
        ("top_k", "top_k: k: Field required"),
        ({"kind": "top_k", "k": 0}, "top_k: k: Input should be greater than or equal to 1, got 0"),
        ({"kind": "top_k", "k": True}, "top_k: k: Input should be a valid integer, got True"),
        ({"kind": "float16", "k": 3}, "float16: k: Extra inputs are not permitted, got 3"),
    ],
)
def test_a_codec_that_cannot_work_is_named_in_one_line(given, told):
    with pytest.raises(ValidationError) as error:
        Section(up=given)
    (first,) = error.value.errors()
    assert told in first["msg"]
    assert "\n" not in first["msg"]


def test_every_codec_says_what_it_does():
    for name in CODECS:
        assert CODECS.find(name).__doc__
        assert CODECS.find(name).model_fields["kind"].default == name


def test_asked_is_a_description_of_the_same_kind_of_thing():
    wanted = Float16().asked(Predictions.asked(np.arange(2), 4))
    assert isinstance(wanted, Asked)
    assert wanted.kind is Encoded
    assert wanted.limits["coded/values"].dtype == np.float16
    assert wanted.limits["inner/values"].shape == (0, 4)
