"""Everything that touches a non-public name of Flower, in one place.

Flower 1.41 lets only its own runtimes create messages: a `Message` needs the process's
`TaskIdentity`, and message ids are set through private attributes. If an upgrade moves these
names, `tests/sim/engine/test_flower.py` fails first.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SERVER_NODE_ID",
    "LazyRecords",
    "Run",
    "empty_run",
    "end_without_traceback",
    "identify_process",
    "reply_to",
    "set_message_id",
]

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


def end_without_traceback() -> None:
    """Let Flower's log show of what ends a ServerApp only the line that a user can act upon.

    Flower logs every exception with its traceback; this process serves one run and ends with it.
    """
    sys.tracebacklimit = 0


def reply_to(message: Message, content: RecordDict) -> Message:
    """Return what ``Message(content, reply_to=message)`` returns, in a fifth of the time.

    Flower looks at every argument anew, and asks for the time by way of a date; every client of
    every round comes through here.
    """
    asked = message.metadata.__dict__
    now = time.time()
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(
        asked,
        _message_id="",
        _src_node_id=asked["_dst_node_id"],
        _dst_node_id=asked["_src_node_id"],
        _src_task_id=asked["_dst_task_id"],
        _dst_task_id=asked["_src_task_id"],
        _reply_to_message_id=asked["_message_id"],
        _created_at=now,
        _ttl=asked["_created_at"] + asked["_ttl"] - now,
        _delivered_at="",
    )
    reply = Message.__new__(Message)
    reply.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return reply


class LazyRecords(RecordDict):
    """Records that are made when somebody looks at them.

    Between a server and clients that share a process nobody does: they hand each other the
    object that the records stand for. To everybody else this is the `RecordDict` of the message.
    """

    # Flower writes the qualified name of a class on the wire, and reads back those it knows.
    __qualname__ = RecordDict.__qualname__

    def __init__(self, original: object, encode: Callable[[], RecordDict]) -> None:
        super().__init__()
        self.__dict__["_data"] = _RecordsInWaiting(encode)
        self.__dict__["_original"] = original

    @property
    def original(self) -> Any | None:
        """The object that the records stand for; None once somebody had the records in hand."""
        return None if self.__dict__["_data"].made else self.__dict__["_original"]

    def __reduce__(self) -> tuple[type[RecordDict], tuple[dict[str, Any]]]:
        """Leave this process as an ordinary `RecordDict`."""
        return RecordDict, (dict(self.items()),)


class _RecordsInWaiting(dict[str, Any]):
    """The dictionary that a `RecordDict` keeps its records in, filled at the first touch."""

    def __init__(self, encode: Callable[[], RecordDict]) -> None:
        super().__init__()
        self._encode = encode
        self.made = False

    def _make(self) -> "_RecordsInWaiting":
        if not self.made:
            self.made = True
            super().update(self._encode().items())
        return self

    def __getitem__(self, key: str) -> Any:
        self._make()
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._make()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._make()
        super().__delitem__(key)

    def __contains__(self, key: object) -> bool:
        self._make()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._make()
        return super().__iter__()

    def __len__(self) -> int:
        self._make()
        return super().__len__()

    def __eq__(self, other: object) -> bool:
        self._make()
        if isinstance(other, _RecordsInWaiting):
            other._make()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        self._make()
        return super().__repr__()

    def keys(self) -> Any:
        self._make()
        return super().keys()

    def values(self) -> Any:
        self._make()
        return super().values()

    def items(self) -> Any:
        self._make()
        return super().items()

    def copy(self) -> dict[str, Any]:
        self._make()
        return super().copy()
