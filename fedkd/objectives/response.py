"""Terms on what the teacher predicts, beyond plain soft targets."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from fedkd.bounds import PositiveShare, Real, Temperature, Weight
from fedkd.losses.correlation import dist_loss
from fedkd.losses.distances import annealing_rows, probability_mse_rows
from fedkd.losses.other_classes import decoupled_rows, normalised_rows, not_true_rows
from fedkd.losses.reduction import Loss, WholeStep
from fedkd.losses.row_temperatures import (
    confidence_temperatures,
    disagreement_temperatures,
    row_temperature_kl,
)
from fedkd.losses.rows import t2_factor
from fedkd.losses.standardised import standardised_rows
from fedkd.objectives.terms import (
    LayerPairs,
    Need,
    Parts,
    Shapes,
    SoftenedTerm,
    Term,
    default_temperature,
    default_weight,
)
from fedkd.objectives.view import View
from fedkd.schedules import NonNegativeSchedule, PositiveSchedule


class ProbabilityMSE(SoftenedTerm):
    """Mean squared difference of softened probabilities."""

    source: ClassVar[str] = "mean squared error of probabilities"

    kind: Literal["prob_mse"] = "prob_mse"
    temperature: PositiveSchedule = default_temperature(1.0)

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over classes of each transfer row."""
        temperature = self.temperature.at(view.progress)
        rows = probability_mse_rows(*view.softened_pair(temperature), temperature=temperature)
        return view.of_transfer(rows)


class AnnealingKD(Term):
    """Squared distance to the teacher's logits, which grow to their full size."""

    source: ClassVar[str] = "Jafari et al., 2021, stage I, https://arxiv.org/abs/2104.07163"

    kind: Literal["annealing"] = "annealing"
    max_temperature: Real = Field(
        10.0, ge=1, le=1e4, description="the teacher's temperature at the start"
    )
    until: PositiveShare = Field(
        1.0,
        description="share of the training over which the temperature falls to 1; a weight that "
        "steps to 0 there leaves the rest to the labels, as published",
    )

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over classes of each transfer row."""
        rows = annealing_rows(
            *view.pair(),
            progress=min(1.0, view.progress / self.until),
            max_temperature=self.max_temperature,
        )
        return view.of_transfer(rows)


class OtherClassTerm(SoftenedTerm):
    """A term that tells a row's label from the other classes."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without: the teacher's logits, and labels of the transfer rows."""
        return ("teacher", "transfer_labels")

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make nothing, but refuse fewer than 3 classes."""
        if num_classes < 3:
            raise ValueError(
                f"needs at least 3 classes, got {num_classes}: next to the label there is no "
                "distribution over the other classes; use kd"
            )
        return {}


class DecoupledKD(OtherClassTerm):
    """Soft targets in two parts: is it the label, and which of the others (DKD)."""

    source: ClassVar[str] = "Zhao et al., 2022, section 3.3, https://arxiv.org/abs/2203.08679"

    kind: Literal["dkd"] = "dkd"
    alpha: Weight = Field(1.0, description="the paper's weight of the label's part")
    beta: Weight = Field(8.0, description="the paper's weight of the other classes")
    scale_by_t2: bool = Field(True, description="multiply by the temperature squared")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        temperature = self.temperature.at(view.progress)
        rows = decoupled_rows(
            *view.pair(),
            view.known_labels(),
            alpha=self.alpha,
            beta=self.beta,
            temperature=temperature,
        )
        return t2_factor(temperature, self.scale_by_t2) * view.of_transfer(rows)


class NormalisedKD(OtherClassTerm):
    """Cross-entropy of the label, as sure as the teacher is, plus that of the others (NKD)."""

    source: ClassVar[str] = "Yang et al., 2023, https://arxiv.org/abs/2303.13005"

    kind: Literal["nkd"] = "nkd"
    temperature: PositiveSchedule = default_temperature(1.0)
    gamma: Weight = Field(1.5, description="the paper's weight of the other classes")
    scale_by_t2: bool = Field(
        True, description="multiply the other classes' part by the temperature squared"
    )

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        rows = normalised_rows(
            *view.pair(),
            view.known_labels(),
            gamma=self.gamma,
            temperature=self.temperature.at(view.progress),
            scale_by_t2=self.scale_by_t2,
        )
        return view.of_transfer(rows)


class NotTrueKD(OtherClassTerm):
    """Soft targets over the classes that are not the label (NTD)."""

    source: ClassVar[str] = "Lee et al., 2022 (FedNTD), https://arxiv.org/abs/2106.03097"

    kind: Literal["ntd"] = "ntd"
    temperature: PositiveSchedule = default_temperature(3.0)
    scale_by_t2: bool = Field(False, description="multiply by the temperature squared")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        temperature = self.temperature.at(view.progress)
        rows = not_true_rows(*view.pair(), view.known_labels(), temperature=temperature)
        return t2_factor(temperature, self.scale_by_t2) * view.of_transfer(rows)


class DIST(SoftenedTerm):
    """How the teacher ranks classes within a row, and rows within a class."""

    source: ClassVar[str] = "Huang et al., 2022, https://arxiv.org/abs/2205.10536"

    kind: Literal["dist"] = "dist"
    weight: NonNegativeSchedule = default_weight(2.0)
    temperature: PositiveSchedule = default_temperature(1.0)
    beta: Weight = Field(1.0, description="the paper's weight of ranks within rows")
    gamma: Weight = Field(1.0, description="the paper's weight of ranks within classes")
    scale_by_t2: bool = Field(True, description="multiply by the temperature squared")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return one minus the mean correlations, without unit."""
        loss = dist_loss(
            *view.pair(),
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature.at(view.progress),
            scale_by_t2=self.scale_by_t2,
            sample_weights=view.weights,
        )
        return WholeStep(loss)


class StandardisedKD(SoftenedTerm):
    """Soft targets of logits that are standardised row by row."""

    source: ClassVar[str] = "Sun et al., 2024, algorithm 1, https://arxiv.org/abs/2403.01427"

    kind: Literal["logit_std"] = "logit_std"
    weight: NonNegativeSchedule = default_weight(9.0, "published beside 0.1 for ce")
    temperature: PositiveSchedule = default_temperature(2.0)
    scale_by_t2: bool = Field(True, description="multiply by the temperature squared")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss of each transfer row, in nats."""
        temperature = self.temperature.at(view.progress)
        rows = standardised_rows(*view.pair(), temperature=temperature)
        return t2_factor(temperature, self.scale_by_t2) * view.of_transfer(rows)


class RowTemperatureTerm(SoftenedTerm):
    """Soft targets with a temperature for every row; ``temperature`` is their mean."""

    beta: Weight = Field(1.0, description="how far temperatures spread; 0: not at all")
    min_temperature: Temperature = Field(0.5, description="no row gets less")
    scale_by_t2: bool = Field(True, description="multiply by each row's temperature squared")


class DisagreementKD(RowTemperatureTerm):
    """Soft targets, sharper for rows on which student and teacher differ (FLSW)."""

    source: ClassVar[str] = (
        "Wen et al., 2019, https://arxiv.org/abs/1911.07471; TextBrewer, "
        "https://arxiv.org/abs/2002.12620"
    )

    kind: Literal["flsw"] = "flsw"
    gamma: Real = Field(1.0, ge=1e-6, le=100, description="exponent of the disagreement")

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over the transfer rows, whose temperatures depend on each other."""
        student, teacher = view.pair()
        temperatures = disagreement_temperatures(
            student,
            teacher,
            temperature=self.temperature.at(view.progress),
            beta=self.beta,
            gamma=self.gamma,
            min_temperature=self.min_temperature,
        )
        loss = row_temperature_kl(
            student,
            teacher,
            temperatures,
            scale_by_t2=self.scale_by_t2,
            sample_weights=view.weights,
        )
        return WholeStep(loss)


class ConfidenceKD(RowTemperatureTerm):
    """Soft targets, sharper for rows on which the student is unsure (CWSM)."""

    source: ClassVar[str] = (
        "Wen et al., 2019, https://arxiv.org/abs/1911.07471; TextBrewer, "
        "https://arxiv.org/abs/2002.12620"
    )

    kind: Literal["cwsm"] = "cwsm"

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the mean over the transfer rows, whose temperatures depend on each other."""
        student, teacher = view.pair()
        temperatures = confidence_temperatures(
            student,
            temperature=self.temperature.at(view.progress),
            beta=self.beta,
            min_temperature=self.min_temperature,
        )
        loss = row_temperature_kl(
            student,
            teacher,
            temperatures,
            scale_by_t2=self.scale_by_t2,
            sample_weights=view.weights,
        )
        return WholeStep(loss)
