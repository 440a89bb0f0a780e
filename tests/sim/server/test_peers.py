"""How clients compare at the end: by hand, in any order, and in a run's folder."""

import json
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest

from fedkd.metrics.calibration import expected_calibration_error
from sim.commands.running import run
from sim.keeping.records import read_rows
from sim.server.peers import MOST_PEERS, Peers
from sim.settings import Settings

LABELS = np.array([0, 1, 1, 0])
ANSWERS = {
    3: np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.55, 0.45]], np.float32),
    0: np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]], np.float32),
    7: np.array([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], np.float32),
}


def found(order: tuple[int, ...]) -> dict[str, object]:
    peers = Peers(ANSWERS, LABELS)
    for client in order:
        peers.add(client, ANSWERS[client])
    return peers.row(5)


def test_agreement_and_reliability_by_hand() -> None:
    row = found((3, 0, 7))
    assert row["clients"] == [0, 3, 7]
    # 0 says 0 0 1 1, 3 says 0 1 0 0, and 7 says 1 0 0 1.
    assert row["agreement"] == [[1.0, 0.25, 0.5], [0.25, 1.0, 0.25], [0.5, 0.25, 1.0]]
    assert (row["round"], row["rows"], row["judged"]) == (5, 4, 3)
    reliability = row["reliability"]
    assert isinstance(reliability, dict)
    assert sum(reliability["rows"]) == 12
    # 0 is right twice, 3 three times, 7 never.
    assert sum(reliability["correct"]) == 5
    told = np.concatenate([ANSWERS[client] for client in (0, 3, 7)])
    gaps = np.abs(np.subtract(reliability["correct"], reliability["confidence"])).sum() / 12
    assert gaps == pytest.approx(expected_calibration_error(told, np.tile(LABELS, 3)), abs=1e-6)


def test_the_order_of_answers_and_their_repetition_change_nothing() -> None:
    rows = [found(order) for order in permutations(ANSWERS)]
    assert all(row == rows[0] for row in rows)
    assert found((3, 0, 7, 3, 0)) == rows[0]


def test_of_many_clients_pairs_are_bounded_and_reliability_is_of_all() -> None:
    peers = Peers(range(MOST_PEERS + 3), LABELS)
    for client in reversed(range(MOST_PEERS + 3)):
        peers.add(client, ANSWERS[0])
    row = peers.row(1)
    assert row["clients"] == list(range(MOST_PEERS))
    assert row["judged"] == MOST_PEERS + 3
    assert sum(row["reliability"]["rows"]) == 4 * (MOST_PEERS + 3)
    assert Peers((), LABELS).row(1) == {}


@pytest.mark.parametrize("strategy", ["dml", "local"])
def test_a_run_writes_it_down_and_its_numbers_are_those_of_its_rows(
    small: Callable[..., Settings], strategy: str
) -> None:
    result = run(small(f"strategy={strategy}"))
    row = json.loads((result.folder / "peers.json").read_text())
    rows = read_rows(result.folder / "metrics.jsonl")
    last = [each for each in rows if (each["round"], each["scope"]) == (row["round"], "client")]
    assert row["round"] == result.settings.rounds
    right = sum(row["reliability"]["correct"])
    assert right == round(sum(each["accuracy"] for each in last) * row["rows"])
    # Means of rows are of those with an ensemble alone.
    assert ("ensemble_accuracy" in result.history.federation[-1]) == (strategy == "dml")
