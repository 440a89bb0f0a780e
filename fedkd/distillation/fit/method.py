"""What every way to distil is made of: settings, and a procedure over a workshop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from fedkd.inputs import Kind

if TYPE_CHECKING:
    from fedkd.distillation.fit.workshop import Workshop


class MethodSettings(BaseModel):
    """Settings under ``method:``; each method adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What a method leaves.

    Attributes:
        student: the model that is reported as the student.
        others: further models to measure, by name: peers, generations, an ensemble.
        notes: numbers of the method's own, for the result.
    """

    student: nn.Module
    others: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Method(ABC, Generic[SettingsT]):
    """One way to distil."""

    Settings: ClassVar[type[MethodSettings]]
    source: ClassVar[str]
    """Whose idea it is: authors, year, link."""
    takes: ClassVar[tuple[Kind, ...]] = ("pictures", "features", "text")
    """The kinds of inputs that it works on."""
    needs_teacher: ClassVar[bool] = True
    """Whether a teacher is trained (or loaded) before."""

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    def check(self, workshop: "Workshop") -> None:
        """Refuse what cannot work.

        Args:
            workshop: as `run` will get it; its teacher may be untrained and its rows few.

        Raises:
            ValueError: naming the setting, its value and what works.
        """

    @abstractmethod
    def run(self, workshop: "Workshop") -> MethodResult:
        """Train and return the student; the test rows are not looked at."""
