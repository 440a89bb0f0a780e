"""What a model starts from: a file, its teacher's layers, or random weights, pruned or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkd.compression import inherit


def load_weights(model: nn.Module, path: Path, *, setting: str) -> None:
    """Copy the weights of a safetensors file into a model.

    Raises:
        ValueError: naming the setting, the file and what does not fit.
    """
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{setting}: {str(path)!r} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{setting}: cannot read {str(path)!r}: {error}") from None
    _check(weights, model, f"{setting}: {str(path)!r}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{setting}: {str(path)!r} does not fit the model: {reason}") from None


def _check(weights: Mapping[str, Tensor], model: nn.Module, file: str) -> None:
    """Refuse tensors that loading would cast, and numbers that are none.

    A buffer may hold what the fresh model's holds, such as the minus infinity of a mask.
    """
    for name, own in model.state_dict().items():
        if name not in weights or not isinstance(own, Tensor):
            continue
        loaded = weights[name]
        if loaded.dtype != own.dtype:
            raise ValueError(
                f"{file}: {name} holds {_type(loaded)}, the model's {_type(own)}: save the weights "
                "as the model has them"
            )
        if not torch.isfinite(loaded).all() and not torch.equal(loaded, own.cpu()):
            raise ValueError(f"{file}: {name} holds NaN or infinity")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
