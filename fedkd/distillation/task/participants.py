"""Settings of those who take part in a distillation: how they train, who teaches, who learns."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedkd.bounds import Count, CountOrZero, ShareBelowOne
from fedkd.compression import PruningSettings, QuantisationSettings
from fedkd.data.augmentation import AugmentationSettings
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.heads import TaskSettings, check_task_names
from fedkd.models import ModelSettings
from fedkd.objectives.terms import LayerName
from fedkd.training.early_stopping import EarlyStoppingSettings
from fedkd.training.optimizers import OptimizerSettings


class Section(BaseModel):
    """A table of settings: frozen, and strict about what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingSettings(Section):
    """How one model is trained (``training``, ``teacher.training``)."""

    epochs: CountOrZero = Field(30, description="passes over the rows")
    batch_size: Count = Field(32, description="rows in a step")
    optimizer: OptimizerSettings = OptimizerSettings()
    early_stopping: EarlyStoppingSettings | None = Field(
        None, description="stop on validation and go back to the best weights; none: last weights"
    )
    augmentation: AugmentationSettings = AugmentationSettings()


class TeacherPruning(PruningSettings):
    """How a trained teacher is pruned before it teaches (``teacher.prune``)."""

    finetune_epochs: CountOrZero = Field(
        5, description="passes over its rows after pruning; pruned weights stay zero"
    )


class StudentPruning(PruningSettings):
    """How students are pruned (``student.prune``), the undistilled twin like the student."""

    when: Literal["start", "end"] = Field(
        "end",
        description="start: random or inherited weights are pruned and all training keeps them "
        "zero; end: the trained student is pruned, then trained on",
    )
    finetune_epochs: CountOrZero = Field(
        5,
        description="with end: passes over the rows after pruning, on the objective where there "
        "is a teacher, else on labels; pruned weights stay zero",
    )


class TeacherSettings(Section):
    """Who teaches (``teacher``)."""

    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(name="mlp", options={"hidden": [256, 256]}),),
        description="one model, or several that teach together",
    )
    weights: tuple[Path, ...] = Field(
        (), description="safetensors files to load, one a model, instead of training"
    )
    rows: Literal["all", "labelled"] = Field(
        "all",
        description="what it is trained on: all transfer rows with their labels, or those "
        "whose labels the student sees as well",
    )
    label_smoothing: ShareBelowOne = Field(0.0, description="of its own labels")
    tasks: dict[str, TaskSettings] = Field(
        {},
        description="the classes of each task by its name, such as {low: [0, 1], high: [2, 3]}: "
        "every model gets one head a task in the place of its last linear layer, trained on the "
        "rows of the task; empty: one head for all classes",
    )
    heads: Literal["own", "all"] = Field(
        "own",
        description="with tasks, who teaches a row: own, the head of its class's task (classes of "
        "other tasks get the logit -1e4, so probability 0); all, all heads side by side",
    )
    combine: Combination = Combination()
    training: TrainingSettings = TrainingSettings()
    prune: TeacherPruning | None = Field(
        None, description="prune the teacher when it is trained or loaded; none: leave it whole"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _one_model_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _one_file_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("tasks")
    @classmethod
    def _tasks_are_apart(cls, tasks: dict[str, TaskSettings]) -> dict[str, TaskSettings]:
        check_task_names(tasks)
        return tasks

    @model_validator(mode="after")
    def _counts_fit(self) -> "TeacherSettings":
        if not self.models:
            raise ValueError("teacher.models needs at least one model, got none")
        if self.weights and len(self.weights) != len(self.models):
            raise ValueError(
                f"teacher.weights needs one file a model ({len(self.models)}), "
                f"got {len(self.weights)}"
            )
        given = len(self.combine.weights)
        if given and given != len(self.models):
            raise ValueError(
                f"teacher.combine.weights needs one number a model ({len(self.models)}), "
                f"got {given}"
            )
        return self


class StudentSettings(Section):
    """Who learns (``student``)."""

    model: ModelSettings = ModelSettings(name="mlp", options={"hidden": [32]})
    weights: Path | None = Field(
        None, description="safetensors file that student and twin start from; none: fresh"
    )
    inherit: bool | dict[LayerName, LayerName] = Field(
        False,
        description="start from the (first) teacher's layers; true: tensors of equal name and "
        "shape; a table: student layer -> teacher layer. The twin does not",
    )
    prune: StudentPruning | None = Field(None, description="prune students; none: leave them whole")
    quantise: QuantisationSettings | None = Field(
        None,
        description="int8, or a table: measure and save the student with int8 weights as well; "
        "none: float only",
    )

    @field_validator("quantise", mode="before")
    @classmethod
    def _a_name_is_a_type(cls, value: object) -> object:
        if isinstance(value, str):
            if value != "int8":
                raise ValueError(f"student.quantise must be int8, a table or none, got {value!r}")
            return {}
        return value

    @model_validator(mode="after")
    def _one_beginning(self) -> "StudentSettings":
        if self.weights is not None and self.inherit:
            raise ValueError(
                "student.weights and student.inherit both say what the student starts from: "
                "choose one"
            )
        return self
