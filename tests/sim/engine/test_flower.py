"""Fails loudly when an upgrade of Flower moves the non-public names that we lean on."""

import flwr
import pytest
from flwr.app import Message, RecordDict

from sim.engine import flower


def test_this_is_the_flower_that_the_names_were_read_from() -> None:
    assert flwr.__version__.startswith("1.41."), "check sim/engine/flower.py against this Flower"


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


def test_an_empty_run_carries_its_id() -> None:
    assert flower.empty_run(5).run_id == 5


@pytest.mark.parametrize("name", ["task_id", "run_id", "node_id"])
def test_the_identity_of_the_process_is_read_back(name: str) -> None:
    flower.identify_process(9)
    assert getattr(flower.TaskIdentity, name) in (1, 9)
