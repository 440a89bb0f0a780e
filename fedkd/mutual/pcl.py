"""PCL: an ensemble classifier and the running means of the other peers teach.

Conventions: peers are the first axis; targets are constants; the terms of a loss come back by name,
weighted already, summed over the peers as published, and what is minimised is their sum. A weight
that ramps up is a schedule of progress: pass its value in force.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import hard_label_loss
from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import Terms, peer_cross_entropies, peer_kl
from fedkd.targets import soften


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
    check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    ensemble_target = soften(ensemble_logits.detach(), temperature=temperature)
    from_ensemble = peer_kl(logits, ensemble_target, temperature, scale_by_t2, sample_weights)
    teachers = soften(mean_teacher_logits.detach(), temperature=temperature)
    num_peers = len(logits)
    # One teacher for each ordered pair: entry [l, k] is what peer k learns from teacher l.
    itself = torch.eye(num_peers, dtype=torch.bool, device=logits.device)
    pairs = torch.stack(
        [peer_kl(logits, teacher, temperature, scale_by_t2, sample_weights) for teacher in teachers]
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
