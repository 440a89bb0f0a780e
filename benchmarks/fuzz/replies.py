"""Malformed replies of clients, as bytes that came over a wire: none may reach an aggregate.

Each is a good reply to training or to evaluation in which something is broken. Right is a rejected
reply with a reason in one short line; one that decodes to the very numbers of the good reply is
harmless.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from harness import HARMLESS, Case

from fedkd.exchange.codecs import TopK
from fedkd.exchange.payload import Asked as Wanted
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, ClassTable, Predictions, Prototypes, Weights
from fedkd.exchange.pipeline import BadPayloadError, ExchangeState, ServerTurn, Stages
from fedkd.exchange.values import flatten
from sim.server.validation import (
    ACCURACIES,
    LONGEST_REASON,
    Expected,
    RejectedReplyError,
    valid_answer,
)
from sim.wire.flower import identify_process
from sim.wire.messages import ClientReply, reply_content

ROUND = 2
ROWS, CLASSES, TEST_ROWS = 20, 5, 30


@dataclass(frozen=True)
class Asked:
    """What was asked for, and a good answer.

    Attributes:
        payload: what has to be sent, decoded; None: nothing.
        stages: what it passes on its way.
    """

    name: str
    reply: ClientReply
    payload: Wanted | None = None
    expected: Expected | None = None
    stages: Stages = field(default_factory=Stages)

    def content(self) -> RecordDict:
        """Return the answer as ordinary records, none of them shared."""
        records = reply_content(self.reply)
        return RecordDict({name: _copy(record) for name, record in records.items()})


def _copy(record: Any) -> Any:
    if isinstance(record, ArrayRecord):
        return ArrayRecord(
            {
                name: Array(array.dtype, tuple(array.shape), array.stype, bytes(array.data))
                for name, array in record.items()
            }
        )
    return type(record)(dict(record))


def asked(rng: np.random.Generator) -> list[Asked]:
    """Return trainings that send payloads of several kinds, and an evaluation."""
    rows = np.sort(rng.choice(2 * ROWS, ROWS, replace=False))
    arrays = {
        "0.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "1.running_var": np.ones(4, np.float32),
        "1.num_batches_tracked": np.array(7, np.int64),
    }
    scores = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    whole = Predictions(rows=rows, values=scores)
    some = Predictions(rows=rows[3:9], values=scores[3:9], ids="subset", planned=ROWS)
    table = ClassTable(values=rng.dirichlet(np.ones(CLASSES), size=CLASSES).astype(np.float32))
    prototypes = Prototypes(
        classes=np.array([0, 2, 3]),
        values=rng.normal(size=(3, 6)).astype(np.float32),
        num_classes=CLASSES,
    )
    soft = Predictions(
        rows=rows,
        values=rng.dirichlet(np.ones(CLASSES), size=ROWS).astype(np.float32),
        scale="probabilities",
    )
    soft_asked = Predictions.asked(rows, CLASSES, scale="probabilities")
    top = TopK(k=2)
    shares = rng.dirichlet(np.ones(CLASSES), size=TEST_ROWS).astype(np.float32)
    return [
        _training("predictions", whole, Predictions.asked(rows, CLASSES)),
        _training("some predictions", some, Predictions.asked(rows, CLASSES, ids="subset")),
        _training("weights", Weights(arrays=arrays), Weights.asked(arrays)),
        _training(
            "a bundle",
            Bundle(parts={"means": table, "features": prototypes}),
            Bundle.asked(means=ClassTable.asked(CLASSES), features=Prototypes.asked(CLASSES, 6)),
        ),
        _training("the largest classes", top.encode(soft, {}, rng)[0], soft_asked, Stages(up=top)),
        Asked(
            "evaluation",
            ClientReply(None, dict.fromkeys(ACCURACIES, 0.5), shares, ROUND),
            expected=Expected.evaluation(ROUND, TEST_ROWS, CLASSES, answers=True),
        ),
    ]


def _training(name: str, payload: Payload, wanted: Wanted, stages: Stages | None = None) -> Asked:
    losses = {"loss/ce": 0.7, "loss/kd": 0.1, "seconds": 0.5}
    return Asked(name, ClientReply(payload, losses, None, ROUND), wanted, stages=stages or Stages())


def cases(rng: np.random.Generator, count: int, _: Path) -> Iterator[Case]:
    """Yield so many cases, every kind in turn."""
    identify_process(1)
    good = asked(rng)
    for each in good:
        if _attempt(each, _message(each.content()), again=False) != HARMLESS:
            raise RuntimeError(f"{each.name}: the reply that nothing is wrong with is refused")
    kinds = list(KINDS.items())
    for number in range(count):
        kind, spoil = kinds[number % len(kinds)]
        chosen = good[rng.integers(len(good))]
        content = chosen.content()
        told = spoil(content, rng)
        if isinstance(told, Message):
            message, again = told, False
        else:
            message, again = _message(content), told == AGAIN
        yield Case(
            kind, f"number {number}: {chosen.name}", partial(_attempt, chosen, message, again)
        )


AGAIN = "again"


def _message(content: RecordDict) -> Message:
    return Message(content, reply_to=Message(RecordDict(), 2, "train"))


def _attempt(chosen: Asked, message: Message, again: bool) -> str:
    turn = ServerTurn(chosen.stages, ExchangeState(), seed=0, round=ROUND)
    expected = chosen.expected
    if expected is None and chosen.payload is not None:
        on_the_way = turn.asked(chosen.payload, 0)
        expected = Expected(round=ROUND, asked=on_the_way, checks_payload=False)
    try:
        reply = valid_answer(message, expected, again=again)
        turn.receive(0, reply.payload, chosen.payload)
    except (RejectedReplyError, BadPayloadError) as error:
        # The round loop makes the one of the other.
        reason = str(RejectedReplyError(str(error)))
        if not reason or len(reason) > LONGEST_REASON or not reason.isprintable():
            return f"the reason is no short line: {reason!r}"
        return ""
    return HARMLESS if _bits(reply) == _bits(chosen.reply) else f"accepted: {reply!r}"


def _bits(reply: ClientReply) -> object:
    plain, arrays = None, {}
    if reply.payload is not None:
        arrays, plain = flatten(reply.payload)
    if reply.test_probabilities is not None:
        arrays = {**arrays, "test": reply.test_probabilities}
    flat = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
    return reply.round, reply.metrics, flat, plain


# -- kinds of malformed replies --------------------------------------------------------------

Spoiler = Callable[[RecordDict, np.random.Generator], Message | str | None]


def _one(content: RecordDict, rng: np.random.Generator) -> tuple[ArrayRecord, str]:
    """Draw one of the arrays in a message."""
    records = list(content.array_records.values())
    record = records[rng.integers(len(records))]
    names = list(record)
    return record, names[rng.integers(len(names))]


def _pick(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def _on_data(change: Callable[[bytes, np.random.Generator], bytes]) -> Spoiler:
    def spoil(content: RecordDict, rng: np.random.Generator) -> None:
        record, name = _one(content, rng)
        record[name].data = change(record[name].data, rng)

    return spoil


def _header_size(data: bytes) -> int:
    return 10 + struct.unpack("<H", data[8:10])[0]


def _flip_header(data: bytes, rng: np.random.Generator) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        spoilt[rng.integers(_header_size(data))] = rng.integers(256)
    return bytes(spoilt)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _lengthen(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 5000)))


def _shift(data: bytes, rng: np.random.Generator) -> bytes:
    """Move the place where the numbers begin, with a header that reads the same."""
    size, by = _header_size(data), int(rng.choice([-4, -1, 1, 2, 4, 8]))
    header = data[10 : size - 1].rstrip(b" ")
    header = header.ljust(max(size - 11 + by, len(header))) + b"\n"
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + len(header) :]


def _not_numbers(data: bytes, rng: np.random.Generator) -> bytes:
    """Fill some of the numbers with bytes that are NaN as floats and far off as integers."""
    size = _header_size(data)
    count = (len(data) - size) // 4
    place = size + 4 * int(rng.integers(count)) if count else size
    return (
        data[:place]
        + _pick(rng, b"\xff" * 4, b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f")
        + data[place + 4 :]
    )


def _python(_: bytes, rng: np.random.Generator) -> bytes:
    """Make a header of things that a parser of Python may stumble over."""
    text = _pick(
        rng,
        b"{'descr': '<f4', 'shape': (" + b"(" * int(rng.integers(1, 5000)),
        b"{'descr': '''<f4",
        b"{'descr': __import__('os').getcwd()}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10L, 2), }",
        b"[" * 60_000,
        b"0x" * 2000,
        b"'" * 999,
        b"\\\n" * 500,
        b"\x00" * 64,
        b"{**{}, 'descr': '<f4'}",
    )
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text), 65535)) + text


def _other_array(content: RecordDict, rng: np.random.Generator) -> None:
    """Put another array in the place of one; half of the time with the label of the old one."""
    record, name = _one(content, rng)
    old = record[name]
    shape = tuple(old.shape)
    dtype = _pick(rng, "f2", "f8", "i4", "u1", "c8", "?", "U3", "S4", "M8[s]", ">f4")
    other = _pick(
        rng,
        np.zeros(shape, dtype),
        np.zeros((*shape, 1), np.float32),
        np.zeros(tuple(size + 1 for size in shape) or (1,), np.float32),
        np.zeros(0, np.float32),
        np.zeros((1,) * 20, np.float32),
    )
    array = Array(other)
    if rng.random() < 0.5:
        array.dtype, array.shape = old.dtype, shape
    record[name] = array


def _objects(content: RecordDict, rng: np.random.Generator) -> None:
    record, name = _one(content, rng)
    stream = BytesIO()
    np.save(stream, np.full(tuple(record[name].shape), None, object), allow_pickle=True)
    label = record[name].dtype if rng.random() < 0.5 else "object"
    record[name] = Array(
        label, tuple(record[name].shape), _pick(rng, "numpy.ndarray", "pickle"), stream.getvalue()
    )


def _huge(content: RecordDict, rng: np.random.Generator) -> None:
    """Declare sizes that nobody has room for, on the label, in the header or in both."""
    record, name = _one(content, rng)
    shape = _pick(rng, (10**9, 10**9), (2**62,), (10**17,), (2**31, 2**31, 2), (10**400,))
    where = _pick(rng, "label", "header", "both")
    if where != "header":
        record[name].shape = shape
    if where != "label":
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        record[name].data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _label(content: RecordDict, rng: np.random.Generator) -> None:
    record, name = _one(content, rng)
    array = record[name]
    attribute, value = _pick(
        rng,
        ("dtype", "no such type"),
        ("dtype", ""),
        ("dtype", "f4,(9999999,9999999)f8"),
        ("dtype", "\x1b[31m"),
        ("shape", (-1,)),
        ("shape", ("2", "3")),
        ("shape", (2.5,)),
        ("stype", "pickle"),
        ("stype", "\x1b]0;x\x07"),
        ("stype", "numpy.ndarray\n"),
    )
    setattr(array, attribute, value)


def _round(content: RecordDict, rng: np.random.Generator) -> None:
    value = _pick(rng, 1, 3, -2, 0, 2**62, "2", "two", 2.0, True, b"2", [2], ["2"])
    content["plan"] = ConfigRecord(_pick(rng, {"round": value}, {"Round": 2}, {}))


def _text(content: RecordDict, rng: np.random.Generator) -> None:
    """Say in words, or in a list, what should be a number or a name."""
    if "payload" in content.config_records and rng.random() < 0.5:
        told = content.config_records["payload"]
        told[_pick(rng, *told)] = _pick(rng, "x", b"x", ["logits"], True, "\x1b[2J", "1e999", -1.0)
        return
    del content["metrics"]
    content["metrics"] = ConfigRecord({"loss/ce": _pick(rng, "0.5", True, b"1", ["0.1"])})


def _plain(content: RecordDict, rng: np.random.Generator) -> None:
    """Say something else in one of the plain values of a payload, or break the text itself."""
    if "payload" not in content.config_records:
        _missing(content, rng)
        return
    told = content.config_records["payload"]
    text = str(told["plain"])
    if rng.random() < 0.3:
        told["plain"] = _pick(
            rng, text[: rng.integers(len(text))], "[" * 60_000, "{" * 99, "x" * 10**6, "1" * 5000
        )
        return
    plain = json.loads(text)
    places = list(_places(plain))
    inside, key = places[rng.integers(len(places))]
    good = inside[key]
    inside[key] = _pick(
        rng, None, True, -7, 1e308, float("nan"), "x", "\x1b[2J", [], {}, {"array": "x"}, [[1, 2]]
    )
    if inside[key] == good:
        del inside[key]
    told["plain"] = json.dumps(plain)


def _places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Yield everything within plain values: what holds it, and under which key."""
    keys = plain.keys() if isinstance(plain, dict) else range(len(plain))
    for key in list(keys):
        yield plain, key
        if isinstance(plain[key], dict | list):
            yield from _places(plain[key])


def _missing(content: RecordDict, rng: np.random.Generator) -> None:
    del content[_pick(rng, *content)]


def _extra(content: RecordDict, rng: np.random.Generator) -> None:
    name = _pick(rng, "more", "metrics2", "\x1b[31mred", "x" * 10_000, "a\nb")
    content[name] = _pick(
        rng,
        MetricRecord({"a": 1.0}),
        ConfigRecord({"a": "b"}),
        ArrayRecord({"a": Array(np.zeros(3))}),
    )


def _names(content: RecordDict, rng: np.random.Generator) -> None:
    record, name = _one(content, rng)
    array = record[name]
    del record[name]
    for number in range(int(rng.integers(0, 50))):
        record[f"{name}{number}"] = array


def _metrics(change: Callable[[dict[str, Any], np.random.Generator], Mapping[str, Any]]) -> Spoiler:
    def spoil(content: RecordDict, rng: np.random.Generator) -> None:
        before = dict(content.metric_records["metrics"])
        content["metrics"] = MetricRecord(dict(change(before, rng)))

    return spoil


def _not_finite(metrics: dict[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
    # A client none of whose classes occurs in the test split has no accuracy of its own.
    name = _pick(rng, *(name for name in metrics if name != "personal_accuracy"))
    return {**metrics, name: _pick(rng, float("nan"), float("inf"), -float("inf"))}


def _beyond(metrics: dict[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
    name = _pick(rng, *metrics)
    return {**metrics, name: _pick(rng, -0.5, 1e17, -1e300, 2**62, [0.5], [1, 2])}


def _odd_names(metrics: dict[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
    return _pick(
        rng,
        {**metrics, "round": 1},
        {**metrics, "client": 0},
        {**metrics, "scope": 1.0},
        {**metrics, "x" * 101: 1.0},
        {**metrics, **{f"loss/{number}": 0.1 for number in range(100)}},
    )


def _second(_: RecordDict, __: np.random.Generator) -> str:
    return AGAIN


def _error(_: RecordDict, rng: np.random.Generator) -> Message:
    reason = _pick(rng, "", "x" * 10**6, "\x1b[2J\x07", "a\nb\n" * 1000, "\u202e", None)
    error = Error(int(_pick(rng, 0, 1, 3, 10**9)), reason)
    return Message(error, reply_to=Message(RecordDict(), 2, "train"))


KINDS: dict[str, Spoiler] = {
    "cut off": _on_data(_cut),
    "bytes of a header": _on_data(_flip_header),
    "bytes too many": _on_data(_lengthen),
    "a shifted header": _on_data(_shift),
    "Python in a header": _on_data(_python),
    "bytes that are no numbers": _on_data(_not_numbers),
    "other shapes and types": _other_array,
    "objects": _objects,
    "huge sizes": _huge,
    "labels": _label,
    "rounds": _round,
    "text for numbers": _text,
    "plain values": _plain,
    "missing records": _missing,
    "records too many": _extra,
    "names of arrays": _names,
    "metrics that are not finite": _metrics(_not_finite),
    "metrics out of range": _metrics(_beyond),
    "names of metrics": _metrics(_odd_names),
    "a second reply": _second,
    "errors in the place of a reply": _error,
}
