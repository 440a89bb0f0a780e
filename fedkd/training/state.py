"""A client's state is a value: a worker gets it, returns it changed, and never owns it."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model's tensors as NumPy arrays.

    Attributes:
        weights: parameters and buffers by their dotted names.
        optimizer: optimizer slots by ``<slot>/<parameter>``, such as ``exp_avg/0.weight``;
            empty before the first step.
    """

    weights: Arrays
    optimizer: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientState:
    """Everything a client carries from one call to the next: its models, by name."""

    models: Mapping[str, ModelState]

    def to_arrays(self) -> Arrays:
        """Flatten to one table of arrays, for a Flower record or a file."""
        return {
            f"{model}/{part}/{name}": array
            for model, state in self.models.items()
            for part, arrays in (("weights", state.weights), ("optimizer", state.optimizer))
            for name, array in arrays.items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ClientState":
        """Rebuild the state that `to_arrays` flattened."""
        tables: dict[str, dict[str, Arrays]] = {}
        for key, array in arrays.items():
            model, part, name = key.split("/", 2)
            tables.setdefault(model, {"weights": {}, "optimizer": {}})[part][name] = array
        return cls({model: ModelState(**parts) for model, parts in tables.items()})


def weights_digest(states: Iterable[ClientState]) -> str:
    """Return the SHA-256 of all clients' weights, in the order given; equal bits, equal digest."""
    digest = hashlib.sha256()
    for state in states:
        for model in sorted(state.models):
            for name, array in sorted(state.models[model].weights.items()):
                digest.update(f"{model}/{name}/{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
