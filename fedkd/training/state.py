"""A client's state is a value: a worker gets it, returns it changed, and never owns it."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from torch import Tensor

Arrays = dict[str, np.ndarray]
"""Named arrays: a client's weights, optimizer or memory, as they are kept and sent."""


def copy_to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as an array of their own."""
    return np.array(tensor.detach().cpu().numpy(), order="C")


def to_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors as arrays of their own."""
    return {name: copy_to_numpy(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The states of one model of several members, below one another.

    The members' states are views of it: made by one copy, and put back into a stack by one. As
    long as one of them is kept, so is the whole block.

    Attributes:
        weights: ``[members, ...]`` by name; each owns its memory.
        slots: ``[members, ...]`` by ``<slot>/<parameter>``, the same.
        memory: for each member, which slots it has; a step counter with its value (a scalar),
            the others with None.
    """

    weights: Arrays
    slots: Arrays
    memory: Sequence[Mapping[str, np.ndarray | None]]

    def states(self) -> "list[ModelState]":
        """Return the state of every member."""
        return [
            ModelState(
                weights=at_place(self.weights, place),
                optimizer={
                    key: self.slots[key][place, ...] if step is None else step
                    for key, step in memory.items()
                },
                home=(self, place),
            )
            for place, memory in enumerate(self.memory)
        ]

    def holds(self, state: "ModelState") -> bool:
        """Tell whether a state's arrays still are those of this block."""
        weights, slots = self.weights, self.slots
        return all(
            array.base is weights.get(name) for name, array in state.weights.items()
        ) and all(
            array.base is slots.get(key)
            for key, array in state.optimizer.items()
            if not key.startswith("step/")
        )


def at_place(arrays: Mapping[str, np.ndarray], place: int) -> Arrays:
    """Return one member's views of arrays ``[members, ...]``; numbers stay arrays."""
    return {name: array[place, ...] for name, array in arrays.items()}


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model's tensors as NumPy arrays.

    Attributes:
        weights: parameters and buffers by their dotted names.
        optimizer: optimizer slots by ``<slot>/<parameter>``, such as ``exp_avg/0.weight``;
            empty before the first step.
        home: the block that its arrays are views of, and the place there; None: they are its own.
            It says nothing that the arrays do not, and does not leave the process.
    """

    weights: Arrays
    optimizer: Arrays = field(default_factory=dict)
    home: "tuple[Block, int] | None" = field(default=None, repr=False, compare=False)


KEPT = "kept/arrays/"
"""What named arrays are called in a flattened state, before their names. No model's tensors begin
like that: theirs are ``<model>/weights/`` and ``<model>/optimizer/``."""

AVERAGE = "average/"
"""How the names of a running average's arrays begin; see `fedkd.training.frozen`."""


@dataclass(frozen=True, slots=True)
class ClientState:
    """Everything a client carries from one call to the next.

    Attributes:
        models: its models, by name.
        arrays: what an algorithm keeps with it, by name: caches, prototypes, earlier models; and
            the running averages of its weights. See `Cohort.keep`.
    """

    models: Mapping[str, ModelState]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_arrays(self) -> Arrays:
        """Flatten to one table of arrays, for a Flower record or a file."""
        flat = {
            f"{model}/{part}/{name}": array
            for model, state in self.models.items()
            for part, arrays in (("weights", state.weights), ("optimizer", state.optimizer))
            for name, array in arrays.items()
        }
        flat.update((f"{KEPT}{name}", array) for name, array in self.arrays.items())
        return flat

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ClientState":
        """Rebuild the state that `to_arrays` flattened.

        Raises:
            ValueError: for a name that it does not give.
        """
        tables: dict[str, dict[str, Arrays]] = {}
        kept: Arrays = {}
        for key, array in arrays.items():
            if key.startswith(KEPT):
                kept[key.removeprefix(KEPT)] = array
                continue
            model, part, name = (*key.split("/", 2), "", "")[:3]
            if part not in ("weights", "optimizer") or not name:
                raise ValueError(f"a client's state has no array {key[:60]!r}")
            tables.setdefault(model, {"weights": {}, "optimizer": {}})[part][name] = array
        return cls(
            {model: ModelState(own["weights"], own["optimizer"]) for model, own in tables.items()},
            kept,
        )

    def __reduce__(self) -> "tuple[Callable[..., ClientState], tuple[Packing, np.ndarray]]":
        """Travel between processes as one buffer: dozens of small arrays take longer than one."""
        return _unpacked, packed(self.to_arrays())


def check_state(
    state: ClientState, like: ClientState, slots: Collection[str], *, made_later: str
) -> None:
    """Refuse a state that a client with these models cannot have; its numbers may be any.

    Named arrays may have any shape, which only the algorithm knows; those of running averages
    must be averages of these models.

    Args:
        state: to be looked at.
        like: a state of a client with the same models.
        slots: what its optimizer remembers of a parameter once that has been trained.
        made_later: what training may have added to the models.

    Raises:
        ValueError: names the model and the array.
    """
    if state.models.keys() - {made_later} != like.models.keys() - {made_later}:
        raise ValueError(f"models {sorted(state.models)[:5]}, expected {sorted(like.models)}")
    for model in like.models.keys() & state.models.keys():
        known, weights = like.models[model], state.models[model].weights
        if weights.keys() != known.weights.keys():
            odd = sorted(weights.keys() ^ known.weights.keys())[:5]
            raise ValueError(f"weights of {model}: unexpected or missing {odd}")
        for name, array in known.weights.items():
            _check_layout(f"weights of {model}: {name!r}", weights[name], array.shape, array.dtype)
        remembered: dict[str, set[str]] = {}
        for key, array in state.models[model].optimizer.items():
            slot, _, name = key.partition("/")
            if slot not in slots or name not in known.weights:
                raise ValueError(f"optimizer of {model}: unexpected {key!r}")
            shape = () if slot == "step" else known.weights[name].shape
            _check_layout(f"optimizer of {model}: {key!r}", array, shape, np.dtype(np.float32))
            remembered.setdefault(name, set()).add(slot)
        for name, there in remembered.items():
            if there != set(slots):
                missing = sorted(set(slots) - there)
                raise ValueError(f"optimizer of {model}: {name!r} has no {missing}")
    _check_kept(state.arrays, like)


def check_named_array(name: str, array: object) -> None:
    """Refuse what cannot be kept with a client.

    Raises:
        ValueError: naming the array.
    """
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME:
        raise ValueError(
            f"a kept array's name must be text of 1 to {LONGEST_NAME} characters, got {name!r:.80}"
        )
    if not isinstance(array, np.ndarray) or array.dtype.str[1:] not in KEPT_TYPES:
        kind = f"{array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(
            f"kept array {name!r} must be a NumPy array of whole numbers, floats of 16 to 64 bits "
            f"or truth values, got {kind}"
        )


LONGEST_NAME = 300

KEPT_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
"""Types of arrays that every way out of the process can carry."""


def _check_kept(arrays: Mapping[str, np.ndarray], like: ClientState) -> None:
    averages: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        check_named_array(name, array)
        if name.startswith(AVERAGE):
            average, model, rest = (*name.removeprefix(AVERAGE).split("/", 2), "", "")[:3]
            if not average or model not in like.models or not rest:
                raise ValueError(f"kept array {name!r} is an average of no model of the client")
            averages.setdefault(f"{average}/{model}", {})[rest] = array
    for average, found in averages.items():
        known = like.models[average.split("/", 1)[1]].weights
        expected = {f"weights/{name}": (each.shape, each.dtype) for name, each in known.items()}
        expected["updates"] = ((), np.dtype(np.int64))
        if found.keys() != expected.keys():
            odd = sorted(found.keys() ^ expected.keys())[:5]
            raise ValueError(f"average {average}: unexpected or missing {odd}")
        for name, array in found.items():
            _check_layout(f"average {average}: {name!r}", array, *expected[name])


def _check_layout(what: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(f"{what} is {array.dtype} {array.shape}, expected {dtype} {shape}")


Packing = tuple[tuple[str, str, tuple[int, ...], int], ...]
"""Name, type, shape and offset of each array in a buffer."""

_ALIGNMENT = 64


def packed(arrays: Mapping[str, np.ndarray]) -> tuple[Packing, np.ndarray]:
    """Copy arrays into one uint8 buffer, each at an address that suits every type."""
    layout = []
    end = 0
    for name, array in arrays.items():
        layout.append((name, array.dtype.str, array.shape, end))
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = np.zeros(end, np.uint8)
    for (_, _, _, start), array in zip(layout, arrays.values(), strict=True):
        buffer[start : start + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
    # Clients of one architecture share one layout object, which pickles as a reference then.
    return _known_layouts(tuple(layout)), buffer


@lru_cache(maxsize=256)
def _known_layouts(layout: Packing) -> Packing:
    return layout


def unpacked(layout: Packing, buffer: np.ndarray) -> Arrays:
    """Return the arrays that `packed` put into a buffer, as views of it."""
    arrays = {}
    for name, dtype, shape, start in layout:
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        arrays[name] = buffer[start : start + size].view(kind).reshape(shape)
    return arrays


def _unpacked(layout: Packing, buffer: np.ndarray) -> ClientState:
    return ClientState.from_arrays(unpacked(layout, buffer))


def weights_digest(states: Iterable[ClientState | int]) -> str:
    """Return the SHA-256 of all clients' weights, in the order given; equal bits, equal digest.

    A number stands for a client that has not trained yet: the seed of its first weights.
    """
    digest = hashlib.sha256()
    for state in states:
        if isinstance(state, int):
            digest.update(f"seed {state}".encode())
            continue
        for model in sorted(state.models):
            for name, array in sorted(state.models[model].weights.items()):
                digest.update(f"{model}/{name}/{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
