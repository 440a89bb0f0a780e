"""Dispatching: which worker carries out which call when, and what becomes of those that fail.

Calls go out longest first, several in a parcel where they are short, and every worker has the
next parcel at hand while it works on one. Nothing polls: this process sleeps until a parcel is
done or overdue.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from fedkd.exchange.payload import Payload
from sim.adversity.faults import FaultPlan
from sim.engine.bundles import Bundle, StatePlace
from sim.engine.costs import Costs
from sim.engine.desks import STARTING_S, Desk, Desks, Flight, Ref
from sim.engine.grid import Outcome, PackedCall, StatesLostError
from sim.engine.session import NOTHING, Answered, Parcel
from sim.settings import EngineSettings
from sim.wire.messages import ClientReply, CohortCall

SHORTEST_PARCEL_S = 0.05
"""Parcels that take less are not worth their trip; the last ones bound how long others wait."""
MOST_CALLS = 256
"""Calls in a parcel, so that nobody waits long for the first answers of a phase."""
AHEAD = 2
"""Parcels at a worker: one in work and one that keeps it from waiting for the next."""
LOOK_ROUND_S = 1.0
"""How often we look, while a cluster has a new worker to place, whether there is room for it."""
LAST_LOOK_S = 0.1
"""How long we look once more whether an overdue answer has come after all."""
DEATHS_IN_A_ROW = 20
"""Workers that die one after the other, with nothing done in between, before we give up."""
PATIENCE_S = 1.5
"""How much later than a worker we lose patience: it interrupts an overdue cohort by itself."""


@runtime_checkable
class Books(Protocol):
    """Who keeps clients' states and writes down what happened."""

    def state_of(self, client: int) -> StatePlace | None:
        """Return where a client's latest state is; None before its first training."""

    def keep(self, client: int, place: StatePlace) -> None:
        """Take a state that training returned."""

    def tell(self, event: str, call: CohortCall, reason: str) -> None:
        """Write down what happened to the clients of a call."""

    def tell_split(self, call: CohortCall, reason: str) -> None:
        """Write down that members of a stack had to train one by one."""

    def exclude(self, call: CohortCall, reason: str) -> None:
        """Never ask these clients again."""

    def note(self, row: Mapping[str, Any]) -> None:
        """Write down an event."""


class Dispatcher:
    """One phase over the workers: what waits, what is under way, who failed how often.

    Args:
        desks: where the workers are.
        calls: to be carried out.
        engine: says how often and how long.
        costs: what calls are expected to take; learns what they took.
        faults: those that are planned take a worker each.
        books: keeps states, and is told what happened.
    """

    def __init__(
        self,
        desks: Desks,
        calls: Sequence[PackedCall],
        *,
        engine: EngineSettings,
        costs: Costs,
        faults: FaultPlan,
        books: Books,
    ) -> None:
        self._desks = desks
        self._costs = costs
        self._faults = faults
        self._books = books
        self._calls = list(calls)
        self._engine = engine
        self._expected = [costs.expect(packed.call.phase, packed.call.clients) for packed in calls]
        # Longest first; of about equals the first, so that answers come about in client order
        # and need not wait here for those before them.
        longest = max(self._expected, default=0.0)
        order = sorted(
            range(len(calls)),
            key=lambda position: round(4 * math.log2(longest / self._expected[position])),
        )
        self._waiting = deque(order)
        self._left_s = sum(self._expected)
        self._shared = Counter(
            piece for packed in calls for piece in {id(piece) for piece in packed.received}
        )
        self._put: dict[int, Ref] = {}
        self._deaths: Counter[int] = Counter()
        self._alone = {
            position for position in order if faults and self._is_planned_death(position)
        }
        self._deaths_in_a_row = 0
        self._whole_of: dict[int, int] = {}
        self._parts: dict[int, dict[int, ClientReply | str]] = {}
        self._done: list[tuple[int, Outcome]] = []

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """Yield (position, outcome) as each call is done."""
        while self._waiting or any(desk.flights for desk in self._desks):
            self._fill()
            # Only now that every worker is busy again: whoever takes the outcomes works on them
            # before asking for more, and that should not keep a worker waiting.
            done, self._done = self._done, []
            yield from done
            self._wait()
        yield from self._done

    def abandon(self) -> None:
        """Forget what is under way; a worker that is still busy with it is replaced when needed."""
        for desk in self._desks:
            desk.stale = desk.stale or bool(desk.flights)
            desk.flights.clear()

    # -- sending ---------------------------------------------------------------------------

    def _fill(self) -> None:
        for desk in self._desks:
            if desk.stale:
                self._desks.renew(desk)
        # A worker that is still starting gets its share once it is there.
        ready = [desk for desk in self._desks if desk.ready]
        for _ in range(AHEAD):
            for desk in ready:
                if self._waiting and self._has_room(desk):
                    self._send(desk)

    def _has_room(self, desk: Desk) -> bool:
        """Tell whether the next call may go to this worker now.

        A suspect has a worker to itself: where two parcels are under way and the worker dies, the
        first may be done and its answer lost, so nobody could tell which of them it was.
        """
        if not desk.flights:
            return True
        alone = self._waiting[0] in self._alone or desk.flights[0].positions[0] in self._alone
        return len(desk.flights) < AHEAD and not alone

    def _send(self, desk: Desk) -> None:
        positions = self._next_parcel()
        packed = [self._calls[position] for position in positions]
        expected = sum(self._expected[position] for position in positions)
        parcel, shared = self._pack(packed)
        reference = desk.worker.run.options(num_returns=2).remote(parcel, *shared)
        if not desk.flights:
            desk.since = time.monotonic()
        states = reference[1] if packed[0].call.phase == "train" else None
        limit = self._limit(packed, expected)
        desk.flights.append(Flight(positions, reference[0], states, limit))

    def _limit(self, calls: Sequence[PackedCall], expected: float) -> float:
        """Return after how many seconds a parcel is overdue.

        A worker interrupts each overdue cohort by itself; this is for those that cannot be.
        """
        deadline = self._engine.deadline_s
        # Members of a stack may hang each by itself, all together, and again one by one.
        sizes = [len(packed.call.clients) for packed in calls]
        each = [deadline * (2 * size + 1 if size > 1 else 1) for size in sizes]
        limit = sum(each)
        if self._costs.measured(calls[0].call.phase):
            limit = min(limit, max(each) + 10 * expected)
        return limit + PATIENCE_S

    def _next_parcel(self) -> tuple[int, ...]:
        """Take calls for about a quarter of what each worker still has to do.

        Parcels get smaller towards the end, so that all workers finish at about the same time.
        """
        first = self._waiting.popleft()
        self._left_s -= self._expected[first]
        taken = [first]
        if first in self._alone:
            return (first,)
        # One worker has nobody to finish together with.
        workers = len(self._desks)
        share = self._left_s / (2 * AHEAD * workers if workers > 1 else AHEAD)
        limit = max(SHORTEST_PARCEL_S, share)
        seconds = self._expected[first]
        while self._waiting and len(taken) < MOST_CALLS:
            position = self._waiting[0]
            seconds += self._expected[position]
            if seconds > limit or position in self._alone:
                break
            taken.append(self._waiting.popleft())
            self._left_s -= self._expected[position]
        return tuple(taken)

    def _pack(self, calls: Sequence[PackedCall]) -> tuple[Parcel, list[Ref]]:
        objects: dict[int, int] = {}
        shared: list[Ref] = []
        own: list[Payload] = []
        own_number: dict[int, int] = {}

        def number_of(key: int, reference: Ref) -> int:
            if key not in objects:
                objects[key] = len(shared)
                shared.append(reference)
            return objects[key]

        # A piece's number is that of an object shared between parcels, or of one of its own,
        # and the latter come first; so their number has to be known before.
        for packed in calls:
            for piece in packed.received:
                if piece is not None and self._is_own(piece) and id(piece) not in own_number:
                    own_number[id(piece)] = len(own)
                    own.append(piece)

        def received_number(piece: Payload | None) -> int:
            if piece is None:
                return NOTHING
            if id(piece) in own_number:
                return own_number[id(piece)]
            if id(piece) not in self._put:
                self._put[id(piece)] = ray.put(piece)
            return len(own) + number_of(id(piece), self._put[id(piece)])

        def state_place(call: CohortCall, client: int) -> tuple[int, int]:
            handle = None if call.phase == "query" else self._books.state_of(client)
            if handle is None:
                return NOTHING, NOTHING
            bundle = handle.bundle
            return number_of(id(bundle), bundle.reference), handle.place

        received = tuple(tuple(map(received_number, packed.received)) for packed in calls)
        states = tuple(
            tuple(state_place(packed.call, client) for client in packed.call.clients)
            for packed in calls
        )
        return Parcel(tuple(packed.call for packed in calls), received, states, tuple(own)), shared

    def _is_own(self, piece: Payload) -> bool:
        return self._shared[id(piece)] == 1

    def _is_planned_death(self, position: int) -> bool:
        call = self._calls[position].call
        return any(
            self._faults.takes_worker_down(
                call.phase, call.round, client, call.attempt, call.deaths
            )
            for client in call.clients
        )

    # -- receiving -------------------------------------------------------------------------

    def _wait(self) -> None:
        busy = [desk for desk in self._desks if desk.flights]
        if self._waiting:
            busy += [desk for desk in self._desks if not desk.ready]
        if not busy:
            failed = tuple(self._waiting)
            self._waiting.clear()
            self._finish(failed, "no worker is left")
            return
        patience = min(desk.overdue_at() for desk in busy) - time.monotonic()
        unplaced = self._desks.unplaced()
        if unplaced:
            patience = min(patience, LOOK_ROUND_S)
        signs = {desk.next_sign(): desk for desk in busy}
        done, _ = ray.wait(list(signs), num_returns=1, timeout=max(patience, 0.0))
        for reference in done:
            desk = signs[reference]
            if desk.ready:
                self._receive(desk)
            else:
                self._welcome(desk)
        if unplaced and not done:
            self._give_up_surplus(unplaced)
        now = time.monotonic()
        for desk in busy:
            waited_for = desk in self._desks and (desk.flights or not desk.ready)
            # A last look, because only the first of all signs is asked for above.
            if (
                waited_for
                and desk.overdue_at() <= now
                and not ray.wait([desk.next_sign()], timeout=LAST_LOOK_S)[0]
            ):
                if desk.ready:
                    self._lose(desk, "it did not answer in time", overdue=True)
                else:
                    self._lose_starting(desk, f"it did not start within {STARTING_S:g} s")

    def _welcome(self, desk: Desk) -> None:
        """A new worker has started, and begins with its first parcel now."""
        try:
            ray.get(desk.configured)
        except RayError as error:
            self._lose_starting(desk, first_line(error))
        else:
            desk.ready = True
            desk.since = time.monotonic()

    def _give_up_surplus(self, unplaced: Sequence[Desk]) -> None:
        """Do without workers whose place was on a machine that is lost."""
        for desk in unplaced[: max(self._desks.surplus, 0)]:
            for flight in desk.flights:
                self._again(flight.positions)
            self._desks.drop(desk)

    def _receive(self, desk: Desk) -> None:
        flight = desk.flights[0]
        try:
            answered: list[Answered] = ray.get(flight.answers)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ObjectLostError):
                raise StatesLostError(f"clients' states were lost: {first_line(cause)}") from None
            desk.flights.popleft()
            self._finish(flight.positions, f"the worker failed: {error}")
        except ObjectLostError as error:
            raise StatesLostError(f"clients' states were lost: {first_line(error)}") from None
        except RayError as error:
            self._lose(desk, first_line(error))
            return
        else:
            desk.flights.popleft()
            self._deaths_in_a_row = 0
            self._take(flight, answered)
        desk.since = time.monotonic()

    def _take(self, flight: Flight, answered: Sequence[Answered]) -> None:
        bundle = Bundle(flight.states, 0)
        for position, done in zip(flight.positions, answered, strict=True):
            call = self._calls[position].call
            self._costs.learn(call.phase, call.clients, done.seconds)
            self._books.tell_split(call, done.split)
            for client, answer in zip(call.clients, done.answers, strict=True):
                if flight.states is not None and not isinstance(answer, str):
                    self._books.keep(client, StatePlace(bundle, bundle.size))
                    bundle.size += 1
            self._finish_one(position, Outcome(done.answers))
        bundle.live = bundle.size

    def _finish(self, positions: Sequence[int], reason: str) -> None:
        for position in positions:
            self._finish_one(position, Outcome.failed(self._calls[position], reason))

    def _finish_one(self, position: int, outcome: Outcome) -> None:
        whole = self._whole_of.get(position)
        if whole is None:
            self._done.append((position, outcome))
            return
        parts = self._parts[whole]
        parts.update(zip(self._calls[position].call.clients, outcome.replies, strict=True))
        clients = self._calls[whole].call.clients
        if len(parts) == len(clients):
            self._done.append((whole, Outcome([parts[client] for client in clients])))

    def _split(self, position: int) -> None:
        """Let each member of a stack that kills or stops its worker try by itself."""
        packed = self._calls[position]
        self._parts[position] = {}
        for number, piece in enumerate(packed.received):
            alone = len(self._calls)
            self._calls.append(PackedCall(packed.call.of([number]), (piece,)))
            self._expected.append(self._expected[position] / len(packed.received))
            self._whole_of[alone] = position
            self._alone.add(alone)
            self._again((alone,))

    # -- losing workers --------------------------------------------------------------------

    def _lose(self, desk: Desk, reason: str, *, overdue: bool = False) -> None:
        """A worker died or hangs over what it was sent."""
        positions = [position for flight in desk.flights for position in flight.positions]
        round = self._calls[positions[0]].call.round
        self._books.note({"round": round, "event": "worker lost", "reason": reason})
        self._desks.renew(desk)
        if self._is_hopeless(positions, reason):
            return
        if len(positions) > 1 or positions[0] not in self._alone:
            # One of them did it, or none: each gets a worker to itself.
            self._alone.update(positions)
            self._again(positions)
        elif overdue and len(self._calls[positions[0]].call.clients) > 1:
            self._split(positions[0])
        elif overdue:
            deadline = f"no answer within engine.deadline_s = {self._engine.deadline_s:g}"
            self._finish(positions, f"{deadline}, and the worker could not be interrupted")
        else:
            self._retry(positions[0], reason)

    def _lose_starting(self, desk: Desk, reason: str) -> None:
        """A worker died or hangs before it began; its parcels are not to blame."""
        positions = [position for flight in desk.flights for position in flight.positions]
        self._desks.renew(desk)
        if not self._is_hopeless(positions, reason):
            self._again(positions)

    def _is_hopeless(self, positions: Sequence[int], reason: str) -> bool:
        """Count a death; if there were too many, fail these calls and all that are left."""
        self._deaths_in_a_row += 1
        most = max(DEATHS_IN_A_ROW, 2 * (self._engine.retries + 1))
        if self._desks and self._deaths_in_a_row < most:
            return False
        failed = [*positions, *self._waiting]
        self._waiting.clear()
        for desk in self._desks:
            failed.extend(p for flight in desk.flights for p in flight.positions)
        self.abandon()
        self._finish(failed, f"workers died {self._deaths_in_a_row} times in a row: {reason}")
        return True

    def _again(self, positions: Sequence[int]) -> None:
        self._waiting.extendleft(reversed(positions))
        self._left_s += sum(self._expected[position] for position in positions)

    def _retry(self, position: int, reason: str) -> None:
        """The worker died over this call alone: try again, but not for ever."""
        packed = self._calls[position]
        self._deaths[position] += 1
        tries = self._deaths[position]
        if tries <= self._engine.retries:
            self._books.tell("retried", packed.call, f"the worker died: {reason}")
            self._calls[position] = PackedCall(
                replace(packed.call, deaths=packed.call.deaths + 1), packed.received
            )
            self._again((position,))
        elif len(packed.call.clients) > 1:
            self._split(position)
        else:
            # These deaths are accounted for.
            self._deaths_in_a_row = 0
            reason = f"the worker died {tries} times over this client: {reason}"
            self._books.exclude(packed.call, reason)
            self._finish((position,), reason)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
