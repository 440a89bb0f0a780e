"""Objectives made of terms, for the models of one client: who learns what, and from whom."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from fedkd.objectives import Objective, View
from fedkd.targets import Targets, confidence_mask
from fedkd.training.objectives import Batch, Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """How one model of a client learns.

    Attributes:
        objective: the terms that it minimises.
        teacher: another model, which teaches on the client's private rows: one that learns in the
            same step, or one that never trains. None: the targets of the public rows teach, on
            those rows.
        setting: the setting that holds the objective, for messages.
    """

    objective: Objective
    teacher: str | None = None
    setting: str = "objective"


@dataclass(frozen=True, kw_only=True)
class ComposedObjective:
    """What a client minimises, as a named sum of terms for each of its models.

    A teacher's logits and features are constants for the model that learns from them, so the
    losses of several models can be minimised together: none sends a gradient into another.

    Attributes:
        learners: by the name of the model. The first one's terms keep their names in the
            metrics; those of another are called ``<model>/<term>``.
        progress: where schedules are read, in [0, 1].
        confidence_threshold: public rows whose largest target probability is below it do not
            count.
        temperature: at which these probabilities are taken; > 0.

    Raises:
        ValueError: if there is no learner.
    """

    learners: Mapping[str, Learner]
    progress: float = 0.0
    confidence_threshold: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.learners:
            raise ValueError("a composed objective needs at least one learner, got none")

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The models that a step needs: those that learn, then teachers that never train."""
        teachers = [own.teacher for own in self.learners.values() if own.teacher is not None]
        return tuple(dict.fromkeys([*self.learners, *teachers]))

    @cached_property
    def key(self) -> str:
        """Text that is equal where terms and teachers are."""
        return "; ".join(
            f"{name} from {learner.teacher}: {learner.objective.key}"
            for name, learner in self.learners.items()
        )

    @property
    def idle(self) -> bool:
        """Whether no term has a weight at this progress."""
        return all(
            term.weight.at(self.progress) == 0
            for learner in self.learners.values()
            for term in learner.objective.terms.values()
        )

    def loss_name(self, learner: str, term: str) -> str:
        """Return what a term is called in the metrics."""
        return term if learner == next(iter(self.learners)) else f"{learner}/{term}"

    def view(self, name: str, outputs: Mapping[str, Outputs], batch: Batch) -> View:
        """Return what the terms of one learner see of a step.

        Args:
            name: of the model that learns.
            outputs: of every model, by name.
            batch: the step's rows.
        """
        teacher = self.learners[name].teacher
        own = outputs[name]
        if teacher is None:
            return View(
                labelled_logits=own.private,
                labels=batch.labels,
                logits=own.public,
                targets=batch.targets,
                transfer_labels=batch.public_labels,
                weights=self._public_weights(batch),
                rows=batch.public_rows,
                progress=self.progress,
            )
        other = outputs[teacher]
        if own.private is None or other.private is None:
            raise ValueError(f"{name!r} learns from {teacher!r} on private rows, got none")
        rows = len(own.private)
        return View(
            labelled_logits=own.private,
            labels=batch.labels,
            logits=own.private,
            targets=Targets.from_model(other.private.detach()),
            transfer_labels=batch.labels,
            transfer_of="private",
            features={layer: tensor[:rows] for layer, tensor in own.features.items()},
            teacher_features={
                layer: tensor[:rows].detach() for layer, tensor in other.features.items()
            },
            rows=batch.private_rows,
            progress=self.progress,
        )

    def _public_weights(self, batch: Batch) -> Float[Tensor, " public"] | None:
        """Return 1 for each public row whose target is sure enough, else 0; None: all count."""
        if batch.targets is None or not self.confidence_threshold:
            return None
        probabilities = batch.targets.probabilities(self.temperature)
        return confidence_mask(probabilities, self.confidence_threshold)
