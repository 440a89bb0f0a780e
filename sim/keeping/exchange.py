"""What travelled in a run, kept in its folder (``exchange.keep``), and the clients' last models.

``exchange/round-000007.safetensors`` holds what clients sent and received in a round, and
``exchange/clients.safetensors`` the weights of every client's judged model after the last one.
Nothing in a run reads them again; `sim.attacks` does.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedkd.exchange.values import flatten, unflatten
from fedkd.training import Arrays
from fedkd.training.cohort import named_models
from sim.engine.grid import CohortGrid
from sim.keeping.parts import DamagedFileError
from sim.keeping.records import storing
from sim.server.exchanged import Exchanged
from sim.server.observers import Observer
from sim.server.rounds import RoundLoop

KEPT_FOLDER = "exchange"
CLIENTS_FILE = "clients.safetensors"


class ExchangeFolder(Observer):
    """Writes what travels into the folder of a run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._run = folder
        self._folder = folder / KEPT_FOLDER

    def travelled(self, exchanged: Exchanged) -> None:
        """Write a round, which may have been written before by a run that was stopped since."""
        flat = flatten(exchanged)
        # Arrays of one piece may be views of each other's memory.
        arrays = {name: np.ascontiguousarray(array) for name, array in flat.arrays.items()}
        content = save(arrays, {"plain": json.dumps(flat.plain)})
        _write(self._run, _file(self._folder, exchanged.round), content)

    def returned(self, round: int) -> None:
        """Forget rounds that were not; they come again."""
        with storing(self._run):
            for path in self._folder.glob("round-*.safetensors"):
                if path > _file(self._folder, round):
                    path.unlink()


def keep_clients(folder: Path, models: Mapping[int, Arrays]) -> None:
    """Write the weights of clients' judged models."""
    arrays = {
        f"{client}/{name}": array for client, own in models.items() for name, array in own.items()
    }
    _write(folder, folder / KEPT_FOLDER / CLIENTS_FILE, save(arrays))


def clients_models(loop: RoundLoop, grid: CohortGrid[Any]) -> dict[int, Arrays]:
    """Return the weights of the judged model of every client that has trained."""
    clients = range(len(loop.architectures))
    found: dict[int, Arrays] = {}
    for client, state in zip(clients, grid.client_states(clients), strict=True):
        if state is not None:
            first = next(iter(named_models(loop.architecture(client))))
            found[client] = state.models[first].weights
    return found


def read_exchange(folder: Path) -> Iterator[Exchanged]:
    """Yield what was kept of a run, round by round.

    Raises:
        DamagedFileError: a file cannot be read.
    """
    for path in sorted((folder / KEPT_FOLDER).glob("round-*.safetensors")):
        arrays, metadata = _read(path)
        try:
            exchanged = unflatten(arrays, json.loads(metadata["plain"]))
            if not isinstance(exchanged, Exchanged):
                raise ValueError(f"it holds a {type(exchanged).__name__}")
        except (KeyError, ValueError) as error:
            raise DamagedFileError(path, str(error)) from None
        yield exchanged


def read_clients(folder: Path) -> dict[int, Arrays] | None:
    """Return what `keep_clients` wrote; None: nothing was kept.

    Raises:
        DamagedFileError: the file cannot be read.
    """
    path = folder / KEPT_FOLDER / CLIENTS_FILE
    if not path.is_file():
        return None
    found: dict[int, Arrays] = {}
    for name, array in _read(path)[0].items():
        client, _, inner = name.partition("/")
        if not client.isdecimal():
            raise DamagedFileError(path, f"{name!r} is of no client")
        found.setdefault(int(client), {})[inner] = array
    return found


def _file(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}.safetensors"


def _write(run: Path, path: Path, content: bytes) -> None:
    with storing(run):
        path.parent.mkdir(exist_ok=True)
        # A name of its own: two commands may make again what was not kept.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)


def _read(path: Path) -> tuple[Arrays, Mapping[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(path, str(error)) from None
