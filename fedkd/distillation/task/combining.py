"""Several teachers, one target."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedkd.bounds import PositiveWeight, Temperature
from fedkd.targets import (
    Targets,
    confidence,
    entropy_reduction,
    mean_by_row,
    shares_by_confidence,
    shares_by_entropy,
    soften,
)


class Combination(BaseModel):
    """How several teachers make one target (``teacher.combine``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    average: Literal["probability", "logit", "era"] = Field(
        "probability",
        description="what is averaged: probabilities softened with the student's temperature; "
        "logits; or era, entropy reduction: probabilities, whose average is sharpened and not "
        "softened again",
        json_schema_extra={"source": "era: Itahara et al., 2020, https://arxiv.org/abs/2008.06180"},
    )
    era_temperature: Temperature = Field(
        0.1, description="with average: era, divides the averaged probabilities"
    )
    by: Literal["uniform", "weights", "confidence", "entropy", "labels"] = Field(
        "uniform",
        description="uniform: all the same; weights: as given; confidence: row by row by the "
        "largest probability; entropy: row by row, the surer the more; labels: row by row, the "
        "nearer to the label the more (CA-MKD; all transfer rows need labels)",
        json_schema_extra={
            "source": "labels: Zhang, Chen, Wang, 2022, CA-MKD, https://arxiv.org/abs/2201.00007"
        },
    )
    weights: tuple[PositiveWeight, ...] = Field((), description="one positive number a teacher")

    @model_validator(mode="after")
    def _weights_are_given(self) -> "Combination":
        if (self.by == "weights") != bool(self.weights):
            raise ValueError(
                "teacher.combine.weights belong to teacher.combine.by: weights, "
                f"got by: {self.by} and weights: {list(self.weights)}"
            )
        return self


def combined_target(
    logits: Float[Tensor, "teachers rows classes"],
    combination: Combination,
    *,
    temperature: float,
    labels: Int[Tensor, " rows"] | None = None,
) -> Targets:
    """Return the ensemble's target, made for a temperature; K identical teachers are one.

    Args:
        logits: of every teacher; treated as constants.
        combination: what is averaged, and with which weights.
        temperature: at which the student will use them, > 0.
        labels: classes of the rows, for ``by: labels``.

    Raises:
        ValueError: if there is no teacher, the weights are not one a teacher, or ``by: labels``
            has no labels.
    """
    logits = logits.detach()
    shares = teacher_shares(logits, combination, labels)
    if combination.average == "logit":
        return Targets.from_model(mean_by_row(logits, shares))
    if combination.average == "probability":
        target = mean_by_row(soften(logits, temperature=temperature), shares)
    else:
        mean = mean_by_row(soften(logits, temperature=1.0), shares)
        target = entropy_reduction(mean, temperature=combination.era_temperature)
    return Targets.softened(target, temperature=temperature)


def teacher_shares(
    logits: Float[Tensor, "teachers rows classes"],
    combination: Combination,
    labels: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "teachers rows"]:
    """Return how much each teacher counts in each row; only ratios within a row mean something.

    Confidence and entropy are those of the predictions as they are, without temperature.

    Args:
        logits: of every teacher; treated as constants.
        combination: ``by`` and ``weights`` of it decide.
        labels: classes of the rows, for ``by: labels``.

    Raises:
        ValueError: if the weights are not one a teacher, or ``by: labels`` has no labels.
    """
    num_teachers, num_rows, _ = logits.shape
    by = combination.by
    if by == "weights":
        if len(combination.weights) != num_teachers:
            raise ValueError(
                f"teacher.combine.weights needs one number a model ({num_teachers}), "
                f"got {len(combination.weights)}"
            )
        weights = torch.tensor(combination.weights, dtype=torch.float64, device=logits.device)
        return weights[:, None].expand(-1, num_rows)
    if by == "labels" and labels is None:
        raise ValueError(
            "teacher.combine.by: labels needs the rows' labels; use uniform, confidence or entropy"
        )
    if by == "uniform" or num_teachers < 2:
        return logits.new_ones(num_teachers, num_rows, dtype=torch.float64)
    if by == "confidence":
        surest = confidence(soften(logits, temperature=1.0).flatten(0, 1))
        return surest.reshape(num_teachers, num_rows)
    if by == "entropy" or labels is None:
        return shares_by_entropy(logits)
    return shares_by_confidence(logits, labels)
