"""What a model starts from: a file, its teacher's layers, or random weights, pruned or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedkd.compression import inherit
from fedkd.trained.files import ModelFileError, fill, read_tensors


def load_weights(model: nn.Module, path: Path, *, setting: str) -> None:
    """Copy the weights of a safetensors file into a model.

    Raises:
        ValueError: naming the setting, the file and what does not fit.
    """
    try:
        tensors = read_tensors(path)
    except ModelFileError as error:
        raise ValueError(f"{setting}: {error}") from None
    fill(model, tensors, f"{setting}: {str(path)!r}")


def inherit_weights(
    student: nn.Module, teacher: nn.Module | None, layers: bool | Mapping[str, str]
) -> dict[str, Any]:
    """Copy the teacher's layers into a student, as ``student.inherit`` says.

    Args:
        student: changed in place.
        teacher: read only; None: there is no trained teacher.
        layers: True for equal names, or student layer -> teacher layer.

    Returns:
        ``copied``: student tensor -> teacher tensor; ``skipped``: student tensor -> reason.

    Raises:
        ValueError: naming the setting, if there is no teacher, a layer is unknown or nothing fits.
    """
    if teacher is None:
        raise ValueError(
            "student.inherit needs a teacher that is trained before the student, and this method "
            "has none: remove it, or use method=offline"
        )
    try:
        report = inherit(student, teacher, layers if isinstance(layers, Mapping) else None)
    except ValueError as error:
        raise ValueError(f"student.inherit: {error}") from None
    skipped = dict(report.skipped)
    if not report.copied:
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            "student.inherit: no tensor of the student fits the teacher "
            f"({name}: {reason}); give layers of equal shape, such as "
            "student.inherit={student.layer: teacher.layer}"
        )
    return {"copied": dict(report.copied), "skipped": skipped}
