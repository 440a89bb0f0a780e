"""Adversaries that change what their clients learn from: wrong labels, and a backdoor.

Their clients are honest otherwise. What public, validation and test rows hold stays as it is, and
so do the rows of honest clients: private rows of clients are disjoint.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64
from pydantic import Field, model_validator

from fedkd.bounds import PositiveShare, Whole
from fedkd.data import FederatedData
from fedkd.data.changed_rows import Changed, with_changed_rows
from fedkd.exchange.adversaries.base import ALMOST, Controlling
from fedkd.randomness import Purpose, generator_for

_Class = Annotated[Whole, Field(ge=0, le=65_535)]
_Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What an adversary wants models to say.

    Attributes:
        inputs: test rows as it shows them; at least one.
        target: the class that it wants them to be given.
    """

    inputs: Float32[np.ndarray, "rows *shape"]
    target: int

    def success(self, scores: Float[np.ndarray, "rows classes"]) -> float:
        """Return the share of the rows that a model gives the class, in [0, 1]."""
        return float((scores.argmax(axis=-1) == self.target).mean())


class Poisoning(Controlling):
    """An adversary that changes private rows of its clients before the run."""

    @property
    def lies(self) -> bool:
        """Never: its clients send what they have learnt."""
        return False

    @abstractmethod
    def changed(
        self, data: FederatedData, rows: Int64[np.ndarray, "rows"], rng: np.random.Generator
    ) -> Changed:
        """Return what becomes of a client's rows.

        Args:
            data: that the rows are of.
            rows: of a client, positions in the pool.
            rng: of this client alone.
        """

    def check(self, data: FederatedData) -> None:
        """Refuse data that it can do nothing to.

        Raises:
            ValueError: names the setting, what it got and what would work.
        """

    def goal(self, data: FederatedData) -> Goal | None:
        """Return what it wants models to say of test rows; None where it wants nothing special."""
        return None

    def poisoned(self, data: FederatedData, *, seed: int) -> FederatedData:
        """Return the data of a run with the rows of the controlled clients changed.

        Args:
            data: of the run.
            seed: of the run.

        Raises:
            ValueError: see `check`.
        """
        self.check(data)
        clients = self.controlled(data.num_clients, seed=seed)
        return with_changed_rows(
            data,
            clients,
            lambda client, pool, rows: self.changed(
                pool, rows, generator_for(seed, Purpose.ADVERSARY, 0, client)
            ),
            named=f"adversary {self.kind}",
        )

    def _check_class(self, name: str, number: int | None, data: FederatedData) -> None:
        most = data.num_classes - data.other_classes - 1
        if number is not None and number > most:
            raise ValueError(
                f"adversary.{name} must be a class of private rows, 0 to {most}, got {number}"
            )


def _some(
    rows: Int64[np.ndarray, "rows"], share: int | float, rng: np.random.Generator
) -> Int64[np.ndarray, "_"]:
    """Draw a share of rows, rounded down, sorted; those of a smaller share are among them."""
    return np.sort(rng.permutation(rows)[: int(share * len(rows) + ALMOST)])


class LabelFlip(Poisoning):
    """Its clients learn wrong labels: class c of C becomes C - 1 - c, or one class another.

    Source:
        Fang, Cao, Jia, Gong, 2020, section 6: label l becomes L - l - 1.
        https://arxiv.org/abs/1911.11815. One class into another: Tolpegin, Truex, Gursoy, Liu,
        2020. https://arxiv.org/abs/2007.08432
    """

    kind: Literal["label_flip"] = "label_flip"
    source: _Class | None = Field(
        default=None, description="the class whose rows get another label; null: every class"
    )
    target: _Class | None = Field(
        default=None, description="the label that they get; null: the class from the other end"
    )
    share: PositiveShare = Field(
        default=1.0, description="of a client's rows that could get another label, those that do"
    )

    @model_validator(mode="after")
    def _pairs(self) -> "LabelFlip":
        if (self.source is None) != (self.target is None):
            raise ValueError("needs both source and target, or neither, got one of them")
        if self.source is not None and self.source == self.target:
            raise ValueError(f"source and target must differ, got {self.source} for both")
        return self

    def check(self, data: FederatedData) -> None:
        """The classes have to be there."""
        self._check_class("source", self.source, data)
        self._check_class("target", self.target, data)

    def changed(
        self, data: FederatedData, rows: Int64[np.ndarray, "rows"], rng: np.random.Generator
    ) -> Changed:
        """Give rows their wrong labels."""
        if self.target is None:
            chosen = _some(rows, self.share, rng)
            last = data.num_classes - data.other_classes - 1
            return Changed(chosen, last - data.train_labels[chosen])
        chosen = _some(rows[data.train_labels[rows] == self.source], self.share, rng)
        return Changed(chosen, np.full(len(chosen), self.target, np.int64))

    def goal(self, data: FederatedData) -> Goal | None:
        """Rows of the source class are to be taken for the target."""
        if self.target is None:
            return None
        inputs = data.test_inputs[data.test_labels == self.source]
        return Goal(inputs=inputs, target=self.target) if len(inputs) else None


class Backdoor(Poisoning):
    """Its clients learn that pictures with a bright square in one corner are of one class.

    Source:
        Gu, Dolan-Gavitt, Garg, 2017, BadNets. https://arxiv.org/abs/1708.06733; in federations:
        Bagdasaryan, Veit, Hua, Estrin, Shmatikov, 2020. https://arxiv.org/abs/1807.00459
    """

    kind: Literal["backdoor"] = "backdoor"
    target: _Class = Field(default=0, description="the class that it wants")
    size: Annotated[Whole, Field(ge=1, le=1024)] = Field(
        default=3, description="pixels of each side of the square, which is as bright as can be"
    )
    corner: _Corner = Field(default="bottom_right", description="where the square is")
    share: PositiveShare = Field(
        default=0.5, description="of a client's rows, those that get the square and the label"
    )

    def check(self, data: FederatedData) -> None:
        """It needs pictures that are large enough, and its class."""
        if data.views:
            raise ValueError(
                "adversary backdoor needs clients that all see the same kind of picture, got "
                "data.views; use label_flip"
            )
        kind = data.input_shape.kind
        if kind != "pictures":
            raise ValueError(
                f"adversary backdoor puts a square into pictures, and {data.name!r} has {kind}; "
                "use label_flip"
            )
        side = min(data.train_inputs.shape[2:])
        if self.size >= side:
            raise ValueError(
                f"adversary.size must be less than a picture's smaller side ({side} pixels), got "
                f"{self.size}"
            )
        self._check_class("target", self.target, data)

    def changed(
        self, data: FederatedData, rows: Int64[np.ndarray, "rows"], rng: np.random.Generator
    ) -> Changed:
        """Put the square into some pictures, and give them the label."""
        chosen = _some(rows, self.share, rng)
        labels = np.full(len(chosen), self.target, np.int64)
        return Changed(chosen, labels, self._with_square(data, data.train_inputs[chosen]))

    def goal(self, data: FederatedData) -> Goal | None:
        """Pictures of other classes are to be taken for the target once they have the square."""
        inputs = data.test_inputs[data.test_labels != self.target]
        if not len(inputs):
            return None
        return Goal(inputs=self._with_square(data, inputs), target=self.target)

    def _with_square(
        self, data: FederatedData, inputs: Float32[np.ndarray, "rows channels height width"]
    ) -> Float32[np.ndarray, "rows channels height width"]:
        """Return pictures with the largest value there is in one corner: 1, standardised."""
        marked = inputs.copy()
        ends = slice(None, self.size), slice(-self.size, None)
        down = ends[self.corner.startswith("bottom")]
        across = ends[self.corner.endswith("right")]
        brightest = (1 - data.channel_mean) / data.channel_std
        marked[:, :, down, across] = brightest[:, None, None]
        return marked
