"""Everything that touches a non-public name of Flower, in one place.

Flower 1.41 lets only its own runtimes create messages: a `Message` needs the process's
`TaskIdentity`, and message ids are set through private attributes. If an upgrade moves these
names, `tests/sim/engine/test_flower.py` fails first.
"""

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["SERVER_NODE_ID", "Run", "empty_run", "identify_process", "set_message_id"]

SERVER_NODE_ID: int = SUPERLINK_NODE_ID


def empty_run(run_id: int) -> Run:
    """Return the run description that a `Grid` has to carry."""
    return Run.create_empty(run_id)


def identify_process(run_id: int) -> None:
    """Let this process create messages as the server of a run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id
