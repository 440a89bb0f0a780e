"""Faults on purpose: what a study of unreliable clients, and our own tests, inject.

``faults`` in the settings is a list of rules. Whether a rule strikes a client is drawn from the
run's seed, the round, the client and the attempt, so a run with faults repeats like any other.
"""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.bounds import Count, CountOrZero, Real, Share
from fedkd.randomness import Purpose, generator_for
from sim.adversity.bad_replies import BAD_REPLIES

Phase = Literal["query", "train", "evaluate"]

FaultKind = Literal[
    "dropout",
    "delay",
    "crash",
    "hang",
    "memory",
    "bad_reply",
    "kill",
    "exit",
    "segfault",
    "freeze",
]

PROCESS_FAULTS: tuple[FaultKind, ...] = ("kill", "exit", "segfault", "freeze")
"""Faults that take the whole worker process with them."""

_PHASES: tuple[Phase, ...] = ("query", "train", "evaluate")


class InjectedError(RuntimeError):
    """What a client raises when the settings ask it to."""


class FaultRule(BaseModel):
    """One entry of ``faults``: what happens, to whom, when and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind = Field(
        description="dropout: no answer; delay: `seconds` late; crash: an exception; hang: never "
        "done; memory: out of memory; bad_reply: `reply`; kill, exit, segfault: the worker "
        "process ends; freeze: it stops",
    )
    probability: Share = Field(1.0, description="of striking a client in a round")
    clients: tuple[CountOrZero, ...] | None = Field(None, description="only these; none: everybody")
    rounds: tuple[Count, ...] | None = Field(None, description="only in these; none: in all")
    phases: tuple[Phase, ...] = Field(("train",), description="train, evaluate or both")
    attempts: Count | None = Field(
        1, description="strikes in the first so many attempts; none: in every attempt"
    )
    seconds: Real = Field(1.0, ge=0, le=2_592_000, description="how long a delay is")
    reply: str = Field("nan", description=f"what a bad reply is: {', '.join(BAD_REPLIES)}")

    @model_validator(mode="after")
    def _reply_is_known(self) -> "FaultRule":
        if self.reply not in BAD_REPLIES:
            raise ValueError(
                f"faults.reply must be one of {', '.join(BAD_REPLIES)}, got {self.reply!r}"
            )
        return self


class FaultPlan:
    """Which faults strike whom: a pure function of the seed, the same on driver and workers.

    Args:
        rules: of the settings.
        seed: of the run.
        simulated: whether there is a simulated clock, by which clients are late: nobody waits then.
    """

    def __init__(self, rules: Sequence[FaultRule], seed: int, *, simulated: bool = False) -> None:
        self._rules = tuple(rules)
        self._seed = seed
        self._simulated = simulated

    def __bool__(self) -> bool:
        """Tell whether anything is planned at all."""
        return bool(self._rules)

    def striking(
        self, phase: Phase, round: int, client: int, attempt: int, deaths: int = 0
    ) -> Iterator[tuple[FaultRule, np.random.Generator]]:
        """Yield the rules that strike, each with a stream for what it draws further.

        Args:
            phase: of the round.
            round: 1-based.
            client: partition id.
            attempt: how often the server asked, this time included.
            deaths: workers that died over it since; only faults of the process take another
                try for another attempt, so that a worker lost by accident changes no other draw.
        """
        asked = attempt
        for number, rule in enumerate(self._rules):
            attempt = asked + (deaths if rule.kind in PROCESS_FAULTS else 0)
            if (
                phase not in rule.phases
                or (rule.clients is not None and client not in rule.clients)
                or (rule.rounds is not None and round not in rule.rounds)
                or (rule.attempts is not None and attempt > rule.attempts)
            ):
                continue
            key = round, client, attempt, _PHASES.index(phase), number
            rng = generator_for(self._seed, Purpose.FAULTS, *key)
            if rng.random() < rule.probability:
                yield rule, rng

    def drops_out(self, phase: Phase, round: int, client: int, attempt: int) -> bool:
        """Tell whether the client does not even get to know that it was asked."""
        struck = self.striking(phase, round, client, attempt)
        return any(rule.kind == "dropout" for rule, _ in struck)

    def takes_worker_down(
        self, phase: Phase, round: int, client: int, attempt: int, deaths: int = 0
    ) -> bool:
        """Tell whether serving the client costs its worker."""
        struck = self.striking(phase, round, client, attempt, deaths)
        return any(rule.kind in PROCESS_FAULTS for rule, _ in struck)

    def strike(self, phase: Phase, round: int, client: int, attempt: int, deaths: int = 0) -> None:
        """Let happen to this process what is planned before the client answers."""
        for rule, _ in self.striking(phase, round, client, attempt, deaths):
            if not (self._simulated and rule.kind == "delay"):
                _strike(rule)

    def delay_s(self, phase: Phase, round: int, client: int, attempt: int) -> float:
        """Return by how much a client starts late, by a simulated clock."""
        struck = self.striking(phase, round, client, attempt)
        return sum((rule.seconds for rule, _ in struck if rule.kind == "delay"), 0.0)

    def spoilers(
        self, phase: Phase, round: int, client: int, attempt: int
    ) -> Iterator[tuple[str, np.random.Generator]]:
        """Yield the names of the bad replies that the client sends instead of its own."""
        for rule, rng in self.striking(phase, round, client, attempt):
            if rule.kind == "bad_reply":
                yield rule.reply, rng


def _strike(rule: FaultRule) -> None:
    match rule.kind:
        case "delay":
            time.sleep(rule.seconds)
        case "crash":
            raise InjectedError("a crash was injected (faults)")
        case "hang":
            while True:
                time.sleep(3600)
        case "memory":
            _exhaust_memory()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(0)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "dropout" | "bad_reply":
            pass


def _exhaust_memory() -> None:
    """Ask for more memory than the process may have; a `MemoryError` is the outcome."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    used = pages * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    headroom = 64 * 2**20
    hoard: list[bytearray] = []
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, limits[1]))
    try:
        while True:
            hoard.append(bytearray(headroom))
    finally:
        hoard.clear()
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, limits)
