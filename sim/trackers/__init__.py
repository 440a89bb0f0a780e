"""Trackers of other projects that a run may write to beside its folder; none by default."""

from typing import Annotated, TypeAlias

from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.kinds import Kinds
from sim.trackers.base import Tracker
from sim.trackers.mlflow import MLflow
from sim.trackers.tensorboard import TensorBoard
from sim.trackers.wandb import WandB

TRACKERS: Kinds[Tracker] = Kinds(
    "tracker", Tracker, {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
)
"""Trackers by the name that a settings file uses."""

TrackerField: TypeAlias = Annotated[SerializeAsAny[Tracker], PlainValidator(TRACKERS.read)]
"""A tracker in settings: its kind, or a table with its kind and settings."""

__all__ = ["TRACKERS", "MLflow", "TensorBoard", "Tracker", "TrackerField", "WandB"]
