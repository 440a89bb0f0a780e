"""Teachers: frozen models whose predictions a student learns from, and the cache of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.distillation.task.combining import Combination, combined_target
from fedkd.distillation.task.heads import routed_logits
from fedkd.distillation.task.predicting import finite, predict_logits
from fedkd.targets import Targets


class Teacher(nn.Module):
    """One or several trained models that never change.

    It stays in evaluation mode whatever is asked of it: a student's ``train()`` further up, or a
    wrapper's, cannot move its BatchNorm statistics.

    Attributes:
        members: the models.
        combination: how several models make one target.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        combination: Combination,
        task_of_class: Int[Tensor, " classes"] | None = None,
    ) -> None:
        """Freeze models.

        Args:
            members: at least one.
            combination: how several models make one target.
            task_of_class: the task of each class where each row is taught by the head of its own
                task; None: by all there is.

        Raises:
            ValueError: if there is no model.
        """
        super().__init__()
        if not members:
            raise ValueError("a teacher needs at least one model, got none")
        self.members = nn.ModuleList(members)
        self.combination = combination
        self.register_buffer("_task_of_class", task_of_class, persistent=False)
        self._task_of_class: Tensor | None
        self.zero_grad(set_to_none=True)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return self

    @property
    def first(self) -> nn.Module:
        """The model whose layers are compared; of several, the first."""
        return self.members[0]

    @property
    def routes(self) -> bool:
        """Whether a row is taught by the head of its own task only."""
        return self._task_of_class is not None

    @property
    def needs_labels(self) -> bool:
        """Whether its target depends on the labels of the rows."""
        return len(self.members) > 1 and self.combination.by == "labels"

    @property
    def depends_on_temperature(self) -> bool:
        """Whether the target that is made for one temperature is wrong for another."""
        average = self.combination.average
        return average == "era" or (len(self.members) > 1 and average == "probability")

    @torch.no_grad()
    def member_logits(
        self, inputs: Float[Tensor, "rows *shape"]
    ) -> Float[Tensor, "teachers rows classes"]:
        """Return every model's logits."""
        return torch.stack([member(inputs) for member in self.members])

    def task_ids(self, labels: Int[Tensor, " rows"]) -> Int[Tensor, " rows"] | None:
        """Return the tasks of rows, which come with the data; None where no row is routed."""
        if self._task_of_class is None:
            return None
        return self._task_of_class.to(labels.device)[labels]

    def combine(
        self,
        logits: Float[Tensor, "teachers rows classes"],
        *,
        temperature: float,
        labels: Int[Tensor, " rows"] | None = None,
        tasks: Int[Tensor, " rows"] | None = None,
    ) -> Targets:
        """Make one target of all models' logits.

        Args:
            logits: of every model, all heads side by side.
            temperature: at which the student will use the target, > 0.
            labels: classes of the rows, for ``teacher.combine.by: labels``.
            tasks: from `task_ids`; None: no row says which task it belongs to, and all heads
                answer.

        Raises:
            ValueError: if labels are needed and missing; see `combined_target`.
        """
        if tasks is not None and self._task_of_class is not None:
            owners = self._task_of_class.to(logits.device)
            logits = torch.stack([routed_logits(each, tasks, owners) for each in logits])
        if len(logits) == 1 and self.combination.average != "era":
            return Targets.from_model(logits[0])
        return combined_target(logits, self.combination, temperature=temperature, labels=labels)

    def check_inputs_suffice(self, method: str) -> None:
        """Refuse a target that depends on labels or tasks, for a method whose rows have none.

        Raises:
            ValueError: naming the setting and what works.
        """
        if self.needs_labels:
            raise ValueError(
                f"teacher.combine.by: labels needs labels, which the rows of method {method!r} do "
                "not have: use uniform, confidence or entropy"
            )
        if self.routes:
            raise ValueError(
                f"teacher.heads: own needs the rows' tasks, which method {method!r} does not "
                "know: set teacher.heads=all"
            )

    def opinion(
        self, logits: Float[Tensor, "teachers rows classes"]
    ) -> Float[Tensor, "rows classes"]:
        """Return what it says of rows about which nothing is known, neither label nor task.

        Where labels would decide which model counts how much, all count the same.

        Args:
            logits: of every model, all heads side by side.
        """
        teacher = self
        if self.needs_labels:
            uniform = self.combination.model_copy(update={"by": "uniform"})
            teacher = Teacher(list(self.members), uniform)
        return teacher.combine(logits, temperature=1.0).logits()


class TeacherCache:
    """A teacher's logits for the transfer rows, kept by row id.

    They are computed once, in the order of the ids, and looked up by id: the order in which a
    student asks cannot misalign them.
    """

    def __init__(self, teacher: Teacher, inputs: Float[Tensor, "rows *shape"]) -> None:
        self._logits = torch.stack(
            [finite(predict_logits(member, inputs), "the teacher") for member in teacher.members]
        )

    def logits(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "teachers batch classes"]:
        """Return every model's logits for these row ids."""
        return self._logits.index_select(1, rows)


def teacher_names(count: int) -> list[str]:
    """Return what the models of a teacher are called."""
    return ["teacher"] if count == 1 else [f"teacher {number + 1}" for number in range(count)]
