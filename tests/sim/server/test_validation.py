"""Validation: every kind of bad reply is named, a good one passes, and nothing large is made."""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.payloads import Predictions, Weights
from fedkd.exchange.payloads.predictions import LARGEST_SCORE
from fedkd.exchange.payloads.weights import LARGEST_PARAMETER
from fedkd.models import ModelSettings
from fedkd.training import Passes
from sim.adversity.bad_replies import BAD_REPLIES
from sim.server.validation import (
    ACCURACIES,
    LONGEST_REASON,
    LONGEST_TRACEBACK,
    Expected,
    RejectedReplyError,
    bad_reply,
    read_valid_reply,
    valid_answer,
)
from sim.wire.flower import identify_process
from sim.wire.messages import ClientReply, reply_content
from sim.wire.records import to_array_record
from strategies.contract import Federation

FEDERATION = Federation(
    seed=0,
    rounds=3,
    participation=1.0,
    models=(ModelSettings(name="mlp"),),
    local=Passes(batch_size=8, epochs=1),
    public_size=20,
    rows_per_round=6,
    public_labelled=False,
    num_classes=3,
    input_shape=(1, 8, 8),
    num_examples=(12,),
)
ROUND = FEDERATION.round(2)

MODEL = {
    "weight": np.zeros((2, 3), np.float32),
    "running_var": np.zeros(3, np.float32),
    "num_batches_tracked": np.array(0, np.int64),
}

TRAINED = Expected(round=2, asked=ROUND.asked_logits)
SENT_MODEL = Expected(round=2, asked=Weights.asked(MODEL))
ONLY_TRAINED = Expected(round=2)
JUDGED = Expected.evaluation(2, 5, 3, answers=True)
JUDGED_WITHOUT_SCORES = Expected.evaluation(2, 5, 3, answers=False)


def scores(rows=6, classes=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, classes)).astype(np.float32)


def predictions(**changes):
    table = {"rows": ROUND.public_rows, "values": scores(), **changes}
    return Predictions(**table)


def weights(**changes):
    arrays = {
        "weight": np.ones((2, 3), np.float32),
        "running_var": np.ones(3, np.float32),
        "num_batches_tracked": np.array(3, np.int64),
        **changes,
    }
    return Weights(arrays={name: a for name, a in arrays.items() if a is not None})


def reply(payload=None, **changes):
    return ClientReply(**{"payload": payload, "metrics": {"ce": 0.7}, "round": 2, **changes})


def judged(**changes):
    probabilities = np.full((5, 3), 1 / 3, np.float32)
    metrics = dict.fromkeys(ACCURACIES, 0.5)
    return reply(**{"metrics": metrics, "test_probabilities": probabilities, **changes})


GOOD = [
    (reply(predictions()), TRAINED),
    (reply(weights()), SENT_MODEL),
    (reply(), ONLY_TRAINED),
    (judged(), JUDGED),
    (judged(test_probabilities=None), JUDGED_WITHOUT_SCORES),
]


def reason(sent, expected):
    """Return why a reply is refused, None for a good one; both ways to look at it must agree."""
    before = bad_reply(sent, expected)
    try:
        read_valid_reply(reply_content(sent), expected)
    except RejectedReplyError as error:
        after = str(error)
    else:
        after = None
    assert (before is None) == (after is None), f"reply: {before}; its message: {after}"
    return after


def in_hand(content):
    """Return records as they come off the wire: made, and no longer what they stand for."""
    return RecordDict(dict(content.items()))


def record_reason(content, expected=TRAINED):
    content = in_hand(content)
    with pytest.raises(RejectedReplyError) as raised:
        read_valid_reply(content, expected)
    return str(raised.value)


@pytest.mark.parametrize(("sent", "expected"), GOOD)
def test_a_good_reply_passes_unchanged(sent, expected):
    assert reason(sent, expected) is None
    read = read_valid_reply(reply_content(sent), expected)
    assert (read.metrics, read.round) == (sent.metrics, sent.round)
    if isinstance(sent.payload, Predictions):
        assert read.payload.values.tobytes() == sent.payload.values.tobytes()


# -- scores ----------------------------------------------------------------------------------


def spoilt(values, value):
    values = values.copy()
    values[4, 1] = value
    return values


@pytest.mark.parametrize("value", [LARGEST_SCORE, -LARGEST_SCORE, 1e-42, 0.0])
def test_unusual_scores_that_are_numbers_pass(value):
    assert reason(reply(predictions(values=spoilt(scores(), value))), TRAINED) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_named(value):
    bad = reply(predictions(values=spoilt(scores(), value)))
    assert reason(bad, TRAINED) == "NaN or infinity among the scores"


@pytest.mark.parametrize("value", [2e4, -2e4, 3e38])
def test_scores_that_no_training_gives_are_named(value):
    bad = reply(predictions(values=spoilt(scores(), value)))
    assert reason(bad, TRAINED) == f"a score of size {abs(value):g}, expected at most 10000"


@pytest.mark.parametrize(
    "shape",
    [(5, 3), (7, 3), (6, 4), (6, 1), (1, 3), (3,), (3, 6), (18,), (1, 6, 3), (0, 3), (6, 0)],
)
def test_another_shape_is_named(shape):
    bad = reply(predictions(values=np.zeros(shape, np.float32)))
    assert bad_reply(bad, TRAINED) == f"'values' has shape {shape}, expected (6, 3)"
    assert reason(bad, TRAINED) == f"'values' has shape {shape}, expected (6, 3)"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, bool])
def test_another_type_is_named(dtype):
    bad = reply(predictions(values=scores().astype(dtype)))
    assert bad_reply(bad, TRAINED) == f"'values' has dtype {np.dtype(dtype)}, expected float32"
    assert reason(bad, TRAINED) == f"'values' has dtype {np.dtype(dtype)}, expected float32"


@pytest.mark.parametrize("change", ["order", "other", "earlier round"])
def test_other_rows_are_named(change):
    rows = ROUND.public_rows
    unused = next(row for row in range(20) if row not in rows)
    changed = {
        "order": rows[::-1].copy(),
        "other": np.sort(np.append(rows[:-1], unused)),
        "earlier round": FEDERATION.round(1).public_rows,
    }[change]
    bad = reply(predictions(rows=changed))
    assert reason(bad, TRAINED) == "rows are not the 6 public rows of the round"


def test_fewer_rows_than_scores_are_named():
    bad = reply(predictions(rows=ROUND.public_rows[:-1]))
    assert bad_reply(bad, TRAINED) == "'rows' has shape (5,), expected (6,)"
    assert reason(bad, TRAINED) == "'rows' has shape (5,), expected (6,)"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scale": "probabilities"}, "scale 'probabilities', expected 'logits'"),
        (
            {"averaged": True},
            "an average of several models, expected the client's own predictions",
        ),
        ({"ids": "subset", "planned": 6}, "ids 'subset', expected 'planned'"),
    ],
)
def test_predictions_of_another_form_are_named(changes, named):
    assert reason(reply(predictions(**changes)), TRAINED) == named


@pytest.mark.parametrize("temperature", [2.0, 0.0, math.nan, math.inf])
def test_softened_logits_are_named(temperature):
    expected = f"temperature {temperature:g}, expected 1"
    assert reason(reply(predictions(temperature=temperature)), TRAINED) == expected


# -- probabilities where logits are expected ---------------------------------------------------

PROBABILITIES = "every row of scores sums to 1: probabilities, expected logits"


def softmax(values):
    powers = np.exp(values)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "values",
    [
        softmax(scores()),
        softmax(scores()).astype(np.float16).astype(np.float32),
        np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]],
        np.full((6, 3), 1 / 3, np.float32),
    ],
    ids=["softmax", "softmax in half precision", "one-hot", "uniform"],
)
def test_probabilities_are_told_from_logits(values):
    assert reason(reply(predictions(values=values)), TRAINED) == PROBABILITIES


@pytest.mark.parametrize(
    "values",
    [
        np.log(softmax(scores())),
        np.zeros((6, 3), np.float32),
        spoilt(softmax(scores()), 1.01),
        softmax(scores()) - np.float32(0.001),
        np.abs(scores()),
    ],
    ids=["log-probabilities", "zeros", "all rows but one", "nearly", "positive"],
)
def test_logits_that_resemble_probabilities_pass(values):
    assert reason(reply(predictions(values=values)), TRAINED) is None


def test_a_lone_odd_row_at_the_end_of_many_makes_them_logits():
    round = replace(FEDERATION, public_size=500, rows_per_round=500).round(2)
    rows, expected = round.public_rows, Expected(round=2, asked=round.asked_logits)
    values = softmax(scores(500))
    assert reason(reply(predictions(rows=rows, values=values)), expected) == PROBABILITIES
    values[-1, 0] += 0.5
    assert reason(reply(predictions(rows=rows, values=values)), expected) is None


def test_three_rows_are_too_few_to_call_them_probabilities():
    rows = ROUND.public_rows[:3]
    expected = Expected(round=2, asked=Predictions.asked(rows, 3))
    sent = reply(predictions(rows=rows, values=softmax(scores(3))))
    assert reason(sent, expected) is None


def test_scores_of_a_single_class_are_never_called_probabilities():
    sent = reply(predictions(values=np.ones((6, 1), np.float32)))
    expected = Expected(round=2, asked=Predictions.asked(ROUND.public_rows, 1))
    assert reason(sent, expected) is None


# -- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool, np.complex64])
def test_a_parameter_of_another_type_is_named(dtype):
    bad = reply(weights(weight=np.ones((2, 3), dtype)))
    text = f"has dtype {np.dtype(dtype)}, expected float32"
    assert bad_reply(bad, SENT_MODEL) == f"'arrays/weight' {text}"
    assert reason(bad, SENT_MODEL) == f"'arrays/weight' {text}"


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (1, 3), (2, 1)])
def test_a_parameter_of_another_shape_is_named(shape):
    bad = reply(weights(weight=np.ones(shape, np.float32)))
    text = f"has shape {shape}, expected (2, 3)"
    assert bad_reply(bad, SENT_MODEL) == f"'arrays/weight' {text}"
    assert reason(bad, SENT_MODEL) == f"'arrays/weight' {text}"


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"weight": None}, "['arrays/weight']"),
        ({"extra": np.zeros(1, np.float32)}, "['arrays/extra']"),
    ],
)
def test_missing_and_unexpected_parameters_are_named(changes, odd):
    bad = reply(weights(**changes))
    assert bad_reply(bad, SENT_MODEL) == f"unexpected or missing arrays: {odd}"
    assert reason(bad, SENT_MODEL) == f"unexpected or missing arrays: {odd}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parameter_that_is_no_number_is_named(value):
    bad = reply(weights(weight=np.full((2, 3), value, np.float32)))
    assert reason(bad, SENT_MODEL) == "NaN or infinity in parameter 'weight'"


def test_a_parameter_that_would_ruin_every_model_is_named():
    bad = reply(weights(weight=np.full((2, 3), -1e30, np.float32)))
    assert reason(bad, SENT_MODEL) == "parameter 'weight' of size 1e+30, expected at most 1e+08"
    usual = reply(weights(weight=np.full((2, 3), LARGEST_PARAMETER, np.float32)))
    assert reason(usual, SENT_MODEL) is None


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("running_var", np.array([1, -1, 1], np.float32)),
        ("num_batches_tracked", np.array(-1, np.int64)),
    ],
)
def test_statistics_that_cannot_be_negative_are_named(name, array):
    bad = reply(weights(**{name: array}))
    assert reason(bad, SENT_MODEL) == f"parameter {name!r} is negative"


# -- the wrong thing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "expected", "named"),
    [
        (weights(), TRAINED, "expected predictions, got weights"),
        (predictions(), SENT_MODEL, "expected weights, got predictions"),
        (None, TRAINED, "expected predictions, got nothing"),
        (None, SENT_MODEL, "expected weights, got nothing"),
        (weights(), ONLY_TRAINED, "expected nothing, got weights"),
        (predictions(), ONLY_TRAINED, "expected nothing, got predictions"),
    ],
)
def test_the_wrong_kind_of_payload_is_named(payload, expected, named):
    assert reason(reply(payload), expected) == named


@pytest.mark.parametrize(
    ("answered", "named"),
    [
        (1, "the reply is to round 1, expected round 2"),
        (3, "the reply is to round 3, expected round 2"),
        (None, "the reply does not say which round, expected round 2"),
    ],
)
@pytest.mark.parametrize(("sent", "expected"), GOOD)
def test_an_answer_to_another_round_is_named(sent, expected, answered, named):
    assert reason(replace(sent, round=answered), expected) == named


# -- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"ce": math.nan}, "metric 'ce' is nan, expected a finite number"),
        ({"ce": -math.inf}, "metric 'ce' is -inf, expected a finite number"),
        ({"ce": 0.1, "kl": -0.5}, "metric 'kl' is -0.5, expected a number >= 0"),
        ({"round": 7.0}, "metric 'round' has a name that records use themselves"),
        ({"client": 7.0}, "metric 'client' has a name that records use themselves"),
        ({"x" * 200: 1.0}, "metric 'xxxxxxxxxxxxxxxxxxxx'... has a name of 200 letters"),
        ({f"loss {i}": 0.0 for i in range(65)}, "65 metrics, expected at most 64"),
        ({"ce": 1e300}, "metric 'ce' is 1e+300, expected at most 9.0072e+15"),
        (
            {"validation_accuracy": 0.5},
            "metric 'validation_accuracy' is for evaluations, and this is a reply to training",
        ),
    ],
)
def test_bad_metrics_are_named(metrics, named):
    assert reason(reply(predictions(), metrics=metrics), TRAINED) == named


@pytest.mark.parametrize("metrics", [{}, {"kl": -1e-7}, {"num-examples": 1e15}])
def test_metrics_that_harm_nobody_pass(metrics):
    assert reason(reply(predictions(), metrics=metrics), TRAINED) is None


@pytest.mark.parametrize("value", [[0.5, 0.5], [1, 2]])
def test_a_metric_that_is_a_list_is_named(value):
    content = reply_content(reply(predictions()))
    content["metrics"] = MetricRecord({"ce": value})
    assert record_reason(content) == "metric 'ce' is a list, expected a number"


@pytest.mark.parametrize("value", ["0.5", True, b"1"])
def test_metrics_that_are_text_come_in_a_record_of_another_kind_and_are_named(value):
    content = reply_content(reply(predictions()))
    content["metrics"] = ConfigRecord({"ce": value})
    assert record_reason(content) == "unexpected records of settings: ['metrics']"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"accuracy": 1.5}, "metric 'accuracy' is 1.5, expected a number in [0, 1]"),
        ({"macro_recall": -0.1}, "metric 'macro_recall' is -0.1, expected a number in [0, 1]"),
        ({"accuracy": math.nan}, "metric 'accuracy' is nan, expected a number in [0, 1]"),
        (
            {"calibration_error": 1.5},
            "metric 'calibration_error' is 1.5, expected a number in [0, 1]",
        ),
        ({"forgetting": -1.0}, "metric 'forgetting' has a name that records use themselves"),
        ({"worst_class_recall": None}, "metric 'worst_class_recall' is missing"),
        ({"more": -1e300}, "metric 'more' is -1e+300, expected at most 9.0072e+15"),
    ],
)
def test_a_judgement_that_cannot_be_is_named(change, named):
    metrics = {**dict.fromkeys(ACCURACIES, 0.5), **change}
    metrics = {name: value for name, value in metrics.items() if value is not None}
    assert reason(judged(metrics=metrics), JUDGED) == named


def test_a_client_without_classes_in_the_test_split_has_no_accuracy_of_its_own():
    metrics = {**dict.fromkeys(ACCURACIES, 0.5), "personal_accuracy": math.nan}
    assert reason(judged(metrics=metrics), JUDGED) is None


def test_infinite_scores_have_no_calibration_error():
    metrics = {**dict.fromkeys(ACCURACIES, 0.5), "calibration_error": math.nan}
    assert reason(judged(metrics=metrics), JUDGED) is None


@pytest.mark.parametrize(
    ("probabilities", "named"),
    [
        (None, "no predictions of the test rows"),
        (np.full((4, 3), 1 / 3, np.float32), "shape (4, 3), expected (5, 3)"),
        (np.full((5, 3), 1 / 3, np.float64), "dtype float64, expected float32"),
        (np.full((5, 3), np.nan, np.float32), "no distributions"),
        (np.full((5, 3), 0.5, np.float32), "no distributions"),
        (np.array([[1.5, -0.5, 0.0]] * 5, np.float32), "no distributions"),
    ],
)
def test_test_predictions_that_cannot_be_are_named(probabilities, named):
    bad = judged(test_probabilities=probabilities)
    assert named in bad_reply(bad, JUDGED)
    content = reply_content(bad)
    missing = "unexpected or missing records of arrays: ['test']"
    assert (missing if probabilities is None else named) in record_reason(content, JUDGED)


def test_test_predictions_that_nobody_asked_for_are_named():
    assert bad_reply(judged(), JUDGED_WITHOUT_SCORES) == "unexpected predictions of the test rows"
    unasked = record_reason(reply_content(judged()), JUDGED_WITHOUT_SCORES)
    assert unasked == "unexpected or missing records of arrays: ['test']"


# -- before decoding -------------------------------------------------------------------------


def arrays_of(content):
    return content.array_records["payload-arrays"]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ("metrics", "unexpected or missing records of metrics: ['metrics']"),
        ("payload", "expected predictions, got nothing"),
        ("payload-arrays", "unexpected or missing records of arrays: ['payload-arrays']"),
        ("plan", "the reply does not say which round, expected round 2"),
    ],
)
def test_a_missing_record_is_named(record, named):
    content = reply_content(reply(predictions()))
    del content[record]
    assert record_reason(content) == named


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (
            to_array_record({"values": scores()}),
            "unexpected or missing records of arrays: ['more']",
        ),
        (MetricRecord({"ce": 1.0}), "unexpected or missing records of metrics: ['more']"),
        (ConfigRecord({"ce": 1.0}), "unexpected records of settings: ['more']"),
    ],
)
def test_a_second_record_is_named(record, named):
    content = reply_content(reply(predictions()))
    content["more"] = record
    assert record_reason(content) == named


def test_an_empty_reply_is_named():
    assert record_reason(RecordDict()) == "expected predictions, got nothing"
    expected = "unexpected or missing records of metrics: ['metrics']"
    assert record_reason(RecordDict(), ONLY_TRAINED) == expected


def test_a_payload_that_is_too_large_is_named_before_it_is_decoded(monkeypatch):
    content = reply_content(reply(predictions(values=np.zeros((6000, 3), np.float32))))
    monkeypatch.setattr(Array, "numpy", lambda self: pytest.fail("was decoded"))
    size = sum(len(array.data) for array in arrays_of(content).values())
    room = 6 * 8 + 6 * 3 * 4 + 2 * 4096
    assert record_reason(content) == f"a payload of {size} bytes, expected at most {room}"


def test_many_empty_arrays_are_named():
    content = reply_content(reply(predictions()))
    arrays_of(content).update(to_array_record({f"a{i}": np.zeros(0) for i in range(9)}))
    expected = "unexpected or missing arrays: ['a0', 'a1', 'a2']"
    assert record_reason(content) == expected


def relabelled(**changes):
    """Return good predictions whose array of values says something else of itself."""
    content = reply_content(reply(predictions()))
    array = arrays_of(content)["values"]
    table = {name: getattr(array, name) for name in ("dtype", "shape", "stype", "data")}
    arrays_of(content)["values"] = Array(**{**table, **changes})
    return content


def npy(shape, dtype="<f4", numbers=b""):
    from io import BytesIO

    stream = BytesIO()
    table = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, table)
    return stream.getvalue() + numbers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shape": (3, 6)}, "by its label and"),
        ({"dtype": "float64"}, "by its label and"),
        ({"dtype": "no such type"}, "bytes that are no array"),
        ({"stype": "pickle"}, "has serialization 'pickle', expected 'numpy.ndarray'"),
        ({"data": b""}, "bytes that are no array"),
        ({"data": b"\x93NUMPY\x01\x00"}, "bytes that are no array"),
        ({"data": b"\x80\x04\x95pickle"}, "bytes that are no array"),
        ({"data": b"\x93NUMPY\x07\x00" + b" " * 100}, "version (7, 0) of the .npy format"),
        ({"data": npy((6, 3))[:-10] + b"\n"}, "bytes that are no array"),
        ({"data": npy((6, 3))}, "'values' has 0 bytes of numbers, expected 72"),
        ({"data": npy((6, 3), numbers=b"\0" * 60)}, "'values' has 60 bytes of numbers"),
        ({"data": npy((6, 3), numbers=b"\0" * 73)}, "'values' has 73 bytes of numbers"),
        # Text that is Python, or nearly: nothing of it is evaluated.
        ({"data": npy((6, 3)).replace(b"(6, 3)", b"(6,*3)")}, "not one that NumPy writes"),
        ({"data": npy((6, 3)).replace(b"(6, 3)", b"(6, 3_")}, "not one that NumPy writes"),
        ({"data": npy((6, 3)).replace(b"'<f4'", b"'<f\0'")}, "not one that NumPy writes"),
        ({"data": npy((6, 3)).replace(b"'<f4'", b"[[[[[")}, "not one that NumPy writes"),
        # A header that asks for four terabytes.
        ({"data": npy((10**6, 10**6)), "shape": (10**6, 10**6)}, "expected (6, 3)"),
        ({"data": npy((10**6, 10**6))}, "by its label and"),
        ({"data": npy((10**6, 10**6), numbers=b"\0" * 72)}, "by its label and"),
        ({"data": npy((6, 3), "|O"), "dtype": "object"}, "has dtype object, expected float32"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_named(changes, named):
    tracemalloc.start()
    try:
        assert named in record_reason(relabelled(**changes))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_arrays_in_another_memory_order_pass():
    content = reply_content(reply(predictions()))
    arrays_of(content)["values"] = Array(np.asfortranarray(scores()))
    assert np.array_equal(read_valid_reply(content, TRAINED).payload.values, scores())


def test_a_reason_is_one_short_line():
    content = reply_content(reply(predictions()))
    content["\n".join("ab" * 500)] = ConfigRecord({})
    named = record_reason(content)
    assert named.startswith("unexpected records of settings: ")
    assert len(named) == LONGEST_REASON
    assert "\n" not in named


def raw(content, name="values"):
    """Return the bytes of an array in a message."""
    return arrays_of(content)[name].data


@pytest.mark.parametrize("name", ["rows", "values"])
def test_no_byte_of_a_header_gets_past_the_reader(name):
    good = read_valid_reply(reply_content(reply(predictions())), TRAINED).payload
    header = len(raw(reply_content(reply(predictions())), name)) - getattr(good, name).nbytes
    passed = 0
    for place in range(header):
        for value in (0, 1, 10, 32, 39, 40, 41, 44, 57, 92, 123, 255):
            content = reply_content(reply(predictions()))
            data = bytearray(raw(content, name))
            data[place] = value
            arrays_of(content)[name].data = bytes(data)
            try:
                read = read_valid_reply(content, TRAINED).payload
            except RejectedReplyError:
                continue
            passed += 1
            # The byte is the same as before, or says the same.
            assert read.values.tobytes() == good.values.tobytes()
            assert read.rows.tobytes() == good.rows.tobytes()
    assert passed < header + 12


def test_numbers_that_begin_elsewhere_than_they_should_are_named():
    content = reply_content(reply(predictions()))
    data = bytearray(raw(content))
    # The header ends four bytes later, after the first number.
    data[8:10] = (int.from_bytes(data[8:10], "little") + 4).to_bytes(2, "little")
    data[131:132], data[127:128] = b"\n", b" "
    data[128:131] = b"   "
    arrays_of(content)["values"].data = bytes(data)
    assert record_reason(content) == "'values' has 68 bytes of numbers, expected 72"


def test_what_any_reader_raises_is_the_sender_s_fault(monkeypatch):
    import tokenize

    def stumble(content):
        raise tokenize.TokenError("EOF in multi-line statement", (1, 0))

    monkeypatch.setattr("sim.server.validation.read_reply", stumble)
    content = reply_content(reply(predictions()))
    content["metrics"]["ce"] = 0.5  # no longer the object that was never encoded
    assert record_reason(content).startswith("unreadable reply: TokenError: ")
    monkeypatch.setattr("sim.server.validation.bad_record", lambda *_: stumble(None))
    assert record_reason(content).startswith("unreadable reply: TokenError: ")


@pytest.mark.parametrize("round", ["two", "2", 2.0, True, [2]])
def test_a_round_that_is_no_whole_number_is_named(round):
    content = reply_content(reply(predictions()))
    content["plan"] = ConfigRecord({"round": round})
    assert record_reason(content) == f"the reply is to round {round!r}, expected round 2"


@pytest.mark.parametrize("temperature", ["1", True, [1.0], None])
def test_a_temperature_that_is_no_number_is_named(temperature):
    content = reply_content(reply(predictions()))
    told = json.loads(content["payload"]["plain"])
    told["fields"]["temperature"] = temperature
    content["payload"]["plain"] = json.dumps(told)
    assert record_reason(content).startswith("unreadable reply: ValueError: ")


@pytest.mark.parametrize(
    ("plain", "named"),
    [
        (b"1", "plain values that are no text of at most 67584 letters"),
        (7, "plain values that are no text of at most 67584 letters"),
        ("x" * 70_000, "plain values that are no text of at most 67584 letters"),
        ("[" * 60_000, "unreadable reply: RecursionError: "),
        ("{", "unreadable reply: JSONDecodeError: "),
        ("7", "unreadable reply: ValueError: "),
        ('{"value": "os:system", "fields": {}}', "unreadable reply: ValueError: unknown kind"),
        (
            '{"value": "fedkd.exchange.payloads.orders:Orders", "fields": {}}',
            "unreadable reply: ValueError: ",
        ),
    ],
)
def test_plain_values_that_cannot_be_are_named(plain, named):
    content = reply_content(reply(predictions()))
    content["payload"] = ConfigRecord({"kind": "predictions", "plain": plain})
    assert record_reason(content).startswith(named)


def test_a_payload_that_says_it_is_of_another_kind_than_it_is_is_named():
    content = reply_content(reply(weights()))
    content["payload"]["kind"] = "predictions"
    arrays_of(content).clear()
    arrays_of(content).update(arrays_of(reply_content(reply(predictions()))))
    assert record_reason(content).startswith("unreadable reply: ValueError: ")


def test_a_reason_holds_no_code_that_a_terminal_obeys():
    content = reply_content(reply(predictions()))
    content["\x1b[2J\x07\u202e"] = ConfigRecord({})
    assert record_reason(content) == r"unexpected records of settings: ['\x1b[2J\x07\u202e']"
    content = reply_content(reply(predictions()))
    arrays_of(content)["values"].stype = "\x1b[31m"
    named = record_reason(content)
    assert named.isprintable()


def test_a_rejection_tells_what_was_carried_where_it_could_be_read():
    for values, known in ((spoilt(scores(), np.nan), True), (scores(7), False)):
        with pytest.raises(RejectedReplyError) as raised:
            read_valid_reply(in_hand(reply_content(reply(predictions(values=values)))), TRAINED)
        assert (raised.value.payload is not None) is known


def test_an_error_in_the_place_of_a_reply_is_kept_within_bounds():
    identify_process(1)
    asked = Message(RecordDict(), 2, "train")
    text = "Traceback\n" + "x" * 10**6 + "\n\x1b[2JOSError: gone"
    with pytest.raises(RejectedReplyError) as raised:
        valid_answer(Message(Error(1, text), reply_to=asked), TRAINED, again=False)
    assert str(raised.value).endswith("OSError: gone")
    assert len(str(raised.value)) <= LONGEST_REASON
    assert len(raised.value.told) <= LONGEST_TRACEBACK
    assert raised.value.told.endswith("\n?[2JOSError: gone")


def test_looking_at_a_large_payload_makes_no_table_of_its_size():
    rows = np.arange(20_000)
    expected = Expected(round=2, asked=Predictions.asked(rows, 50))
    values = softmax(scores(20_000, 50))
    for table in (values, values - np.float32(1)):
        sent = reply(Predictions(rows=rows, values=table))
        tracemalloc.start()
        try:
            bad_reply(sent, expected)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < table.nbytes / 8


# -- bad replies by name ---------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_REPLIES)
@pytest.mark.parametrize(("sent", "expected"), GOOD)
def test_every_bad_reply_is_named(name, sent, expected):
    for seed in range(5):
        bad = BAD_REPLIES[name](sent, np.random.default_rng(seed))
        assert reason(bad, expected)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    names=st.lists(st.sampled_from(list(BAD_REPLIES)), min_size=1, max_size=4, unique=True),
    case=st.sampled_from(GOOD),
    seed=st.integers(0, 2**32 - 1),
)
def test_replies_that_are_bad_in_several_ways_are_named(names, case, seed):
    sent, expected = case
    rng = np.random.default_rng(seed)
    for name in names:
        sent = BAD_REPLIES[name](sent, rng)
    assert bad_reply(sent, expected)
    named = record_reason(reply_content(sent), expected)
    assert named
    assert "Traceback" not in named


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_spoiling_leaves_the_good_reply_alone_and_follows_its_generator(name):
    for sent, _ in GOOD:
        before = reply_content(sent)
        one, other = (
            reply_content(BAD_REPLIES[name](sent, np.random.default_rng(3))) for _ in range(2)
        )
        assert same_content(reply_content(sent), before)
        assert same_content(one, other)
        assert not same_content(one, before)


def same_content(one, other):
    """Compare what messages carry; NaN equals NaN."""
    return str(dict(one)) == str(dict(other)) and all(
        {name: array.data for name, array in one.array_records[record].items()}
        == {name: array.data for name, array in other.array_records[record].items()}
        for record in one.array_records
    )


# -- constants that are no numbers -------------------------------------------------------------


def test_a_constant_mask_comes_back_as_it_was_or_is_named():
    mask = np.triu(np.full((2, 3), -np.inf, np.float32), 1)
    expected = Expected(round=2, asked=Weights.asked({**MODEL, "weight": mask}))
    assert reason(reply(weights(weight=mask)), expected) is None
    message = "parameter 'weight' is a constant with NaN or infinity and has changed"
    for changed in (np.where(mask < 0, np.nan, mask), np.where(mask < 0, mask, 1), mask + 1):
        assert reason(reply(weights(weight=changed.astype(np.float32))), expected) == message
    # What was a number has to stay one.
    spoilt = np.array([1, np.inf, 1], np.float32)
    assert "NaN or infinity" in reason(reply(weights(weight=mask, running_var=spoilt)), expected)


@pytest.mark.parametrize("kind", ["Masked", "Scaled"])
@pytest.mark.parametrize(("strategy", "own"), [("fedavg", "models"), ("fml", "meme")])
def test_odd_models_are_averaged_round_after_round(
    strategy, own, kind, tiny_settings, tiny_data, simulate
):
    model = {"name": "odd_models:make", "options": {"kind": kind}}
    place = {"clients": {"models": [model]}} if own == "models" else {"options": {"meme": model}}
    run = simulate(tiny_settings(strategy, **place), tiny_data())
    assert run.events == []
    state = run.loop.boundary.state
    averaged = (
        state.model.weights if strategy == "fml" else next(iter(state.models.values())).arrays
    )
    if kind == "Masked":
        assert np.isneginf(averaged["mask"][0, 1])
        assert np.isnan(averaged["unset"])
    else:
        assert averaged["scale"].shape == ()
        assert bool(averaged["is_used"])
