"""What a distillation leaves."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedkd.compression import ModelCost
from fedkd.distillation.fit.epochs import EpochRow
from fedkd.distillation.judging.finished import FinishedLogits
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.teachers import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What `distill` returns.

    Attributes:
        models: by name: ``teacher`` (or ``teacher 1``, ...), ``student``, ``twin`` (the student
            without distillation, same seed), and what the method adds.
        scores: of each model on the test rows; see `fedkd.distillation.judging.scores.score`. A
            pruned model has ``sparsity``, the share of its weights that are zero, and ``student
            int8`` has ``agreement_with_student``.
        costs: of each model; apart from the scores, since a seed does not repeat latency.
        histories: of every fit, one row an epoch.
        notes: the method's own numbers; ``inherited``, ``sparsity`` and ``int8`` where the
            settings ask for these.
        teacher: whose target the student learned; None where the method needs none.
        predictions: of the models, as far as they were needed.
    """

    settings: DistillSettings
    rows: Rows
    predictions: FinishedLogits
    models: dict[str, nn.Module]
    scores: dict[str, dict[str, Any]]
    costs: dict[str, ModelCost]
    histories: dict[str, list[EpochRow]]
    notes: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher | None = None
