"""Settings of ``fedkd distill``: one frozen, checked object."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, field_validator

from fedkd import own_code
from fedkd.bounds import Few, PathText, Rows, RowsOrZero, Seed, Share, Temperature, Whole
from fedkd.data import DataSettings
from fedkd.data.settings import PublicSettings
from fedkd.distillation.fit.method import MethodSettings
from fedkd.distillation.methods import METHODS, method_class
from fedkd.distillation.task.measures import DiagnosticsSettings
from fedkd.distillation.task.participants import (
    Section,
    StudentSettings,
    TeacherSettings,
    TrainingSettings,
)
from fedkd.distillation.task.selection import Selection
from fedkd.names import check_name
from fedkd.objectives import Objective


class UnreadMethod(MethodSettings):
    """Settings of a method of another package whose code nobody has allowed, as they stand."""

    model_config = ConfigDict(extra="allow")


if TYPE_CHECKING:
    MethodField = SerializeAsAny[MethodSettings]
else:
    MethodField = own_code.by_name(METHODS, UnreadMethod, method_class)


class TransferRows(PublicSettings):
    """Rows that the student sees without their labels (``data.public``)."""

    size: RowsOrZero = Field(1000, description="rows without labels; 0: all rows have labels")


class DistillData(DataSettings):
    """Which rows there are (``data``), with the defaults of a distillation."""

    private_rows: Rows | None = Field(
        100, description="rows whose labels the student sees; none: all that are left"
    )
    public: TransferRows = TransferRows()


class SearchSettings(Section):
    """What ``fedkd distill --search`` tries; models are judged on the validation split only."""

    temperatures: tuple[Temperature, ...] = Field(
        (1.0, 2.0, 4.0, 8.0), min_length=1, description="temperatures of the softened terms, > 0"
    )
    weights: tuple[Share, ...] = Field(
        (0.1, 0.5, 0.9),
        min_length=1,
        description="weights in [0, 1] of the first softened term; ce has the rest up to 1",
    )
    seeds: Few = Field(1, description="paired seeds a cell is averaged over")

    @field_validator("temperatures", "weights")
    @classmethod
    def _cells_differ(cls, values: tuple[float, ...], info: Any) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"search.{info.field_name} must differ, got {list(values)}")
        return values


class DistillSettings(Section):
    """Everything that decides a distillation. Without arguments: the digits default."""

    name: str = Field("distill", description="names the folder of the run")
    seed: Seed = Field(0, description="decides every draw")
    seeds: Few = Field(1, description="paired repetitions: seed, seed + 1, ...")
    output: PathText = Field(Path("runs"), description="where run folders are made")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one"
    )
    threads: Whole = Field(
        1,
        ge=1,
        le=256,
        description="CPU threads; another number may change the last bits of a result",
    )
    data: DistillData = DistillData()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    objective: Objective = Field(
        Objective.model_validate({"ce": 0.1, "kd": {"weight": 0.9, "temperature": 4.0}}),
        description="what the student minimises: terms by name",
    )
    targets: Selection = Selection()
    training: TrainingSettings = TrainingSettings()
    method: MethodField = Field(METHODS["offline"].Settings(name="offline"))
    search: SearchSettings = SearchSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()

    @field_validator("data", mode="before")
    @classmethod
    def _rows_of_another_kind(cls, value: object) -> object:
        if isinstance(value, DataSettings) and not isinstance(value, DistillData):
            return value.model_dump()
        return value

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        return check_name(name, "name")

    @field_validator("method", mode="before")
    @classmethod
    def _a_name_is_a_method(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        name = value.get("name", "offline")
        if not own_code.is_own_code(name) or own_code.may_load(name, "method.name"):
            method_class(name)
        return {**value, "name": name}

    def to_table(self) -> dict[str, Any]:
        """Return the settings as plain values, all defaults included."""
        return self.model_dump(mode="json")
