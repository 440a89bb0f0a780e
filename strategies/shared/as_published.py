"""What several faults of published code come to, as plain functions; each is wrong on purpose.

`strategy.as_published` asks for them, and docs/museum.md says what each costs. Nothing else may
use them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.exchange.factors import as_matrix
from fedkd.inputs import Shape
from fedkd.losses.rows import log_softmax
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.randomness import seeded_everything
from fedkd.schedules import ConstantSchedule
from fedkd.targets.robust import outlier_scores
from fedkd.tensors import as_tensor


def over_classes(objective: Objective, classes: int, progress: float) -> Objective:
    """Divide every term that has a teacher by the number of classes.

    ``nn.KLDivLoss()`` and ``F.kl_div`` average over batch and classes unless told otherwise.
    """
    return Objective.model_validate(
        {
            name: term
            if term.needs == ("labels",)
            else term.model_copy(
                update={"weight": ConstantSchedule(value=term.weight.at(progress) / classes)}
            )
            for name, term in objective.terms.items()
        }
    )


def kl_of_both(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Return KL(teacher || student) of logits with gradients for both; neither is a constant."""
    theirs = log_softmax(teacher)
    return (theirs.exp() * (theirs - log_softmax(student))).sum(-1)


def published_rank(singular: Float[np.ndarray, " values"], energy: float) -> int:
    """Return the rank that FedKD's published loop chooses; 0 where only all values have the energy.

    It looks at the first 0, 1, ... values but never at all of them, and begins with a rank of 0.
    """
    squares = np.square(singular)
    total = squares.sum()
    for rank in range(len(squares)):
        if total > 0 and squares[:rank].sum() / total > energy:
            return rank
    return 0


def without_full_rank(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], energy: float
) -> dict[str, np.ndarray]:
    """Return weights after training, unchanged where `published_rank` of the change is 0."""
    kept = dict(after)
    for name, now in after.items():
        change = now - before[name] if now.dtype.kind == "f" else now
        if change.ndim < 2 or change.dtype.kind != "f" or not np.isfinite(change).all():
            continue
        singular = np.linalg.svd(as_matrix(change).astype(np.float64), compute_uv=False)
        if not published_rank(singular, energy):
            kept[name] = np.array(before[name])
    return kept


def multiplied_density_ratio(
    rows: Float[Tensor, "rows features"],
    known: Float[Tensor, "known features"],
    auxiliary: Float[Tensor, "auxiliary features"],
    *,
    width: float,
    ridge: float | None = None,
) -> Float[Tensor, " rows"]:
    """Return `fedkd.targets.density_ratio` with its system's matrix where its inverse belongs."""

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        far = torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-(far**2) / (2 * width**2))

    blind, held = len(auxiliary), len(known)
    lam = blind**-0.5 if ridge is None else ridge
    matrix = kernel(auxiliary, auxiliary) / blind + lam * torch.eye(blind, dtype=torch.float64)
    right = -kernel(auxiliary, known).sum(1) / (blind * held * lam)
    weights = matrix @ right
    return kernel(rows, auxiliary) @ weights + kernel(rows, known).sum(1) / (held * lam)


def train_mode_logits(
    model: ModelSettings,
    weights: Mapping[str, np.ndarray],
    inputs: np.ndarray,
    *,
    input_shape: Shape,
    num_classes: int,
    batch_size: int,
    seed: int,
) -> Float[np.ndarray, "rows classes"]:
    """Return a model's logits in training mode: BatchNorm by the batch at hand, dropout on."""
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    module.load_state_dict({name: as_tensor(array) for name, array in weights.items()})
    module.train()
    with torch.no_grad(), seeded_everything(seed):
        # Parts of equal size, since BatchNorm cannot train on a row that is left over.
        count = max(len(inputs) // batch_size, 1)
        parts = [module(part) for part in as_tensor(inputs).tensor_split(count)]
    logits: np.ndarray = torch.cat(parts).float().numpy()
    return logits


def scores_from_ones(
    values: Float[Tensor, "clients classes"], steps: int = 20
) -> Float[Tensor, " clients"]:
    """Return clients' distances along a direction that power iteration finds from a vector of ones.

    Covariances of probabilities map that vector to 0, so that only rounding finds any direction.
    """
    single = values.float()
    centred = single - single.mean(0)
    covariance = centred.T @ centred / max(len(centred) - 1, 1)
    direction = torch.ones(len(covariance))
    for _ in range(steps):
        direction = covariance @ direction
        direction = direction / direction.norm().clamp(min=1e-8)
    return (centred @ direction).abs()


def published_filter(
    values: Float[Tensor, "clients rows classes"],
    *,
    dishonest: float,
    from_ones: bool,
    quantile_of_rest: bool,
) -> Float[Tensor, "rows classes"]:
    """Return `fedkd.targets.filtered_mean` with one or both faults of a later implementation.

    Args:
        values: probabilities of every client on the same rows.
        dishonest: share of the clients that may lie.
        from_ones: find the direction by `scores_from_ones`, and leave out whom ``topk`` does.
        quantile_of_rest: keep, in the second pass, whoever is within a quantile of those left.
    """
    clients = len(values)
    leave = min(math.floor(dishonest * clients / 2 + 1e-9), (clients - 1) // 2)
    if not leave:
        return values.mean(0)
    told = []
    for row in values.double().transpose(0, 1):
        kept = torch.arange(clients)
        for second in (False, True):
            left = row[kept]
            if from_ones:
                scores = scores_from_ones(left)
            else:
                scores = torch.from_numpy(outlier_scores(left.numpy()[None])[0])
            if second and quantile_of_rest:
                most = scores.double().quantile(1 - dishonest / 2, interpolation="higher")
                stays = (scores <= most).nonzero()[:, 0]
            elif from_ones:
                stays = scores.topk(len(kept) - leave, largest=False).indices
            else:
                stays = scores.argsort(stable=True)[: len(kept) - leave]
            kept = kept[stays].sort().values
        told.append(row[kept].mean(0))
    return torch.stack(told).to(values.dtype)


def ramp_by_lambda(progress: float, *, end: float, until: float, epochs: int = 80) -> float:
    """Return PCL's weight as a port ramps it: by the weight lambda (1), not by the epochs alpha.

    So it is at its end after one of the ramp's 80 epochs, and next to 0 in all others.

    Args:
        progress: of the run, in [0, 1].
        end: the weight after the ramp.
        until: progress at which the ramp ends.
        epochs: how many the ramp has.
    """
    if progress >= until:
        return end
    return end * math.exp(-5 * (1 - progress / until * epochs) ** 2)


def with_old_buffers(
    before: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray], *, memes: int
) -> dict[str, np.ndarray]:
    """Return mean weights whose BatchNorm statistics have a share of the old ones on top.

    What is iterated so comes to ``memes / (memes - 1)`` times the true mean.

    Args:
        before: the weights that were handed out.
        mean: of what came back.
        memes: how many came back, >= 1.
    """
    return {
        name: (array + before[name] / memes).astype(array.dtype)
        if name.endswith(("running_mean", "running_var"))
        else array
        for name, array in mean.items()
    }


def reversed_kl_rows(
    logits: Float[Tensor, "rows classes"], taught: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Return KL(student || teacher) of each row: student's logits, teacher's probabilities."""
    own = log_softmax(logits)
    theirs = taught.detach().to(own.dtype).clamp_min(torch.finfo(own.dtype).tiny).log()
    return (own.exp() * (own - theirs)).sum(-1)
