"""What a module of somebody else's keeps or changes outside its state, and how that is put right.

A worker hands one module from client to client. Its state (parameters and persistent buffers) is
loaded for each of them; everything else that a forward pass may leave behind is put back here, so
that a client's numbers do not depend on who was there before.
"""

import copy
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold its registered parts."""

_OWN_BOOKS = ("_non_persistent_buffers_set",)
"""What a module notes about its tables itself."""

UNCHANGEABLE = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.dtype,
    torch.device,
    torch.Size,
)


def copy_inputs(module: nn.Module) -> None:
    """Hand the module a copy of its input in every forward pass.

    It may then change its input as it likes: the rows belong to all clients and all models.
    """
    module.register_forward_pre_hook(_copied)


def _copied(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


class _Part(NamedTuple):
    """One module as it was at first.

    Attributes:
        path: its dotted name with a dot behind it, or "".
        attributes: its plain attributes; those that can be changed in place are copies.
        changeable: names of the latter.
        tables: its registered parameters, buffers and modules, and its hooks, by table.
        buffers: values of the buffers that no state holds.
    """

    module: nn.Module
    path: str
    attributes: dict[str, Any]
    changeable: tuple[str, ...]
    tables: dict[str, dict[Any, Any]]
    buffers: dict[str, Tensor]


class Outside:
    """All that a module holds beside its state, as it was when this was made.

    Parameters, persistent buffers and parts stay the same objects, whatever refers to them; the
    values of the state are nobody's business here. What cannot be copied (a lock, a
    ``torch.Generator``) stays as it is; a model whose numbers depend on that is found by trial.
    """

    def __init__(self, module: nn.Module) -> None:
        self._gradients = [(p, p.requires_grad) for p in module.parameters()]
        lasting: list[Any] = [*module.modules(), *module.parameters()]
        for part in module.modules():
            free = part._non_persistent_buffers_set
            lasting += [b for name, b in part._buffers.items() if name not in free]
            if type(part).__module__.startswith("fedkd."):
                # A layer of ours is connected to whoever trains.
                lasting += vars(part).values()
        self._lasting = {id(each): each for each in lasting}
        memo = dict(self._lasting)
        self._parts = [
            _first_look(part, f"{path}." if path else "", memo)
            for path, part in module.named_modules()
        ]

    def restore(self) -> None:
        """Put everything back."""
        memo = dict(self._lasting)
        for part in self._parts:
            now = vars(part.module)
            if len(now) != len(part.attributes) + len(part.tables):
                for name in now.keys() - part.attributes.keys() - part.tables.keys():
                    del now[name]
            now.update(part.attributes)
            for name in part.changeable:
                now[name] = _copied_value(part.attributes[name], memo)
            for name, table in part.tables.items():
                own = now[name]
                if not _same_entries(own, table):
                    own.clear()
                    own.update(table)
            for name, value in part.buffers.items():
                part.tables["_buffers"][name].detach_().copy_(value)
        for parameter, wanted in self._gradients:
            parameter.requires_grad_(wanted)

    def changes(self) -> list[str]:
        """Return the names of attributes and buffers that are not what they were at first."""
        names = []
        for part in self._parts:
            now = vars(part.module)
            own = {name: value for name, value in now.items() if name not in part.tables}
            own |= {name: value for name, value in now["_buffers"].items() if name in part.buffers}
            first = {**part.attributes, **part.buffers}
            for name in sorted(own.keys() | first.keys()):
                if name == "training":
                    continue
                if name not in own or name not in first or not _equal(own[name], first[name]):
                    names.append(part.path + name)
            for table in TABLES:
                names += [
                    part.path + name for name in now[table].keys() ^ part.tables[table].keys()
                ]
        return names

    def differences(self, other: "Outside") -> list[str]:
        """Return the names of what was different at first in another module of one architecture."""
        return [
            part.path + name
            for part, twin in zip(self._parts, other._parts, strict=False)
            for name, value in {**part.attributes, **part.buffers}.items()
            if isinstance(value, int | float | complex | str | Tensor | np.ndarray)
            and not _equal(value, {**twin.attributes, **twin.buffers}.get(name))
        ]


def _first_look(module: nn.Module, path: str, memo: dict[int, Any]) -> _Part:
    attributes, changeable, tables = {}, [], {}
    for name, value in vars(module).items():
        # Hooks are functions, and whoever registered one holds the table that it stands in.
        if name in TABLES or (name.startswith("_") and "_hooks" in name):
            tables[name] = dict(value)
        elif id(value) in memo or name in _OWN_BOOKS or _is_unchangeable(value):
            attributes[name] = value
        else:
            attributes[name] = _copied_value(value, memo)
            changeable.append(name)
    free = module._non_persistent_buffers_set
    buffers = {
        name: buffer.detach().clone()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in free
    }
    return _Part(module, path, attributes, tuple(changeable), tables, buffers)


def _is_unchangeable(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_unchangeable, value))
    return isinstance(value, UNCHANGEABLE)


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    # Anybody's object may refuse in any way.
    except Exception:
        return value


def _same_entries(own: Mapping[Any, Any], first: Mapping[Any, Any]) -> bool:
    return len(own) == len(first) and all(
        key == known and value is wanted
        for (key, value), (known, wanted) in zip(own.items(), first.items(), strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return bool(torch.equal(one.get_state(), other.get_state()))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    try:
        return bool(one == other)
    # A list of tensors, for example, has no answer.
    except Exception:
        return False
