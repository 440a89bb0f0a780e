"""Two models of a client that learn from each other on the same private rows."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.training import Architecture, ComposedObjective, Learner
from strategies.contract import Federation, PrivateUse, Step, Strategy
from strategies.contract.strategy import SettingsT, StateT

PRIVATE = "private"
"""The model that stays at home and is judged."""

HALF_AND_HALF = Objective.model_validate(
    {"ce": 0.5, "kd": {"weight": 0.5, "temperature": 1.0}},
)
"""Half the cross-entropy, and half the divergence from the other model."""


def each_other(
    objectives: Mapping[str, Objective],
    *,
    federation: Federation,
    progress: float,
) -> ComposedObjective:
    """Return both models' objectives, each with the other model as its teacher.

    A teacher is a constant for the model that learns from it, and both are updated from one forward
    pass.

    Args:
        objectives: of the two models by name; the first is called ``strategy.objective`` in
            settings, the second ``strategy.<name>_objective``.
        federation: says which terms ever have a weight.
        progress: where schedules are read, in [0, 1].
    """
    first, second = objectives
    teachers = {first: second, second: first}
    settings = {first: "strategy.objective", second: f"strategy.{second}_objective"}
    return ComposedObjective(
        learners={
            name: Learner(
                objective=federation.in_force(objective),
                teacher=teachers[name],
                setting=settings[name],
            )
            for name, objective in objectives.items()
        },
        progress=progress,
    )


AS_IN_LOCAL = Objective.model_validate({"ce": 1.0})
"""What a model minimises that does not learn from the other one."""


class Pair(Strategy[SettingsT, StateT]):
    """A private model and one that travels, which learn from each other on private rows.

    A subclass names the one that travels. Its settings have the model under that name, what it
    minimises under ``<name>_objective``, and what the private one minimises under ``objective``.
    """

    travels: ClassVar[str]
    """The model that leaves the client."""

    @property
    def travelling(self) -> ModelSettings:
        """The model that travels."""
        model: ModelSettings = getattr(self.settings, self.travels)
        return model

    def architecture(self, client: int) -> Architecture:
        """A private model and the one that travels."""
        return {PRIVATE: self.federation.models[client], self.travels: self.travelling}

    @property
    def private_use(self) -> PrivateUse:
        """The model that travels learns from a private one, on private rows."""
        return super().private_use._replace(
            peer="a private model, which is not protected, teaches the one that travels on "
            "private rows",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether a private model never learns from the other one, which may learn from it."""
        terms = self._objectives[PRIVATE].terms.values()
        return all(self.federation.never(t.weight) for t in terms if t.needs != ("labels",))

    def composed(self) -> ComposedObjective:
        """Both models' objectives, each with the other model as its teacher."""
        return self.mutual(0.0)

    def mutual(self, progress: float) -> ComposedObjective:
        """Return the same at a moment of the run; progress in [0, 1]."""
        return each_other(self._objectives, federation=self.federation, progress=progress)

    @property
    def _objectives(self) -> dict[str, Objective]:
        mutual = {
            PRIVATE: getattr(self.settings, "objective"),  # noqa: B009
            self.travels: getattr(self.settings, f"{self.travels}_objective"),
        }
        return {
            name: objective if self.learns(name) else AS_IN_LOCAL
            for name, objective in mutual.items()
        }

    def smallest_steps(self) -> Iterator[Step]:
        """The model that travels learns in every step, too."""
        yield from super().smallest_steps()
        for client in range(self.federation.num_clients):
            yield from self.private_steps(f"strategy.{self.travels}", self.travelling, client)
