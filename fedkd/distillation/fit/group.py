"""Training several models in one loop, so that they learn from each other at every step.

A method says by a `Group` what its models learn from each other; the loop is the same for all.
Targets are constants, so one backward pass gives every model the gradient of its own losses only.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from fedkd.data.augmentation import Mix
from fedkd.distillation.fit.epochs import EpochRow, FitRecord, epoch_means
from fedkd.distillation.fit.feeding import (
    RowViews,
    own_batches,
    transfer_batches,
    validated,
)
from fedkd.distillation.fit.method import MethodSettings
from fedkd.distillation.fit.workshop import Workshop, labels_only
from fedkd.models.dropout import connect_dropout, step_keys
from fedkd.objectives import Parts, View
from fedkd.randomness import Purpose, seeded_everything, torch_seed_for
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule
from fedkd.training.steps import RatedOptimizer, Steps


class GroupSettings(MethodSettings):
    """What all methods share in which models learn from each other.

    Labels are learned as the objective's ``ce`` says, with the method's own weight; the other
    terms of the objective need a teacher that was trained before and have no part here.
    """

    ce_weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=1.0), description="weight of the labels, a number or a schedule"
    )
    kd_weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=1.0),
        description="weight of what the models tell each other; while it is 0 each trains alone",
    )


class SoftenedSettings(GroupSettings):
    """The same where the models compare softened predictions."""

    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=1.0), description="softens what the models tell each other"
    )


class InForce(NamedTuple):
    """Values of the schedules at one point of the training."""

    ce_weight: float
    kd_weight: float


class OwnRows(NamedTuple):
    """What one model said in a step about rows whose labels it may see.

    Attributes:
        logits: gradients flow through these.
        labels: classes of those rows.
        mix: how the rows were mixed with each other; None where they were not.
    """

    logits: Float[Tensor, "own classes"]
    labels: Int[Tensor, " own"]
    mix: Mix | None


NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class GroupOutputs(NamedTuple):
    """What a group puts out for one batch of every model.

    Attributes:
        logits: of each model for its own batch.
        beside: anything else, by name, rows first; all models then had batches of one length.
    """

    logits: tuple[Tensor, ...]
    beside: Mapping[str, Tensor] = NOTHING


class Exchange(NamedTuple):
    """What all models said in a step about the same transfer rows.

    Attributes:
        logits: gradients flow through these.
        beside: what else the group put out about these rows, by name, rows first.
        inputs: what each model saw.
        ids: of the rows.
        extra_logits: of each model, for the rows that the group made besides.
    """

    logits: Float[Tensor, "models rows classes"]
    beside: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    ids: Int[Tensor, " rows"]
    extra_logits: tuple[Tensor, ...]


class GroupStep(NamedTuple):
    """One step of a group.

    Attributes:
        values: the schedules' values in force.
        progress: how much of the training is done, in [0, 1].
        own: of every model, in their order.
        own_beside: what else the group put out about the labelled rows.
        exchange: None in a step in which every model trains alone.
    """

    values: InForce
    progress: float
    own: tuple[OwnRows, ...]
    own_beside: Mapping[str, Tensor] = NOTHING
    exchange: Exchange | None = None


SettingsT = TypeVar("SettingsT", bound=GroupSettings)


class Group(Generic[SettingsT]):
    """Models that learn in one loop; a method's subclass says what they tell each other.

    Attributes:
        workshop: rows, training settings and seed.
        settings: of the method.
        models: what every step runs and trains, an optimizer for each.
        names: under which the models are recorded; the first is the student.
        judged: what is validated, stopped early and kept in each model's place. The models
            themselves, unless a method keeps something else, such as their running means.
        parts: modules trained beside the models, with an optimizer of their own; no model has
            them inside.
        own_rows: ids of the rows whose labels each model may see; None: the run's labelled rows.
        noted: numbers of the step that `losses` has just seen, to be averaged over an epoch.
    """

    own_views: ClassVar[bool] = False
    """Whether every model gets its own augmentation of a row."""
    mixes: ClassVar[bool] = True
    """Whether rows may be mixed with each other (mixup)."""

    def __init__(
        self,
        workshop: Workshop,
        settings: SettingsT,
        models: Sequence[nn.Module],
        names: Sequence[str],
    ) -> None:
        self.workshop, self.settings = workshop, settings
        self.models, self.names = list(models), list(names)
        self.judged = self.models
        self.parts = nn.ModuleDict()
        self.own_rows: list[Tensor] | None = None
        self.noted: dict[str, Tensor] = {}
        self._labels = labels_only(workshop.objective).terms["ce"]
        self._no_parts = Parts.of(nn.ModuleDict())

    def kd_weight(self, progress: float) -> float:
        """Return the weight of what the models tell each other."""
        return self.settings.kd_weight.at(progress)

    def exchanges(self, progress: float) -> bool:
        """Tell whether the models say anything about the transfer rows at this progress.

        Where they do not, only labelled rows go through them, and each trains bit for bit as it
        would alone.
        """
        return len(self.models) > 1 and self.kd_weight(progress) > 0

    def run(self, inputs: Sequence[Tensor]) -> GroupOutputs:
        """Run every model once, each on its own batch."""
        return GroupOutputs(tuple(model(x) for model, x in zip(self.models, inputs, strict=True)))

    def tapping(self) -> AbstractContextManager[Any]:
        """Return a context in which `run` finds what it needs, such as hooks on inner layers."""
        return nullcontext()

    def extra_inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make further rows for each model from what it sees of the transfer rows."""
        return ()

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        """Return what is minimised besides each model's labels, weighted, by name.

        A vector has a number for each model; a scalar is for all of them together.
        """
        raise NotImplementedError

    def label_loss(self, own: OwnRows) -> Float[Tensor, ""]:
        """Return the cross-entropy of the objective, its smoothing and the rows' mixing included.

        Args:
            own: logits of any model, for rows whose labels are known.
        """
        view = View(labelled_logits=own.logits, labels=own.labels, mix=own.mix)
        return view.step_rows.mean("ce", self._labels.value(view, self._no_parts, ()))

    def before_epoch(self) -> None:
        """Prepare the next epoch; models are in the mode that validation left them in."""

    def after_step(self, steps: int) -> None:
        """Follow the models after ``steps`` steps, before they are validated."""


def fit_group(group: Group[Any], *, key: tuple[int, ...] = (0,)) -> None:
    """Train all models of a group, step by step, and keep their histories.

    Every step takes one batch of transfer rows for what the models tell each other and a batch of
    labelled rows for each, in one forward pass a model; one backward pass; one step of each
    model's optimizer. Batches are those of `fedkd.distillation.fit.fitting.fit` with the same key:
    the first model, alone, has the bits of a fit on labels.

    With early stopping every model keeps its own best weights, from before its own patience ran
    out; training ends when all have stopped.

    Args:
        group: its models are left in evaluation mode.
        key: tells apart the fits of a run; equal keys give equal batches.

    Raises:
        ValueError: for settings that such a method cannot follow, before anything trains.
    """
    _GroupFit(group, key).run()


def check_group(group: Group[Any]) -> None:
    """Refuse settings that models without a trained teacher cannot follow.

    Raises:
        ValueError: naming the setting, its value and what works.
    """
    workshop, name = group.workshop, group.settings.name
    augmentation = workshop.training.augmentation
    if not workshop.rows.labelled:
        raise ValueError(
            f"method {name!r} has no trained teacher and needs labelled rows, but "
            "data.private_rows is 0"
        )
    if workshop.selection.is_on:
        raise ValueError(
            f"targets choose rows by what a trained teacher says, and method {name!r} has none: "
            "remove targets, or use method=offline"
        )
    if augmentation.teacher_view != "same":
        raise ValueError(
            "training.augmentation.teacher_view must be same where no trained teacher looks "
            f"(method {name!r}), got {augmentation.teacher_view!r}"
        )
    if augmentation.mixup and not group.mixes:
        raise ValueError(
            f"training.augmentation.mixup must be 0 with method {name!r}, whose models must speak "
            f"of the same rows, got {augmentation.mixup}"
        )


class _GroupFit:
    def __init__(self, group: Group[Any], key: tuple[int, ...]) -> None:
        check_group(group)
        self._group, self._key = group, key
        self._workshop = workshop = group.workshop
        self._rows, self._training = workshop.rows, workshop.training
        self._records = []
        for name in group.names:
            record = FitRecord(workshop.training, partial(workshop.observe, name))
            self._records.append(record)
            workshop.histories[name] = record.history
        # The first model's streams are those of a fit with this key.
        keys = [key] + [(*key, 5, number) for number in range(1, len(group.models))]
        self._views = [
            RowViews(workshop.rows, workshop.training, seed=workshop.seed, key=own)
            for own in (keys if group.own_views else keys[:1])
        ]
        self._transfer = transfer_batches(
            workshop.rows, workshop.training, seed=workshop.seed, key=key
        )
        if group.own_rows is None:
            shared = torch.arange(workshop.rows.labelled, device=workshop.rows.device)
            self._own = [self._batches_of(shared, key)] * len(group.models)
        else:
            self._own = [
                self._batches_of(ids, own) for ids, own in zip(group.own_rows, keys, strict=True)
            ]

    def _batches_of(self, ids: Int[Tensor, " _"], key: tuple[int, ...]) -> list[Tensor]:
        """Return a model's labelled rows, step by step; those of the transfer rows if all are."""
        if len(ids) == len(self._rows.inputs):
            return self._transfer
        positions = own_batches(
            self._rows,
            len(ids),
            self._training,
            steps=len(self._transfer),
            seed=self._workshop.seed,
            key=key,
        )
        return [ids[batch] for batch in positions]

    def run(self) -> None:
        group, training = self._group, self._training
        count = len(self._transfer)
        if not count:
            self._finish()
            return
        trained = [model.parameters() for model in group.models]
        if len(group.parts):
            trained.append(group.parts.parameters())
        seed = torch_seed_for(self._workshop.seed, Purpose.DISTILL, *self._key, 2)
        steps = Steps(
            [
                RatedOptimizer(training.optimizer.build(parameters), training.optimizer, count)
                for parameters in trained
            ],
            count,
            epochs=training.epochs,
            dropout=[connect_dropout(model) for model in group.models],
            keys=torch.from_numpy(step_keys(seed, count)),
        )
        with seeded_everything(seed), group.tapping():
            begins = True
            for step in steps:
                if begins:
                    group.before_epoch()
                    for module in (*group.models, group.parts):
                        module.train()
                steps.descend(self._losses(step.number, step.progress))
                group.after_step(step.number + 1)
                for name, value in group.noted.items():
                    steps.records.add(f"targets/{name}", value)
                begins = step.epoch is not None
                if step.epoch is not None:
                    self._judge(step.epoch, steps.records.take(), step.progress)
                    if all(record.stopped for record in self._records):
                        break
        self._finish()

    def _losses(self, step: int, progress: float) -> dict[str, Tensor]:
        group, settings = self._group, self._group.settings
        values = InForce(settings.ce_weight.at(progress), group.kd_weight(progress))
        seen = self._step(step, progress, values)
        ce = torch.stack([group.label_loss(own) for own in seen.own])
        group.noted = {}
        return {"ce": values.ce_weight * ce, **group.losses(seen)}

    def _step(self, step: int, progress: float, values: InForce) -> GroupStep:
        """Run every model once, on its transfer, own and extra rows in one batch."""
        group, labels = self._group, self._rows.labels
        transfer, own = self._transfer[step], [batches[step] for batches in self._own]
        drawn: dict[tuple[int, int], tuple[Tensor, Mix | None]] = {}
        if not group.exchanges(progress):
            seen = self._seen(own, drawn)
            outputs = group.run([inputs for inputs, _ in seen])
            alone = (
                OwnRows(logits, labels[ids], mix)
                for logits, ids, (_, mix) in zip(outputs.logits, own, seen, strict=True)
            )
            return GroupStep(values, progress, tuple(alone), outputs.beside)
        inputs = tuple(view for view, _ in self._seen([transfer] * len(own), drawn))
        seen = self._seen(own, drawn)
        extra = group.extra_inputs(inputs)
        rows, batches = len(transfer), []
        for number, ids in enumerate(own):
            pieces = [inputs[number]]
            if ids is not transfer:
                pieces.append(seen[number][0])
            batches.append(torch.cat([*pieces, *extra[number : number + 1]]))
        outputs = group.run(batches)
        owned, ends = [], []
        for logits, ids, (_, mix) in zip(outputs.logits, own, seen, strict=True):
            start = 0 if ids is transfer else rows
            ends.append(start + len(ids))
            owned.append(OwnRows(logits[start : ends[-1]], labels[ids], mix))
        start = 0 if own[0] is transfer else rows
        exchange = Exchange(
            logits=torch.stack([logits[:rows] for logits in outputs.logits]),
            beside={name: tensor[:rows] for name, tensor in outputs.beside.items()},
            inputs=inputs,
            ids=transfer,
            extra_logits=tuple(
                logits[end:] for logits, end in zip(outputs.logits, ends, strict=True) if extra
            ),
        )
        own_beside = {name: tensor[start : ends[0]] for name, tensor in outputs.beside.items()}
        return GroupStep(values, progress, tuple(owned), own_beside, exchange)

    def _seen(
        self, ids: Sequence[Tensor], drawn: dict[tuple[int, int], tuple[Tensor, Mix | None]]
    ) -> list[tuple[Tensor, Mix | None]]:
        """Return what each model sees of its rows; what was drawn in this step is not drawn again.

        Args:
            ids: each model's rows.
            drawn: the step's views by stream and batch; new ones are put there.
        """
        seen = []
        for number, rows in enumerate(ids):
            stream = number if self._group.own_views else 0
            if (stream, id(rows)) not in drawn:
                drawn[stream, id(rows)] = self._views[stream].own(rows)
            seen.append(drawn[stream, id(rows)])
        return seen

    def _judge(self, epoch: int, recorded: Mapping[str, Tensor], progress: float) -> None:
        """Validate every model, write down its epoch, and keep what is best so far."""
        group, training = self._group, self._training
        for number, (model, record) in enumerate(zip(group.judged, self._records, strict=True)):
            row: EpochRow = {"epoch": epoch, **epoch_means(recorded, model=number)}
            row |= validated(model, self._rows)
            row["learning_rate"] = training.optimizer.learning_rate(progress)
            row["weight/ce"] = group.settings.ce_weight.at(progress)
            row["weight/kd"] = group.kd_weight(progress)
            if isinstance(group.settings, SoftenedSettings):
                row["temperature/kd"] = group.settings.temperature.at(progress)
            record.close_epoch(row, model)

    def _finish(self) -> None:
        """Leave every model with the weights that count, in evaluation mode."""
        group = self._group
        for model, record in zip(group.judged, self._records, strict=True):
            record.restore_best(model)
        for module in (*group.models, *group.judged, group.parts):
            module.eval()


def parts_seed(workshop: Workshop) -> int:
    """Return the seed of the first weights of what is trained beside the models."""
    return torch_seed_for(workshop.seed, Purpose.DISTILL, 0, 1)
