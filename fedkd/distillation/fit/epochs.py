"""The epochs of a training: what is written down, who is told, when to stop, what is kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedkd.distillation.task.participants import TrainingSettings
from fedkd.training.early_stopping import EarlyStopping

EpochRow = dict[str, int | float]
"""What is recorded of an epoch."""

Watcher = Callable[[Mapping[str, Any]], None]
"""Is told after every epoch: its number, mean loss terms, validation accuracy, values in force."""


@dataclass(slots=True)
class FitHistory:
    """What happened while one model was trained: one row an epoch.

    Attributes:
        epochs: mean of each loss term, validation accuracy and loss, schedules in force.
        best_epoch: the epoch whose weights were kept, None for the last one.
    """

    epochs: list[EpochRow] = field(default_factory=list)
    best_epoch: int | None = None


class FitRecord:
    """The history of one model's training, and its best weights where it may stop early.

    Attributes:
        history: one row an epoch.
    """

    def __init__(self, training: TrainingSettings, watch: Watcher) -> None:
        """Begin before the first epoch.

        Args:
            training: how many epochs there are, and whether they may end early.
            watch: told after every epoch.
        """
        self.history = FitHistory()
        self._epochs, self._watch = training.epochs, watch
        stopping = training.early_stopping
        self._stopping = None if stopping is None else EarlyStopping(stopping)
        lower_is_better = stopping is not None and stopping.mode == "min"
        self._watched = "validation_loss" if lower_is_better else "validation_accuracy"

    @property
    def stopped(self) -> bool:
        """Whether nothing was gained for so long that the training ends."""
        return self._stopping is not None and self._stopping.should_stop

    def close_epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Write down an epoch, tell it, and keep the model's weights if they are the best.

        Args:
            row: the epoch's number, its losses and the `validated` values of the model.
            model: as it was validated.
        """
        self.history.epochs.append(row)
        self._watch({"epochs": self._epochs, **row})
        if self._stopping is not None and not self._stopping.should_stop:
            self._stopping.update(row[self._watched], model, step=int(row["epoch"]))

    def restore_best(self, model: nn.Module) -> None:
        """Give a model its best weights back, where it might have stopped early."""
        if self._stopping is not None and self._stopping.best_step is not None:
            self._stopping.restore(model)
            self.history.best_epoch = self._stopping.best_step


def epoch_means(recorded: Mapping[str, Tensor], *, model: int | None = None) -> dict[str, float]:
    """Return the mean over an epoch's steps of everything recorded, losses as ``loss/<name>``.

    Args:
        recorded: by name, steps first; names of what is no loss have a slash.
        model: which of several models, where a step had a number for each; a number that is for
            all of them together is every model's.
    """
    means = {}
    for name, values in recorded.items():
        own = values[:, model].contiguous() if values.ndim > 1 else values
        means[name if "/" in name else f"loss/{name}"] = float(own.sum()) / len(own)
    return means
