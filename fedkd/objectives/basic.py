"""The terms nearly everybody uses: labels, and the teacher's softened predictions."""

from functools import partial
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedkd.bounds import PositiveShare, ShareBelowOne
from fedkd.losses.curriculum_temperature import (
    LOWEST,
    SPAN,
    LearnedTemperature,
    learned_temperature_rows,
)
from fedkd.losses.distances import logit_l1_rows, logit_mse_rows
from fedkd.losses.reduction import Loss
from fedkd.losses.response import (
    hard_label_loss,
    hard_label_rows,
    soft_cross_entropy_rows,
    soft_target_kl,
    soft_target_rows,
)
from fedkd.losses.rows import t2_factor
from fedkd.objectives.terms import LayerPairs, Need, Parts, Shapes, SoftenedTerm, Term
from fedkd.objectives.view import View
from fedkd.schedules import PositiveSchedule


class HardLabels(Term):
    """Cross-entropy against the labels that the student may see."""

    source: ClassVar[str] = "cross-entropy"

    kind: Literal["ce"] = "ce"
    label_smoothing: ShareBelowOne = Field(
        0.0, description="share of the probability spread over all classes"
    )

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without: labelled rows."""
        return ("labels",)

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each labelled row, in nats."""
        if view.labelled_logits is None or view.labels is None:
            raise ValueError("this step has no labelled rows")
        logits, smoothing = view.labelled_logits, self.label_smoothing
        rows = partial(hard_label_rows, logits, label_smoothing=smoothing)
        if view.mix is None:
            mean = partial(hard_label_loss, logits, view.labels, label_smoothing=smoothing)
            return view.of_labelled(partial(rows, view.labels), mean=mean)
        share, partners = view.mix.share, view.labels[view.mix.permutation]
        return view.of_labelled(share * rows(view.labels) + (1 - share) * rows(partners))


class SoftTargets(SoftenedTerm):
    """``T^2 * KL(teacher || student)`` of the softened predictions; the usual distillation loss."""

    source: ClassVar[str] = (
        "Hinton, Vinyals, Dean, 2015, section 2, https://arxiv.org/abs/1503.02531; learned "
        "temperature: Li et al., 2023 (CTKD), https://arxiv.org/abs/2211.16231"
    )

    kind: Literal["kd"] = "kd"
    teacher_temperature: PositiveSchedule | None = Field(
        None, description="softens the teacher; none: the student's temperature"
    )
    scale_by_t2: bool = Field(True, description="multiply by the student's temperature squared")
    learned: bool = Field(
        False,
        description="the temperature is learned against the student (CTKD) and not taken from "
        "temperature",
    )
    learned_until: PositiveShare = Field(
        0.04, description="share of the training over which the reversal grows to 1"
    )

    @model_validator(mode="after")
    def _one_temperature(self) -> "SoftTargets":
        if self.learned and self.teacher_temperature is not None:
            raise ValueError(
                "teacher_temperature has no say with learned: true, where one temperature softens "
                f"both sides: remove one of them, got {self.teacher_temperature!r}"
            )
        return self

    def temperature_at(self, progress: float, parts: Parts) -> float:
        """Return the temperature in force, which softens the student."""
        if self.learned:
            return float(parts.call("temperature", progress).detach())
        return super().temperature_at(progress, parts)

    def target_temperature_at(self, progress: float, parts: Parts) -> float:
        """Return the temperature in force that softens the teacher."""
        if self.teacher_temperature is not None:
            return self.teacher_temperature.at(progress)
        return self.temperature_at(progress, parts)

    def target_temperature_range(self) -> tuple[float, float]:
        """Return the lowest and the highest temperature that ever softens the teacher."""
        if self.learned:
            return LOWEST, LOWEST + SPAN
        return (self.teacher_temperature or self.temperature).range()

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make the learned temperature."""
        if not self.learned:
            return {}
        return {"temperature": LearnedTemperature(until=self.learned_until)}

    def notes(self, view: View, parts: Parts) -> dict[str, Float[Tensor, ""]]:
        """Return the learned temperature."""
        if not self.learned:
            return {}
        return {"temperature": parts.call("temperature", view.progress)}

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        if self.learned:
            learned = parts.call("temperature", view.progress)
            rows = learned_temperature_rows(*view.pair(), learned)
            return view.of_transfer(rows * learned**2 if self.scale_by_t2 else rows)
        temperature = self.temperature.at(view.progress)
        student, target = view.softened_pair(self.target_temperature_at(view.progress, parts))
        divergence = view.of_transfer(
            partial(soft_target_rows, student, target, temperature=temperature),
            mean=partial(
                soft_target_kl, student, target, temperature=temperature, scale_by_t2=False
            ),
        )
        return t2_factor(temperature, self.scale_by_t2) * divergence


class SoftCrossEntropy(SoftenedTerm):
    """Cross-entropy against the softened teacher: the gradient of ``kd``, another value."""

    source: ClassVar[str] = (
        "Hinton, Vinyals, Dean, 2015, section 2, https://arxiv.org/abs/1503.02531"
    )

    kind: Literal["soft_ce"] = "soft_ce"
    scale_by_t2: bool = Field(True, description="multiply by the temperature squared")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        temperature = self.temperature.at(view.progress)
        rows = soft_cross_entropy_rows(*view.softened_pair(temperature), temperature=temperature)
        return t2_factor(temperature, self.scale_by_t2) * view.of_transfer(rows)


class LogitMSE(Term):
    """Mean squared difference of logits."""

    source: ClassVar[str] = "Kim et al., 2021, https://arxiv.org/abs/2105.08919"

    kind: Literal["mse"] = "mse"

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over classes of each transfer row."""
        return view.of_transfer(logit_mse_rows(*view.pair()))


class LogitL1(Term):
    """Mean absolute difference of logits."""

    source: ClassVar[str] = "FedMD's published code, https://arxiv.org/abs/1910.03581"

    kind: Literal["l1"] = "l1"

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over classes of each transfer row."""
        return view.of_transfer(logit_l1_rows(*view.pair()))
