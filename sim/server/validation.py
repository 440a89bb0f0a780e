"""Checks on what clients answer: a bad reply is named and left out, never averaged in.

Two looks at a reply. `bad_record` reads what a message declares, before anything in it is decoded
or room is made for it; `bad_reply` reads the decoded numbers. `read_valid_reply` does both.
Neither makes a table of the payload's size.

How many examples a client has is no part of a reply: the server knows it from the partition, so
nobody gains weight by claiming them.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedkd.exchange.payload import Asked, Limit, Payload
from fedkd.exchange.spending import PrivacyBudgetError
from fedkd.targets.scale import are_distributions
from sim.engine.mistakes import author_traceback, is_misfortune
from sim.wire.messages import MEMORY_LOST, MISTAKE, ClientReply, is_unencoded, read_reply
from sim.wire.records import arrays_name

LARGEST_METRIC = 2.0**53
"""Metrics beyond this are refused: no loss is as large, and no count is exact any more."""

MOST_METRICS = 64
"""Numbers that a reply may report."""

LONGEST_NAME = 100
"""Letters in the name of a metric."""

SLIGHTLY_NEGATIVE = -1e-3
"""A divergence of near-equal distributions may round to a little less than 0, no loss to more."""

RESERVED_METRICS = frozenset({"round", "scope", "client", "forgetting"})
"""What a row of metrics says about itself, and what the server adds to it."""

ACCURACIES = (
    "accuracy",
    "personal_accuracy",
    "macro_recall",
    "worst_class_recall",
    "validation_accuracy",
)
"""What every evaluation reports, in [0, 1]; nothing that a client measures in training."""

CALIBRATION_ERROR = "calibration_error"
"""What an evaluation reports beside where scores are logits, in [0, 1]; NaN where some are no
numbers that a probability could be made of."""

ATTACK_SUCCESS = "attack_success"
"""What an evaluation reports beside where an adversary wants test rows to be given a class."""

HEADER_BYTES = 4096
"""Room for an array's own header beside its numbers."""

MAGIC_BYTES = np.lib.format.MAGIC_LEN
"""What an ``.npy`` file begins with: its name and its version."""

LONGEST_TRACEBACK = 10_000
"""Letters of a client's traceback that go into the record."""

LONGEST_REASON = 300
"""Letters of a reason that go into the record; a reply may have put any text into it."""

LONGEST_PLAIN = 65_536
"""Letters of a payload's plain values, and so many more for each of its arrays as the next says."""
PLAIN_PER_ARRAY = 1024

NPY_HEADER = re.compile(
    rb"\{'descr': '([<>=|]?[A-Za-z?]\d{0,9})', 'fortran_order': (?:True|False), "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18})+)\), \} *\n"
)
"""What every NumPy writes before an array's numbers: type and shape, and nothing to be evaluated.

NumPy itself hands what is no such text to Python's parser and tokenizer, whose errors and whose
appetite for memory are no concern of a server.
"""


class RejectedReplyError(ValueError):
    """A reply that cannot be used; the text is the reason, in one short line.

    Attributes:
        payload: what it carried, where that much of it could be read.
        memory_lost: whether the client lost what its codecs remembered.
        told: what belongs into the record: the reason, or the whole traceback of a client's own.
    """

    def __init__(
        self,
        reason: str,
        payload: Payload | None = None,
        *,
        traceback: str | None = None,
        memory_lost: bool = False,
    ) -> None:
        super().__init__(shortened(reason))
        self.payload = payload
        self.memory_lost = memory_lost
        self.told = str(self) if traceback is None else traceback


class AuthorError(RuntimeError):
    """The code of an algorithm or of a model is wrong; the run is over.

    Args:
        where: it failed, such as ``round 2, a client's half``.
        traceback: of its exception.
    """

    def __init__(self, where: str, traceback: str) -> None:
        super().__init__(f"{where}: an algorithm's or a model's own code failed\n{traceback}")


@contextmanager
def authors_code(
    where: str, passed_on: Callable[[], BaseException | None] = lambda: None
) -> Iterator[None]:
    """Run code of an algorithm's server half; what it raises ends the run as its author's mistake.

    Args:
        where: it runs.
        passed_on: returns what was raised to it by what it was handed, if anything was.

    Raises:
        AuthorError: it raised an exception of its own.
    """
    try:
        yield
    except (AuthorError, PrivacyBudgetError):
        # The second comes out of the answers that it was handed.
        raise
    except Exception as error:
        if error is passed_on() or is_misfortune(error):
            raise
        raise AuthorError(where, author_traceback(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a client's answer has to look like.

    Attributes:
        round: the round that it was asked in.
        asked: what it has to send; None: nothing.
        test: of its predictions of the test split, where it sends them.
        judged: whether it is judged, and does not train.
        any_loss: whether losses of training may be any numbers. Where a mechanism protects what is
            sent they decide nothing: whether an answer counts would tell of private rows.
        checks_payload: whether the payload is looked at here; if not, whoever decodes it does.
    """

    round: int
    asked: Asked | None = None
    test: Limit | None = None
    judged: bool = False
    any_loss: bool = False
    checks_payload: bool = True

    @classmethod
    def evaluation(cls, round: int, test_rows: int, classes: int, *, answers: bool) -> "Expected":
        """Return what a client that is judged answers.

        Args:
            round: 1-based.
            test_rows: rows of the test split.
            classes: how many scores a row has.
            answers: whether it sends its predictions of the test rows.
        """
        test = Limit(shape=(test_rows, classes)) if answers else None
        return cls(round=round, test=test, judged=True)

    @property
    def records(self) -> dict[str, Asked]:
        """What each record of arrays has to hold."""
        records: dict[str, Asked] = {}
        if self.asked is not None:
            records[arrays_name("payload")] = self.asked
        if self.test is not None:
            records["test"] = Asked(kind=Payload, limits={"probabilities": self.test})
        return records


def valid_answer(message: Message, expected: Expected, *, again: bool) -> ClientReply:
    """Return the reply that a message carries.

    Args:
        message: a client's, or the runtime's error in the place of it.
        expected: what was asked for.
        again: whether the client gave a usable answer already.

    Raises:
        RejectedReplyError: if there is none that can be used, with the reason.
        AuthorError: the code that should have made it is wrong.
    """
    if message.has_error() and message.error.code == MISTAKE:
        told = message.error.reason or "it does not say how"
        half = "the judging of a client" if expected.judged else "a client's half"
        where = f"round {expected.round}, {half}"
        raise AuthorError(where, without_codes(told[-LONGEST_TRACEBACK:]))
    if message.has_error():
        text = message.error.reason or "unknown error"
        # A traceback ends with what matters.
        traceback = without_codes(text[-LONGEST_TRACEBACK:])
        lost = message.error.code == MEMORY_LOST
        raise RejectedReplyError(text[-LONGEST_REASON:], traceback=traceback, memory_lost=lost)
    if again:
        raise RejectedReplyError(f"a second reply to round {expected.round}")
    return read_valid_reply(message.content, expected)


def read_valid_reply(content: RecordDict, expected: Expected) -> ClientReply:
    """Return the reply in a message's content.

    Raises:
        RejectedReplyError: if it cannot be used, with the reason in one short line.
    """
    payload = None
    try:
        # A reply of our own grid was never turned into bytes; there is nothing to look at before.
        reason = None if is_unencoded(content) else bad_record(content, expected)
        if reason is None:
            reply = read_reply(content)
            payload = reply.payload
            reason = bad_reply(reply, expected)
    except Exception as error:
        # Whatever the bytes of others make a reader raise is the sender's fault.
        reason = f"unreadable reply: {type(error).__name__}: {error}"
    if reason is not None:
        raise RejectedReplyError(reason, payload)
    return reply


def shortened(reason: str) -> str:
    """Return a reason as one line of bounded length, without codes that a terminal obeys."""
    line = without_codes(" ".join(reason.split()))
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


def without_codes(text: str) -> str:
    """Return a text without what a terminal would obey; its lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


# -- before decoding -------------------------------------------------------------------------


def bad_record(content: RecordDict, expected: Expected) -> str | None:
    """Return why a message's content is not worth decoding, or None."""
    records = expected.records
    reason = (
        _bad_settings(content, expected)
        or _bad_names("records of arrays", content.array_records.keys(), records.keys())
        or _bad_names("records of metrics", content.metric_records.keys(), {"metrics"})
        or _bad_metric_types(content.metric_records["metrics"])
    )
    for name, asked in records.items():
        reason = reason or _bad_array_record(content.array_records[name], asked)
    return reason


def _bad_settings(content: RecordDict, expected: Expected) -> str | None:
    """Look at what the message says of itself: which round it answers, what it carries."""
    configs = content.config_records
    unknown = configs.keys() - {"plan", "payload"}
    if unknown:
        return f"unexpected records of settings: {sorted(unknown)[:3]}"
    if "plan" in configs:
        reason = _bad_round(configs["plan"].get("round"), expected.round)
        if reason is not None:
            return reason
    asked = expected.asked
    if "payload" not in configs:
        return None if asked is None else f"expected {asked.kind.kind}, got nothing"
    told = configs["payload"]
    reason = _bad_kind(told.get("kind"), asked)
    if reason is None and asked is not None:
        plain, longest = told.get("plain"), LONGEST_PLAIN + PLAIN_PER_ARRAY * len(asked.limits)
        if not isinstance(plain, str) or len(plain) > longest:
            reason = f"plain values that are no text of at most {longest} letters"
    return reason


def _bad_kind(kind: object, asked: Asked | None) -> str | None:
    if asked is None:
        return f"expected nothing, got {kind}"
    return None if kind == asked.kind.kind else f"expected {asked.kind.kind}, got {kind}"


def _bad_metric_types(metrics: Mapping[str, object]) -> str | None:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"metric {name!r} is a {type(value).__name__}, expected a number"
    return None


def _bad_array_record(record: ArrayRecord, asked: Asked) -> str | None:
    room = asked.most_bytes + HEADER_BYTES * len(asked.limits)
    size = sum(len(array.data) for array in record.values())
    # First of all: what is too large may be so because it has too many names.
    if size > room:
        return f"a payload of {size} bytes, expected at most {room}"
    reason = asked.bad_names(set(record.keys()))
    sizes: dict[str, int] = {}
    for name, array in record.items():
        reason = reason or _bad_declaration(name, array, asked.limits[name], sizes)
    return reason


def _bad_declaration(name: str, array: Array, limit: Limit, sizes: dict[str, int]) -> str | None:
    """Compare what an array says of itself, twice, with what is expected; decode nothing."""
    shape = tuple(array.shape)
    if shape == limit.shape and (array.stype, array.dtype) == ("numpy.ndarray", str(limit.dtype)):
        header = _npy_header(shape, limit.dtype)
        size = len(header) + math.prod(shape) * limit.dtype.itemsize
        if len(array.data) == size and array.data.startswith(header):
            return None
    subject = f"{name!r} has "
    if array.stype != "numpy.ndarray":
        return f"{subject}serialization {array.stype!r}, expected 'numpy.ndarray'"
    try:
        declared = shape, np.dtype(array.dtype)
        *encoded, start = _encoded_layout(array.data)
    except Exception as error:
        return f"{subject}bytes that are no array: {error}"
    if declared != tuple(encoded):
        return f"{subject}layout {declared} by its label and {tuple(encoded)} by its bytes"
    reason = limit.bad_layout(*declared, sizes)
    if reason is not None:
        return f"{subject}{reason}"
    room = math.prod(shape) * declared[1].itemsize
    if len(array.data) - start != room:
        # Numbers that begin elsewhere are others, whatever the header says.
        return f"{subject}{len(array.data) - start} bytes of numbers, expected {room}"
    return None


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
        or _bad_metrics(reply.metrics, judged=expected.judged, any_loss=expected.any_loss)
        or (bad_payload(reply.payload, expected.asked) if expected.checks_payload else None)
        or _bad_test(reply.test_probabilities, expected.test)
    )


def _bad_round(answered: object, asked: int) -> str | None:
    # Neither "2" nor 2.7 nor True is a round.
    if type(answered) is int and answered == asked:
        return None
    said = "does not say which round" if answered is None else f"is to round {answered!r}"
    return f"the reply {said}, expected round {asked}"


def _bad_metrics(metrics: Mapping[str, float], *, judged: bool, any_loss: bool) -> str | None:
    if len(metrics) > MOST_METRICS:
        return f"{len(metrics)} metrics, expected at most {MOST_METRICS}"
    for name, value in metrics.items():
        if name in RESERVED_METRICS:
            return f"metric {name!r} has a name that records use themselves"
        if len(name) > LONGEST_NAME:
            return f"metric {name[:20]!r}... has a name of {len(name)} letters"
        if not judged and name in (*ACCURACIES, CALIBRATION_ERROR):
            return f"metric {name!r} is for evaluations, and this is a reply to training"
        if judged and name in (*ACCURACIES, CALIBRATION_ERROR, ATTACK_SUCCESS):
            # A client none of whose classes occurs in the test split has no accuracy of its own.
            no_number = name in ("personal_accuracy", CALIBRATION_ERROR) and math.isnan(value)
            if not (0 <= value <= 1 or no_number):
                return f"metric {name!r} is {value:g}, expected a number in [0, 1]"
        elif any_loss and name.startswith("loss/"):
            continue
        elif not math.isfinite(value):
            return f"metric {name!r} is {value:g}, expected a finite number"
        elif abs(value) > LARGEST_METRIC:
            return f"metric {name!r} is {value:g}, expected at most {LARGEST_METRIC:g}"
        elif not judged and value < SLIGHTLY_NEGATIVE:
            return f"metric {name!r} is {value:g}, expected a number >= 0"
    missing = [name for name in ACCURACIES if name not in metrics] if judged else []
    return f"metric {missing[0]!r} is missing" if missing else None


def bad_payload(payload: Payload | None, asked: Asked | None) -> str | None:
    """Return why an upload cannot be used, or None for a good one."""
    if payload is None:
        return None if asked is None else f"expected {asked.kind.kind}, got nothing"
    reason = _bad_kind(payload.kind, asked)
    return reason if reason is not None or asked is None else payload.problem(asked)


def _bad_test(probabilities: np.ndarray | None, limit: Limit | None) -> str | None:
    """Look at a judged client's predictions of the test rows."""
    if probabilities is None or limit is None:
        if (probabilities is None) == (limit is None):
            return None
        return f"{'no' if limit else 'unexpected'} predictions of the test rows"
    reason = limit.bad_layout(probabilities.shape, probabilities.dtype, {})
    if reason is not None:
        return f"test probabilities have {reason}"
    if not are_distributions(probabilities):
        return "test probabilities are no distributions: NaN, negative or a sum other than 1"
    return None


def _bad_names(what: str, names: Collection[str], expected: Collection[str]) -> str | None:
    if set(names) == set(expected):
        return None
    return f"unexpected or missing {what}: {sorted(set(names) ^ set(expected))[:3]}"
