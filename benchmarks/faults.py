"""Injected faults and what becomes of the run: each kind, in each phase, stacked and one by one.

A run of 6 digits clients over 3 rounds is repeated with one planned fault; algorithms take turns.
Faults that cost a
retry (a late client, a worker that is killed, exits or crashes) must leave no trace but an event:
the same weights as the run without. Faults that cost a client its round (dropped out, raised,
hung, out of memory, frozen, a bad reply) must leave exactly the weights of the run in which that
client does not answer; of bad replies, and where a frozen stack is tried one by one, the others'
replies must count. In an evaluation they must leave the weights alone. And the client, round and
reason must be named.

    python benchmarks/faults.py           # about 5 minutes
    python benchmarks/faults.py --check   # exit status 1 where an outcome is wrong
    python benchmarks/faults.py --quick   # two of them, to see that it runs
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measurement import describe, machine, row

from sim.adversity.bad_replies import BAD_REPLIES
from sim.commands.running import run
from sim.engine.session import RaySession
from sim.keeping.records import EVENTS_FILE, read_rows
from sim.settings import Settings, settings_from_table

RETRIED = ("delay", "kill", "exit", "segfault")
LOST = ("dropout", "crash", "hang", "memory", "freeze")
STRATEGIES = ("dml", "dsfl", "fedgkt", "proxyfl")
CLIENT, ROUND = 2, 2
DEADLINE_S = 2.0


@dataclass(frozen=True)
class Fault:
    """One planned fault, and how the clients train."""

    kind: str
    phase: str
    vectorize: str
    reply: str = "nan"
    strategy: str = "dml"

    @property
    def label(self) -> str:
        what = f"bad_reply {self.reply}" if self.kind == "bad_reply" else self.kind
        return f"{what}, {self.phase}, {self.vectorize}, {self.strategy}"

    @property
    def rule(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "phases": [self.phase],
            "clients": [CLIENT],
            "rounds": [ROUND],
            "seconds": 0.3,
            "reply": self.reply,
        }


def catalogue() -> list[Fault]:
    """Return every fault that is tried."""
    kinds = (*RETRIED, *LOST)
    faults = [
        Fault(kind, phase, vectorize)
        for vectorize in ("loop", "vmap")
        for phase in ("train", "evaluate")
        for kind in kinds
    ]
    spoilt = [Fault("bad_reply", "train", "loop", reply) for reply in BAD_REPLIES]
    return [
        replace(fault, strategy=STRATEGIES[number % len(STRATEGIES)])
        for number, fault in enumerate([*faults, *spoilt])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 for wrong outcomes")
    parser.add_argument("--quick", action="store_true", help="two faults, no verdict")
    options = parser.parse_args()
    before = machine()
    faults = catalogue()
    if options.quick:
        faults = [Fault("crash", "train", "loop"), Fault("delay", "evaluate", "vmap")]
    wrong = []
    with tempfile.TemporaryDirectory() as output, RaySession(settings().engine) as session:
        reference: dict[tuple[str, str, bool], str | None] = {}
        for fault in faults:
            started = time.perf_counter()
            lost = fault.phase == "train" and fault.kind not in RETRIED
            key = fault.strategy, fault.vectorize, lost
            if key not in reference:
                absent = [replace(fault, kind="dropout").rule] if lost else []
                whole = settings(fault.vectorize, absent, output, fault.strategy)
                reference[key] = run(whole, session=session).weights_sha256
            planned = settings(fault.vectorize, [fault.rule], output, fault.strategy)
            result = run(planned, session=session)
            problem = judge(fault, result, reference[key])
            seconds = time.perf_counter() - started
            print(f"  {fault.label:48} {seconds:5.1f} s  {problem or 'right'}", flush=True)
            if problem:
                wrong.append(fault.label)
    print(describe(before, os.getloadavg()[0]))
    right = f"{len(faults) - len(wrong)} of {len(faults)}"
    row(
        "R", "injected faults with the right outcome", right, "all, at least 30", not wrong, options
    )
    return int(options.check and bool(wrong))


def judge(fault: Fault, result: Any, expected: str | None) -> str | None:
    """Return what is wrong with the outcome, or None."""
    # Of a stack that stops its worker each member goes on by itself, which rounds differently.
    same_bits = fault.kind != "bad_reply" and (fault.kind, fault.vectorize) != ("freeze", "vmap")
    if same_bits and result.weights_sha256 != expected:
        return "other weights"
    events = read_rows(Path(result.folder) / EVENTS_FILE)
    replies = [r["replies"] for r in result.history.federation]
    answered = 6 if fault.kind in RETRIED or fault.phase == "evaluate" else 5
    if replies != [6, answered, 6]:
        return f"replies {replies}"
    named = [event for event in events if event.get("client") == CLIENT]
    if fault.kind == "delay":
        return None if not events else f"events {events}"
    if not named or any(event["round"] != ROUND for event in named):
        return f"not named: {events}"
    return None


def settings(
    vectorize: str = "loop",
    faults: list[dict[str, Any]] | None = None,
    output: str = "runs",
    strategy: str = "dml",
) -> Settings:
    return settings_from_table(
        {
            "rounds": 3,
            "strategy": {"name": strategy},
            "output": output,
            "data": {"private_rows": 240, "test_rows": 100, "public": {"size": 60}},
            "clients": {"count": 6, "models": ["mlp"], "local": {"epochs": 1}},
            "engine": {"vectorize": vectorize, "deadline_s": DEADLINE_S},
            "faults": faults or [],
        }
    )


if __name__ == "__main__":
    sys.exit(main())
