"""Which rows a member's fit takes in each step: cut before the first one."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedkd.randomness import Purpose, generator_for
from fedkd.training.batches import Passes
from fedkd.training.cohort import Member, PublicLesson, Streams


class FitKey(NamedTuple):
    """What tells a fit's streams from those of a call's other fits."""

    purpose: Purpose
    number: int
    attempt: int = 0
    """Of private learning, in which no attempt draws the rows of another; 0 otherwise."""

    @property
    def also(self) -> tuple[int, ...]:
        """What stands behind the others in the key of a stream."""
        return (self.attempt,) if self.attempt else ()


class FitKeys:
    """Hands out the keys of a call's fits.

    A client's fits on public rows alone are counted for themselves: an algorithm that has one
    takes the same private batches as one that does without.
    """

    def __init__(self, streams: Streams) -> None:
        self._purpose = streams.purpose
        self._fits: Counter[Purpose] = Counter()

    def next(self, *, private: bool, attempt: int = 0) -> FitKey:
        """Return the key of the next fit.

        Args:
            private: whether it takes private rows.
            attempt: of private learning; 0: something else.
        """
        purpose = self._purpose
        if purpose is Purpose.TRAIN and not private:
            purpose = Purpose.TRAIN_PUBLIC
        key = FitKey(purpose, self._fits[purpose], attempt)
        self._fits[purpose] += 1
        return key


@dataclass(frozen=True, slots=True)
class Feed:
    """The batches of one member's fit.

    Attributes:
        steps: optimizer steps.
        private: row ids of the private rows of each step, or None in a fit without any.
        public: positions in the lesson's rows of each step, or None in a fit without any, also
            where the lesson has no rows for the member and private ones are there.
        places: where the private rows of each step are among the member's rows.
    """

    steps: int
    private: list[np.ndarray] | None
    public: list[np.ndarray] | None
    places: list[np.ndarray] | None = None

    @classmethod
    def drawn(
        cls,
        member: Member,
        streams: Streams,
        fit: FitKey,
        private: Passes | None,
        public: PublicLesson | None,
    ) -> "tuple[int, Feed]":
        """Return a fit's seed for torch and its batches: the same in every backend."""
        rng = generator_for(streams.seed, fit.purpose, *streams.key(member, fit.number), *fit.also)
        return int(rng.integers(2**62)), cls.cut(member, private, public, rng)

    @classmethod
    def cut(
        cls,
        member: Member,
        private: Passes | None,
        public: PublicLesson | None,
        rng: np.random.Generator,
    ) -> "Feed":
        """Draw a member's batches; the lesson is that member's own."""
        if private is None and public is None:
            raise ValueError("fit needs private rows, public rows or both")
        own = shared = places = None
        steps = 0
        if private is not None:
            places = private.batches(len(member.rows), rng)
            own = [member.rows[batch] for batch in places]
            steps = len(own)
        if public is not None and len(public.rows):
            passes = public.passes
            if private is not None:
                passes = passes.spread_over(steps, len(public.rows))
            shared = passes.batches(len(public.rows), rng)
            steps = len(shared)
        elif public is not None and private is None:
            shared = []
        return cls(steps, own, shared, places)
