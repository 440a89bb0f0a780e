"""Every algorithm of the table, with clients that join late, come and go, and are too slow."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.commands.running import run
from sim.keeping.records import read_rows
from sim.settings import Settings
from strategies import STRATEGIES

QUICK = ("dml", "fedavg", "fedmd")
"""What the quick suite tries."""

WORDS = (
    "rounds=3",
    "clients.count=6",
    "clients.models=[{name: mlp, options: {hidden: [16]}}]",
    "evaluation.every=3",
    "engine.below_quorum=skip",
)

HARDSHIPS = {
    # Nobody but client 0 is there from the first round on; 5 never is.
    "late": ["presence.join_rounds=[1,2,2,3,3,9]"],
    # Of seed 3: rounds with few clients.
    "churn": ["presence.leave=0.5", "presence.come_back=0.3", "seed=3"],
    # Clients 2 and 5 are never done in time, others drop out.
    "slow": [
        "clock.speed=[1e9,1e9,1]",
        "clock.server_speed=1e9",
        "clock.deadline_s=60",
        "faults=[{kind: dropout, probability: 0.3, attempts: null}]",
    ],
    # Everything, and a round in which nobody is there.
    "night": [
        "clock.speed=1e9",
        "clock.latency_s=1",
        "presence.trace={trace}",
        "presence.round_s=100",
    ],
}

EACH = [
    pytest.param(
        name,
        hardship,
        id=f"{name}-{hardship}",
        marks=() if name in QUICK and hardship in ("late", "night") else pytest.mark.slow,
    )
    for name in sorted(STRATEGIES)
    for hardship in HARDSHIPS
]


@pytest.mark.parametrize(("name", "hardship"), EACH)
def test_a_run_ends_and_ends_alike_twice(
    small: Callable[..., Settings], tmp_path: Path, name: str, hardship: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from,to\n0,0,1\n1,0,1\n*,100,1e6\n", encoding="utf-8")
    words = [
        word.format(trace=trace) if "{trace}" in word else word for word in HARDSHIPS[hardship]
    ]
    # What an algorithm needs comes last.
    settings = small(*WORDS, *words, f"strategy.name={name}", *STRATEGIES[name].card.needs)
    first, second = run(settings), run(settings)
    assert first.weights_sha256 == second.weights_sha256
    rows = [
        row for row in read_rows(first.folder / "metrics.jsonl") if row["scope"] == "federation"
    ]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert any(row["replies"] for row in rows)
    assert rows[-1]["accuracy"] is not None
    events = {row["event"] for row in read_rows(first.folder / "events.jsonl")}
    assert events <= {"rejected", "round skipped", "evaluation failed"}
    if hardship == "night":
        # Two clients, then nobody, then everybody else.
        assert [row["participants"] for row in rows][1] == 0
