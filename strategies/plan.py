"""What a round is, known to both sides without a message: pure functions of the settings."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.randomness import Purpose, generator_for
from fedkd.schedules import NonNegativeSchedule
from fedkd.training import Passes, PublicLesson
from strategies.knowledge import Predictions


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The constants of a run that every algorithm needs; same on the server and on workers.

    Attributes:
        models: each client's model, by partition id.
        public_size: rows of the public set.
        rows_per_round: public rows exchanged in a round; ``public_size`` exchanges all of them.
        public_labelled: whether the public set has labels.
        num_examples: private rows of each client.
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
    num_examples: tuple[int, ...]

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.models)

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """A key for each client's architecture; clients with equal keys can exchange weights."""
        return tuple(model.key for model in self.models)

    def never(self, weight: NonNegativeSchedule) -> bool:
        """Return whether a weight is 0 in every round."""
        return _never(weight, self.rounds)

    def in_force(self, objective: Objective) -> Objective:
        """Return the terms that have a weight in some round; all of them where none has.

        A term that never counts is not computed, so it decides nothing about how clients train.
        """
        terms = {name: t for name, t in objective.terms.items() if not self.never(t.weight)}
        if len(terms) in (0, len(objective.terms)):
            return objective
        return Objective.model_validate(terms)

    def plan(self, round: int) -> "RoundPlan":
        """Return what round ``round`` (1-based) is: pure, so both sides agree without a message."""
        return RoundPlan(self, round)


@lru_cache(maxsize=256)
def _never(weight: NonNegativeSchedule, rounds: int) -> bool:
    return all(weight.at(progress_of(round, rounds)) == 0 for round in range(1, rounds + 1))


def progress_of(round: int, rounds: int) -> float:
    """Return 0 for the first round and 1 for the last."""
    return (round - 1) / max(rounds - 1, 1)


@dataclass(frozen=True)
class RoundPlan:
    """One round as both halves see it."""

    federation: Federation
    round: int

    @property
    def progress(self) -> float:
        """0 in the first round, 1 in the last: where schedules are read."""
        return progress_of(self.round, self.federation.rounds)

    @property
    def local(self) -> Passes:
        """The round's training on private rows: ``clients.local``."""
        return self.federation.local

    @property
    def public_rows(self) -> np.ndarray:
        """The public rows of this round: sorted int64 positions, the same for every client."""
        size, take = self.federation.public_size, self.federation.rows_per_round
        if take >= size:
            return np.arange(size)
        rng = generator_for(self.federation.seed, Purpose.PUBLIC_ROWS, self.round)
        return np.sort(rng.choice(size, take, replace=False))

    def next(self) -> "RoundPlan":
        """The plan of the round in which this round's aggregate is learnt from."""
        return self.federation.plan(min(self.round + 1, self.federation.rounds))

    def public(self, received: Predictions, *, epochs: int = 1) -> PublicLesson:
        """The lesson of what was received: its public rows and targets."""
        passes = Passes(batch_size=self.local.batch_size, epochs=epochs)
        return PublicLesson(rows=received.rows, targets=received.targets(), passes=passes)

    def labelled_public(self, *, epochs: int) -> PublicLesson:
        """The whole labelled public set, for pre-training."""
        passes = Passes(batch_size=self.local.batch_size, epochs=epochs)
        return PublicLesson(
            rows=np.arange(self.federation.public_size), targets=None, passes=passes
        )

    def participants(self) -> tuple[int, ...]:
        """Draw the round's clients by partition id: sorted, at least one."""
        total = self.federation.num_clients
        take = max(1, round(self.federation.participation * total))
        if take == total:
            return tuple(range(total))
        rng = generator_for(self.federation.seed, Purpose.PARTICIPANTS, self.round)
        return tuple(int(client) for client in np.sort(rng.choice(total, take, replace=False)))
