"""Fails loudly when an upgrade of Flower moves the non-public names that we lean on."""

import io
import logging
import pickle
import sys
from typing import Any

import flwr
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from sim.wire import flower


def test_this_is_the_flower_that_the_names_were_read_from() -> None:
    assert flwr.__version__.startswith("1.41."), "check sim/wire/flower.py against this Flower"


def test_a_process_can_create_messages_once_it_is_identified() -> None:
    flower.identify_process(7)
    message = Message(RecordDict(), 3, "train", group_id="1")
    assert message.metadata.run_id == 7
    assert message.metadata.src_node_id == flower.SERVER_NODE_ID
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.src_node_id == 3


def test_a_reply_refers_to_the_id_that_was_set() -> None:
    flower.identify_process(7)
    message = Message(RecordDict(), 3, "train")
    flower.set_message_id(message, "17")
    assert message.metadata.message_id == "17"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "17"


def test_a_reply_made_in_short_is_the_one_that_flower_makes() -> None:
    flower.identify_process(7)
    message = Message(RecordDict(), 3, "train", ttl=50.0, group_id="4")
    flower.set_message_id(message, "17")
    content = RecordDict({"more": MetricRecord({"x": 1.5})})
    short, whole = flower.reply_to(message, content), Message(content, reply_to=message)
    assert type(short) is type(whole)
    assert short.__dict__.keys() == whole.__dict__.keys()
    assert short.content is content
    assert short.has_content()
    assert not short.has_error()
    made, known = short.metadata.__dict__, whole.metadata.__dict__
    times = ("_created_at", "_ttl")
    assert {name: made[name] for name in made if name not in times} == {
        name: known[name] for name in known if name not in times
    }
    for name in times:
        assert type(made[name]) is type(known[name])
        assert made[name] == pytest.approx(known[name], abs=1.0)


def test_an_empty_run_carries_its_id() -> None:
    assert flower.empty_run(5).run_id == 5


@pytest.mark.parametrize("name", ["task_id", "run_id", "node_id"])
def test_the_identity_of_the_process_is_read_back(name: str) -> None:
    flower.identify_process(9)
    assert getattr(flower.TaskIdentity, name) in (1, 9)


def lazy_and_plain() -> tuple[flower.LazyRecords, RecordDict]:
    plain = RecordDict({"plan": ConfigRecord({"round": 3}), "more": MetricRecord({"x": 1.5})})
    return flower.LazyRecords("the original", lambda: plain), plain


@pytest.mark.parametrize(
    "look",
    [
        dict,
        len,
        list,
        repr,
        lambda records: records["plan"],
        lambda records: "plan" in records,
        lambda records: records.keys(),
        lambda records: list(records.items()),
        lambda records: list(records.values()),
        lambda records: records.copy(),
        lambda records: records.config_records["plan"],
        lambda records: records.get("nothing"),
        lambda records: records == records,
        lambda records: pickle.loads(pickle.dumps(records)),  # noqa: S301
    ],
)
def test_records_are_made_at_the_first_look_and_are_those_that_were_promised(look: Any) -> None:
    lazy, plain = lazy_and_plain()
    assert lazy.original == "the original"
    look(lazy)
    assert lazy.original is None
    assert lazy == plain
    assert dict(lazy.items()) == dict(plain.items())


def test_who_changes_the_records_has_changed_what_is_read() -> None:
    lazy, _ = lazy_and_plain()
    del lazy["more"]
    lazy["plan"] = ConfigRecord({"round": 4})
    assert lazy.original is None
    assert list(lazy) == ["plan"]
    assert lazy.config_records["plan"]["round"] == 4


def test_records_leave_the_process_as_ordinary_ones() -> None:
    lazy, plain = lazy_and_plain()
    copied = pickle.loads(pickle.dumps(lazy))  # noqa: S301
    assert type(copied) is RecordDict
    assert copied == plain


def test_lazy_records_arrive_over_the_wire_as_ordinary_ones() -> None:
    flower.identify_process(7)
    lazy, plain = lazy_and_plain()
    message = Message(lazy, 3, "train")
    objects = get_all_nested_objects(message)
    contents = {name: each.deflate() for name, each in objects.items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    assert type(arrived.content) is RecordDict
    assert arrived.content == plain


def test_who_ends_a_run_is_shown_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", None, raising=False)
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    log = logging.getLogger("test of tracebacks")
    log.addHandler(handler)
    flower.end_without_traceback()
    try:
        raise ValueError("clients.count must be >= 1")
    except ValueError as error:
        log.error("ServerApp raised an exception", exc_info=error)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "ServerApp raised an exception"
    assert lines[-1] == "ValueError: clients.count must be >= 1"
    assert not any("File" in line for line in lines)
