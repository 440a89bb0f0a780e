"""Which transfer rows count, and how much: by the teacher's confidence, by difficulty, by time."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedkd.bounds import PositiveShare, ShareBelowOne
from fedkd.objectives.view import View
from fedkd.targets import (
    Targets,
    certainty_weights,
    confidence_mask,
    confidence_weights,
    curriculum_mask,
    difficulty,
    difficulty_weights,
    entropy,
    hardest_mask,
    kept_fraction,
    soften,
)

Difficulty = Literal["teacher_entropy", "teacher_loss", "student_loss", "disagreement"]

CURRICULUM_STEPS = 100
"""A curriculum lets rows in at this many points of its time: sorting all rows takes long."""


class CurriculumSettings(BaseModel):
    """Easy rows first (``targets.curriculum``).

    Source:
        Bengio, Louradour, Collobert, Weston, 2009, Curriculum Learning, section 3.
        https://doi.org/10.1145/1553374.1553380
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: PositiveShare = Field(
        0.2, description="share of all transfer rows that count at first: the easiest"
    )
    until: PositiveShare = Field(
        0.5, description="share of the training after which all rows count"
    )


class Selection(BaseModel):
    """How transfer rows are weighted and left out (``targets``); all off by default.

    Rules apply one after the other: threshold, curriculum, hardest fraction, weights. Each sees
    only the rows of the batch that those before it keep. All of them act on the terms about
    transfer rows that take a weight for each row; the cross-entropy on labels keeps all its rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence_threshold: ShareBelowOne = Field(
        0.0, description="leave out rows whose largest target probability is smaller"
    )
    weight_by: Literal["none", "confidence", "entropy", "difficulty"] = Field(
        "none",
        description="none: rows count the same; confidence: by the largest target probability; "
        "entropy: by how far the target's entropy is below the largest possible; difficulty: hard "
        "rows count more. Weights of a batch sum to the number of rows kept",
    )
    hardest_fraction: PositiveShare = Field(
        1.0, description="share of each batch that counts: its hardest rows"
    )
    curriculum: CurriculumSettings | None = Field(
        None, description="easy rows first, hard ones join; none: all rows from the start"
    )
    difficulty: Difficulty = Field(
        "teacher_entropy",
        description="what makes a row hard, without temperature: the entropy of the target; the "
        "cross-entropy of the target or of the student (all transfer rows need labels); "
        "disagreement: KL(target || student)",
    )

    @model_validator(mode="after")
    def _rules_fit(self) -> "Selection":
        if self.curriculum is not None and self.difficulty in ("student_loss", "disagreement"):
            raise ValueError(
                "targets.curriculum orders all rows before the training and needs "
                "targets.difficulty: teacher_entropy or teacher_loss, got "
                f"{self.difficulty!r}, which changes with the student"
            )
        if self.difficulty != "teacher_entropy" and not self._asks_difficulty:
            raise ValueError(
                f"targets.difficulty: {self.difficulty!r} does nothing without "
                "targets.weight_by: difficulty, targets.hardest_fraction < 1 or targets.curriculum"
            )
        return self

    @property
    def _asks_difficulty(self) -> bool:
        by_difficulty = self.weight_by == "difficulty" or self.hardest_fraction < 1
        return by_difficulty or self.curriculum is not None

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self != Selection()

    @property
    def needs_labels(self) -> bool:
        """Whether all transfer rows must have labels that the student may see."""
        return self.difficulty in ("teacher_loss", "student_loss")


class RowSelector:
    """A selection that knows all transfer rows, and so which of them are easy."""

    def __init__(
        self,
        selection: Selection,
        targets: Targets | None = None,
        labels: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Measure how hard each row is, where a curriculum asks for it.

        Args:
            selection: the rules.
            targets: the teacher's for all transfer rows, by row id, unaugmented; for a
                curriculum.
            labels: of the same rows, for a curriculum by the teacher's loss.

        Raises:
            ValueError: if a curriculum lacks what it needs.
        """
        self._selection = selection
        self._hardness: Float[Tensor, " rows"] | None = None
        self._mask: Float[Tensor, " rows"] | None = None
        self._mask_point = -1
        if selection.curriculum is not None:
            if targets is None:
                raise ValueError("targets.curriculum needs the targets of all transfer rows")
            self._hardness = _hardness(
                View(logits=targets.logits(), targets=targets, transfer_labels=labels),
                selection.difficulty,
            )

    def weights(self, view: View) -> tuple[Float[Tensor, " rows"], dict[str, Float[Tensor, ""]]]:
        """Return how much each transfer row of a step counts, and what to log.

        Args:
            view: the step; its ``rows`` are the ids by which a curriculum knows them.

        Returns:
            Weights >= 0, 0 for a row left out, whose sum is the number of rows kept; and
            ``kept``, the fraction of the batch that counts at all. Where nothing is kept all
            weights are 0, and so is a loss that they weigh.
        """
        selection = self._selection
        _, target = view.softened_pair(1.0)
        mask = confidence_mask(target, selection.confidence_threshold)
        if selection.curriculum is not None:
            mask = mask * self._curriculum(selection.curriculum, view)
        kept = mask.nonzero().squeeze(1)
        row_weights = torch.ones_like(mask[kept])
        if selection.hardest_fraction < 1:
            hard = hardest_mask(
                _hardness(view, selection.difficulty)[kept], share=selection.hardest_fraction
            )
            kept = kept[hard.nonzero().squeeze(1)]
            row_weights = torch.ones_like(mask[kept])
        if selection.weight_by == "confidence":
            row_weights = confidence_weights(target[kept])
        elif selection.weight_by == "entropy":
            row_weights = certainty_weights(target[kept])
        elif selection.weight_by == "difficulty":
            row_weights = difficulty_weights(_hardness(view, selection.difficulty)[kept])
        weights = torch.zeros_like(mask).index_copy(0, kept, row_weights.to(mask.dtype))
        # A weight of 0 for the easiest row does not leave it out.
        counted = torch.zeros_like(mask).index_fill(0, kept, 1.0)
        return weights, {"kept": kept_fraction(counted)}

    def _curriculum(self, settings: CurriculumSettings, view: View) -> Float[Tensor, " rows"]:
        if self._hardness is None or view.rows is None:
            raise ValueError("this step has no row ids, which targets.curriculum goes by")
        done = min(view.progress / settings.until, 1.0)
        point = int(done * CURRICULUM_STEPS + 1e-9)
        if self._mask is None or point != self._mask_point:
            self._mask_point = point
            self._mask = curriculum_mask(
                self._hardness, progress=point / CURRICULUM_STEPS, start_share=settings.start
            )
        return self._mask.index_select(0, view.rows)


def _hardness(view: View, by: Difficulty) -> Float[Tensor, " rows"]:
    """Return how hard each row is, in nats; a constant."""
    student, teacher = (logits.detach() for logits in view.pair())
    if by == "teacher_entropy":
        return entropy(soften(teacher, temperature=1.0))
    if by == "teacher_loss":
        return difficulty(teacher, view.known_labels())
    if by == "student_loss":
        return difficulty(student, view.known_labels())
    log_target = torch.log_softmax(teacher, dim=-1)
    log_student = torch.log_softmax(student, dim=-1)
    divergence = F.kl_div(log_student, log_target, reduction="none", log_target=True).sum(-1)
    # The sum of a row that agrees misses 0 by a rounding, to either side.
    return divergence.clamp_min(0.0)
