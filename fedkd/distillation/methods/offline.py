"""Offline distillation: a trained teacher, a student that learns from it."""

from typing import ClassVar, Literal

from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop


class OfflineSettings(MethodSettings):
    """Settings under ``method:`` when ``name: offline``: none."""

    name: Literal["offline"] = "offline"


class Offline(Method[OfflineSettings]):
    """Train the student on the objective, with the teacher as it is."""

    Settings: ClassVar[type[MethodSettings]] = OfflineSettings
    source: ClassVar[str] = "Hinton, Vinyals, Dean, 2015, https://arxiv.org/abs/1503.02531"

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the distilled student."""
        student = workshop.new_student()
        workshop.fit(student, name="student", teacher=workshop.teacher)
        return MethodResult(student)
