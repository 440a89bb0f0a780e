"""A generator of features: what a model's last layer might read of a row of some class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.randomness import Purpose, seeded_torch, torch_seed_for
from fedkd.training import MODEL, Arrays, ClientState, OptimizerSettings, as_tensor
from fedkd.training.pool import Slot
from fedkd.training.state import ModelState, to_arrays
from fedkd.training.steps import FixedRate, Steps

CPU = torch.device("cpu")

OUT = "3.weight"
"""The weights of a generator's last layer: a row for each feature."""

Teacher = Literal["losses", "logits", "weighted_logits"]
"""How heads teach a generator together: by the weighted sum of their losses, or by the loss of the
mean or of the weighted mean of their logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorShape:
    """The sizes of a generator.

    Attributes:
        classes: of labels.
        noise: numbers that are drawn for a row.
        hidden: width of its hidden layer.
        features: numbers that it puts out for a row.
    """

    classes: int
    noise: int
    hidden: int
    features: int

    def built(self) -> nn.Sequential:
        """Return a fresh module, drawn from torch's global stream."""
        return nn.Sequential(
            nn.Linear(self.noise + self.classes, self.hidden),
            nn.BatchNorm1d(self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, self.features),
        )

    def read(
        self, labels: Int[Tensor, " rows"], noise: Float[Tensor, "rows noise"]
    ) -> Float[Tensor, "rows inputs"]:
        """Return what the module reads: noise beside labels."""
        return torch.cat([noise, F.one_hot(labels, self.classes).to(noise.dtype)], dim=1)

    def first(self, seed: int) -> Arrays:
        """Return the state of a generator that was never trained, from the run's seed."""
        with seeded_torch(torch_seed_for(seed, Purpose.ALGORITHM)):
            tensors = self.built().state_dict()
        weights = to_arrays(tensors)
        return ClientState({MODEL: ModelState(weights)}).to_arrays()


def generator_weights(state: Mapping[str, np.ndarray]) -> Arrays:
    """Return a generator's parameters and buffers, without what its optimizer remembers."""
    return ClientState.from_arrays(state).models[MODEL].weights


def noise_for(
    rng: np.random.Generator, rows: int, width: int, *, uniform: bool
) -> Float[np.ndarray, "rows noise"]:
    """Draw Gaussian noise, or, as the fault ``uniform_noise``, evenly from [0, 1)."""
    if uniform:
        return rng.random((rows, width), np.float32)
    return rng.standard_normal((rows, width), np.float32)


def generated(
    shape: GeneratorShape,
    weights: Mapping[str, np.ndarray],
    labels: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    *,
    uniform_noise: bool = False,
) -> list[Float[np.ndarray, "rows features"]]:
    """Return features for labels, in evaluation mode.

    Args:
        shape: of the generator.
        weights: of the generator.
        labels: int64 classes, for each of several clients.
        rngs: where each client's noise is drawn.
        uniform_noise: see `noise_for`.
    """
    module = shape.built()
    module.load_state_dict({name: as_tensor(array) for name, array in weights.items()})
    module.eval()
    features = []
    for own, rng in zip(labels, rngs, strict=True):
        noise = noise_for(rng, len(own), shape.noise, uniform=uniform_noise)
        with torch.inference_mode():
            put_out = module(shape.read(torch.from_numpy(own), torch.from_numpy(noise)))
        features.append(put_out.numpy())
    return features


def label_weights(counts: Float[np.ndarray, "clients classes"]) -> np.ndarray:
    """Return each client's share of every class: float64; 0 of a class that nobody holds."""
    totals = counts.sum(0, dtype=np.float64)
    return counts / np.where(totals > 0, totals, 1.0)


def known_labels(counts: Float[np.ndarray, "clients classes"]) -> np.ndarray:
    """Return the classes of which some client holds more than one row."""
    return np.flatnonzero(counts.max(0, initial=0) > 1)


def teacher_loss(
    logits: Float[Tensor, "clients rows classes"],
    labels: Int[Tensor, " rows"],
    weights: Float[Tensor, "clients classes"],
    *,
    teacher: Teacher = "losses",
) -> Float[Tensor, ""]:
    """Return how far features are from those of their classes, by the heads of several clients.

    Args:
        logits: of each client's head.
        labels: classes that the features were generated for.
        weights: of each client for each class, from `label_weights`.
        teacher: how heads teach together.
    """
    of_rows = weights[:, labels]
    if teacher == "losses":
        clients, rows, classes = logits.shape
        each = F.cross_entropy(
            logits.reshape(-1, classes), labels.repeat(clients), reduction="none"
        )
        return (of_rows * each.reshape(clients, rows)).mean(1).sum()
    if teacher == "weighted_logits":
        return F.cross_entropy((of_rows[..., None] * logits).sum(0), labels)
    return F.cross_entropy(logits.mean(0), labels)


def diversity_loss(
    noise: Float[Tensor, "rows noise"], features: Float[Tensor, "rows features"]
) -> Float[Tensor, ""]:
    """Return ``exp(-mean over pairs of distance of noise * distance of features)``, in (0, 1].

    Features of one class that do not depend on the noise have 1. Distances are mean squares of
    noise and mean absolute differences of features; each row counts as a pair with itself.
    """
    far = torch.cdist(noise, noise, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = torch.cdist(features, features, p=1.0)
    far, apart = far / noise.shape[1], apart / features.shape[1]
    return (-(far * apart).mean()).exp()


def taught(
    shape: GeneratorShape,
    state: Mapping[str, np.ndarray],
    heads: Sequence[tuple[np.ndarray, np.ndarray | None]],
    counts: Float[np.ndarray, "clients classes"],
    *,
    optimizer: OptimizerSettings,
    steps: int,
    batch: int,
    teacher: Teacher,
    teacher_weight: float,
    diversity_weight: float,
    rng: np.random.Generator,
    uniform_noise: bool = False,
) -> Arrays:
    """Train a generator for clients' heads to recognise; return its state then.

    Args:
        shape: of the generator.
        state: of the generator, its optimizer included.
        heads: weight ``[classes, features]`` and bias of each client's last layer.
        counts: rows of each class at each client.
        optimizer: of the generator.
        steps: how many to take.
        batch: features in each of them, >= 2.
        teacher: how heads teach together.
        teacher_weight: of what they say.
        diversity_weight: of `diversity_loss`.
        rng: where labels and noise are drawn.
        uniform_noise: see `noise_for`.
    """
    slot = Slot(shape.built(), optimizer, CPU)
    slot.load(ClientState.from_arrays(state).models[MODEL])
    slot.module.train()
    known, shares = known_labels(counts), torch.from_numpy(label_weights(counts)).float()
    matrices = torch.stack([torch.from_numpy(weight.copy()) for weight, _ in heads])
    biases = torch.stack(
        [
            torch.zeros(shape.classes) if bias is None else torch.from_numpy(bias.copy())
            for _, bias in heads
        ]
    )
    training = Steps([FixedRate(slot.optimizer)], steps)
    for _ in training:
        labels = torch.from_numpy(rng.choice(known, batch))
        drawn = noise_for(rng, batch, shape.noise, uniform=uniform_noise)
        noise = torch.from_numpy(drawn)
        features = slot.module(shape.read(labels, noise))
        logits = torch.einsum("kcf,nf->knc", matrices, features) + biases[:, None]
        taught = teacher_weight * teacher_loss(logits, labels, shares, teacher=teacher)
        diverse = diversity_weight * diversity_loss(noise, features)
        training.descend({"teacher": taught, "diversity": diverse})
    slot.keep_buffers()
    return ClientState({MODEL: slot.state()}).to_arrays()
