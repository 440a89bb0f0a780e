"""What the terms of an objective see of one step."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.data.augmentation import Mix

NO_FEATURES: Mapping[str, Tensor] = MappingProxyType({})


class View(NamedTuple):
    """One step of one student: rows with labels, and rows about which a teacher knows something.

    Both may be the same rows. Whatever a step does not have is None; a term that needs it says so
    when the objective is bound, before the first step.

    Attributes:
        labelled_logits: the student's logits for rows whose labels it may see.
        labels: classes of those rows.
        labelled_weights: >= 0, how much each of those rows counts; None: all the same.
        mix: how the labelled rows were mixed with each other; None where they were not.
        logits: the student's logits for the transfer rows.
        teacher_logits: the teacher's logits for the same rows; a constant.
        transfer_labels: classes of the transfer rows, where the student may see them.
        weights: >= 0, how much each transfer row counts; None: all the same.
        features: what the student's tapped layers put out for the transfer rows, by layer.
        teacher_features: the same of the teacher; constants.
        rows: ids of the transfer rows; the same row has the same id all the time.
        progress: how much of the training is done, in [0, 1].
    """

    labelled_logits: Float[Tensor, "labelled classes"] | None = None
    labels: Int[Tensor, " labelled"] | None = None
    labelled_weights: Float[Tensor, " labelled"] | None = None
    mix: Mix | None = None
    logits: Float[Tensor, "rows classes"] | None = None
    teacher_logits: Float[Tensor, "rows classes"] | None = None
    transfer_labels: Int[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    features: Mapping[str, Tensor] = NO_FEATURES
    teacher_features: Mapping[str, Tensor] = NO_FEATURES
    rows: Int[Tensor, " rows"] | None = None
    progress: float = 0.0

    def pair(self) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
        """Return the logits of student and teacher for the transfer rows.

        Raises:
            ValueError: in a step without transfer rows or without a teacher.
        """
        if self.logits is None or self.teacher_logits is None:
            raise ValueError("this step has no rows with a teacher's logits")
        return self.logits, self.teacher_logits

    def known_labels(self) -> Int[Tensor, " rows"]:
        """Return the classes of the transfer rows.

        Raises:
            ValueError: where the student may not see them.
        """
        if self.transfer_labels is None:
            raise ValueError("this step has no labels of the transfer rows")
        return self.transfer_labels


def logits_from_probabilities(
    probabilities: Float[Tensor, "*batch classes"], *, temperature: float
) -> Float[Tensor, "*batch classes"]:
    """Return logits whose softmax at ``temperature`` is ``probabilities``.

    A teacher that sent soft labels can then serve every loss that takes logits. A class that is
    ruled out gets the logarithm of the smallest normal float32, not minus infinity.
    """
    floor = torch.finfo(torch.float32).tiny
    return temperature * probabilities.detach().float().clamp_min(floor).log()
