"""A cohort: clients of one architecture that train, predict and are evaluated together.

A single client is a cohort of one. Algorithms are written against `Cohort`; `LoopCohort` in
`fedkd.training.loop` is the reference that `VmapCohort` in `fedkd.training.vmap` matches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.data import FederatedData
from fedkd.inputs import InputShape
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose, seeded_everything, torch_seed_for
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.gradients import PLAIN, Rules
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import JointObjective, ObjectiveFunction
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parts import NewParts
from fedkd.training.state import Arrays, ClientState
from fedkd.training.steps import fraction_of_rounds
from fedkd.training.tables import Table
from fedkd.training.work import Work

MODEL = "model"
"""The name of a client's model where it has only one."""

PARTS = "parts"
"""The name in a client's state of what terms train beside its models, such as projectors."""

Architecture = ModelSettings | Mapping[str, ModelSettings]
"""What each client of a cohort trains: one model, or several by name."""


def named_models(architecture: Architecture) -> dict[str, ModelSettings]:
    """Return an architecture's models by name; a single one is called `MODEL`."""
    if isinstance(architecture, ModelSettings):
        return {MODEL: architecture}
    if not architecture:
        raise ValueError("a client needs at least one model, got none")
    odd = [name for name in architecture if not name or "/" in name]
    if odd:
        raise ValueError(f"a client's model needs a name without '/', got {odd[0]!r}")
    if PARTS in architecture:
        raise ValueError(f"a client's model cannot be called {PARTS!r}")
    return dict(architecture)


WeightsForMembers = Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]
"""Parameters and buffers by name: one set for all members of a cohort, or one for each."""


def weights_of_each(weights: WeightsForMembers, members: int) -> list[Mapping[str, np.ndarray]]:
    """Return one set of weights for each member.

    Raises:
        ValueError: for another number of sets.
    """
    if isinstance(weights, Mapping):
        return [weights] * members
    if len(weights) != members:
        raise ValueError(
            f"weights must be one set for all or one for each of {members} members, got "
            f"{len(weights)} sets"
        )
    return list(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The run's arrays as tensors on the device that trains.

    Texts have a vocabulary, see `fedkd.inputs.InputShape`.
    """

    train_inputs: Float[Tensor, "rows *shape"]
    train_labels: Int[Tensor, " rows"]
    public_inputs: Float[Tensor, "public *shape"]
    public_labels: Int[Tensor, " public"] | None
    num_classes: int
    vocabulary: int | None = None

    @classmethod
    def from_arrays(cls, data: FederatedData, device: torch.device) -> "TrainingData":
        """Move what training reads to ``device``, once; on the CPU it is not copied."""
        labels = data.public_labels
        return cls(
            train_inputs=as_tensor(data.train_inputs).to(device),
            train_labels=as_tensor(data.train_labels).to(device),
            public_inputs=as_tensor(data.public_inputs).to(device),
            public_labels=None if labels is None else as_tensor(labels).to(device),
            num_classes=data.num_classes,
            vocabulary=data.vocabulary,
        )

    @property
    def input_shape(self) -> InputShape:
        """Shape of one row."""
        return InputShape(tuple(self.train_inputs.shape[1:]), self.vocabulary)


@dataclass(frozen=True, slots=True)
class Member:
    """One client in a cohort.

    Attributes:
        client: partition id; part of the seeds of everything the member draws.
        rows: int64 row ids of its private rows in ``TrainingData.train_inputs``.
        state: what the client carried out of its last call, None before its first.
    """

    client: int
    rows: np.ndarray
    state: ClientState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicLesson:
    """Public rows to learn from.

    Attributes:
        rows: int64 positions in the public set, the same for every member; or a sequence of
            them, one for each member. A member without any takes its private steps alone, and
            none in a fit on public rows alone.
        targets: of ``[rows, classes]`` for every member; of ``[members, rows, classes]``, or a
            sequence of targets, where each member has its own; or None when the objective uses
            public labels.
        passes: how to walk through the rows; ignored (except ``epochs``) beside private rows,
            over whose steps they are then spread.
        apart: whether they go through the model in a forward pass of their own, where a step has
            private rows too.

    Raises:
        TypeError: for bare numbers as targets.
    """

    rows: np.ndarray | Sequence[np.ndarray]
    targets: Targets | Sequence[Targets] | None
    passes: Passes
    apart: bool = False

    def __post_init__(self) -> None:
        given = [] if self.targets is None else self.targets
        each = [given] if isinstance(given, Targets | np.ndarray) else list(given)
        odd = [own for own in each if not isinstance(own, Targets)]
        if odd:
            raise TypeError(
                f"targets of a lesson must be Targets, got {type(odd[0]).__name__}: write "
                "Targets(values, scale='logits') or Targets(values, scale='probabilities', "
                "temperature=...)"
            )

    def own(self, position: int) -> "PublicLesson":
        """Return the lesson of one member, with rows and targets of its own."""
        if isinstance(self.rows, np.ndarray) and not self.has_own_targets:
            return self
        return replace(self, rows=self.rows_of(position), targets=self.targets_of(position))

    def rows_of(self, position: int) -> np.ndarray:
        """Return one member's positions in the public set."""
        return self.rows if isinstance(self.rows, np.ndarray) else self.rows[position]

    def targets_of(self, position: int) -> Targets | None:
        """Return what one member is to learn about its rows."""
        if self.targets is None or not self.has_own_targets:
            assert not isinstance(self.targets, Sequence)  # noqa: S101 (each would have its own)
            return self.targets
        if isinstance(self.targets, Targets):
            return self.targets.of(self.targets.tensor[position])
        return self.targets[position]

    @property
    def has_own_targets(self) -> bool:
        """Whether each member has targets of its own."""
        return isinstance(self.targets, Sequence) or (
            self.targets is not None and self.targets.values.ndim == 3
        )

    def check(self, members: int) -> None:
        """Refuse a lesson for another number of members, and targets of other rows.

        Raises:
            ValueError: naming what there is and what would fit.
        """
        counts = {}
        if not isinstance(self.rows, np.ndarray):
            counts["rows"] = len(self.rows)
        if isinstance(self.targets, Sequence):
            counts["targets"] = len(self.targets)
        elif self.targets is not None and self.has_own_targets:
            counts["targets"] = len(self.targets.values)
        for what, count in counts.items():
            if count != members:
                raise ValueError(
                    f"a public lesson's {what} must be one for all or one for each of {members} "
                    f"members, got {count}"
                )
        if self.targets is None:
            return
        for position in range(members if counts else 1):
            rows, targets = self.rows_of(position), self.targets_of(position)
            if targets is not None and len(targets.values) != len(rows):
                raise ValueError(
                    f"a public lesson needs a target for each of its {len(rows)} rows, got "
                    f"{len(targets.values)}"
                )
        if isinstance(self.targets, Sequence):
            scales = {(own.scale, own.temperature) for own in self.targets}
            if len(scales) > 1:
                raise ValueError(
                    "targets of a cohort's members must have one scale and temperature, got "
                    f"{sorted(scales)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutputs:
    """What a member's model put out for some rows.

    Attributes:
        rows: int64 ids of the rows: of private ones among all clients' training rows, of public
            ones their positions in the public set, of given inputs their numbers. Rows that a
            fit took in several steps stand there several times.
        labels: int64 classes of the rows, None where they are not known.
        logits: float32 ``[rows, classes]``.
        features: ``[rows, ...]`` of each layer that was asked for.
    """

    rows: np.ndarray
    labels: np.ndarray | None
    logits: Float[np.ndarray, "rows classes"]
    features: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Rows as a member has them, before any model.

    Attributes:
        rows: int64 ids, as in `RowOutputs`.
        inputs: float32 ``[rows, *shape]``; a copy.
        labels: int64 classes of the rows, None where they are not known.
    """

    rows: np.ndarray
    inputs: Float[np.ndarray, "rows *shape"]
    labels: np.ndarray | None


Mode = Literal["eval", "train"]
"""``eval``: as a model is used; ``train``: as it trains, by statistics of the batch and with
dropout."""

Layers = Sequence[str] | Mapping[str, Sequence[str]]
"""Layers of every model, or of some by the name of the model: module paths, ``penultimate`` (what
the last linear layer reads) or ``last_map`` (the last feature maps)."""

RowChoice = Literal["private"] | np.ndarray | Sequence[np.ndarray] | Tensor
"""Rows to put through a model: each member's private ones, int64 positions in the public set (the
same for all, or one array for each member), or inputs ``[rows, *shape]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Where a cohort's random numbers and its place in the run come from."""

    seed: int
    purpose: Purpose = Purpose.TRAIN
    round: int = 1
    rounds: int = 1

    def key(self, member: Member, fit: int) -> tuple[int, int, int]:
        """Return what tells this fit's streams from all others of the run."""
        return self.round, member.client, fit

    def progress(self, step: int, steps: int) -> float:
        """Return the fraction of the run that is done: 0 at its first step, 1 at its last.

        Every round of the run counts as one of so many steps.
        """
        return fraction_of_rounds(step, steps, round=self.round, rounds=self.rounds)


@dataclass(frozen=True, slots=True)
class Average:
    """A running average of a model's weights, updated after every step (a mean teacher).

    ``average = a * average + (1 - a) * weights`` with ``a = min(1 - 1 / (t + 1), decay)`` where t
    counts the updates before: the plain mean of all steps until the exponential one has seen
    enough. Floating-point buffers, such as BatchNorm's statistics, are averaged like weights;
    counters are copied. Before its first update it is the model as the fit found it.

    Attributes:
        decay: largest share of the past, in [0, 1).
        model: whose weights; None: the first model's.

    Source:
        Tarvainen and Valpola, 2017. https://arxiv.org/abs/1703.01780
    """

    decay: float = 0.999
    model: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay of a running average must be in [0, 1), got {self.decay}")

    def share_of_new(self, updates: int) -> float:
        """Return the weight of the newest weights after so many updates."""
        return 1 - min(1 - 1 / (updates + 1), self.decay)


class Cohort(ABC):
    """What an algorithm may ask of K clients of one architecture.

    Where clients have several models, a model is named; without a name the first one is meant.
    """

    clients: tuple[int, ...]
    work: list[Work]
    """What went through each member's models since the cohort was opened."""

    @property
    @abstractmethod
    def private_rows(self) -> list[np.ndarray]:
        """Each member's ids of its private rows, in the order of a `Table` of private rows."""

    @abstractmethod
    def fit(
        self,
        objective: ObjectiveFunction | JointObjective | ComposedObjective,
        *,
        private: Passes | Sequence[Passes] | None = None,
        public: PublicLesson | None = None,
        models: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        layers: Layers = (),
        tables: Mapping[str, Table] | None = None,
        optimizer: OptimizerSettings | None = None,
        gradient: Rules = PLAIN,
        averages: Mapping[str, Average] | None = None,
        parts: NewParts | None = None,
        heads: bool = False,
        keep_outputs: bool = False,
    ) -> list[RowOutputs]:
        """Minimise ``objective``; a step takes one batch of each kind of rows that is given.

        Private and public rows of one step go through the model in a single forward pass, in which
        BatchNorm takes them for one batch, unless the lesson says ``apart``.
        The members' models and optimizers change; mean terms are kept for `metrics`. What a
        composed objective trains beside the models stays with each member, in its state alone.

        Args:
            objective: sees the model's `Outputs`; with several ``models``, or ``frozen`` ones
                beside them, a mapping from their names to the outputs of each on the same rows. A
                composed objective says itself which models learn; without a term in force it
                leaves everything as it is.
            private: how to walk through each member's own rows: the same for all, or one for each
                member, such as passes of no epoch for those that have nothing to catch up with.
            public: public rows and what to learn about them.
            models: which models to train in one step, each by its own optimizer; None: the first.
            frozen: models that do not learn and whose outputs the objective sees too: names that
                were given to `freeze` or that a running average has. They are in evaluation mode,
                get no gradient, and none of their tensors moves.
            layers: what these layers put out is in the outputs' ``features``.
            tables: what the objective sees as ``batch.tables``, by name.
            optimizer: of this fit alone. It begins without memory and ends with the fit; what the
                clients' own optimizer remembers stays as it is. None: the clients' own.
            gradient: what becomes of the losses before an optimizer sees a gradient; a rule that
                clips the gradient of each row refuses models and losses that mix rows. One for all
                models, or a mapping with those of some; the others are plain.
            averages: running averages of weights, by name, that follow every step of this fit.
                They stay with the clients. One that is named in ``frozen`` teaches as it stood
                before the step.
            parts: modules that learn in the same steps by the clients' optimizer, one of each for
                every client: how to make them, by name. ``batch.parts.call(name, *inputs)`` runs
                one. A client's keep their weights from fit to fit and from round to round in its
                state, are called the same in every fit, and begin with the client's seed.
            heads: whether ``outputs.head(embeddings)`` is there.
            keep_outputs: whether to return what the first model put out while it trained.

        Returns:
            With ``keep_outputs`` one entry a member: what its first model put out for its private
            rows in training mode, before the step that they were part of, in the order of the
            steps. Without, an empty list.

        Raises:
            VmapUnsupportedError: if the members are stacked and ``objective`` cannot be.
            PrivacyError: under private learning, for what would tell of private rows past the
                noise, and for more steps than were paid for.
            ValueError: for names that nobody has, tables and lessons that do not fit the members,
                outputs to keep of a fit without private rows, and models whose head cannot be told
                apart.
        """

    @abstractmethod
    def outputs(
        self,
        *,
        on: RowChoice,
        mode: Mode = "eval",
        layers: Sequence[str] = (),
        model: str | None = None,
        batch_rows: int | None = None,
    ) -> list[RowOutputs]:
        """Return what each member's model puts out, without gradients; nothing is changed by it.

        In training mode BatchNorm takes its statistics from the batch and dropout drops, by a
        stream of its own for each call; running statistics stay as they are.

        Args:
            on: which rows.
            mode: evaluation or training.
            layers: what these layers put out is in ``features``.
            model: a model, one that was frozen, or a running average; None: the first model.
            batch_rows: rows that go through the model at once, in the order given; None: all of
                them in training mode. Numbers in evaluation mode do not depend on it.
        """

    @abstractmethod
    def examples(
        self, *, on: Literal["private"] | np.ndarray | Sequence[np.ndarray]
    ) -> list[Examples]:
        """Return rows themselves, for what needs no model: counts of labels, densities of inputs.

        Args:
            on: each member's private rows, or positions in the public set: the same for all, or
                one array for each member.
        """

    @abstractmethod
    def predict(
        self,
        inputs: Float[Tensor, "rows *shape"],
        *,
        model: str | None = None,
    ) -> Float[np.ndarray, "members rows classes"]:
        """Return each member's logits, in evaluation mode and without gradients."""

    @abstractmethod
    def predict_public(
        self, rows: np.ndarray, *, model: str | None = None
    ) -> Float[np.ndarray, "members rows classes"]:
        """Return each member's logits on these positions of the public set."""

    @abstractmethod
    def weights(self, *, model: str | None = None) -> list[Arrays]:
        """Return a copy of each member's parameters and buffers, or of a running average's."""

    @abstractmethod
    def load_weights(self, weights: WeightsForMembers, *, model: str | None = None) -> None:
        """Give every member these parameters and buffers: one set for all, or one for each."""

    @abstractmethod
    def freeze(self, name: str, weights: WeightsForMembers, *, like: str | None = None) -> None:
        """Bring in a model that never trains, for as long as this cohort lives.

        Args:
            name: what `fit` and `outputs` call it; a model that it had before is replaced.
            weights: its parameters and buffers: one set for all members, or one for each.
            like: the model whose architecture it has; None: the first.

        Raises:
            ValueError: if a model of the members has that name, or the weights do not fit.
        """

    @abstractmethod
    def keep(self, name: str, values: Sequence[np.ndarray | None]) -> None:
        """Keep an array with each member, under a name; it stays in the clients' states.

        Args:
            name: 1 to 300 characters; not ``average/...`` or
                ``exchange/...``, which are those of running averages and codecs.
            values: one for each member, of any shape; None forgets what it had.

        Raises:
            ValueError: for another number of arrays, and types that no state can hold.
        """

    @abstractmethod
    def kept(self, name: str) -> list[np.ndarray | None]:
        """Return what each member keeps under a name, read-only; None where it has nothing."""

    @abstractmethod
    def parts(self, name: str) -> list[Arrays | None]:
        """Return copies of each member's weights of a part; None where it was not trained yet."""

    @abstractmethod
    def layer_shape(self, layer: str, *, model: str | None = None) -> tuple[int, ...]:
        """Return the shape, without the rows, of what a layer of a model puts out.

        Raises:
            ValueError: naming a layer that the model does not have, and those that it has.
        """

    @abstractmethod
    def reset_optimizers(self, *, model: str | None = None) -> None:
        """Forget the momentum of one model, as a client without memory would; None: of all."""

    @abstractmethod
    def states(self) -> list[ClientState]:
        """Return a copy of each member's state, to be carried to its next call."""

    @abstractmethod
    def metrics(self) -> list[dict[str, float]]:
        """Return each member's mean loss terms, ``loss/<term>``, over the fits so far."""


@contextmanager
def predicting(streams: Streams, member: Member, *, own_code: bool) -> Iterator[None]:
    """Compute without gradients; whatever somebody else's model draws depends on the member alone.

    Args:
        streams: the cohort's.
        member: whose model predicts.
        own_code: whether the model is somebody else's. Ours draw nothing in evaluation mode.
    """
    with ExitStack() as stack:
        if own_code:
            key = streams.round, member.client
            seed = torch_seed_for(streams.seed, Purpose.EVALUATION, *key)
            stack.enter_context(seeded_everything(seed))
        stack.enter_context(torch.inference_mode())
        yield


def public_inputs(data: TrainingData, rows: np.ndarray) -> Float[Tensor, "rows *shape"]:
    """Return these positions of the public set; all of them in order are not copied."""
    inputs = data.public_inputs
    if len(rows) == len(inputs) and np.array_equal(rows, np.arange(len(inputs))):
        return inputs
    return inputs[as_tensor(rows).to(inputs.device)]


def check_weights(weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of another architecture.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    if weights.keys() != shapes.keys():
        odd = sorted(weights.keys() ^ shapes.keys())
        raise ValueError(f"weights do not fit the model: {', '.join(odd[:5])}")
    for name, array in weights.items():
        if shapes[name] != array.shape:
            raise ValueError(
                f"weight {name!r} has shape {array.shape}, the model has {shapes[name]}"
            )
