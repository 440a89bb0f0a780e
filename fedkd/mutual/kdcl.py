"""KDCL: four ways to make one teacher out of the peers, which all of them learn from.

Conventions: peers are the first axis; targets are constants; the terms of a loss come back by name,
weighted already, summed over the peers as published, and what is minimised is their sum. A weight
that ramps up is a schedule of progress: pass its value in force. The naive and the MinLogit rule
also work on peers that arrive one after the other; the other ways need all peers at once, for which
`fedkd.targets.PredictionSpool` keeps them in a file and hands them out rows by rows.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import (
    PeerTable,
    PeerTables,
    RowLabels,
    Terms,
    constants,
    known_labels,
    peer_cross_entropies,
    peer_kl,
)
from fedkd.targets import mean_by_row, soften


def kdcl_naive(logits: PeerTables, labels: RowLabels) -> Float[Tensor, "batch classes"]:
    """For every row take the logits of the peer with the lowest cross-entropy.

    Args:
        logits: unnormalised scores of all peers on the same rows, an array or a tensor;
            treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Target logits. Among equals the first peer is taken.

    Source:
        Guo et al., 2020, Online Knowledge Distillation via Collaborative Learning (KDCL), section
        3.2. https://openaccess.thecvf.com/content_CVPR_2020/html/
        Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html
    """
    scores = constants(logits)
    best = torch.logsumexp(_margins(scores, known_labels(labels)), dim=2).argmin(dim=0)
    return scores.gather(0, best[None, :, None].expand(1, -1, scores.shape[2])).squeeze(0)


def kdcl_minlogit(logits: PeerTables, labels: RowLabels) -> Float[Tensor, "batch classes"]:
    """For every row and class take the smallest margin over the label's logit among the peers.

    The label's own logit becomes 0. The cross-entropy of this target is never above that of any
    peer.

    Args:
        logits: unnormalised scores of all peers on the same rows, an array or a tensor;
            treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Target logits.

    Source:
        Guo et al., 2020, KDCL-MinLogit, section 3.2; see `kdcl_naive`.
    """
    return _margins(constants(logits), known_labels(labels)).amin(dim=0)


class StreamingNaive:
    """`kdcl_naive` of peers that arrive one after the other; holds one table of rows x classes."""

    def __init__(self, labels: RowLabels) -> None:
        """Begin without any peer.

        Args:
            labels: class of each row, in [0, classes).
        """
        self._labels = known_labels(labels)
        self._best: tuple[Tensor, Tensor] | None = None

    def add(self, logits: PeerTable) -> None:
        """Take in one peer's unnormalised scores, an array or a tensor."""
        scores = constants(logits)
        losses = torch.logsumexp(_margins(scores[None], self._labels)[0], dim=1)
        if self._best is not None:
            kept, lowest = self._best
            better = losses < lowest
            scores = torch.where(better[:, None], scores, kept)
            losses = torch.where(better, losses, lowest)
        self._best = scores, losses

    def target(self) -> Float[Tensor, "rows classes"]:
        """Return the target logits of the peers so far.

        Raises:
            ValueError: if there is none.
        """
        if self._best is None:
            raise ValueError("a common target needs at least 1 peer, got 0")
        return self._best[0]


class StreamingMinLogit:
    """`kdcl_minlogit` of peers that arrive one after the other; holds one table."""

    def __init__(self, labels: RowLabels) -> None:
        """Begin without any peer.

        Args:
            labels: class of each row, in [0, classes).
        """
        self._labels = known_labels(labels)
        self._smallest: Tensor | None = None

    def add(self, logits: PeerTable) -> None:
        """Take in one peer's unnormalised scores, an array or a tensor."""
        margins = _margins(constants(logits)[None], self._labels)[0]
        known = self._smallest
        self._smallest = margins if known is None else torch.minimum(known, margins)

    def target(self) -> Float[Tensor, "rows classes"]:
        """Return the target logits of the peers so far.

        Raises:
            ValueError: if there is none.
        """
        if self._smallest is None:
            raise ValueError("a common target needs at least 1 peer, got 0")
        return self._smallest


class GatheredPeers:
    """A rule that needs all peers at once, of peers that arrive one after the other.

    Holds a table of each.
    """

    def __init__(
        self, rule: Callable[[Float[Tensor, "peers rows classes"]], Float[Tensor, "rows classes"]]
    ) -> None:
        """Begin without any peer.

        Args:
            rule: makes target logits of all peers' logits.
        """
        self._rule = rule
        self._peers: list[Tensor] = []

    def add(self, logits: PeerTable) -> None:
        """Take in one peer's unnormalised scores, an array or a tensor."""
        self._peers.append(constants(logits))

    def target(self) -> Float[Tensor, "rows classes"]:
        """Return the target logits of the peers so far.

        Raises:
            ValueError: if there is none.
        """
        if not self._peers:
            raise ValueError("a common target needs at least 1 peer, got 0")
        return self._rule(torch.stack(self._peers))


def kdcl_linear(
    logits: PeerTables, labels: RowLabels, *, per: Literal["row", "batch"] = "row"
) -> Float[Tensor, "batch classes"]:
    """Mix the peers' logits so that the mixture's cross-entropy is lowest.

    Args:
        logits: unnormalised scores of all peers on the same rows, an array or a tensor;
            treated as constants.
        labels: class of each row, in [0, classes).
        per: ``row`` finds a mixture for every row, ``batch`` one for all of them.

    Returns:
        Target logits, `mean_by_row` with the shares of `kdcl_linear_shares`. With one for every row
        their cross-entropy is at most that of `kdcl_naive`, within the tolerance stated there.

    Source:
        Guo et al., 2020, KDCL-Linear, section 3.2; see `kdcl_naive`.
    """
    return mean_by_row(constants(logits), kdcl_linear_shares(logits, labels, per=per))


_NEWTON_STEPS = 48
_LAST_BARRIER = 1e-8
_STEP_SIZES = [2.0**-k for k in range(12)]


def kdcl_linear_shares(
    logits: PeerTables, labels: RowLabels, *, per: Literal["row", "batch"] = "row"
) -> Float[Tensor, "peers batch"]:
    """Find the mixture of the peers' logits that has the lowest cross-entropy.

    The problem is convex, its solution in general neither a peer nor unique. Solved by a
    primal-dual interior point method in float64, a fixed number of steps for any data.

    Args:
        logits: unnormalised scores of all peers on the same rows, an array or a tensor;
            treated as constants.
        labels: class of each row, in [0, classes).
        per: ``row`` finds shares for every row; ``batch`` the same for all rows, with the lowest
            mean cross-entropy.

    Returns:
        Shares > 0, float64, that sum to 1 over the peers. The cross-entropy of the mixture is
        within 1e-6 nats of the lowest there is, for logits up to +-300.
    """
    margins = _margins(constants(logits).double(), known_labels(labels)).transpose(0, 1)
    num_rows, num_peers, _ = margins.shape
    problems = num_rows if per == "row" else min(num_rows, 1)

    def of_problems(rows: Tensor) -> Tensor:
        return rows if per == "row" else rows.mean(dim=0, keepdim=True)

    shares = margins.new_full((problems, num_peers), 1.0 / num_peers)
    bounds = torch.ones_like(shares)  # the multipliers of shares >= 0
    step_sizes = margins.new_tensor(_STEP_SIZES)
    spread = margins.abs().amax(dim=(1, 2)).clamp_min(1.0)[:, None]
    if per == "batch":
        spread = spread.amax(dim=0, keepdim=True)
    for step in range(_NEWTON_STEPS):
        # From as steep as the problem itself down to nothing, the last steps at one height.
        done = min(1.0, step / (_NEWTON_STEPS - 6))
        barrier = spread ** (1 - done) * _LAST_BARRIER**done
        mixture = torch.einsum("bk,bkc->bc", shares.expand(num_rows, -1), margins)
        probabilities = torch.softmax(mixture, dim=1)
        slopes = torch.einsum("bkc,bc->bk", margins, probabilities)
        # Centred first: a difference of large squares would not stay positive.
        centred = (margins - slopes[:, :, None]) * probabilities.sqrt()[:, None, :]
        slope, curvature = of_problems(slopes), of_problems(centred @ centred.transpose(1, 2))
        pull = bounds / shares
        system = curvature + torch.diag_embed(pull)
        right = torch.stack([barrier / shares - slope, torch.ones_like(shares)], dim=2)
        free, tilt = torch.linalg.solve(system, right).unbind(dim=2)
        # The multiplier of "shares sum to 1" keeps their sum where it is.
        move = free - tilt * (free.sum(1, keepdim=True) / tilt.sum(1, keepdim=True))
        bounds_move = barrier / shares - bounds - pull * move
        # Every problem looks along its direction at several step sizes and takes the best: a
        # search that stops early would branch on data.
        steps = _longest_step(shares, move) * step_sizes
        candidates = shares[:, None, :] + steps[:, :, None] * move[:, None, :]
        mixtures = torch.einsum("bsk,bkc->bsc", candidates.expand(num_rows, -1, -1), margins)
        heights = of_problems(torch.logsumexp(mixtures, dim=2))
        merits = heights - barrier * candidates.log().sum(dim=2)
        best = merits.argmin(dim=1, keepdim=True)
        shares = shares + steps.gather(1, best) * move
        shares = shares / shares.sum(dim=1, keepdim=True)
        bounds = bounds + _longest_step(bounds, bounds_move) * bounds_move
    return shares.expand(num_rows, -1).transpose(0, 1)


def _longest_step(
    values: Float[Tensor, "rows peers"], move: Float[Tensor, "rows peers"]
) -> Float[Tensor, "rows 1"]:
    """Return the step in (0, 1] along ``move`` that leaves every positive value 1 % of itself."""
    limits = torch.where(move < 0, -0.99 * values / move, torch.ones_like(values))
    longest: Tensor = limits.amin(dim=1, keepdim=True).clamp(max=1.0)
    return longest


def error_correlation(logits: PeerTables, labels: RowLabels) -> Float[Tensor, "peers peers"]:
    """Return how the peers' errors go together: ``C_kl = mean (p_k - y) . (p_l - y)``.

    Args:
        logits: unnormalised scores of all peers on the same rows, of which there is at least one;
            treated as constants.
        labels: class of each row, in [0, classes).

    Source:
        Guo et al., 2020, KDCL-General, section 3.2; see `kdcl_naive`. How the paper defines an
        error could not be read; this is the error of all classes' probabilities.
    """
    scores = constants(logits).double()
    truth = F.one_hot(known_labels(labels), scores.shape[2])
    errors = (torch.softmax(scores, dim=2) - truth).flatten(1)
    return errors @ errors.t() / scores.shape[1]


def kdcl_general_weights(
    logits: PeerTables, labels: RowLabels, *, ridge: float = 0.1
) -> Float[Tensor, "peers"]:
    """Weigh the peers so that their average errs least, given how their errors go together.

    With C the peers' `error_correlation` on held-out rows the weights are
    ``C^-1 1 / (1' C^-1 1)``. Peers that err alike make C nearly singular and the
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
    num_peers, num_rows, _ = logits.shape
    if num_rows == 0:
        raise ValueError("error correlation needs at least 1 held-out row, got 0")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    correlation = error_correlation(logits, labels)
    scale = correlation.trace() / num_peers
    # Peers that never err leave only the ridge, whose inverse weighs all alike.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ones = correlation.new_ones(num_peers, 1)
    identity = torch.eye(num_peers, dtype=correlation.dtype, device=correlation.device)
    solution = torch.linalg.solve(correlation + ridge * scale * identity, ones).squeeze(1)
    # Their sum is positive, so at least one of them is.
    weights: Tensor = solution.clamp_min(0.0)
    return weights / weights.sum()


def kdcl_general(
    logits: PeerTables, weights: Float[Tensor, " peers"]
) -> Float[Tensor, "batch classes"]:
    """Average the peers' logits with one weight per peer.

    Args:
        logits: unnormalised scores of all peers on the same rows, an array or a tensor;
            treated as constants.
        weights: >= 0, such as `kdcl_general_weights`, renewed from time to time.

    Returns:
        Target logits.

    Source:
        Guo et al., 2020, KDCL-General, section 3.2; see `kdcl_naive`.
    """
    return mean_by_row(constants(logits), weights[:, None].expand(-1, logits.shape[1]))


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
    check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    target = soften(target_logits.detach(), temperature=temperature)
    divergences = peer_kl(logits, target, temperature, scale_by_t2, sample_weights)
    terms = {"kd": kd_weight * divergences.sum()}
    if labels is None:
        return terms
    return {"ce": ce_weight * peer_cross_entropies(logits, labels, sample_weights).sum(), **terms}


def _margins(
    logits: Float[Tensor, "peers rows classes"], labels: Int[Tensor, " rows"]
) -> Float[Tensor, "peers rows classes"]:
    """Return how far each class's logit is above the label's; its log-sum-exp is the CE."""
    known = labels[None, :, None].expand(len(logits), -1, 1)
    return logits - logits.gather(2, known)
