"""A teacher of several tasks: one trunk, one head a task.

The classes are divided among the tasks. A row's task is that of its class; for rows whose labels
the student may not see, the task, but not the class, counts as something that comes with the data.
Heads are trained side by side, each on the rows of its own task, and know nothing of each other.
"""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from fedkd.bounds import CountOrZero, ShareBelowOne
from fedkd.losses.response import hard_label_loss
from fedkd.objectives import Objective, View
from fedkd.objectives.taps import last_linear
from fedkd.objectives.terms import LayerPairs, Need, Parts, Term
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import HEAD_PADDING, route_to_heads


class TaskSettings(BaseModel):
    """One task (``teacher.tasks.NAME``); a list is its classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[CountOrZero, ...] = Field(
        description="numbers of the classes that its head tells apart"
    )
    weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=1.0),
        description="of its cross-entropy in the sum that the teacher minimises",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_the_classes(cls, value: object) -> object:
        return {"classes": value} if isinstance(value, list | tuple) else value

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[int, ...]) -> tuple[int, ...]:
        if len(classes) < 2:
            raise ValueError(
                f"a task needs at least 2 classes, or its rows give their class away, "
                f"got {list(classes)}"
            )
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must differ, got {list(classes)}")
        return classes


Tasks = Mapping[str, TaskSettings]
"""Tasks by name; a task's id is its place in the order given."""

TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def task_of_each_class(tasks: Tasks, num_classes: int) -> Int[Tensor, " classes"]:
    """Return for every class the id of its task.

    Raises:
        ValueError: unless every class in [0, num_classes) belongs to exactly one task.
    """
    given = sorted(number for task in tasks.values() for number in task.classes)
    if given != list(range(num_classes)):
        missing = sorted(set(range(num_classes)) - set(given))
        unknown = sorted({number for number in given if number >= num_classes})
        twice = sorted({number for number in given if given.count(number) > 1})
        raise ValueError(
            f"teacher.tasks must name each class from 0 to {num_classes - 1} once, got missing: "
            f"{missing}, twice: {twice}, unknown: {unknown}"
        )
    owners = torch.empty(num_classes, dtype=torch.int64)
    for number, task in enumerate(tasks.values()):
        owners[list(task.classes)] = number
    return owners


def check_task_names(tasks: Tasks) -> None:
    """Refuse names that no part of a network, and no column of a record, can have.

    Raises:
        ValueError: naming the task.
    """
    for name in tasks:
        if not TASK_NAME.fullmatch(name):
            raise ValueError(
                "a name in teacher.tasks must be letters, digits, '_' or '-', at most 64, "
                f"got {name!r}"
            )


class TaskHeads(nn.Module):
    """Linear heads over one embedding, in the place of a network's last linear layer.

    Attributes:
        heads: by the tasks' names.
    """

    def __init__(self, layer: nn.Linear, tasks: Tasks) -> None:
        """Cut a layer into heads, which start from its weights.

        Args:
            layer: one output a class.
            tasks: their classes are the layer's outputs.
        """
        super().__init__()
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            head = nn.Linear(
                layer.in_features,
                len(task.classes),
                bias=layer.bias is not None,
                device="meta",
            ).to_empty(device=layer.weight.device)
            with torch.no_grad():
                head.weight.copy_(layer.weight[list(task.classes)])
                if layer.bias is not None:
                    head.bias.copy_(layer.bias[list(task.classes)])
            self.heads[name] = head
        given = [number for task in tasks.values() for number in task.classes]
        places = torch.argsort(torch.tensor(given, device=layer.weight.device))
        self.register_buffer("_places", places, persistent=False)
        self._places: Tensor

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        """Return the logits of all heads side by side, in the order of the classes."""
        each = [head(features) for head in self.heads.values()]
        return torch.cat(each, dim=-1).index_select(-1, self._places)


def split_into_heads(model: nn.Module, tasks: Tasks, num_classes: int) -> nn.Module:
    """Put `TaskHeads` in the place of a model's last linear layer.

    Args:
        model: changed in place.
        tasks: which classes go together.
        num_classes: width of its logits.

    Returns:
        The model; its logits are those it had.

    Raises:
        ValueError: if the tasks do not divide the classes, or the last linear layer is not the
            model's output.
    """
    task_of_each_class(tasks, num_classes)
    layer = last_linear(model)
    path = next(name for name, module in model.named_modules() if module is layer)
    if layer.out_features != num_classes or not path:
        raise ValueError(
            "teacher.tasks needs a model that ends in a linear layer with one output a class "
            f"({num_classes}), got {path or 'a bare linear layer'!r} with {layer.out_features}"
        )
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, TaskHeads(layer, tasks))
    return model


def routed_logits(
    logits: Float[Tensor, "rows classes"],
    task_ids: Int[Tensor, " rows"],
    task_of_class: Int[Tensor, " classes"],
) -> Float[Tensor, "rows classes"]:
    """Keep of each row the logits of its own task's head.

    Classes of other tasks get the logit `HEAD_PADDING` (-1e4), for which any softmax gives
    probability 0: losses of probabilities are those of the head alone, and those of plain logits
    mean nothing.

    Args:
        logits: of all heads side by side.
        task_ids: the task of each row.
        task_of_class: the task of each class.

    Raises:
        ValueError: if a row has a task that no class has.
    """
    num_tasks = int(task_of_class.max()) + 1
    heads = [
        logits.masked_fill(task_of_class != number, HEAD_PADDING) for number in range(num_tasks)
    ]
    return route_to_heads(heads, task_ids)


class TaskLabels(Term):
    """Cross-entropy of one task's head on the rows of this task.

    It divides by the number of those rows in the batch, and is 0 where there is none.
    """

    source: ClassVar[str] = "Caruana, 1997, https://doi.org/10.1023/A:1007379606734"
    needs: ClassVar[tuple[Need, ...]] = ("labels",)

    kind: Literal["task"] = "task"
    classes: tuple[CountOrZero, ...]
    label_smoothing: ShareBelowOne = 0.0

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Float[Tensor, ""]:
        """Return the mean over the task's rows, in nats."""
        if view.labelled_logits is None or view.labels is None:
            raise ValueError("this step has no labelled rows")
        if view.mix is None:
            return self._loss(view.labelled_logits, view.labels)
        share, partners = view.mix.share, view.labels[view.mix.permutation]
        logits = view.labelled_logits
        return share * self._loss(logits, view.labels) + (1 - share) * self._loss(logits, partners)

    def _loss(
        self, logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        classes = torch.tensor(self.classes, device=logits.device)
        is_class = labels[:, None] == classes
        return hard_label_loss(
            logits.index_select(-1, classes),
            is_class.to(torch.int64).argmax(-1),
            sample_weights=is_class.any(-1).to(logits.dtype),
            label_smoothing=self.label_smoothing,
        )


def tasks_objective(tasks: Tasks, *, label_smoothing: float) -> Objective:
    """Return what a teacher of several tasks minimises: their cross-entropies, by name."""
    return Objective(
        {
            name: TaskLabels(
                weight=task.weight, classes=task.classes, label_smoothing=label_smoothing
            )
            for name, task in tasks.items()
        }
    )
