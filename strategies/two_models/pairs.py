"""Two models of a client that learn from each other on the same private rows."""

from collections.abc import Mapping

from fedkd.objectives import Objective
from fedkd.training import ComposedObjective, Learner
from strategies.contract import Federation

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


def learns_alone(objective: Objective, federation: Federation) -> bool:
    """Tell whether a model never learns from the other one."""
    return all(
        federation.never(t.weight) for t in objective.terms.values() if t.needs != ("labels",)
    )
