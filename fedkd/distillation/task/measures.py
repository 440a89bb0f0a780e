"""What a distillation is asked to measure beside the scores."""

from typing import Literal

from pydantic import Field

from fedkd.bounds import Few, PositiveWeight, Whole
from fedkd.distillation.task.participants import Section


class DiagnosticsSettings(Section):
    """What is measured beside the scores (``diagnostics``); what is off costs time."""

    split: Literal["validation", "test"] = Field(
        "test",
        description="rows that finished models are compared on, as the table of scores; "
        "validation: while settings are still being chosen",
    )
    similarity: bool = Field(True, description="CKA of the teacher's layers with the student's")
    similarity_rows: Whole = Field(
        256, ge=4, le=100_000, description="transfer rows that layers are compared on, at most"
    )
    flatness: bool = Field(
        False, description="accuracy of the student and its twin under noise on their weights"
    )
    noise: tuple[PositiveWeight, ...] = Field(
        (0.01, 0.02, 0.05, 0.1, 0.2),
        min_length=1,
        description="standard deviations of that noise, > 0, in units of the weights",
    )
    noise_draws: Few = Field(10, description="directions of noise to average over")
    gradients: bool = Field(
        False,
        description="after every epoch, norm and direction of each term's gradient beside that "
        "of the labels, on a fixed batch",
    )
