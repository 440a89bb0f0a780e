"""Training over cohorts of clients: state, batches, optimizers, objectives and backends."""

from fedkd.training.batches import Passes
from fedkd.training.cohort import Cohort, Member, PublicLesson, Streams, TrainingData, as_tensor
from fedkd.training.loop import MODEL, LoopCohort, ModelPool, initial_model_seed
from fedkd.training.objectives import (
    Batch,
    Losses,
    Objective,
    Outputs,
    distilled,
    supervised,
    supervised_public,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.state import Arrays, ClientState, ModelState, weights_digest

__all__ = [
    "MODEL",
    "Arrays",
    "Batch",
    "ClientState",
    "Cohort",
    "LoopCohort",
    "Losses",
    "Member",
    "ModelPool",
    "ModelState",
    "Objective",
    "OptimizerSettings",
    "Outputs",
    "Passes",
    "PublicLesson",
    "Streams",
    "TrainingData",
    "as_tensor",
    "distilled",
    "initial_model_seed",
    "supervised",
    "supervised_public",
    "weights_digest",
]
