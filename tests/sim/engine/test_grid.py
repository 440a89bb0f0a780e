from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flwr.app import Message

from fedkd.training import ClientState
from sim.engine.grid import FIRST_NODE_ID, CohortGrid, Outcome, PackedCall, instruction, read_reply
from sim.engine.runtime import ClientReply
from sim.settings import load_settings
from strategies.knowledge import Predictions


class BackwardsGrid(CohortGrid):
    """Finishes its calls last to first, and remembers them."""

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        self.calls = calls
        for position in reversed(range(len(calls))):
            clients = calls[position].call.clients
            if 3 in clients:
                yield position, Outcome(failure="worker on fire")
            else:
                yield position, Outcome([ClientReply(metrics={"me": float(c)}) for c in clients])

    def client_states(self, clients: Iterable[int]) -> Iterator[ClientState | None]:
        return iter(())

    def close(self) -> None:
        pass


def grid_of(count: int, *overrides: str) -> BackwardsGrid:
    return BackwardsGrid(load_settings(None, [f"clients.count={count}", *overrides]))


def ask(grid: CohortGrid, clients: Iterable[int], content: object = None) -> list[Message]:
    content = content or instruction(1, None)
    messages = [Message(content, client + FIRST_NODE_ID, "query") for client in clients]
    return list(grid.send_and_receive(messages))


def test_replies_come_in_client_order_whatever_finishes_first() -> None:
    grid = grid_of(10, "clients.models=[mlp,cnn]", "engine.cohort_size=2")
    replies = ask(grid, [9, 0, 4, 7, 2])
    assert [int(read_reply(r.content).metrics["me"]) for r in replies] == [0, 2, 4, 7, 9]


def test_cohorts_hold_one_architecture_and_are_cut_from_sorted_clients() -> None:
    grid = grid_of(10, "clients.models=[mlp,cnn]", "engine.cohort_size=2")
    ask(grid, range(10))
    assert [packed.call.clients for packed in grid.calls] == [
        (0, 2),
        (4, 6),
        (8,),
        (1, 3),
        (5, 7),
        (9,),
    ]


def test_a_call_that_fails_fails_for_its_clients_only() -> None:
    grid = grid_of(6, "clients.models=[mlp]", "engine.cohort_size=2")
    replies = ask(grid, range(6))
    failed = [r.metadata.src_node_id - FIRST_NODE_ID for r in replies if r.has_error()]
    assert failed == [2, 3]
    assert replies[2].error.reason == "worker on fire"


def test_clients_that_receive_one_object_have_it_decoded_once() -> None:
    grid = grid_of(4, "clients.models=[mlp]")
    values = np.ones((5, 3), np.float32)
    piece = Predictions(kind="mean_logit", rows=np.arange(5), values=values)
    ask(grid, range(4), instruction(1, piece))
    first, *others = grid.calls[0].received
    assert isinstance(first, Predictions)
    assert np.array_equal(first.values, values)
    assert all(other is first for other in others)


def test_push_and_pull_give_the_replies_of_the_ids_asked_for() -> None:
    grid = grid_of(3, "clients.models=[mlp]", "engine.cohort_size=1")
    content = instruction(1, None)
    messages = [Message(content, client + FIRST_NODE_ID, "query") for client in range(3)]
    ids = list(grid.push_messages(messages))
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids[1:2])] == [1 + FIRST_NODE_ID]
    assert len(list(grid.pull_messages(ids))) == 2


def test_node_ids_are_partition_ids_in_order() -> None:
    grid = grid_of(3)
    assert grid.partitions() == {0: 2, 1: 3, 2: 4}
