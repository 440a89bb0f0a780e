"""Born-again networks: each generation is taught by the one before, which looks just like it."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from fedkd.bounds import Few
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop, labels_only
from fedkd.distillation.methods.peers import Ensemble
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.teachers import Teacher

EARLIER = 8
"""Key of the batches of all generations but the last."""


class BornAgainSettings(MethodSettings):
    """Settings under ``method:`` when ``name: born_again``."""

    name: Literal["born_again"] = "born_again"
    generations: Few = Field(
        2, description="born-again models; generation 0, which has no teacher, is not counted"
    )


class BornAgain(Method[BornAgainSettings]):
    """A model learns labels, a fresh one of its kind learns from it, and so on.

    Generation 0 learns labels only. Every later one starts fresh and minimises the objective with
    a frozen copy of the generation before as its teacher. The last generation has the first
    weights and the batches of the undistilled twin.
    """

    Settings: ClassVar[type[MethodSettings]] = BornAgainSettings
    source: ClassVar[str] = (
        "Furlanello et al., 2018, Born-Again Neural Networks, https://arxiv.org/abs/1805.04770"
    )
    needs_teacher: ClassVar[bool] = False

    def check(self, workshop: Workshop) -> None:
        """Set up what a born-again generation learns and train nothing.

        The first of them trains late: an objective that does not fit must not cost generation 0.
        """
        workshop.fit(
            workshop.new_student(),
            name="student",
            teacher=_teacher(workshop, workshop.new_student(1)),
            training=workshop.training.model_copy(update={"epochs": 0}),
        )
        del workshop.histories["student"]

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the last generation as the student, the earlier ones beside it.

        With two born-again generations or more their ``ensemble`` is there too: as in the paper
        the mean of all generations' predictions but that of generation 0.
        """
        last = self.settings.generations
        self.check(workshop)
        models: list[nn.Module] = []
        names = [f"generation {number}" for number in range(last)] + ["student"]
        for number, name in enumerate(names):
            left = last - number
            model = workshop.new_student(left)
            workshop.fit(
                model,
                name=name,
                teacher=_teacher(workshop, models[-1]) if models else None,
                objective=None if models else labels_only(workshop.objective),
                key=(0, EARLIER, left) if left else (0,),
            )
            models.append(model)
        others = dict(zip(names[:-1], models[:-1], strict=True))
        if last > 1:
            others["ensemble"] = Ensemble(models[1:])
        return MethodResult(models[-1], others)


def _teacher(workshop: Workshop, model: nn.Module) -> Teacher:
    # A copy: being a teacher freezes a model, and a generation must share nothing with the next.
    copied = workshop.new_student(1)
    copied.load_state_dict(model.state_dict())
    return Teacher([copied], Combination())
