"""Objectives as an author writes them: functions that say of which rows each loss is."""

from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.targets import confidence_mask
from fedkd.training import PerRow


def distilled(
    outputs,
    batch,
    *,
    temperature,
    ce_weight=1.0,
    kd_weight=1.0,
    scale_by_t2=True,
    confidence_threshold=0.0,
):
    """Cross-entropy on private rows plus soft targets on public rows, whichever a step has."""
    losses = {}
    if outputs.private is not None:
        rows = hard_label_rows(outputs.private, batch.labels)
        losses["ce"] = ce_weight * PerRow(rows, of="private")
    if outputs.public is not None and batch.targets is not None:
        target = batch.targets.probabilities(temperature)
        weights = confidence_mask(target, confidence_threshold) if confidence_threshold else None
        rows = soft_target_rows(outputs.public, target, temperature=temperature)
        scale = temperature**2 if scale_by_t2 else 1.0
        losses["kd"] = kd_weight * (scale * PerRow(rows, of="public", weights=weights))
    return losses
