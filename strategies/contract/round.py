"""What a round is: pure functions of the settings, and what the server decides as it goes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar, overload

import numpy as np

from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Orders, Predictions
from fedkd.inputs import Shape
from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.randomness import Purpose, generator_for
from fedkd.schedules import NonNegativeSchedule
from fedkd.training import Passes, PublicLesson

PayloadT = TypeVar("PayloadT", bound=Payload)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The constants of a run that every algorithm needs; same on the server and on workers.

    Attributes:
        models: each client's model, by partition id.
        public_size: rows of the public set.
        rows_per_round: public rows exchanged in a round; ``public_size`` exchanges all of them.
        public_labelled: whether the public set has labels.
        input_shape: of one input.
        num_examples: private rows of each client.
        other_classes: how many of the classes, the last ones, only labelled public rows have.
        view_shapes: of inputs of other kinds that some clients have, see `shape_of`.
    """

    seed: int
    rounds: int
    participation: float
    models: tuple[ModelSettings, ...]
    local: Passes
    public_size: int
    rows_per_round: int
    public_labelled: bool
    num_classes: int
    input_shape: Shape
    num_examples: tuple[int, ...]
    other_classes: int = 0
    view_shapes: tuple[Shape, ...] = ()

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.models)

    def view_of(self, client: int) -> int:
        """Return which view was dealt to a client; 0: inputs of ``data.source``."""
        return client % (1 + len(self.view_shapes))

    def shape_of(self, client: int) -> Shape:
        """Return the shape of a client's inputs."""
        return (self.input_shape, *self.view_shapes)[self.view_of(client)]

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """A key for each client's architecture; clients with equal keys can exchange weights."""
        return tuple(
            f"{model.key} on view {view}" if (view := self.view_of(client)) else model.key
            for client, model in enumerate(self.models)
        )

    @cached_property
    def first_clients(self) -> dict[str, int]:
        """The first client of each architecture, by its key."""
        first: dict[str, int] = {}
        for client, architecture in enumerate(self.architectures):
            first.setdefault(architecture, client)
        return first

    def check_public_labels(self, setting: str, remedy: str) -> None:
        """Refuse a setting that needs public rows with the classes of private rows.

        Args:
            setting: what needs them, such as ``strategy.rule: linear``.
            remedy: what works without.

        Raises:
            ValueError: where public rows have no labels, or classes of their own.
        """
        if not self.public_labelled:
            raise ValueError(
                f"{setting} needs the labels of public rows: set data.public.labelled: true, or "
                f"use {remedy}"
            )
        if self.other_classes:
            raise ValueError(
                f"{setting} needs public rows of the classes of private rows, and "
                f"data.public.source has {self.other_classes} that are none of these: name "
                f"another, or use {remedy}"
            )

    def never(self, weight: NonNegativeSchedule) -> bool:
        """Return whether a weight is 0 in every round."""
        return _never(weight, self.rounds)

    def in_force(self, objective: Objective) -> Objective:
        """Return the terms that have a weight in some round; all of them where none has.

        A term that never counts is not computed, so it decides nothing about how clients train.
        """
        counting = [name for name, t in objective.terms.items() if not self.never(t.weight)]
        return objective.only(counting) if counting else objective

    def round(self, number: int) -> "Round":
        """Return a round by its number, from 1 on: pure, so both sides agree without a message."""
        return Round(self, number)


@lru_cache(maxsize=256)
def _never(weight: NonNegativeSchedule, rounds: int) -> bool:
    return all(weight.at(progress_of(round, rounds)) == 0 for round in range(1, rounds + 1))


def progress_of(round: int, rounds: int) -> float:
    """Return 0 for the first round and 1 for the last."""
    return (round - 1) / max(rounds - 1, 1)


@dataclass(frozen=True)
class Round:
    """One round as both halves see it.

    Attributes:
        present: on the server, who can be reached at its beginning: sorted partition ids; None:
            everybody. Clients do not know.
    """

    federation: Federation
    number: int
    present: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def progress(self) -> float:
        """0 in the first round, 1 in the last: where schedules are read."""
        return progress_of(self.number, self.federation.rounds)

    @property
    def local(self) -> Passes:
        """The round's training on private rows: ``clients.local``."""
        return self.federation.local

    @cached_property
    def public_rows(self) -> np.ndarray:
        """The public rows of this round: sorted int64 positions, the same for every client."""
        size, take = self.federation.public_size, self.federation.rows_per_round
        if take >= size:
            return np.arange(size)
        rng = generator_for(self.federation.seed, Purpose.PUBLIC_ROWS, self.number)
        return np.sort(rng.choice(size, take, replace=False))

    def next(self) -> "Round":
        """The round in which this round's aggregate is learnt from."""
        return self.federation.round(min(self.number + 1, self.federation.rounds))

    def passes(self, epochs: int) -> Passes:
        """So many passes, in batches of ``clients.batch_size``."""
        return Passes(batch_size=self.local.batch_size, epochs=epochs)

    def lesson(
        self, taught: "Predictions | Received", *, epochs: int = 1, apart: bool = False
    ) -> PublicLesson:
        """The lesson of what was received: its public rows, and what to learn about them.

        Args:
            taught: predictions: those of all members of a cohort, or what each of them received.
            epochs: passes over the rows.
            apart: whether they go through the model in a forward pass of their own.
        """
        passes = self.passes(epochs)
        if isinstance(taught, Received):
            shared = taught.shared
            if shared is None:
                each = taught.all(Predictions)
                return PublicLesson(
                    rows=[piece.rows for piece in each],
                    targets=[piece.targets for piece in each],
                    passes=passes,
                    apart=apart,
                )
            taught = expect(shared, Predictions)
        return PublicLesson(rows=taught.rows, targets=taught.targets, passes=passes, apart=apart)

    def labelled_public(self, *, epochs: int) -> PublicLesson:
        """The whole labelled public set, for pre-training."""
        rows = np.arange(self.federation.public_size)
        return PublicLesson(rows=rows, targets=None, passes=self.passes(epochs))

    def drawn(self) -> tuple[int, ...]:
        """Draw the round's clients by partition id: sorted; none only where nobody is there.

        As many as ever, or everybody who is there where these are fewer.
        """
        total = self.federation.num_clients
        take = max(1, round(self.federation.participation * total))
        there = range(total) if self.present is None else self.present
        if take >= len(there):
            return tuple(there)
        rng = generator_for(self.federation.seed, Purpose.PARTICIPANTS, self.number)
        drawn = np.sort(rng.choice(len(there), take, replace=False))
        return tuple(there[int(place)] for place in drawn)

    def random(self, *key: int) -> np.random.Generator:
        """Return a stream of the algorithm's own: of the run's seed, this round and a key.

        The same key gives the same numbers on both sides and in a resumed run; whose are to differ
        puts the client into the key. What is drawn once for the run is drawn in one round's
        stream: ``federation.round(1).random(...)``.
        """
        return generator_for(self.federation.seed, Purpose.ALGORITHM, self.number, *key)

    @cached_property
    def asked_logits(self) -> Asked:
        """Every client's logits of the round's public rows."""
        return Predictions.asked(self.public_rows, self.federation.num_classes)


@dataclass(frozen=True)
class Call(Round):
    """A round as a cohort's client half sees it.

    Attributes:
        orders: what the server decided for each member; None where it decided nothing.
        fresh: whether each member has no state: it has its first weights and keeps no arrays, since
            this is its first call or since the node that had them was restarted.
    """

    orders: tuple[Orders | None, ...] = ()
    fresh: tuple[bool, ...] = ()

    def rows_of(self, position: int) -> np.ndarray:
        """Return the public rows that a member is to predict."""
        orders = self.orders[position] if self.orders else None
        return self.public_rows if orders is None or orders.rows is None else orders.rows


class Received(Sequence[Payload | None]):
    """What the members of a cohort received, in their order: all of them something, or nothing.

    Args:
        pieces: one for each member; the same object where they received the same.
    """

    def __init__(self, pieces: "Sequence[Payload | None]") -> None:
        self._pieces = tuple(pieces)

    @overload
    def __getitem__(self, position: int) -> "Payload | None": ...
    @overload
    def __getitem__(self, position: slice) -> "Sequence[Payload | None]": ...
    def __getitem__(self, position: int | slice) -> "Payload | Sequence[Payload | None] | None":
        return self._pieces[position]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> "Iterator[Payload | None]":
        return iter(self._pieces)

    def __bool__(self) -> bool:
        """Tell whether the members received anything."""
        return any(piece is not None for piece in self._pieces)

    @property
    def shared(self) -> "Payload | None":
        """The one piece that all members received; None where they differ, or there is none."""
        first = self._pieces[0] if self._pieces else None
        return first if all(piece is first for piece in self._pieces) else None

    def all(self, kind: type[PayloadT]) -> list[PayloadT]:
        """Return every member's piece, which has to be of this kind.

        Raises:
            TypeError: a member received something else, or nothing.
        """
        return [expect(piece, kind) for piece in self._pieces]
