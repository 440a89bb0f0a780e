"""The half of a grid that does not depend on where calls are carried out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedkd.exchange.payloads import Predictions
from fedkd.training import ClientState, ModelState
from sim.engine.grid import FIRST_NODE_ID, CohortGrid, Outcome, PackedCall
from sim.wire.messages import ClientReply, Phase, Told, instruction, read_reply


def state_of(number: int) -> ClientState:
    return ClientState({"model": ModelState({"weight": np.full(2, number, np.float32)})})


class BackwardsGrid(CohortGrid[ClientState]):
    """Finishes its calls last to first, and remembers them."""

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        self.calls = calls
        for position in reversed(range(len(calls))):
            clients = calls[position].call.clients
            if 3 in clients:
                yield position, Outcome.failed(calls[position], "worker on fire")
            else:
                self._pending.update({c: state_of(calls[position].call.round) for c in clients})
                yield position, Outcome([ClientReply(metrics={"me": float(c)}) for c in clients])

    def _fetch(self, handle: ClientState) -> ClientState:
        return handle

    def _store(self, states: Sequence[ClientState]) -> list[ClientState]:
        return list(states)

    def _measure(self, clients: Sequence[int]) -> Mapping[str, Any]:
        return {"choice": "vmap", "members": len(clients)}

    def close(self) -> None:
        pass


@pytest.fixture
def grid_of(tiny_data: Callable[..., Any], tiny_settings: Callable[..., Any]) -> Callable[..., Any]:
    def build(count: int, models: tuple[str, ...] = ("mlp",), **settings: Any) -> BackwardsGrid:
        clients = {"count": count, "models": list(models)}
        # Sizes go down and up again, so that order by size is not order by number.
        sizes = tuple(5 + abs(2 * number - count) for number in range(count))
        return BackwardsGrid(tiny_settings(clients=clients, **settings), tiny_data(rows=sizes))

    return build


def ask(
    grid: CohortGrid[Any], clients: Iterable[int], content: object = None, phase: Phase = "train"
) -> list[Message]:
    content = content or instruction(1, Told())
    messages = [Message(content, client + FIRST_NODE_ID, phase) for client in clients]
    return list(grid.send_and_receive(messages))


def members(grid: BackwardsGrid) -> list[tuple[int, ...]]:
    return [packed.call.clients for packed in grid.calls]


def test_replies_come_in_client_order_whatever_finishes_first(grid_of: Any) -> None:
    grid = grid_of(10, ("mlp", "cnn"))
    replies = ask(grid, [9, 0, 4, 7, 2])
    assert [int(read_reply(r.content).metrics["me"]) for r in replies] == [0, 2, 4, 7, 9]


def test_clients_that_train_one_after_the_other_are_cohorts_of_one(grid_of: Any) -> None:
    grid = grid_of(5, ("mlp", "cnn"), engine={"vectorize": "loop", "cohort_size": 4})
    ask(grid, range(5))
    assert members(grid) == [(0,), (2,), (4,), (1,), (3,)]


def test_stacked_clients_share_an_architecture_and_are_of_about_one_size(grid_of: Any) -> None:
    grid = grid_of(10, ("mlp", "cnn"), engine={"vectorize": "vmap", "cohort_size": 2})
    ask(grid, range(10))
    # Sizes are 15, 13, 11, 9, 7, 5, 7, 9, 11, 13.
    assert members(grid) == [(0, 2), (4, 8), (6,), (1, 9), (3, 7), (5,)]


def test_measured_backends_are_settled_once_and_can_be_recalled(grid_of: Any) -> None:
    engine = {"vectorize": "measure", "cohort_size": 4}
    grid = grid_of(6, engine=engine)
    ask(grid, range(6))
    ask(grid, range(6), phase="evaluate")
    assert [len(clients) for clients in members(grid)] == [4, 2]
    (event,) = grid.take_events()
    assert (event["event"], event["choice"], event["members"]) == ("backend measured", "vmap", 4)
    resumed = grid_of(6, engine=engine)
    resumed.recall(grid.memory())
    ask(resumed, range(6))
    assert resumed.take_events() == []
    assert members(resumed) == members(grid)


def test_a_call_that_fails_fails_for_its_clients_only(grid_of: Any) -> None:
    grid = grid_of(6, engine={"vectorize": "vmap", "cohort_size": 2})
    replies = ask(grid, range(6))
    failed = [r.metadata.src_node_id - FIRST_NODE_ID for r in replies if r.has_error()]
    (cohort,) = [clients for clients in members(grid) if 3 in clients]
    assert tuple(failed) == cohort
    assert replies[3].error.reason == "worker on fire"


def test_what_was_trained_counts_once_it_is_committed(grid_of: Any) -> None:
    grid = grid_of(2)
    ask(grid, range(2), instruction(1, Told()))
    grid.commit()
    ask(grid, [1], instruction(2, Told()))
    first, second = grid.client_states(range(2))
    assert (first, second) == (first, grid._pending[1])
    assert second.models["model"].weights["weight"][0] == 2
    grid.rollback()
    assert [s.models["model"].weights["weight"][0] for s in grid.client_states(range(2))] == [1, 1]


def test_loaded_states_replace_all_that_there_were(grid_of: Any) -> None:
    grid = grid_of(3)
    ask(grid, range(3))
    grid.load_states([(2, state_of(7))])
    assert grid.trained_clients() == [2]
    assert [state is None for state in grid.client_states(range(3))] == [True, True, False]


def test_excluded_clients_are_not_asked_again_not_even_after_a_resume(grid_of: Any) -> None:
    grid = grid_of(3)
    ask(grid, range(3))
    (call,) = [packed.call for packed in grid.calls if packed.call.clients == (1,)]
    grid.exclude(call, "it kills")
    resumed = grid_of(3)
    resumed.recall(grid.memory())
    for one in (grid, resumed):
        replies = ask(one, range(3))
        assert replies[1].error.reason == "excluded since round 1: it kills"
        assert (1,) not in members(one)


def test_a_client_that_drops_out_is_not_asked(grid_of: Any) -> None:
    grid = grid_of(3, faults=[{"kind": "dropout", "clients": [1], "rounds": [2]}])
    assert not any(reply.has_error() for reply in ask(grid, range(3), instruction(1, Told())))
    replies = ask(grid, range(3), instruction(2, Told()))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert not ask(grid, [1], instruction(2, Told(), attempt=2))[0].has_error()


def test_clients_that_receive_one_object_have_it_decoded_once(grid_of: Any) -> None:
    grid = grid_of(4, engine={"vectorize": "vmap", "cohort_size": 4})
    values = np.ones((5, 3), np.float32)
    piece = Predictions(rows=np.arange(5), values=values, averaged=True)
    ask(grid, range(4), instruction(1, Told(piece)))
    first, *others = grid.calls[0].received
    assert isinstance(first, Predictions)
    assert np.array_equal(first.values, values)
    assert all(other is first for other in others)


def test_push_and_pull_give_the_replies_of_the_ids_asked_for(grid_of: Any) -> None:
    grid = grid_of(3)
    content = instruction(1, Told())
    messages = [Message(content, client + FIRST_NODE_ID, "query") for client in range(3)]
    ids = list(grid.push_messages(messages))
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids[1:2])] == [1 + FIRST_NODE_ID]
    assert len(list(grid.pull_messages(ids))) == 2


def test_node_ids_are_partition_ids_in_order(grid_of: Any) -> None:
    assert list(grid_of(3).get_node_ids()) == [2, 3, 4]
