"""Checks on what clients answer: a bad reply is named and left out, never averaged in.

Two looks at a reply. `bad_record` reads what a message declares, before anything in it is decoded
or room is made for it; `bad_reply` reads the decoded numbers. `read_valid_reply` does both.
Neither makes a table of the payload's size.

How many examples a client has is no part of a reply: the server knows it from the partition, so
nobody gains weight by claiming them.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import get_args

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedkd.training import Arrays
from sim.wire.messages import ClientReply, is_unencoded, read_reply
from strategies.base import UploadKind
from strategies.knowledge import Knowledge, PredictionKind, Predictions
from strategies.plan import Federation, RoundPlan

LARGEST_SCORE = 1e4
"""Logits beyond this are refused: honest training does not produce them, attacks do."""

LARGEST_PARAMETER = 1e8
"""Weights and statistics beyond this are refused: one of them ruins every client's model."""

LARGEST_METRIC = 2.0**53
"""Metrics beyond this are refused: no loss is as large, and no count is exact any more."""

MOST_METRICS = 64
"""Numbers that a reply may report."""

LONGEST_NAME = 100
"""Letters in the name of a metric."""

SLIGHTLY_NEGATIVE = -1e-3
"""A divergence of near-equal distributions may round to a little less than 0, no loss to more."""

RESERVED_METRICS = frozenset({"round", "scope", "client"})
"""What a row of metrics says about itself."""

ACCURACIES = (
    "accuracy",
    "personal_accuracy",
    "macro_recall",
    "worst_class_recall",
    "validation_accuracy",
)
"""What every evaluation reports, in [0, 1]; nothing that a client measures in training."""

FEWEST_ROWS = 4
"""Rows that have to look like distributions before they are taken for some."""

SUM_TOLERANCE = 1e-3
"""By how much the sum of a distribution may miss 1: the rounding of half precision."""

HEADER_BYTES = 4096
"""Room for an array's own header beside its numbers."""

MAGIC_BYTES = np.lib.format.MAGIC_LEN
"""What an ``.npy`` file begins with: its name and its version."""

LONGEST_TRACEBACK = 10_000
"""Letters of a client's traceback that go into the record."""

LONGEST_REASON = 300
"""Letters of a reason that go into the record; a reply may have put any text into it."""

FLOAT32 = np.dtype(np.float32)

NPY_HEADER = re.compile(
    rb"\{'descr': '([<>=|]?[A-Za-z?]\d{0,9})', 'fortran_order': (?:True|False), "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18})+)\), \} *\n"
)
"""What every NumPy writes before an array's numbers: type and shape, and nothing to be evaluated.

NumPy itself hands what is no such text to Python's parser and tokenizer, whose errors and whose
appetite for memory are no concern of a server.
"""

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of each array by name."""


class RejectedReplyError(ValueError):
    """A reply that cannot be used; the text is the reason, in one short line.

    Attributes:
        knowledge: what it carried, where that much of it could be read.
        told: what belongs into the record: the reason, or the whole traceback of a client's own.
    """

    def __init__(
        self, reason: str, knowledge: Knowledge | None = None, *, traceback: str | None = None
    ) -> None:
        super().__init__(shortened(reason))
        self.knowledge = knowledge
        self.told = str(self) if traceback is None else traceback


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a client's answer has to look like.

    Attributes:
        round: the round that it was asked in.
        uploads: what clients send; ``nothing`` where they are only judged.
        rows: the round's public rows, where clients send predictions.
        classes: how many scores a row has.
        parameters: the layout of the client's model, where it sends parameters.
        constants: those of its arrays that hold NaN or infinity from the start, such as a mask of
            -inf: they have to come back as they were.
        test_rows: rows of the test split where the client is judged; None where it trains.
        test_probabilities: whether a judged client sends its predictions of the test rows.
    """

    round: int
    uploads: UploadKind
    rows: np.ndarray
    classes: int
    parameters: Layout | None = None
    constants: Arrays = field(default_factory=dict)
    test_rows: int | None = None
    test_probabilities: bool = False

    @classmethod
    def training(
        cls,
        plan: RoundPlan,
        uploads: UploadKind,
        parameters: Layout | None = None,
        constants: Arrays | None = None,
    ) -> "Expected":
        """Return what a client that trained answers."""
        return cls(
            round=plan.round,
            uploads=uploads,
            rows=plan.public_rows if uploads == "predictions" else np.empty(0, np.int64),
            classes=plan.federation.num_classes,
            parameters=parameters,
            constants=constants or {},
        )

    @classmethod
    def evaluation(cls, plan: RoundPlan, uploads: UploadKind, test_rows: int) -> "Expected":
        """Return what a client that is judged answers, ``uploads`` being what it trains for."""
        return cls(
            round=plan.round,
            uploads="nothing",
            rows=np.empty(0, np.int64),
            classes=plan.federation.num_classes,
            test_rows=test_rows,
            test_probabilities=uploads == "predictions",
        )

    @property
    def arrays(self) -> dict[str, Layout]:
        """The layout of each record of arrays that the message has to hold."""
        records: dict[str, Layout] = {}
        if self.uploads == "predictions":
            records["knowledge-arrays"] = {
                "rows": (self.rows.shape, self.rows.dtype),
                "values": ((len(self.rows), self.classes), FLOAT32),
            }
        elif self.uploads == "parameters":
            records["knowledge-arrays"] = self.parameters or {}
        if self.test_rows is not None and self.test_probabilities:
            records["test"] = {"probabilities": ((self.test_rows, self.classes), FLOAT32)}
        return records


def valid_answer(message: Message, expected: Expected, *, again: bool) -> ClientReply:
    """Return the reply that a message carries.

    Args:
        message: a client's, or the runtime's error in the place of it.
        expected: what was asked for.
        again: whether the client gave a usable answer already.

    Raises:
        RejectedReplyError: if there is none that can be used, with the reason.
    """
    if message.has_error():
        text = message.error.reason or "unknown error"
        # A traceback ends with what matters.
        traceback = _without_codes(text[-LONGEST_TRACEBACK:])
        raise RejectedReplyError(text[-LONGEST_REASON:], traceback=traceback)
    if again:
        raise RejectedReplyError(f"a second reply to round {expected.round}")
    return read_valid_reply(message.content, expected)


def read_valid_reply(content: RecordDict, expected: Expected) -> ClientReply:
    """Return the reply in a message's content.

    Raises:
        RejectedReplyError: if it cannot be used, with the reason in one short line.
    """
    knowledge = None
    try:
        # A reply of our own grid was never turned into bytes; there is nothing to look at before.
        reason = None if is_unencoded(content) else bad_record(content, expected)
        if reason is None:
            reply = read_reply(content)
            knowledge = reply.knowledge
            reason = bad_reply(reply, expected)
    except Exception as error:
        # Whatever the bytes of others make a reader raise is the sender's fault.
        reason = f"unreadable reply: {type(error).__name__}: {error}"
    if reason is not None:
        raise RejectedReplyError(reason, knowledge)
    return reply


def shortened(reason: str) -> str:
    """Return a reason as one line of bounded length, without codes that a terminal obeys."""
    line = _without_codes(" ".join(reason.split()))
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


def _without_codes(text: str) -> str:
    """Return a text without what a terminal would obey; its lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


# -- before decoding -------------------------------------------------------------------------


def bad_record(content: RecordDict, expected: Expected) -> str | None:
    """Return why a message's content is not worth decoding, or None."""
    layouts = expected.arrays
    reason = (
        _bad_settings(content, expected)
        or _bad_names("records of arrays", content.array_records.keys(), layouts.keys())
        or _bad_names("records of metrics", content.metric_records.keys(), {"metrics"})
        or _bad_metric_types(content.metric_records["metrics"])
    )
    for name, layout in layouts.items():
        reason = reason or _bad_array_record(content.array_records[name], layout)
    return reason


def _bad_settings(content: RecordDict, expected: Expected) -> str | None:
    """Look at what the message says of itself: which round it answers, what it carries."""
    configs = content.config_records
    unknown = configs.keys() - {"plan", "knowledge"}
    if unknown:
        return f"unexpected records of settings: {sorted(unknown)[:3]}"
    if "plan" in configs:
        reason = _bad_round(configs["plan"].get("round"), expected.round)
        if reason is not None:
            return reason
    if "knowledge" not in configs:
        return (
            None if expected.uploads == "nothing" else f"expected {expected.uploads}, got nothing"
        )
    told = configs["knowledge"]
    kind = told.get("kind")
    temperature = told.get("temperature")
    reason = _bad_upload_kind(kind, expected.uploads)
    if reason is None and kind != "parameters" and type(temperature) not in (int, float):
        reason = f"the temperature is {temperature!r}, expected a number"
    return reason


def _bad_upload_kind(kind: object, uploads: UploadKind) -> str | None:
    sent = "parameters" if kind == "parameters" else "predictions"
    if uploads == "nothing":
        return f"expected nothing, got {kind}"
    if sent != uploads:
        return f"expected {uploads}, got {sent}"
    if sent == "predictions" and kind != "logits":
        return f"kind {kind!r}, expected 'logits'"
    return None


def _bad_metric_types(metrics: Mapping[str, object]) -> str | None:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"metric {name!r} is a {type(value).__name__}, expected a number"
    return None


def _bad_array_record(record: ArrayRecord, layout: Layout) -> str | None:
    room = sum(math.prod(shape) * dtype.itemsize + HEADER_BYTES for shape, dtype in layout.values())
    size = sum(len(array.data) for array in record.values())
    # First of all: what is too large may be so because it has too many names.
    if size > room:
        return f"a payload of {size} bytes, expected at most {room}"
    reason = _bad_names("arrays", record.keys(), layout.keys())
    for name, (shape, dtype) in layout.items():
        reason = reason or _bad_declaration(name, record[name], shape, dtype)
    return reason


def _bad_declaration(
    name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype
) -> str | None:
    """Compare what an array says of itself, twice, with what is expected; decode nothing."""
    header = _npy_header(shape, dtype)
    if (
        (array.stype, tuple(array.shape), array.dtype) == ("numpy.ndarray", shape, str(dtype))
        and len(array.data) == len(header) + math.prod(shape) * dtype.itemsize
        and array.data.startswith(header)
    ):
        return None
    subject = f"{name!r} has "
    if array.stype != "numpy.ndarray":
        return f"{subject}serialization {array.stype!r}, expected 'numpy.ndarray'"
    try:
        declared = tuple(array.shape), np.dtype(array.dtype)
        *encoded, start = _encoded_layout(array.data)
    except Exception as error:
        return f"{subject}bytes that are no array: {error}"
    if declared != tuple(encoded):
        return f"{subject}layout {declared} by its label and {tuple(encoded)} by its bytes"
    reason = _bad_layout(subject, *declared, shape, dtype)
    room = math.prod(shape) * dtype.itemsize
    if reason is None and len(array.data) - start != room:
        # Numbers that begin elsewhere are others, whatever the header says.
        reason = f"{subject}{len(array.data) - start} bytes of numbers, expected {room}"
    return reason


@lru_cache(maxsize=1024)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the bytes that NumPy puts before the numbers of an array."""
    stream = BytesIO()
    table = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, table)
    return stream.getvalue()


def _encoded_layout(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape and type by the header of an ``.npy`` file, and where its numbers begin."""
    version = np.lib.format.read_magic(BytesIO(data[:MAGIC_BYTES]))
    size = {(1, 0): 2, (2, 0): 4}.get(version)
    if size is None:
        raise ValueError(f"version {version} of the .npy format is not known here")
    length = MAGIC_BYTES + size
    start = length + int.from_bytes(data[MAGIC_BYTES:length], "little")
    header = NPY_HEADER.fullmatch(data[length : min(start, length + HEADER_BYTES)])
    if header is None or start > len(data):
        raise ValueError("the header is not one that NumPy writes")
    shape = tuple(int(size) for size in header[2].split(b",") if size)
    return shape, np.dtype(header[1].decode("ascii")), start


# -- after decoding --------------------------------------------------------------------------


def bad_reply(reply: ClientReply, expected: Expected) -> str | None:
    """Return why a reply cannot be used, or None for a good one."""
    return (
        _bad_round(reply.round, expected.round)
        or _bad_metric_types(reply.metrics)
        or _bad_metrics(reply.metrics, judged=expected.test_rows is not None)
        or bad_knowledge(reply.knowledge, expected)
        or _bad_test(reply.test_probabilities, expected)
    )


def _bad_round(answered: object, asked: int) -> str | None:
    # Neither "2" nor 2.7 nor True is a round.
    if type(answered) is int and answered == asked:
        return None
    said = "does not say which round" if answered is None else f"is to round {answered!r}"
    return f"the reply {said}, expected round {asked}"


def _bad_metrics(metrics: Mapping[str, float], *, judged: bool) -> str | None:
    if len(metrics) > MOST_METRICS:
        return f"{len(metrics)} metrics, expected at most {MOST_METRICS}"
    for name, value in metrics.items():
        if name in RESERVED_METRICS:
            return f"metric {name!r} has a name that records use themselves"
        if len(name) > LONGEST_NAME:
            return f"metric {name[:20]!r}... has a name of {len(name)} letters"
        if not judged and name in ACCURACIES:
            return f"metric {name!r} is for evaluations, and this is a reply to training"
        if judged and name in ACCURACIES:
            # A client none of whose classes occurs in the test split has no accuracy of its own.
            no_number = name == "personal_accuracy" and math.isnan(value)
            if not (0 <= value <= 1 or no_number):
                return f"metric {name!r} is {value:g}, expected a number in [0, 1]"
        elif not math.isfinite(value):
            return f"metric {name!r} is {value:g}, expected a finite number"
        elif abs(value) > LARGEST_METRIC:
            return f"metric {name!r} is {value:g}, expected at most {LARGEST_METRIC:g}"
        elif not judged and value < SLIGHTLY_NEGATIVE:
            return f"metric {name!r} is {value:g}, expected a number >= 0"
    missing = [name for name in ACCURACIES if name not in metrics] if judged else []
    return f"metric {missing[0]!r} is missing" if missing else None


def bad_knowledge(knowledge: Knowledge | None, expected: Expected) -> str | None:
    """Return why an upload cannot be used, or None for a good one."""
    if knowledge is None:
        return (
            None if expected.uploads == "nothing" else f"expected {expected.uploads}, got nothing"
        )
    reason = _bad_upload_kind(knowledge.kind, expected.uploads)
    if reason is not None:
        return reason
    if isinstance(knowledge, Predictions):
        return _bad_predictions(knowledge, expected)
    return _bad_parameters(knowledge.arrays, expected.parameters or {}, expected.constants)


def _bad_predictions(predictions: Predictions, expected: Expected) -> str | None:
    rows, values = expected.rows, predictions.values
    shape = len(rows), expected.classes
    reason = _bad_layout("", values.shape, values.dtype, shape, FLOAT32)
    if reason is not None:
        return reason
    if not np.array_equal(predictions.rows, rows):
        return f"rows are not the {len(rows)} public rows of round {expected.round}"
    if predictions.temperature != 1:
        return f"temperature {predictions.temperature:g}, expected 1: logits are not softened"
    reason = _bad_values("among the scores", "a score", values, LARGEST_SCORE)
    return reason or _probabilities_for_logits(values)


def _probabilities_for_logits(values: np.ndarray) -> str | None:
    """Name a table whose every row is a distribution: somebody sent a softmax.

    Honest logits look like that by chance only, which a few rows rule out; so nothing is said of
    fewer than `FEWEST_ROWS`, nor of a single class. A model that ends in a softmax of its own is
    named as well: its outputs are no logits.
    """
    rows, classes = values.shape
    if rows >= FEWEST_ROWS and classes > 1 and _are_distributions(values):
        return "every row of scores sums to 1: probabilities, expected logits"
    return None


def _are_distributions(values: np.ndarray) -> bool:
    # The first rows settle it for honest logits.
    return all(
        bool(rows.min() >= 0) and np.allclose(rows.sum(axis=-1), 1, rtol=0, atol=SUM_TOLERANCE)
        for rows in (values[:16], values)
    )


def not_finite(arrays: Arrays) -> Arrays:
    """Return the arrays that hold NaN or infinity."""
    return {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    }


def _bad_parameters(arrays: Arrays, layout: Layout, constants: Arrays) -> str | None:
    reason = _bad_names("parameters", arrays.keys(), layout.keys())
    for name, (shape, dtype) in layout.items():
        if reason is not None:
            return reason
        array = arrays[name]
        subject = f"parameter {name!r}"
        reason = _bad_layout(f"{subject} has ", array.shape, array.dtype, shape, dtype)
        if reason is None and name in constants:
            if not np.array_equal(array, constants[name], equal_nan=True):
                reason = f"{subject} is a constant with NaN or infinity and has changed"
        elif reason is None and array.size:
            reason = _bad_values(f"in {subject}", subject, array, LARGEST_PARAMETER)
            # BatchNorm takes the root of its variance, and its counter only counts.
            is_count = name.endswith(("running_var", "num_batches_tracked"))
            if reason is None and is_count and array.min() < 0:
                reason = f"{subject} is negative"
    return reason


def _bad_test(probabilities: np.ndarray | None, expected: Expected) -> str | None:
    """Look at a judged client's predictions of the test rows."""
    layout = expected.arrays.get("test")
    if probabilities is None or layout is None:
        if (probabilities is None) == (layout is None):
            return None
        return f"{'no' if layout else 'unexpected'} predictions of the test rows"
    subject = "test probabilities have "
    shape, dtype = layout["probabilities"]
    reason = _bad_layout(subject, probabilities.shape, probabilities.dtype, shape, dtype)
    if reason is None and not _are_distributions(probabilities):
        reason = "test probabilities are no distributions: NaN, negative or a sum other than 1"
    return reason


# -- what was kept ---------------------------------------------------------------------------


def check_predictions(kept: Predictions, federation: Federation) -> None:
    """Refuse predictions that no server of this run sends; their numbers may be any.

    Raises:
        ValueError: with the reason.
    """
    rows = kept.rows
    inside = rows.size == 0 or bool(rows.min() >= 0 and rows.max() < federation.public_size)
    if rows.ndim != 1 or rows.dtype != np.int64 or not inside or bool((np.diff(rows) <= 0).any()):
        raise ValueError("rows that are not of the public set, in order")
    reason = _bad_layout(
        "", kept.values.shape, kept.values.dtype, (len(rows), federation.num_classes), FLOAT32
    )
    if kept.kind not in get_args(PredictionKind):
        reason = f"kind {kept.kind!r}"
    temperature = kept.temperature
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        reason = f"temperature {temperature!r}"
    if reason is not None:
        raise ValueError(f"predictions have {reason}")


def check_parameters(arrays: Arrays, layout: Layout) -> None:
    """Refuse parameters of another model; their numbers may be any.

    Raises:
        ValueError: with the reason.
    """
    reason = _bad_names("parameters", arrays.keys(), layout.keys())
    for name, (shape, dtype) in layout.items():
        reason = reason or _bad_layout(
            f"{name!r} has ", arrays[name].shape, arrays[name].dtype, shape, dtype
        )
    if reason is not None:
        raise ValueError(reason)


def check_arrays(arrays: Arrays, layouts: Iterable[Layout]) -> None:
    """Refuse arrays that are called like parameters of some model, and are those of none.

    Args:
        arrays: by a prefix, a slash and the name of a parameter.
        layouts: of the models.

    Raises:
        ValueError: with the reason.
    """
    known: dict[str, list[tuple[tuple[int, ...], np.dtype]]] = {}
    for layout in layouts:
        for name, form in layout.items():
            known.setdefault(name, []).append(form)
    for key, array in arrays.items():
        forms = known.get(key.partition("/")[2])
        if forms is not None and (array.shape, array.dtype) not in forms:
            raise ValueError(f"{key!r} is {array.dtype} {array.shape}")


# -- arrays ----------------------------------------------------------------------------------


def _bad_layout(
    subject: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    expected_shape: tuple[int, ...],
    expected_dtype: np.dtype,
) -> str | None:
    if shape != expected_shape:
        return f"{subject}shape {shape}, expected {expected_shape}"
    if dtype != expected_dtype:
        return f"{subject}dtype {dtype}, expected {expected_dtype}"
    return None


def _bad_values(where: str, subject: str, values: np.ndarray, largest: float) -> str | None:
    """Name NaN, infinity and huge numbers; makes no table of the size of ``values``."""
    # Both ends are NaN where any value is.
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"NaN or infinity {where}"
    size = max(-low, high)
    if size > largest:
        return f"{subject} of size {size:g}, expected at most {largest:g}"
    return None


def _bad_names(what: str, names: Collection[str], expected: Collection[str]) -> str | None:
    if set(names) == set(expected):
        return None
    return f"unexpected or missing {what}: {sorted(set(names) ^ set(expected))[:3]}"
