"""The workshop: what a method needs to build, train and name models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fedkd.compression import PruningSettings, prune_weights
from fedkd.distillation.fit.epochs import FitHistory
from fedkd.distillation.fit.fitting import Lesson, fit
from fedkd.distillation.task.first_weights import inherit_weights, load_weights
from fedkd.distillation.task.participants import StudentSettings, TrainingSettings
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.selection import Selection
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings, build_model
from fedkd.models.memory import check_memory
from fedkd.objectives import Objective
from fedkd.objectives.basic import HardLabels
from fedkd.randomness import Purpose, torch_seed_for
from fedkd.training.steps import DivergedError, diverged
from fedkd.training.trial import TrialSettings, try_model

EpochListener = Callable[[str, Mapping[str, Any]], None]
"""Is told after every epoch of every fit: the model's name, and the epoch's row."""


TRIAL_ROWS = 16
"""Transfer rows that models are tried on, at most."""

MASKS = 6
"""Last part of the key of a random choice of weights; a fit's own draws have lower ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Rows, teacher and settings of one distillation.

    Attributes:
        rows: what there is to learn from.
        teacher: trained already; None where the method needs none.
        student: the student's settings.
        training: how students are trained.
        objective: what a student minimises.
        selection: which transfer rows count.
        seed: of the run.
        listener: told after every epoch.
        compares_gradients: whether students that are taught compare their terms' gradients.
        histories: of every fit so far, by the model's name.
        notes: what is to be told about the run's models, such as what a student inherited.
        tried: keys of the architectures that were tried.
    """

    rows: Rows
    teacher: Teacher | None
    student: StudentSettings
    training: TrainingSettings
    objective: Objective
    selection: Selection
    seed: int
    listener: EpochListener
    compares_gradients: bool = False
    histories: dict[str, FitHistory] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)

    def build(self, model: ModelSettings, *key: int, trains: bool = True) -> nn.Module:
        """Return a fresh network on the rows' device; seed and key decide its weights.

        An architecture is tried when it is built for the first time.

        Args:
            model: the architecture.
            key: tells apart the run's models.
            trains: whether the network is going to be trained, and not only asked.

        Raises:
            ValueError: naming the model, if it cannot be what it is to be.
        """
        self.try_out(model, trains=trains)
        module = build_model(
            model,
            input_shape=self.rows.input_shape,
            num_classes=self.rows.num_classes,
            seed=torch_seed_for(self.seed, Purpose.MODEL, *key),
        )
        return module.to(self.rows.device)

    def try_out(self, model: ModelSettings, *, trains: bool = True) -> None:
        """Try an architecture, unless it was tried before.

        Raises:
            ValueError: naming the model, if it cannot be what it is to be.
        """
        if model.key in self.tried:
            return
        self.tried.add(model.key)
        rows, training = self.rows, self.training
        shape, classes = rows.input_shape, rows.num_classes
        check_memory(model, input_shape=shape, num_classes=classes, slots=training.optimizer.slots)
        use = TrialSettings(
            training.optimizer, fewest_rows=min(training.batch_size, 2), trains=trains
        )
        some = rows.inputs[:TRIAL_ROWS], rows.labels[:TRIAL_ROWS]
        try_model(model, some, num_classes=classes, use=use, vocabulary=rows.vocabulary)

    def new_student(self, number: int = 0) -> nn.Module:
        """Return a student before its training, as the settings ``student`` want it.

        Number 0 has the random first weights of the undistilled twin, or those of
        ``student.weights``, which further students do not load: they would all be equal.

        Raises:
            ValueError: naming the setting, if there is nothing to load, inherit or prune.
        """
        return self._first_student(number, inherits=True)

    def new_twin(self) -> nn.Module:
        """Return what the undistilled twin starts from: student 0, but nothing of the teacher."""
        return self._first_student(0, inherits=False)

    def _first_student(self, number: int, *, inherits: bool) -> nn.Module:
        settings = self.student
        model = self.build(settings.model, 0, number)
        if settings.weights is not None and number == 0:
            load_weights(model, settings.weights, setting="student.weights")
        if settings.inherit and inherits:
            teacher = None if self.teacher is None else self.teacher.first
            self.notes["inherited"] = inherit_weights(model, teacher, settings.inherit)
        if settings.prune is not None and settings.prune.when == "start":
            self.prune(model, settings.prune, key=(0, number), setting="student.prune")
        return model

    def prune(
        self, model: nn.Module, settings: PruningSettings, *, key: tuple[int, ...], setting: str
    ) -> None:
        """Prune a model in place; its masks stay in force.

        Args:
            model: trained or not.
            settings: how many weights go, and which.
            key: of the model; decides what a random choice draws.
            setting: that asks for it, for the error.

        Raises:
            ValueError: naming the setting, if there is nothing to prune.
        """
        seed = torch_seed_for(self.seed, Purpose.DISTILL, *key, MASKS)
        try:
            prune_weights(model, settings, seed=seed)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None

    def fit(
        self,
        student: nn.Module,
        *,
        name: str,
        teacher: Teacher | None,
        objective: Objective | None = None,
        training: TrainingSettings | None = None,
        rows: Rows | None = None,
        key: tuple[int, ...] = (0,),
    ) -> FitHistory:
        """Train a model in place and keep its history under ``name``.

        Args:
            student: the model.
            name: for the record.
            teacher: who teaches; None: only labels do.
            objective: what to minimise; None: the run's objective.
            training: how; None: as students are trained.
            rows: on what; None: the run's rows.
            key: tells apart the fits of a run; equal keys give equal batches.
        """
        lesson = Lesson(
            rows=rows or self.rows,
            objective=objective or self.objective,
            training=training or self.training,
            teacher=teacher,
            selection=self.selection if teacher is not None else Selection(),
            seed=self.seed,
            key=key,
            compares_gradients=self.compares_gradients,
        )
        self.histories[name] = fit(student, lesson, lambda row: self.observe(name, row))
        return self.histories[name]

    def observe(self, name: str, row: Mapping[str, Any]) -> None:
        """Tell what an epoch of a model measured; a method calls it after every epoch.

        Raises:
            DivergedError: if a loss of that epoch is NaN or infinite: what follows is no training.
        """
        self.listener(name, row)
        loss = diverged(row)
        if loss is not None:
            setting = f"{'teacher.' if name.startswith('teacher') else ''}training.optimizer.lr"
            raise DivergedError(
                f"{name} diverged: {loss} is {row[loss]} in epoch {row['epoch']}; "
                f"a smaller {setting} or training.optimizer.warm_up may help"
            )

    def taught_by(self, teacher: Teacher) -> "Workshop":
        """Return the same workshop with a teacher."""
        return replace(self, teacher=teacher)


def labels_only(objective: Objective) -> Objective:
    """Return what an undistilled twin minimises: cross-entropy with weight 1."""
    for term in objective.terms.values():
        if isinstance(term, HardLabels):
            return Objective({"ce": HardLabels(label_smoothing=term.label_smoothing)})
    return Objective({"ce": HardLabels()})
