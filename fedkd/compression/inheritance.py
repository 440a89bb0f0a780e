"""A student that starts from its teacher's layers, and the list of what it took over."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class CopiedTensor(NamedTuple):
    """A student's tensor and the teacher's that it was copied from."""

    student: str
    teacher: str


class SkippedTensor(NamedTuple):
    """A student's tensor that kept its own values, and why."""

    student: str
    reason: str


class InheritanceReport(NamedTuple):
    """What happened to each tensor of the student, in the order of its state."""

    copied: tuple[CopiedTensor, ...]
    skipped: tuple[SkippedTensor, ...]


def inherit(
    student: nn.Module, teacher: nn.Module, layers: Mapping[str, str] | None = None
) -> InheritanceReport:
    """Copy the teacher's parameters and buffers into the student wherever they fit.

    Args:
        student: changed in place; shares no memory with the teacher afterwards.
        teacher: read only.
        layers: student module path -> teacher module path; the longest path that fits a tensor
            decides, and tensors that none fits are skipped. The path ``""`` stands for the whole
            model. ``{"": "", "blocks.1": "blocks.2"}`` takes all equal names, but the student's
            second block from the teacher's third. None: equal names.

    Returns:
        Every tensor of the student, either copied or skipped with the reason.

    Raises:
        ValueError: if a path holds no tensor, or if student and teacher share memory already.

    Source:
        Sanh, Debut, Chaumond, Wolf, 2019, section 3 (one layer out of two).
        https://arxiv.org/abs/1910.01108
    """
    layers = {"": ""} if layers is None else layers
    own, given = student.state_dict(), teacher.state_dict()
    _check_paths("student", layers.keys(), own)
    _check_paths("teacher", layers.values(), given)
    if shared := _addresses(own) & _addresses(given):
        raise ValueError(
            f"student and teacher share {len(shared)} tensors: build the student on its own"
        )
    copied, skipped = [], []
    with torch.no_grad():
        for name, tensor in own.items():
            fitting = [path for path in layers if _is_inside(name, path)]
            if not fitting:
                skipped.append(SkippedTensor(name, "no path of layers leads to it"))
                continue
            path = max(fitting, key=len)
            source = _moved(name, path, layers[path])
            if source not in given:
                skipped.append(SkippedTensor(name, f"the teacher has no {source!r}"))
            elif reason := _misfit(tensor, given[source]):
                skipped.append(SkippedTensor(name, reason))
            else:
                tensor.copy_(given[source])
                copied.append(CopiedTensor(name, source))
    return InheritanceReport(tuple(copied), tuple(skipped))


def _is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _moved(name: str, path: str, to: str) -> str:
    rest = name[len(path) :].removeprefix(".")
    return ".".join(part for part in (to, rest) if part)


def _misfit(own: Tensor, given: Tensor) -> str | None:
    if own.shape != given.shape:
        return f"shape {list(own.shape)}, the teacher's is {list(given.shape)}"
    if own.dtype != given.dtype:
        return f"type {own.dtype}, the teacher's is {given.dtype}"
    return None


def _check_paths(side: str, paths: Iterable[str], state: Mapping[str, Tensor]) -> None:
    for path in paths:
        if not any(_is_inside(name, path) for name in state):
            known = sorted({name.rpartition(".")[0] for name in state})
            raise ValueError(
                f"layers: the {side} has no tensors under {path!r}; it has them under "
                f"{', '.join(known)}"
            )


def _addresses(state: Mapping[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()}
