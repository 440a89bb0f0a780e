"""What the terms of an objective see of one step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from fedkd.data.augmentation import Mix
from fedkd.losses.reduction import PerRow, RowKind, StepRows
from fedkd.targets import Targets

NO_FEATURES: Mapping[str, Tensor] = MappingProxyType({})


class View(NamedTuple):
    """One step of one student: rows with labels, and rows about which a teacher knows something.

    Both may be the same rows. Whatever a step does not have is None; a term that needs it says so
    when the objective is bound, before the first step.

    Attributes:
        labelled_logits: the student's logits for rows whose labels it may see.
        labels: classes of those rows.
        labelled_of: which rows of the step they are.
        labelled_weights: >= 0, how much each of those rows counts; None: all the same.
        mix: how the labelled rows were mixed with each other; None where they were not.
        logits: the student's logits for the transfer rows.
        targets: what the teacher says of the same rows; a constant.
        transfer_labels: classes of the transfer rows, where the student may see them.
        weights: >= 0, how much each transfer row counts; None: all the same.
        features: what the student's tapped layers put out for the transfer rows, by layer.
        teacher_features: the same of the teacher; constants.
        transfer_of: which rows of the step the transfer rows are.
        rows: ids of the transfer rows; the same row has the same id all the time.
        progress: how much of the training is done, in [0, 1].
    """

    labelled_logits: Float[Tensor, "labelled classes"] | None = None
    labels: Int[Tensor, " labelled"] | None = None
    labelled_of: RowKind = "private"
    labelled_weights: Float[Tensor, " labelled"] | None = None
    mix: Mix | None = None
    logits: Float[Tensor, "rows classes"] | None = None
    targets: Targets | None = None
    transfer_labels: Int[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    transfer_of: RowKind = "public"
    features: Mapping[str, Tensor] = NO_FEATURES
    teacher_features: Mapping[str, Tensor] = NO_FEATURES
    rows: Int[Tensor, " rows"] | None = None
    progress: float = 0.0

    def pair(self) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
        """Return the logits of student and teacher for the transfer rows.

        Raises:
            ValueError: in a step without transfer rows or without a teacher.
        """
        student, targets = self._taught()
        return student, targets.logits()

    def softened_pair(
        self, temperature: float
    ) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
        """Return the student's logits, and the teacher's probabilities at a temperature.

        Raises:
            ValueError: in a step without transfer rows or without a teacher.
        """
        student, targets = self._taught()
        return student, targets.probabilities(temperature)

    def _taught(self) -> tuple[Float[Tensor, "rows classes"], Targets]:
        if self.logits is None or self.targets is None:
            raise ValueError("this step has no rows that a teacher speaks about")
        return self.logits, self.targets

    def of_labelled(
        self, values: Tensor | Callable[[], Tensor], *, mean: Callable[[], Tensor] | None = None
    ) -> PerRow:
        """Return a loss of the labelled rows, each of which counts as the view says.

        Args:
            values: one a row, or a function that returns them.
            mean: returns their mean cheaper; see `PerRow`.
        """
        return PerRow(values, of=self.labelled_of, weights=self.labelled_weights, mean=mean)

    def of_transfer(
        self, values: Tensor | Callable[[], Tensor], *, mean: Callable[[], Tensor] | None = None
    ) -> PerRow:
        """Return a loss of the transfer rows, each of which counts as the view says.

        Args:
            values: one a row, or a function that returns them.
            mean: returns their mean cheaper; see `PerRow`.
        """
        return PerRow(values, of=self.transfer_of, weights=self.weights, mean=mean)

    @property
    def step_rows(self) -> StepRows:
        """The rows that the view shows, all of which count."""
        sizes: dict[RowKind, int] = {}
        if self.labelled_logits is not None:
            sizes[self.labelled_of] = len(self.labelled_logits)
        if self.logits is not None:
            sizes[self.transfer_of] = len(self.logits)
        elif self.features:
            sizes[self.transfer_of] = len(next(iter(self.features.values())))
        return StepRows(sizes)

    def known_labels(self) -> Int[Tensor, " rows"]:
        """Return the classes of the transfer rows.

        Raises:
            ValueError: where the student may not see them.
        """
        if self.transfer_labels is None:
            raise ValueError("this step has no labels of the transfer rows")
        return self.transfer_labels
