"""What a fit feeds to its models: which rows in which step, and which view of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.data.augmentation import Mix, Views, teacher_student_views
from fedkd.distillation.task.participants import TrainingSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows
from fedkd.losses.response import hard_label_loss
from fedkd.randomness import Purpose, generator_for, torch_generator, torch_seed_for
from fedkd.training.batches import Passes


def transfer_batches(
    rows: Rows, training: TrainingSettings, *, seed: int, key: tuple[int, ...]
) -> list[Int[Tensor, " _"]]:
    """Return the transfer rows' ids of every step, ``epochs`` passes; seed and key decide them."""
    passes = Passes(batch_size=training.batch_size, epochs=training.epochs)
    batches = passes.batches(len(rows.inputs), generator_for(seed, Purpose.DISTILL, *key, 3))
    return [torch.from_numpy(batch).to(rows.device) for batch in batches]


def own_batches(
    rows: Rows,
    count: int,
    training: TrainingSettings,
    *,
    steps: int,
    seed: int,
    key: tuple[int, ...],
) -> list[Int[Tensor, " _"]]:
    """Return positions in [0, count) for every step: the rows with labels, as often as needed."""
    passes = Passes(batch_size=training.batch_size, steps=steps)
    batches = passes.batches(count, generator_for(seed, Purpose.DISTILL, *key, 4))
    return [torch.from_numpy(batch).to(rows.device) for batch in batches]


class RowViews:
    """Rows as a model sees them in training: augmented where the settings say so.

    Attributes:
        augments: whether anything is changed; ``teacher_view`` alone changes nothing.
    """

    def __init__(
        self, rows: Rows, training: TrainingSettings, *, seed: int, key: tuple[int, ...]
    ) -> None:
        self._rows, self._settings = rows, training.augmentation
        plain = type(self._settings)(teacher_view=self._settings.teacher_view)
        self.augments = self._settings != plain
        self._generator = torch_generator(torch_seed_for(seed, Purpose.AUGMENT, *key))

    def both(self, ids: Int[Tensor, " rows"]) -> Views:
        """Return the views of a student and its teacher."""
        inputs = self._rows.inputs.index_select(0, ids)
        if not self.augments:
            return Views(inputs, inputs, None, teacher_is_mixed=True)
        mean, std = self._rows.mean, self._rows.std
        views = teacher_student_views(inputs * std + mean, self._settings, self._generator)
        return Views(
            (views.student - mean) / std,
            (views.teacher - mean) / std,
            views.mix,
            teacher_is_mixed=views.teacher_is_mixed,
        )

    def own(self, ids: Int[Tensor, " rows"]) -> tuple[Float[Tensor, "rows *shape"], Mix | None]:
        """Return the student's view alone, and how it was mixed."""
        views = self.both(ids)
        return views.student, views.mix


def validated(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Return ``validation_accuracy`` and ``validation_loss`` (nats) of a model as it is now."""
    logits = predict_logits(model, rows.validation_inputs)
    right = (logits.argmax(-1) == rows.validation_labels).double().mean()
    return {
        "validation_accuracy": float(right),
        "validation_loss": float(hard_label_loss(logits, rows.validation_labels)),
    }
