"""A cohort: clients of one architecture that train, predict and are evaluated together.

A single client is a cohort of one. Algorithms are written against `Cohort`; `LoopCohort` in
`fedkd.training.loop` is the reference that `VmapCohort` in `fedkd.training.vmap` matches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose, seeded_everything, torch_seed_for
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import JointObjective, Objective
from fedkd.training.state import Arrays, ClientState

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
    if PARTS in architecture:
        raise ValueError(f"a client's model cannot be called {PARTS!r}")
    return dict(architecture)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The run's arrays as tensors on the device that trains."""

    train_inputs: Float[Tensor, "rows channels height width"]
    train_labels: Int[Tensor, " rows"]
    public_inputs: Float[Tensor, "public channels height width"]
    public_labels: Int[Tensor, " public"] | None
    num_classes: int

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
        )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one row."""
        channels, height, width = self.train_inputs.shape[1:]
        return channels, height, width


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
        rows: int64 positions in the public set.
        targets: of ``[rows, classes]`` for every member, of ``[members, rows, classes]`` where each
            member has its own, or None when the objective uses public labels.
        passes: how to walk through the rows; ignored (except ``epochs``) beside private rows,
            over whose steps they are then spread.
        apart: whether they go through the model in a forward pass of their own, where a step has
            private rows too.

    Raises:
        TypeError: for bare numbers as targets.
    """

    rows: np.ndarray
    targets: Targets | None
    passes: Passes
    apart: bool = False

    def __post_init__(self) -> None:
        if self.targets is not None and not isinstance(self.targets, Targets):
            raise TypeError(
                f"targets of a lesson must be Targets, got {type(self.targets).__name__}: write "
                "Targets(values, scale='logits') or Targets(values, scale='probabilities', "
                "temperature=...)"
            )


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
        """Return the fraction of the run that is done, in [0, 1]."""
        return min(1.0, (self.round - 1 + step / max(steps, 1)) / self.rounds)


class Cohort(ABC):
    """What an algorithm may ask of K clients of one architecture.

    Where clients have several models, a model is named; without a name the first one is meant.
    """

    clients: tuple[int, ...]

    @abstractmethod
    def fit(
        self,
        objective: Objective | JointObjective | ComposedObjective,
        *,
        private: Passes | None = None,
        public: PublicLesson | None = None,
        models: Sequence[str] | None = None,
    ) -> None:
        """Minimise ``objective``; a step takes one batch of each kind of rows that is given.

        Private and public rows of one step go through the model in a single forward pass, in which
        BatchNorm takes them for one batch, unless the lesson says ``apart``.
        The members' models and optimizers change; mean terms are kept for `metrics`. What a
        composed objective trains beside the models stays with each member, in its state alone.

        Args:
            objective: sees the model's `Outputs`; with several ``models``, a mapping from their
                names to the outputs of each on the same rows. A composed objective says itself
                which models learn; without a term in force it leaves everything as it is.
            private: how to walk through each member's own rows.
            public: public rows and what to learn about them.
            models: which models to train in one step, each by its own optimizer; None: the first.

        Raises:
            VmapUnsupportedError: if the members are stacked and ``objective`` cannot be.
        """

    @abstractmethod
    def predict(
        self,
        inputs: Float[Tensor, "rows channels height width"],
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
        """Return a copy of each member's parameters and buffers."""

    @abstractmethod
    def load_weights(self, weights: Mapping[str, np.ndarray], *, model: str | None = None) -> None:
        """Give every member these parameters and buffers."""

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


def public_inputs(
    data: TrainingData, rows: np.ndarray
) -> Float[Tensor, "rows channels height width"]:
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
