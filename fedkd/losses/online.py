"""Online distillation: peers that train together and learn from what they know as a group.

Pairwise mutual learning is in `fedkd.losses.mutual`; here a group first makes one target out of
its predictions (a gate, the best member, attention, the past) and every peer learns from that.

Conventions: peers (or branches) are the first axis; targets are constants; the terms of a loss come
back by name, weighted already, summed over the peers as published, and what is minimised is their
sum. A mean over rows is that of `fedkd.losses.response.row_mean`. A weight that ramps up is a
schedule of progress: pass its value in force.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.losses.mutual import peer_cross_entropies, peer_means
from fedkd.losses.response import hard_label_loss, soft_target_kl
from fedkd.targets import (
    at_least_float32,
    check_temperature,
    mean_by_row,
    mean_probability,
    soften,
)

Terms = dict[str, Float[Tensor, ""]]

# --- ONE: branches of one network and the gate that combines them ---------------------------


class BranchGate(nn.Module):
    """How much each branch counts for each row: pool, linear, BatchNorm, ReLU, softmax.

    Source:
        Lan, Zhu, Gong, 2018, Knowledge Distillation by On-the-Fly Native Ensemble (ONE),
        section 3.1. https://arxiv.org/abs/1806.04606
    """

    def __init__(self, width: int, branches: int) -> None:
        """Make a gate.

        Args:
            width: channels of the shared features that it looks at, >= 1.
            branches: number of branches that it chooses among, >= 1.

        Raises:
            ValueError: if a number is below 1.
        """
        super().__init__()
        _check_counts(width=width, branches=branches)
        self.linear = nn.Linear(width, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(
        self, features: Float[Tensor, "batch width *space"]
    ) -> Float[Tensor, "batch branches"]:
        """Return shares >= 0 that sum to 1 over the branches.

        Args:
            features: the last features that all branches share; maps are averaged over space.

        Raises:
            ValueError: for one row in training mode, of which BatchNorm knows no variance.
        """
        if self.training and len(features) < 2:
            raise ValueError(
                f"a gate in training needs at least 2 rows for its BatchNorm, got {len(features)}; "
                "drop the last batch or call eval()"
            )
        pooled = features.flatten(2).mean(dim=2) if features.dim() > 2 else features
        scores = F.relu(self.norm(self.linear(pooled)))
        return torch.softmax(at_least_float32(scores), dim=1)


def gated_logits(
    logits: Float[Tensor, "branches batch classes"], gates: Float[Tensor, "batch branches"]
) -> Float[Tensor, "batch classes"]:
    """Combine the branches' logits row by row, ``sum_k gate_k * logits_k``.

    Args:
        logits: unnormalised scores of all branches; gradients flow through these.
        gates: a share of each branch for each row, such as a `BranchGate` returns; gradients flow
            through these too, which is how the gate learns.

    Source:
        Lan, Zhu, Gong, 2018, equation 5. https://arxiv.org/abs/1806.04606
    """
    return (at_least_float32(gates).t()[:, :, None] * at_least_float32(logits)).sum(dim=0)


def one_losses(
    logits: Float[Tensor, "branches batch classes"],
    gates: Float[Tensor, "batch branches"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 3.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Native ensemble: branches and their gated ensemble learn labels, branches the ensemble.

    The ensemble is a constant in the KL; labels alone teach it and the gate.

    Args:
        logits: unnormalised scores of all branches.
        gates: shares of the branches for each row, rows summing to 1.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of both cross-entropies, >= 0.
        kd_weight: weight of the KL, >= 0. The paper ramps it up over the first 80 of 300 epochs:
            a schedule ``{kind: ramp_up, end: 1.0, until: 0.27}``.
        temperature: softening divisor, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        ``ce`` and ``kd``, summed over the branches, and ``ce_ensemble``.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Lan, Zhu, Gong, 2018, equations 2-8. https://arxiv.org/abs/1806.04606
        The released code adds 1e-7 to the probabilities; here the KL is exact.
    """
    _check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    ensemble = gated_logits(logits, gates)
    divergences = _divergences(
        logits,
        soften(ensemble.detach(), temperature=temperature),
        temperature,
        scale_by_t2,
        sample_weights,
    )
    terms = {"kd": kd_weight * divergences.sum()}
    if labels is None:
        return terms
    return {
        "ce": ce_weight * peer_cross_entropies(logits, labels, sample_weights).sum(),
        "ce_ensemble": ce_weight * hard_label_loss(ensemble, labels, sample_weights=sample_weights),
        **terms,
    }


# --- KDCL: four ways to make one teacher out of the peers -----------------------------------


def kdcl_naive(
    logits: Float[Tensor, "peers batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch classes"]:
    """For every row take the logits of the peer with the lowest cross-entropy.

    Args:
        logits: unnormalised scores of all peers on the same rows; treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Target logits. Among equals the first peer is taken.

    Source:
        Guo et al., 2020, Online Knowledge Distillation via Collaborative Learning (KDCL), section
        3.2. https://openaccess.thecvf.com/content_CVPR_2020/html/
        Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html
    """
    constants = at_least_float32(logits.detach())
    best = torch.logsumexp(_margins(constants, labels), dim=2).argmin(dim=0)
    return constants.gather(0, best[None, :, None].expand(1, -1, logits.shape[2])).squeeze(0)


def kdcl_minlogit(
    logits: Float[Tensor, "peers batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch classes"]:
    """For every row and class take the smallest margin over the label's logit among the peers.

    The label's own logit becomes 0. The cross-entropy of this target is never above that of any
    peer.

    Args:
        logits: unnormalised scores of all peers on the same rows; treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Target logits.

    Source:
        Guo et al., 2020, KDCL-MinLogit, section 3.2; see `kdcl_naive`.
    """
    return _margins(at_least_float32(logits.detach()), labels).amin(dim=0)


def kdcl_linear(
    logits: Float[Tensor, "peers batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch classes"]:
    """For every row mix the peers' logits so that the mixture's cross-entropy is lowest.

    Args:
        logits: unnormalised scores of all peers on the same rows; treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Target logits, `mean_by_row` with the shares of `kdcl_linear_shares`. Their cross-entropy
        is at most that of `kdcl_naive`, within the tolerance stated there.

    Source:
        Guo et al., 2020, KDCL-Linear, section 3.2; see `kdcl_naive`.
    """
    return mean_by_row(logits.detach(), kdcl_linear_shares(logits, labels))


_NEWTON_STEPS = 48
_LAST_BARRIER = 1e-8
_STEP_SIZES = [2.0**-k for k in range(12)]


def kdcl_linear_shares(
    logits: Float[Tensor, "peers batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "peers batch"]:
    """Find the mixture of the peers' logits that has the lowest cross-entropy, row by row.

    The problem is convex, its solution in general neither a peer nor unique. Solved by a
    primal-dual interior point method in float64, a fixed number of steps for any data.

    Args:
        logits: unnormalised scores of all peers on the same rows; treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Shares > 0, float64, that sum to 1 over the peers. The cross-entropy of the mixture is
        within 1e-6 nats of the lowest there is, for logits up to +-300.
    """
    margins = _margins(logits.detach().double(), labels).transpose(0, 1)
    num_rows, num_peers, _ = margins.shape
    shares = margins.new_full((num_rows, num_peers), 1.0 / num_peers)
    bounds = torch.ones_like(shares)  # the multipliers of shares >= 0
    step_sizes = margins.new_tensor(_STEP_SIZES)
    spread = margins.abs().amax(dim=(1, 2)).clamp_min(1.0)[:, None]
    for step in range(_NEWTON_STEPS):
        # From as steep as the problem itself down to nothing, the last steps at one height.
        done = min(1.0, step / (_NEWTON_STEPS - 6))
        barrier = spread ** (1 - done) * _LAST_BARRIER**done
        mixture = torch.einsum("bk,bkc->bc", shares, margins)
        probabilities = torch.softmax(mixture, dim=1)
        slope = torch.einsum("bkc,bc->bk", margins, probabilities)
        # Centred first: a difference of large squares would not stay positive.
        centred = (margins - slope[:, :, None]) * probabilities.sqrt()[:, None, :]
        curvature = centred @ centred.transpose(1, 2)
        pull = bounds / shares
        system = curvature + torch.diag_embed(pull)
        right = torch.stack([barrier / shares - slope, torch.ones_like(shares)], dim=2)
        free, tilt = torch.linalg.solve(system, right).unbind(dim=2)
        # The multiplier of "shares sum to 1" keeps their sum where it is.
        move = free - tilt * (free.sum(1, keepdim=True) / tilt.sum(1, keepdim=True))
        bounds_move = barrier / shares - bounds - pull * move
        # Every row looks along its direction at several step sizes and takes the best: a search
        # that stops early would branch on data.
        steps = _longest_step(shares, move) * step_sizes
        candidates = shares[:, None, :] + steps[:, :, None] * move[:, None, :]
        mixtures = torch.einsum("bsk,bkc->bsc", candidates, margins)
        heights = torch.logsumexp(mixtures, dim=2)
        merits = heights - barrier * candidates.log().sum(dim=2)
        best = merits.argmin(dim=1, keepdim=True)
        shares = shares + steps.gather(1, best) * move
        shares = shares / shares.sum(dim=1, keepdim=True)
        bounds = bounds + _longest_step(bounds, bounds_move) * bounds_move
    return shares.transpose(0, 1)


def _longest_step(
    values: Float[Tensor, "rows peers"], move: Float[Tensor, "rows peers"]
) -> Float[Tensor, "rows 1"]:
    """Return the step in (0, 1] along ``move`` that leaves every positive value 1 % of itself."""
    limits = torch.where(move < 0, -0.99 * values / move, torch.ones_like(values))
    longest: Tensor = limits.amin(dim=1, keepdim=True).clamp(max=1.0)
    return longest


def kdcl_general_weights(
    logits: Float[Tensor, "peers rows classes"], labels: Int[Tensor, "rows"], *, ridge: float = 0.1
) -> Float[Tensor, "peers"]:
    """Weigh the peers so that their average errs least, given how their errors go together.

    With C the peers' error correlation on held-out rows, ``C_kl = mean (p_k - y) . (p_l - y)``,
    the weights are ``C^-1 1 / (1' C^-1 1)``. Peers that err alike make C nearly singular and the
    weights huge, with either sign; so C gets a ridge, and what is negative still becomes 0.

    Args:
        logits: unnormalised scores of all peers on rows that they were not trained on; treated as
            constants.
        labels: class of each row, in [0, classes).
        ridge: > 0, added to the diagonal of C as a fraction of its mean; large values tend to
            uniform weights.

    Returns:
        Weights >= 0 that sum to 1, float64; uniform where no peer errs.

    Raises:
        ValueError: if there is no row or ``ridge`` is not positive.

    Source:
        Guo et al., 2020, KDCL-General, section 3.2; see `kdcl_naive`. The ridge and the clipping
        are ours.
    """
    num_peers, num_rows, num_classes = logits.shape
    if num_rows == 0:
        raise ValueError("error correlation needs at least 1 held-out row, got 0")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    truth = F.one_hot(labels.long(), num_classes)
    errors = (torch.softmax(logits.detach().double(), dim=2) - truth).flatten(1)
    correlation = errors @ errors.t() / num_rows
    scale = correlation.trace() / num_peers
    # Peers that never err leave only the ridge, whose inverse weighs all alike.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ones = errors.new_ones(num_peers, 1)
    identity = torch.eye(num_peers, dtype=errors.dtype, device=errors.device)
    solution = torch.linalg.solve(correlation + ridge * scale * identity, ones).squeeze(1)
    # Their sum is positive, so at least one of them is.
    weights: Tensor = solution.clamp_min(0.0)
    return weights / weights.sum()


def kdcl_general(
    logits: Float[Tensor, "peers batch classes"], weights: Float[Tensor, "peers"]
) -> Float[Tensor, "batch classes"]:
    """Average the peers' logits with one weight per peer.

    Args:
        logits: unnormalised scores of all peers on the same rows; treated as constants.
        weights: >= 0, such as `kdcl_general_weights`, renewed from time to time.

    Returns:
        Target logits.

    Source:
        Guo et al., 2020, KDCL-General, section 3.2; see `kdcl_naive`.
    """
    return mean_by_row(logits.detach(), weights[:, None].expand(-1, logits.shape[1]))


def kdcl_losses(
    logits: Float[Tensor, "peers batch classes"],
    target_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 2.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Collaborative learning: every peer fits the labels and the group's common target.

    In the paper every peer sees its own augmentation of a row; whoever makes the logits decides.

    Args:
        logits: unnormalised scores of all peers.
        target_logits: what `kdcl_naive`, `kdcl_linear`, `kdcl_minlogit` or `kdcl_general` made of
            them; treated as constants.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of the labels, >= 0.
        kd_weight: weight of the common target, >= 0; the paper's lambda.
        temperature: softening divisor, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for both terms.

    Returns:
        ``ce`` and ``kd``, summed over the peers.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Guo et al., 2020, equation 5; see `kdcl_naive`.
    """
    _check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    target = soften(target_logits.detach(), temperature=temperature)
    divergences = _divergences(logits, target, temperature, scale_by_t2, sample_weights)
    terms = {"kd": kd_weight * divergences.sum()}
    if labels is None:
        return terms
    return {"ce": ce_weight * peer_cross_entropies(logits, labels, sample_weights).sum(), **terms}


# --- OKDDip: each peer chooses whom it learns from, a leader learns from all ----------------


class PeerAttention(nn.Module):
    """How much each peer learns from each other one, row by row: a softmax of queries times keys.

    The features are constants here: attention learns to choose, the peers do not learn to please.

    Source:
        Chen et al., 2020, Online Knowledge Distillation with Diverse Peers (OKDDip), equation 3.
        https://arxiv.org/abs/1912.00350. Two linear maps to an eighth of the width, as published.
    """

    def __init__(self, width: int, *, reduction: int = 8) -> None:
        """Make the attention of peers that have features of one width.

        Args:
            width: numbers in a peer's features, >= 1.
            reduction: queries and keys have ``width // reduction`` numbers, at least one; >= 1.

        Raises:
            ValueError: if a number is below 1.
        """
        super().__init__()
        _check_counts(width=width, reduction=reduction)
        self.query = nn.Linear(width, max(1, width // reduction), bias=False)
        self.key = nn.Linear(width, max(1, width // reduction), bias=False)

    def forward(
        self, features: Float[Tensor, "peers batch width"]
    ) -> Float[Tensor, "batch peers peers"]:
        """Return for each row what peer a (row of the matrix) takes from peer b, itself included.

        Args:
            features: one vector per peer and row, treated as constants.

        Returns:
            Shares > 0 that sum to 1 over the last axis.
        """
        by_row = features.detach().transpose(0, 1)
        scores = self.query(by_row) @ self.key(by_row).transpose(1, 2)
        return torch.softmax(at_least_float32(scores), dim=2)


def okddip_losses(
    peer_logits: Float[Tensor, "peers batch classes"],
    leader_logits: Float[Tensor, "batch classes"],
    attention: Float[Tensor, "batch peers peers"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 3.0,
    average: Literal["prob", "logit"] = "prob",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Diverse peers: peer a learns from its own mixture of the peers, the leader from their mean.

    The peers' logits are constants in every target, so no peer is pulled towards its pupils. The
    attention is not: the KL is its only lesson, and through it attention learns which mixture a
    peer can follow. Pass ``attention.detach()`` to leave it as it is.

    Args:
        peer_logits: unnormalised scores of the auxiliary peers.
        leader_logits: unnormalised scores of the model that is kept in the end.
        attention: what each peer takes from each, such as `PeerAttention` returns.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of the labels for peers and leader, >= 0.
        kd_weight: weight of both KL terms, >= 0; the paper ramps it up, as `one_losses`.
        temperature: softening divisor, > 0.
        average: "prob" mixes softened probabilities, as the paper; "logit" mixes logits and
            softens the mixture, as the released code.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        ``ce`` (peers and leader), ``kd_peers`` (summed over the peers) and ``kd_leader``.

    Raises:
        ValueError: if a weight, ``temperature`` or ``average`` is out of range.

    Source:
        Chen et al., 2020, equations 4-7. https://arxiv.org/abs/1912.00350
        The released code detaches nothing.
    """
    _check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    if average not in ("prob", "logit"):
        raise ValueError(f"unknown average {average!r}; known: prob, logit")
    constants = at_least_float32(peer_logits.detach())
    shares = at_least_float32(attention)
    if average == "prob":
        softened = soften(constants, temperature=temperature)
        peer_targets, leader_target = _mixtures(shares, softened), softened.mean(dim=0)
    else:
        peer_targets = soften(_mixtures(shares, constants), temperature=temperature)
        leader_target = soften(constants.mean(dim=0), temperature=temperature)
    divergences = _divergences(peer_logits, peer_targets, temperature, scale_by_t2, sample_weights)
    kd_leader = soft_target_kl(
        leader_logits,
        leader_target,
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )
    terms = {"kd_peers": kd_weight * divergences.sum(), "kd_leader": kd_weight * kd_leader}
    if labels is None:
        return terms
    ce_peers = peer_cross_entropies(peer_logits, labels, sample_weights).sum()
    ce_leader = hard_label_loss(leader_logits, labels, sample_weights=sample_weights)
    return {"ce": ce_weight * (ce_peers + ce_leader), **terms}


def _mixtures(
    attention: Float[Tensor, "batch peers peers"], values: Float[Tensor, "peers batch classes"]
) -> Float[Tensor, "peers batch classes"]:
    # Sums of products, not a matrix product: autocast would run that in half precision.
    weights = attention.permute(1, 2, 0)[:, :, :, None]
    return (weights * values[None]).sum(dim=1)


# --- PCL: an ensemble classifier and the running means of the peers -------------------------


def pcl_losses(
    logits: Float[Tensor, "peers batch classes"],
    ensemble_logits: Float[Tensor, "batch classes"],
    mean_teacher_logits: Float[Tensor, "peers batch classes"],
    labels: Int[Tensor, "batch"] | None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 3.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Terms:
    """Peer collaborative learning: an ensemble classifier and the others' mean teachers teach.

    Args:
        logits: unnormalised scores of all peers.
        ensemble_logits: scores of one more classifier on the peers' joined features; labels
            teach it, and it is a constant where it teaches.
        mean_teacher_logits: scores of each peer's running mean (`update_mean_teacher`); constants.
            Peer k learns from the mean teachers of the OTHER peers, averaged.
        labels: class of each row, in [0, classes); None leaves out the terms that need labels.
        ce_weight: weight of the labels for peers and ensemble, >= 0.
        kd_weight: weight of both KL terms, >= 0; the paper ramps it up, as `one_losses`.
        temperature: softening divisor, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        ``ce``, ``kd_ensemble`` and ``kd_mean_teachers``, summed over the peers, and
        ``ce_ensemble``. A peer alone has no other mean teacher: the last is 0.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Wu and Gong, 2021, Peer Collaborative Learning for Online Knowledge Distillation (PCL),
        section 3. https://arxiv.org/abs/2006.04147
    """
    _check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    ensemble_target = soften(ensemble_logits.detach(), temperature=temperature)
    from_ensemble = _divergences(logits, ensemble_target, temperature, scale_by_t2, sample_weights)
    teachers = soften(mean_teacher_logits.detach(), temperature=temperature)
    num_peers = len(logits)
    # One teacher for each ordered pair: entry [l, k] is what peer k learns from teacher l.
    itself = torch.eye(num_peers, dtype=torch.bool, device=logits.device)
    pairs = torch.stack(
        [
            _divergences(logits, teacher, temperature, scale_by_t2, sample_weights)
            for teacher in teachers
        ]
    )
    from_others = pairs.masked_fill(itself, 0.0).sum() / max(num_peers - 1, 1)
    terms = {
        "kd_ensemble": kd_weight * from_ensemble.sum(),
        "kd_mean_teachers": kd_weight * from_others,
    }
    if labels is None:
        return terms
    return {
        "ce": ce_weight * peer_cross_entropies(logits, labels, sample_weights).sum(),
        "ce_ensemble": ce_weight
        * hard_label_loss(ensemble_logits, labels, sample_weights=sample_weights),
        **terms,
    }


@torch.no_grad()
def update_mean_teacher(
    mean_teacher: nn.Module, model: nn.Module, *, step: int, decay: float = 0.999
) -> None:
    """Move a mean teacher's weights towards those of the model it averages.

    ``mean = d * mean + (1 - d) * model`` with ``d = min(1 - 1 / (step + 1), decay)``: the plain
    average of all steps so far until the exponential one has seen enough. Floating-point buffers,
    such as BatchNorm's statistics, are averaged like weights; counters are copied.

    Args:
        mean_teacher: changed in place; a module of its own, such as ``copy.deepcopy(model)``.
        model: left as it is.
        step: number of updates before this one, >= 0; at 0 the mean teacher becomes a copy.
        decay: largest share of the past, in [0, 1).

    Raises:
        ValueError: if ``step`` or ``decay`` is out of range, the modules differ in the names or
            shapes of their tensors, or they share one.

    Source:
        Tarvainen and Valpola, 2017, Mean teachers. https://arxiv.org/abs/1703.01780; used by Wu
        and Gong, 2021 (PCL). https://arxiv.org/abs/2006.04147
    """
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    means, currents = mean_teacher.state_dict(), model.state_dict()
    unlike = list(means.keys() ^ currents.keys())
    unlike += [
        name for name in means.keys() & currents.keys() if means[name].shape != currents[name].shape
    ]
    if unlike:
        raise ValueError(f"mean teacher and model differ in {', '.join(sorted(unlike))}")
    for name, mean in means.items():
        if mean.numel() and mean.data_ptr() == currents[name].data_ptr():
            raise ValueError(f"mean teacher and model share the tensor {name}; average a copy")
    share_of_new = 1 - min(1 - 1 / (step + 1), decay)
    for name, mean in means.items():
        current = currents[name].to(mean.device, mean.dtype)
        if mean.is_floating_point():
            mean.lerp_(current, share_of_new)
        else:
            mean.copy_(current)


# --- Codistillation: peers as they were some steps ago ---------------------------------------


def codistillation_loss(
    logits: Float[Tensor, "batch classes"],
    stale_peer_logits: Float[Tensor, "others batch classes"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull one model towards the mean prediction of the others as they were some steps ago.

    Computes ``temperature**2 * KL(mean of the others' softened probabilities || student)``; the
    paper's cross-entropy has the same gradient. During the burn-in it has weight 0: give it the
    weight schedule ``{kind: step, values: [0.0, 1.0], milestones: [0.2]}``.

    Args:
        logits: unnormalised scores of the model that learns; gradients flow through these.
        stale_peer_logits: scores of the other models, such as `StalePeers.others` returns;
            treated as constants.
        temperature: softening divisor, > 0; the paper uses 1.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if there is no other model or ``temperature`` is out of range.

    Source:
        Anil et al., 2018, Large scale distributed neural network training through online
        distillation, Algorithm 1. https://arxiv.org/abs/1804.03235
    """
    if len(stale_peer_logits) == 0:
        raise ValueError("codistillation needs at least 1 other model, got 0")
    return soft_target_kl(
        logits,
        mean_probability(stale_peer_logits.detach(), temperature=temperature),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )


class StalePeers(nn.Module):
    """Copies of the peers as they were at the last exchange, some steps ago.

    The copies share no memory with the peers, never train and always predict in evaluation mode.
    They are in this module's ``state_dict``, so a resumed run goes on with the same ones.

    Source:
        Anil et al., 2018, section 2.1. https://arxiv.org/abs/1804.03235
    """

    def __init__(self, peers: Sequence[nn.Module], *, interval: int) -> None:
        """Copy the peers as they are now.

        Args:
            peers: the models that train; their architectures may differ.
            interval: steps between two exchanges, >= 1.

        Raises:
            ValueError: if there are fewer than two peers or ``interval`` is below 1.
        """
        super().__init__()
        if len(peers) < 2:
            raise ValueError(f"codistillation needs at least 2 peers, got {len(peers)}")
        _check_counts(interval=interval)
        self.interval = interval
        self.copies = nn.ModuleList(copy.deepcopy(peer) for peer in peers)
        self.copies.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "StalePeers":
        """Stay in evaluation mode, whatever the module that this one belongs to does."""
        return super().train(False)

    @torch.no_grad()
    def refresh(self, peers: Sequence[nn.Module], *, step: int) -> bool:
        """Copy the peers' weights again where ``step`` is a multiple of the interval.

        Args:
            peers: the models that train, in the order they were given first.
            step: number of steps done, >= 0.

        Returns:
            Whether they were copied.

        Raises:
            ValueError: if ``step`` is negative or the number of peers has changed.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if len(peers) != len(self.copies):
            raise ValueError(f"peers must be the {len(self.copies)} of the start, got {len(peers)}")
        if step % self.interval:
            return False
        for stale, peer in zip(self.copies, peers, strict=True):
            stale.load_state_dict(peer.state_dict())
        return True

    @torch.no_grad()
    def others(self, inputs: Tensor, *, leave_out: int) -> Float[Tensor, "others batch classes"]:
        """Return what the copies of all peers but one say about a batch.

        Args:
            inputs: a batch as the peers take it.
            leave_out: index of the peer that learns.

        Raises:
            ValueError: if there is no peer ``leave_out``.
        """
        if not 0 <= leave_out < len(self.copies):
            raise ValueError(f"leave_out must be in [0, {len(self.copies)}), got {leave_out}")
        kept: list[Callable[[Tensor], Tensor]] = [
            stale for index, stale in enumerate(self.copies) if index != leave_out
        ]
        return torch.stack([stale(inputs) for stale in kept])


# --- shared ----------------------------------------------------------------------------------


def _margins(
    logits: Float[Tensor, "peers batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "peers batch classes"]:
    """Return how far each class's logit is above the label's; its log-sum-exp is the CE."""
    known = labels.long()[None, :, None].expand(len(logits), -1, 1)
    return logits - logits.gather(2, known)


def _divergences(
    logits: Float[Tensor, "peers batch classes"],
    targets: Float[Tensor, "peers batch classes"] | Float[Tensor, "batch classes"],
    temperature: float,
    scale_by_t2: bool,
    sample_weights: Float[Tensor, "batch"] | None,
) -> Float[Tensor, "peers"]:
    """KL of every peer to one common or to its own target probabilities, which are NOT detached."""
    check_temperature(temperature)
    log_p = torch.log_softmax(at_least_float32(logits) / temperature, dim=2)
    target_p = targets.to(log_p.dtype)
    # Where attention made the target it gets a gradient, and that of 0 * log 0 would be NaN.
    target_log_p = target_p.clamp_min(torch.finfo(target_p.dtype).tiny).log()
    row_losses = (target_p * (target_log_p - log_p)).sum(dim=-1)
    return peer_means(row_losses, sample_weights) * (temperature**2 if scale_by_t2 else 1.0)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
