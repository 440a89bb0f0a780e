"""Training over cohorts of clients: state, batches, optimizers, objectives and backends."""

from fedkd.losses.reduction import Loss, PerRow, WholeStep
from fedkd.tensors import as_tensor
from fedkd.training.backends import (
    Backend,
    BackendTimes,
    choose_backend,
    measure_backends,
    open_cohort,
)
from fedkd.training.batches import Passes
from fedkd.training.binding import Stacking, stacking_of
from fedkd.training.cohort import (
    MODEL,
    PARTS,
    Architecture,
    Average,
    Cohort,
    Examples,
    Member,
    PublicLesson,
    RowOutputs,
    Streams,
    TrainingData,
)
from fedkd.training.gradients import PLAIN, Clipped, GradientRule, Plain, Proximal
from fedkd.training.learners import ComposedObjective, Learner
from fedkd.training.loop import LoopCohort
from fedkd.training.objectives import (
    Batch,
    JointObjective,
    Losses,
    ObjectiveFunction,
    Outputs,
    supervised,
    supervised_public,
    towards_targets,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import ModelPool, initial_model_seed
from fedkd.training.private import PrivacyError, PrivateLearning
from fedkd.training.stacking import VmapUnsupportedError
from fedkd.training.state import Arrays, ClientState, ModelState, check_state, weights_digest
from fedkd.training.tables import Table
from fedkd.training.vmap import VmapCohort
from fedkd.training.work import Network, RowFlops, Work

__all__ = [
    "MODEL",
    "PARTS",
    "PLAIN",
    "Architecture",
    "Arrays",
    "Average",
    "Backend",
    "BackendTimes",
    "Batch",
    "ClientState",
    "Clipped",
    "Cohort",
    "ComposedObjective",
    "Examples",
    "GradientRule",
    "JointObjective",
    "Learner",
    "LoopCohort",
    "Loss",
    "Losses",
    "Member",
    "ModelPool",
    "ModelState",
    "Network",
    "ObjectiveFunction",
    "OptimizerSettings",
    "Outputs",
    "Passes",
    "PerRow",
    "Plain",
    "PrivacyError",
    "PrivateLearning",
    "Proximal",
    "PublicLesson",
    "RowFlops",
    "RowOutputs",
    "Stacking",
    "Streams",
    "Table",
    "TrainingData",
    "VmapCohort",
    "VmapUnsupportedError",
    "WholeStep",
    "Work",
    "as_tensor",
    "check_state",
    "choose_backend",
    "initial_model_seed",
    "measure_backends",
    "open_cohort",
    "stacking_of",
    "supervised",
    "supervised_public",
    "towards_targets",
    "weights_digest",
]
