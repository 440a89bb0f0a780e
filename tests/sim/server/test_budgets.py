"""Runs under a byte budget: never above it, the same plan when resumed, refused where it is none.

The toy federation has 4 clients, 20 public rows and 3 classes; at one bit a row of soft labels is a
class of 2 bits, so that a transfer has 5 bytes.
"""

import json
import re
from typing import Any

import pytest

from fedkd.exchange.budget import BITS, NO_BUDGET, Levels
from sim.commands import running
from sim.commands.running import run
from sim.keeping.records import read_rows
from sim.server.observers import Observer
from sim.server.replies import QuorumError
from sim.settings import SettingsError, load_settings
from sim.wire.messages import (
    Assignment,
    Told,
    instruction,
    node_instruction,
    payload_records,
    read_instruction,
)

LEAST = 3 * 4 * 2 * 5
"""Bytes of three rounds at the fewest bits, both ways."""


def settings_of(tiny_settings: Any, strategy: str = "dsfl", *, kb: float, **more: Any) -> Any:
    allocation = {"allocation": more.pop("allocation")} if "allocation" in more else {}
    exchange = {"budget_kb": kb, **allocation, **more.pop("exchange", {})}
    return tiny_settings(strategy, exchange=exchange, **more)


def spent(rows: Any) -> int:
    return sum(row["bytes"] for row in rows)


@pytest.mark.parametrize(
    ("strategy", "kb", "allocation"),
    [
        ("dsfl", 0.5, "greedy"),
        ("dsfl", 0.5, "uniform"),
        ("dsfl", 100.0, "greedy"),
        ("dml", 3.0, "greedy"),
        ("fedavg", 20.0, "greedy"),
    ],
)
def test_a_run_keeps_its_budget(tiny_settings, tiny_data, simulate, strategy, kb, allocation):
    found = simulate(
        settings_of(tiny_settings, strategy, kb=kb, allocation=allocation), tiny_data()
    )
    assert not found.events
    assert spent(found.exchange) <= 1000 * kb
    assert found.loop.boundary.exchange.spent == spent(found.exchange)
    assert all(row["bits"] in BITS for row in found.exchange)
    if kb == 100.0:
        # There is room for all of it: nothing is rounded.
        assert {row["bits"] for row in found.exchange} == {32}
        assert found.digest == simulate(tiny_settings(strategy), tiny_data()).digest


def test_the_smallest_budget_is_said_and_is_enough(tiny_settings, tiny_data, simulate):
    with pytest.raises(SettingsError, match=r"must be at least 0.2 for this run .*, got 0.1"):
        simulate(settings_of(tiny_settings, kb=0.1), tiny_data())
    found = simulate(settings_of(tiny_settings, kb=LEAST / 1000), tiny_data())
    assert {row["bits"] for row in found.exchange} <= {1, 2}
    assert spent(found.exchange) <= LEAST


def test_clients_of_many_rows_get_more_bits(tiny_settings, tiny_data, simulate):
    # Rows 12, 13, 9, 17: fedavg weighs clients 1 and 3, of one model, by theirs.
    found = simulate(settings_of(tiny_settings, "fedavg", kb=14.0), tiny_data())
    of = {
        client: sum(
            r["bits"] for r in found.exchange if r["client"] == client and r["direction"] == "up"
        )
        for client in (1, 3)
    }
    assert of[3] >= of[1]


def test_who_is_asked_again_costs_again_and_the_budget_is_kept(tiny_settings, tiny_data, simulate):
    faults = [{"kind": "crash", "clients": [0, 1, 2], "rounds": [2]}]
    engine = {"backend": "inline", "quorum": 1.0}
    given = {"faults": faults, "engine": engine}
    found = simulate(settings_of(tiny_settings, kb=0.5, **given), tiny_data())
    assert [e["event"] for e in found.events].count("round retried") == 1
    assert len([r for r in found.exchange if r["round"] == 2 and r["direction"] == "down"]) == 7
    assert spent(found.exchange) <= 500


def test_nobody_is_asked_again_for_whom_nothing_is_left(tiny_settings, tiny_data, simulate):
    faults = [{"kind": "crash", "rounds": [3]}]
    given = settings_of(tiny_settings, kb=LEAST / 1000, faults=faults)
    with pytest.raises(QuorumError, match="round 3: 0 of 4 clients gave a usable answer"):
        simulate(given, tiny_data())
    engine = {"backend": "inline", "below_quorum": "skip"}
    given = settings_of(tiny_settings, kb=LEAST / 1000, faults=faults, engine=engine)
    found = simulate(given, tiny_data())
    # What is left out has cost what it cost, and counts.
    assert found.loop.boundary.exchange.spent == spent(found.exchange) <= LEAST


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("fedproto", "the size of prototypes is not known before a run"),
        ("fedgkd", "fedgkd sends weights in the first round and bundle later"),
        ("fedkd", "the size of low_rank is not known before a run"),
    ],
)
def test_an_algorithm_whose_transfers_are_not_known_is_refused_by_name(
    tiny_settings, tiny_data, simulate, strategy, told
):
    with pytest.raises(SettingsError, match=f"exchange.budget_kb: {told}"):
        simulate(settings_of(tiny_settings, strategy, kb=100.0), tiny_data())


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        (
            {"budget_kb": 5, "up": "float16"},
            "exchange.up must be left out under exchange.budget_kb",
        ),
        ({"budget_kb": 5, "down": "int8"}, "exchange.down must be left out"),
        ({"allocation": "uniform"}, "exchange.budget_kb, which is not set"),
        ({"budget_kb": 0}, "greater than or equal to 0.001"),
        ({"budget_kb": 5, "allocation": "fair"}, "'greedy' or 'uniform'"),
    ],
)
def test_settings_that_cannot_work_are_named(tiny_settings, exchange, told):
    with pytest.raises(ValueError, match=told):
        tiny_settings("dsfl", exchange=exchange)


def test_what_was_chosen_travels_to_workers_and_nodes():
    told = Told(levels=Levels(3, 1, 77))
    assert read_instruction(instruction(2, told)).levels == (3, 1, 77)
    records = payload_records(None)
    written = node_instruction(2, 1, records, told, Assignment("{}"))
    assert read_instruction(written).levels == (3, 1, 77)
    written = node_instruction(2, 1, records, Told(), Assignment("{}"))
    assert read_instruction(written).levels == NO_BUDGET


class Stopping(Observer):
    def metrics(self, rows: Any) -> None:
        if rows[0]["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_by_the_same_plan_and_is_shown(
    tiny_settings, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "load_data", lambda of: tiny_data())
    given = settings_of(tiny_settings, kb=0.7, rounds=4, output=tmp_path, checkpoints={"every": 1})
    whole = run(given)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(given, observers=[Stopping()])
    resumed = run(resume=stop.value.folder)
    assert resumed.weights_sha256 == whole.weights_sha256
    rows = [read_rows(of.folder / "exchange.jsonl") for of in (whole, resumed)]
    assert rows[0] == rows[1]
    assert 0 < spent(rows[0]) <= 700
    result = json.loads((whole.folder / "result.json").read_text())
    assert sum(result["bits"]["up"].values()) == 16


def test_a_budget_is_checked_before_any_worker_starts(tmp_path):
    settings = load_settings(
        None, ["strategy.name=dsfl", "exchange.budget_kb=1", "engine.backend=inline"]
    )
    with pytest.raises(SettingsError, match=r"exchange.budget_kb must be at least [\d.]+ for this"):
        running.load_data(settings)


def test_rows_with_which_a_small_budget_can_be_kept_are_said():
    words = ["strategy.name=dsfl", "exchange.budget_kb=9", "engine.backend=inline", "rounds=2"]
    told = r"exchange\.rows_per_round=(\d+) or data\.public\.size=\1 fits it \(now 500 rows a round"
    with pytest.raises(SettingsError, match=told) as small:
        running.load_data(load_settings(None, words))
    rows = int(re.search(told, str(small.value))[1])
    for fewer in ("exchange.rows_per_round", "data.public.size"):
        running.load_data(load_settings(None, [*words, f"{fewer}={rows}"]))
    with pytest.raises(SettingsError, match="must be at least"):
        running.load_data(load_settings(None, [*words, f"exchange.rows_per_round={rows + 10}"]))
    # Weights are as many whatever the rows are.
    weights = ["strategy.name=fedavg", "clients.models=mlp", *words[1:]]
    with pytest.raises(SettingsError, match=r"got 9$"):
        running.load_data(load_settings(None, weights))
