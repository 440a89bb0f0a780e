"""The processes that make whole runs of a study, with everything loaded before the first.

A nursery imports what runs need, once, and is forked for each process that is asked for: a new one
costs next to nothing, and all share the memory of what was imported. What goes over the sockets is
JSON: orders with their settings one way, rows the other.
"""

import gc
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from signal import SIGTERM
from typing import Any

import torch

from fedkd.data import FederatedData
from fedkd_start import find_last
from sim.commands.interruption import Interruption, call_off, interruptible
from sim.commands.packing import STOP
from sim.commands.planned import PlannedRun, make_run
from sim.server.observers import Observer, Row
from sim.settings import Settings, settings_from_table


def nursery(descriptor: int) -> None:
    """Fork a process for every socket that comes in, until nobody can send one any more.

    Args:
        descriptor: of the socket through which they come.
    """
    torch.set_num_threads(1)
    # What was imported stays: no process need look at it again, so all go on sharing it.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as requests:
        while True:
            message, sockets, *_ = socket.recv_fds(requests, 1, 1)
            if not message:
                break
            if os.fork() == 0:
                requests.close()
                _be_one(sockets[0])
            os.close(sockets[0])
            _bury(os.WNOHANG)
    _bury(0)


def _be_one(descriptor: int) -> None:
    """Serve until told to stop, and go without what the nursery would do at its end."""
    try:
        serve(Connection(descriptor))
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _bury(how: int) -> None:
    """Take note of processes that have ended, or wait for all; the system keeps them until then."""
    try:
        while os.waitpid(-1, how)[0]:
            pass
    except ChildProcessError:
        pass


class _Desk:
    """Where orders come in, also while a run goes on: an order to stop ends it."""

    def __init__(self, connection: Connection) -> None:
        self.orders: SimpleQueue[Row | None] = SimpleQueue()
        self.closed = False
        self._connection = connection
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        while (order := _received(self._connection)) != STOP:
            self.orders.put(order)
        self.closed = True
        self.orders.put(None)
        call_off(Interruption(SIGTERM))


def _received(connection: Connection) -> Row:
    """Return the next order; to stop where whoever gave them has ended."""
    try:
        order: Row = json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return STOP
    return order


class Feed(Observer):
    """Passes on what happens in a run.

    Args:
        send: one message.
        stopped: tells whether the run shall stop.
    """

    def __init__(self, send: Callable[[Row], None], stopped: Callable[[], bool]) -> None:
        self._send = send
        self._stopped = stopped
        self._tell("begun")

    def _tell(self, what: str, *values: Any) -> None:
        # A word to stop may come before anything listens to it.
        if self._stopped():
            raise Interruption(SIGTERM)
        self._send({"told": what, "values": values})

    def started(self, settings: Settings, data: FederatedData) -> None:
        """Without the data, which is no row."""
        self._tell("started")

    def returned(self, round: int) -> None:
        """Pass it on."""
        self._tell("returned", round)

    def metrics(self, rows: Sequence[Row]) -> None:
        """Pass it on."""
        self._tell("metrics", rows)

    def exchange(self, rows: Sequence[Row]) -> None:
        """Pass it on."""
        self._tell("exchange", rows)

    def charges(self, rows: Sequence[Row]) -> None:
        """Pass it on."""
        self._tell("charges", rows)

    def event(self, row: Row) -> None:
        """Pass it on."""
        self._tell("event", row)

    def attacking(self, what: str) -> None:
        """Pass it on."""
        self._tell("attacking", what)

    def attacked(self) -> None:
        """Pass it on."""
        self._tell("attacked")

    def completed(self, round: int) -> None:
        """Pass it on."""
        self._tell("completed", round)


def serve(connection: Connection) -> None:
    """Make runs, one after the other, until told to stop.

    Args:
        connection: through which orders come and everything goes that is to be told.
    """
    find_last(os.getcwd())

    def send(message: Row) -> None:
        try:
            connection.send_bytes(json.dumps(message).encode())
        except OSError:
            # Nobody is there any more: the run is saved, and others go on with it.
            raise Interruption(SIGTERM) from None

    desk = _Desk(connection)
    send({"pid": os.getpid()})
    while (order := desk.orders.get()) is not None:
        send(carried_out(order, send, lambda: desk.closed))


def carried_out(
    order: Row, send: Callable[[Row], None], stopped: Callable[[], bool] = lambda: False
) -> Row:
    """Make a run, or go on with it.

    Args:
        order: ``arm``, ``settings``, ``folder`` and ``accept_code`` of the run; ``code``: folders
            from which code of one's own is imported; ``waits``: for another process that makes it;
            ``lost``: why a process before this one did not, empty if there was none.
        send: is handed what is to be told.
        stopped: tells whether it shall stop.

    Returns:
        How it ``ended``: ``made``, ``busy``, ``stopped`` or ``failed``; then with what error.
    """
    for folder in order["code"]:
        find_last(folder)
    try:
        with interruptible():
            settings = settings_from_table(order["settings"])
            made = make_run(
                PlannedRun(order["arm"], settings, Path(order["folder"])),
                lambda _arm, _seed: [Feed(send, stopped)],
                accept_code=order["accept_code"],
                waits=order["waits"],
                tell=lambda note: send({"told": "note", "values": [note]}),
                lost=order["lost"],
            )
    except KeyboardInterrupt:
        return {"ended": "stopped"}
    except Exception as error:
        return {
            "ended": "failed",
            "kind": type(error).__name__,
            "text": str(error),
            "notes": list(getattr(error, "__notes__", ())),
            "trace": traceback.format_exc(),
        }
    return {"ended": "made" if made else "busy"}
