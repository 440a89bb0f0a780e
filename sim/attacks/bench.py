"""Many models at once: what an attacker predicts with, and teaches by soft labels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training import (
    MODEL,
    Arrays,
    ClientState,
    Cohort,
    Member,
    ModelPool,
    ModelState,
    OptimizerSettings,
    Passes,
    PublicLesson,
    Streams,
    TrainingData,
    choose_backend,
    open_cohort,
)
from strategies.shared.lessons import Distilling

TOGETHER = 64
"""Models of one cohort at most."""

STUDENT_BATCH = 32


class SoftLabels(NamedTuple):
    """What somebody says of public rows.

    Attributes:
        rows: int64 positions in the public set.
        probabilities: float32 ``[rows, classes]``.
    """

    rows: np.ndarray
    probabilities: np.ndarray


class Bench:
    """An attacker's models.

    Args:
        data: of the run: public rows to teach with, and what a row looks like.
        optimizer: of students.
        seed: of all that is drawn.
    """

    def __init__(self, data: FederatedData, optimizer: OptimizerSettings, seed: int) -> None:
        self._tensors = TrainingData.from_arrays(data, torch.device("cpu"))
        self._optimizer = optimizer
        self._pool = ModelPool(self._tensors, optimizer)
        self.seed = seed

    def shapes(self, model: ModelSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a model's weights, by name."""
        weights = self._first(model).models[MODEL].weights
        return {name: array.shape for name, array in weights.items()}

    def predict(
        self,
        model: ModelSettings,
        weights: Sequence[Mapping[str, np.ndarray]],
        inputs: Float[np.ndarray, "rows *shape"],
    ) -> Float[np.ndarray, "models rows classes"]:
        """Return the logits of models with these weights, in evaluation mode."""
        rows = as_tensor(inputs)
        some = [
            self._cohort(model, states, first=place).predict(rows)
            for place, states in self._together(weights)
        ]
        return np.concatenate(some)

    def taught(
        self, model: ModelSettings, labels: Sequence[SoftLabels], epochs: int
    ) -> list[Arrays]:
        """Return the weights of students, each of which learns its own soft labels.

        All begin with the same weights, and take equal rows in orders of their own.

        Args:
            model: the students' architecture.
            labels: what each is to say of public rows.
            epochs: passes over the rows.
        """
        first = self._first(model)
        taught: list[Arrays] = []
        for start in range(0, len(labels), TOGETHER):
            own = labels[start : start + TOGETHER]
            cohort = self._cohort(model, [first] * len(own), batch_rows=STUDENT_BATCH)
            cohort.fit(Distilling(), public=_lesson(own, epochs))
            taught += cohort.weights()
        return taught

    def _first(self, model: ModelSettings) -> ClientState:
        return self._pool.initial_state(model, self.seed)

    def _together(
        self, weights: Sequence[Mapping[str, np.ndarray]]
    ) -> list[tuple[int, list[ClientState]]]:
        return [
            (
                start,
                [
                    ClientState({MODEL: ModelState(dict(own))})
                    for own in weights[start : start + TOGETHER]
                ],
            )
            for start in range(0, len(weights), TOGETHER)
        ]

    def _cohort(
        self,
        model: ModelSettings,
        states: Sequence[ClientState],
        *,
        first: int = 0,
        batch_rows: int = 1,
    ) -> Cohort:
        members = [
            Member(first + place, np.empty(0, np.int64), state)
            for place, state in enumerate(states)
        ]
        backend = choose_backend(
            model,
            input_shape=self._tensors.input_shape,
            num_classes=self._tensors.num_classes,
            members=len(members),
            batch_rows=batch_rows,
            device="cpu",
        )
        return open_cohort(
            members,
            backend=backend,
            model=model,
            optimizer=self._optimizer,
            data=self._tensors,
            pool=self._pool,
            streams=Streams(seed=self.seed, purpose=Purpose.ATTACK),
        )


def _lesson(labels: Sequence[SoftLabels], epochs: int) -> PublicLesson:
    passes = Passes(batch_size=STUDENT_BATCH, epochs=epochs)
    rows = labels[0].rows
    if all(np.array_equal(own.rows, rows) for own in labels):
        values = np.stack([own.probabilities for own in labels])
        targets = Targets(values, scale="probabilities")
        return PublicLesson(rows=rows, targets=targets, passes=passes)
    return PublicLesson(
        rows=[own.rows for own in labels],
        targets=[Targets(own.probabilities, scale="probabilities") for own in labels],
        passes=passes,
    )
