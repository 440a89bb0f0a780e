"""A byte budget: how many bits each transfer of a run gets, so that all of them stay within it.

A transfer is what goes one way between the server and one client in one round. It can be written by
any codec of `LADDER` that takes it: the form of a transfer says what each would cost and how much
of it would be lost. `allocated` chooses for all transfers that are left, by either of two rules:

``uniform``: the highest level at which all of them fit, the same for all.

``greedy``: from the cheapest level of each on, always the step that takes away most expected error
for a byte, as long as a step fits; and once more from the uniform levels on, of which the better
one is taken. So its expected error is never above that of ``uniform``.

The expected error of a transfer is the share of its squares that is lost, on average over soft
labels drawn evenly from all distributions and over other numbers drawn from a normal distribution,
times a weight: the square of a client's share in the mean for what goes up, an equal share for what
comes down. Nothing of anybody's data is looked at, so the plan tells nothing of it.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from fedkd.exchange.codecs import Codec, Float16, Float32, Int8, SoftLabelBits
from fedkd.exchange.payload import Asked, AtMost, Payload
from fedkd.exchange.payloads import Bundle, ClassTable, Numbers, Predictions, Weights
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.values import flatten

Allocation = Literal["greedy", "uniform"]

LADDER: tuple[Codec, ...] = (
    *(SoftLabelBits(bits=bits) for bits in range(1, 9)),
    Int8(),
    Float16(),
    Float32(),
)
"""What a transfer may be written by, from coarse to exact; a place in it is a level."""

BITS = (*range(1, 9), 8, 16, 32)
"""Of a number at each level, beside what rows cost; at level 0 a row of soft labels is a class."""

EXACT = len(LADDER) - 1


class BudgetError(ValueError):
    """A byte budget that cannot be kept; the text says what would be possible."""


class SmallBudgetError(BudgetError):
    """A budget that is too small for what is planned."""


class Levels(NamedTuple):
    """What one client is told of its two transfers in a round.

    Attributes:
        down: level of what comes down; None: as the settings say, there is no budget.
        up: level of what goes up; None likewise.
        most_bytes: that its answer may have. One that has more, such as NaN that no codec takes,
            stays at home.
    """

    down: int | None = None
    up: int | None = None
    most_bytes: int = 0


NO_BUDGET = Levels()


class Share(NamedTuple):
    """What the server has allotted to one client in a round.

    Attributes:
        down_bytes: that what comes down may have, orders included.
        up: level of what goes up.
        up_bytes: that it may have.
    """

    down_bytes: int
    up: int
    up_bytes: int


@dataclass(frozen=True)
class Form:
    """What a transfer costs and loses at each level that is worth taking.

    Attributes:
        levels: places in `LADDER`, rising.
        sizes: bytes at each, rising.
        errors: expected share of its squares that is lost at each, falling.
    """

    levels: tuple[int, ...]
    sizes: tuple[int, ...]
    errors: tuple[float, ...]

    @classmethod
    def of(cls, example: Payload, asked: Asked | None = None, *, more_bytes: int = 0) -> "Form":
        """Measure a form at an example of it.

        Args:
            example: as large as a transfer can be.
            asked: what is asked for, where codecs may refuse it.
            more_bytes: that travel with it at any level.

        Raises:
            BudgetError: no codec takes it.
        """
        found = [
            (level, size + more_bytes, error)
            for level in range(len(LADDER))
            if (measured := _measured(LADDER[level], example, asked)) is not None
            for size, error in [measured]
        ]
        kept: list[tuple[int, int, float]] = []
        for level, size, error in found:
            # Who costs no less and loses no less than another has no place.
            while kept and kept[-1][1] >= size and kept[-1][2] >= error:
                kept.pop()
            if not kept or (size > kept[-1][1] and error < kept[-1][2]):
                kept.append((level, size, error))
        if not kept:
            raise BudgetError(f"no codec takes {example.label}")
        return cls(*map(tuple, zip(*kept, strict=True)))

    def step_at(self, level: int) -> int:
        """Return the highest step that is not above a level of `LADDER`; 0 if all are."""
        return max((step for step, own in enumerate(self.levels) if own <= level), default=0)


NOTHING = Form((EXACT,), (0,), (0.0,))
"""The form of a transfer that does not take place."""


def _measured(codec: Codec, example: Payload, asked: Asked | None) -> tuple[int, float] | None:
    """Return bytes and the share of squares that is lost; None: the codec does not take it."""
    if isinstance(codec, Float32):
        return example.payload_bytes, 0.0
    if codec.refuses(type(example)) is not None or type(example).is_added:
        return None
    try:
        if asked is not None:
            codec.asked(asked)
    except ValueError:
        return None
    encoded, _ = codec.encode(example, {}, np.random.default_rng(0))
    if not isinstance(encoded, Encoded) or not encoded.coded:
        return None
    before, after = flatten(example).arrays, flatten(codec.decode(encoded, {})[0]).arrays
    lost = total = 0.0
    for place, array in before.items():
        if array.dtype.kind == "f" and np.isfinite(array).all():
            wide = array.astype(np.float64)
            lost += float(np.square(after[place] - wide).sum())
            total += float(np.square(wide).sum())
    return encoded.payload_bytes, lost / total if total else 0.0


def example_of(asked: Asked) -> Payload:
    """Return a payload as large as one that is asked for can be, of numbers drawn at random.

    Raises:
        BudgetError: its size is not known before.
    """
    rng = np.random.default_rng(0)
    if asked.kind is Bundle:
        return Bundle(parts={name: example_of(part) for name, part in asked.parts.items()})

    def drawn(place: str) -> np.ndarray:
        limit = asked.limits[place]
        shape = tuple(size.size if isinstance(size, AtMost) else size for size in limit.shape)
        if limit.constant is not None:
            return limit.constant
        if limit.dtype.kind != "f":
            return np.zeros(shape, limit.dtype)
        numbers = rng.normal(size=shape).astype(limit.dtype)
        return np.abs(numbers) if limit.smallest >= 0 else numbers

    def shares(place: str) -> np.ndarray:
        rows, classes = drawn(place).shape
        return rng.dirichlet(np.ones(classes), size=rows).astype(np.float32)

    if asked.kind is Weights:
        names = (place.removeprefix("arrays/") for place in asked.limits)
        return Weights(arrays={name: drawn(f"arrays/{name}") for name in names})
    if asked.kind is Numbers:
        return Numbers(values=drawn("values"))
    if asked.kind in (Predictions, ClassTable):
        made = shares if asked.about["scale"] == "probabilities" else drawn
        if asked.kind is ClassTable:
            counts = drawn("counts") if "counts" in asked.limits else None
            return ClassTable(values=made("values"), counts=counts, scale=asked.about["scale"])
        rows, ids = asked.about["rows"], asked.about["ids"]
        return Predictions(
            rows=rows,
            values=made("values"),
            scale=asked.about["scale"],
            ids=ids,
            planned=len(rows) if ids == "subset" else 0,
            weights=drawn("weights") if "weights" in asked.limits else None,
        )
    raise BudgetError(
        f"the size of {asked.kind.kind} is not known before a run; a budget is for predictions, "
        "weights and class tables"
    )


class Demand(NamedTuple):
    """Transfers that are alike.

    Attributes:
        form: of each.
        weight: of the error of each, >= 0.
        number: how many there are.
    """

    form: Form
    weight: float
    number: int


class Allotted(NamedTuple):
    """What transfers that are alike got.

    Attributes:
        step: of the form, that all of them got at least.
        more: how many of them got one step more.
    """

    step: int
    more: int = 0


def smallest_budget(demands: Sequence[Demand]) -> int:
    """Return the bytes of all transfers at the lowest level of each."""
    return sum(demand.number * demand.form.sizes[0] for demand in demands)


def allocated(demands: Sequence[Demand], budget: int, rule: Allocation) -> list[Allotted]:
    """Choose a level for every transfer, so that all of them have at most ``budget`` bytes.

    Args:
        demands: the transfers.
        budget: bytes for all of them.
        rule: ``greedy`` or ``uniform``.

    Returns:
        What each demand got, in their order.

    Raises:
        BudgetError: not even the lowest levels fit.
    """
    smallest = smallest_budget(demands)
    if smallest > budget:
        raise BudgetError(f"{smallest} bytes are the least, got {budget}")
    uniform = _uniform(demands, budget)
    if rule == "uniform":
        return uniform
    from_below = _raised(demands, [Allotted(0) for _ in demands], budget)
    from_uniform = _raised(demands, uniform, budget)
    return min(from_below, from_uniform, key=lambda steps: expected_error(demands, steps))


def bytes_of(demands: Sequence[Demand], steps: Sequence[Allotted]) -> int:
    """Return the bytes of what was allotted."""
    return sum(
        (demand.number - own.more) * demand.form.sizes[own.step]
        + (own.more and own.more * demand.form.sizes[own.step + 1])
        for demand, own in zip(demands, steps, strict=True)
    )


def expected_error(demands: Sequence[Demand], steps: Sequence[Allotted]) -> float:
    """Return the weighted sum of the expected errors of what was allotted."""
    return sum(
        demand.weight
        * (
            (demand.number - own.more) * demand.form.errors[own.step]
            + (own.more * demand.form.errors[own.step + 1] if own.more else 0.0)
        )
        for demand, own in zip(demands, steps, strict=True)
    )


def _uniform(demands: Sequence[Demand], budget: int) -> list[Allotted]:
    best = [Allotted(0) for _ in demands]
    for level in range(len(LADDER)):
        steps = [Allotted(demand.form.step_at(level)) for demand in demands]
        if bytes_of(demands, steps) <= budget:
            best = steps
    return best


def _raised(demands: Sequence[Demand], steps: Sequence[Allotted], budget: int) -> list[Allotted]:
    """Take the step that helps most for a byte, again and again, as far as the bytes reach."""
    raised = list(steps)
    left = budget - bytes_of(demands, steps)
    waiting: list[tuple[float, int]] = []

    def offer(place: int) -> None:
        form, step = demands[place].form, raised[place].step
        if step + 1 < len(form.levels):
            gain = demands[place].weight * (form.errors[step] - form.errors[step + 1])
            heapq.heappush(waiting, (-gain / (form.sizes[step + 1] - form.sizes[step]), place))

    for place in range(len(demands)):
        offer(place)
    while waiting:
        _, place = heapq.heappop(waiting)
        demand, step = demands[place], raised[place].step
        each = demand.form.sizes[step + 1] - demand.form.sizes[step]
        taken = min(demand.number, left // each)
        left -= taken * each
        if taken == demand.number:
            raised[place] = Allotted(step + 1)
            offer(place)
        else:
            # Of those that are alike only some got it: nobody gets two steps more than another.
            raised[place] = Allotted(step, taken)
    return raised


@dataclass(frozen=True)
class Plan:
    """What is to be transferred in a run, as far as it is known before it.

    Attributes:
        budget: bytes for the whole run, both ways.
        rule: how they are allotted.
        participants: who takes part in each round, sorted; the first entry is round 1.
        up: form of what each client sends, by client.
        down: form of what each client is sent.
        weights: share of each client in the mean of a round, by client.
    """

    budget: int
    rule: Allocation
    participants: Sequence[Sequence[int]]
    up: Mapping[int, Form]
    down: Mapping[int, Form]
    weights: Mapping[int, float]

    @property
    def smallest(self) -> int:
        """The bytes below which no run is possible."""
        return self._least(self._counts(0))

    def check(self) -> None:
        """Refuse a budget that cannot be kept.

        Raises:
            SmallBudgetError: with the smallest that can.
        """
        if self.smallest > self.budget:
            least = -(-self.smallest // 100) / 10
            raise SmallBudgetError(
                f"exchange.budget_kb must be at least {least:g} for this run (both ways, all "
                f"clients, {len(self.participants)} rounds at the fewest bits), got "
                f"{self.budget / 1000:g}"
            )

    def purse(self, round: int, clients: Sequence[int], spent: int) -> "Purse":
        """Allot the rest of the budget to this round and those after it; return this one's part.

        Of transfers that are alike the later ones get a step more where not all can, since what is
        learnt last is what stays.

        Args:
            round: 1-based.
            clients: who takes part in it, sorted.
            spent: bytes in the rounds before.

        Raises:
            BudgetError: what is left does not hold the rest of the run at the fewest bits.
        """
        after = self._counts(round)
        now: dict[_Key, list[int]] = {}
        for client in clients:
            for key in self._keys[client]:
                now.setdefault(key, []).append(client)
        keys = sorted({*after, *now})
        counts = [after[key] + len(now.get(key, ())) for key in keys]
        demands = [
            Demand(self._form(key), self._weight(key), count)
            for key, count in zip(keys, counts, strict=True)
        ]
        allotted = allocated(demands, self.budget - spent, self.rule)
        steps: dict[tuple[str, int], int] = {}
        for key, own in zip(keys, allotted, strict=True):
            more = own.more - after[key]
            for position, client in enumerate(now.get(key, ())):
                steps[key[0], client] = own.step + (position < more)
        shares = {
            client: self._share(client, steps["down", client], steps["up", client])
            for client in clients
        }
        planned = sum(share.down_bytes + share.up_bytes for share in shares.values())
        spare = self.budget - spent - planned - self._least(after)
        return Purse(self, shares, spare)

    def least_share(self, client: int) -> Share:
        """Return a client's share at the fewest bits."""
        return self._share(client, 0, 0)

    def _share(self, client: int, down: int, up: int) -> Share:
        form = self.up[client]
        return Share(self.down[client].sizes[down], form.levels[up], form.sizes[up])

    def _least(self, counts: "Counter[_Key]") -> int:
        return sum(count * self._form(key).sizes[0] for key, count in counts.items())

    def _counts(self, round: int) -> "Counter[_Key]":
        """Count the transfers of each kind in the rounds after one."""
        if round not in self._counted:
            found = Counter(self._counted.get(round - 1, ()))
            for members in self.participants[round - 1 : round] if found else ():
                found.subtract(key for client in members for key in self._keys[client])
            if not found:
                found = Counter(
                    key
                    for members in self.participants[round:]
                    for client in members
                    for key in self._keys[client]
                )
            # Rounds come one after the other; those of long ago are not asked for again.
            self._counted.clear()
            self._counted[round] = +found
        return self._counted[round]

    @cached_property
    def _counted(self) -> "dict[int, Counter[_Key]]":
        return {}

    @cached_property
    def _keys(self) -> "dict[int, tuple[_Key, _Key]]":
        """What each client's two transfers are alike to: those of the first client of that kind."""
        first: dict[Any, int] = {}
        return {
            client: (
                ("up", first.setdefault((self.up[client], self.weights[client]), client)),
                ("down", first.setdefault(self.down[client], client)),
            )
            for client in sorted(self.up)
        }

    def _form(self, key: "_Key") -> Form:
        way, client = key
        return self.up[client] if way == "up" else self.down[client]

    def _weight(self, key: "_Key") -> float:
        way, client = key
        if way == "up":
            return self.weights[client] ** 2
        return len(self.participants) / max(sum(map(len, self.participants)), 1)


_Key = tuple[str, int]


class Purse:
    """What one round may spend.

    Attributes:
        shares: of each client that is asked.
    """

    def __init__(self, plan: Plan, shares: dict[int, Share], spare: int) -> None:
        self._plan = plan
        self._spare = spare
        self.shares = shares

    def again(self, clients: Sequence[int]) -> list[int]:
        """Return whom the budget lets ask once more, in this round, at the fewest bits.

        What the rest of the run needs at the fewest bits is not touched.
        """
        asked = []
        for client in clients:
            share = self._plan.least_share(client)
            cost = share.down_bytes + share.up_bytes
            if cost <= self._spare:
                self._spare -= cost
                self.shares[client] = share
                asked.append(client)
        return asked


def best_within(
    payload: Payload, most_bytes: int, encoded: Callable[[int], Payload]
) -> tuple[int, Payload]:
    """Return the highest level at which a payload has no more than so many bytes.

    Args:
        payload: what is to travel.
        most_bytes: that it may have.
        encoded: returns it as it travels at a level.

    Raises:
        BudgetError: there is none.
    """
    least = None
    for level in reversed(range(len(LADDER))):
        if level < EXACT and type(payload).is_added:
            break
        if LADDER[level].refuses(type(payload)) is not None:
            continue
        sent = encoded(level)
        if level < EXACT and not (isinstance(sent, Encoded) and sent.coded):
            continue
        if sent.payload_bytes <= most_bytes:
            return level, sent
        least = sent.payload_bytes if least is None else min(least, sent.payload_bytes)
    raise BudgetError(
        f"exchange.budget_kb: {payload.label} for a client needs {least} bytes, and {most_bytes} "
        "are left for it"
    )
