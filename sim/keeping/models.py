"""The models that a run leaves in its folder: which of them, of which round, and what they are."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedkd.data import FederatedData
from fedkd.inputs import InputShape
from fedkd.models import ModelSettings, build_model
from fedkd.tensors import as_tensor
from fedkd.trained.files import ModelInfo, float_tuple, model_content
from fedkd.training.cohort import named_models
from fedkd.training.pool import PREDICT_ROWS
from sim.engine.grid import CohortGrid
from sim.keeping.records import SETTINGS_FILE, is_finished, storing
from sim.server.history import History, selected_round
from sim.server.observers import Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings, SettingsError
from sim.settings.tables import read_yaml
from strategies.contract import FinishedModel, Strategy

MODELS_FOLDER = "models"
SUFFIX = ".safetensors"


class _Kept(NamedTuple):
    """One model that is to be written."""

    name: str
    model: ModelSettings
    weights: Mapping[str, np.ndarray]
    about: Mapping[str, Any]


def check_keep(settings: Settings, strategy: Strategy[Any, Any], *, nodes: bool = False) -> None:
    """Refuse to keep what there is not.

    Args:
        settings: of the run.
        strategy: its algorithm.
        nodes: whether clients are nodes of Flower's own runtimes, which keep their models.

    Raises:
        SettingsError: names the setting and what would work.
    """
    asked = settings.keep_models
    if asked == "server" and not strategy.has_server_models:
        features = " that takes the run's inputs" if strategy.server_models() else ""
        raise SettingsError(
            f"keep_models: server needs an algorithm whose server has a model, and that of "
            f"{settings.strategy.name!r} has none{features}: use best, clients or none"
        )
    if nodes and not (asked in ("none", "auto") or asked == "server"):
        raise SettingsError(
            f"keep_models must be auto, server or none where clients are nodes of Flower's own "
            f"runtimes, which keep their models to themselves, got {asked!r}; fedkd run keeps "
            "clients' models"
        )


class ModelKeeper:
    """Writes the models that the settings ask for into ``models/`` of a run's folder.

    Args:
        folder: of the run.
        settings: of the run.
        data: of the run.
        loop: runs the rounds.
        grid: holds the clients' states; None: nodes of Flower's do.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        data: FederatedData,
        loop: RoundLoop,
        grid: CohortGrid[Any] | None,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._data = data
        self._loop = loop
        self._grid = grid
        self._modules: dict[tuple[str, InputShape], nn.Module] = {}

    def after_round(self) -> None:
        """Keep this round's models where they are the best so far; a later round may be better.

        Raises:
            StorageError: they cannot be written.
        """
        if self._settings.keep_round == "selected" and self._selected == self._round:
            self._write()

    def finish(self) -> dict[str, Row]:
        """Keep the last round's models, if these are wanted, and describe what is kept.

        Returns:
            By name: ``file`` in the run's folder, ``sha256`` of the file, ``round``, and
            ``validation_accuracy`` of the weights.

        Raises:
            StorageError: they cannot be written.
        """
        if self._settings.keep_models == "none":
            return {}
        found = kept_models(self._folder)
        if self._settings.keep_round == "selected" and self._selected is not None:
            if found and all(row["round"] == self._selected for row in found.values()):
                return found
            if self._selected != self._round:
                self._loop.tell(
                    {
                        "round": self._round,
                        "event": "models not kept",
                        "reason": f"round {self._selected} was the best by validation and was over "
                        "when keep_round: selected was set; the last round's are kept instead",
                    }
                )
        self._write()
        return kept_models(self._folder)

    @property
    def _round(self) -> int:
        return 0 if self._loop.boundary is None else self._loop.boundary.round

    @property
    def _selected(self) -> int | None:
        return selected_round(self._loop.history).get("round")

    def _write(self) -> None:
        if self._settings.keep_models == "none":
            return
        target = self._folder / MODELS_FOLDER
        written: set[str] = set()
        with storing(self._folder):
            target.mkdir(exist_ok=True)
            for kept in self._models():
                file = f"{kept.name}{SUFFIX}"
                partial = target / f".{file}.partial"
                partial.write_bytes(self._content(kept))
                os.replace(partial, target / file)
                written.add(file)
            for old in target.iterdir():
                ours = old.suffix == SUFFIX or old.name.endswith(".partial")
                if ours and old.name not in written:
                    old.unlink()

    def _models(self) -> Iterator[_Kept]:
        asked = self._settings.keep_models
        servers = self._loop.finished_models()
        if asked == "server" or (asked == "auto" and (servers or self._grid is None)):
            yield from _named_servers(servers)
            return
        clients = self._best() if asked in ("auto", "best") else asked
        if clients == "clients":
            clients = range(self._settings.clients.count)
        yield from self._clients(clients)  # type: ignore[arg-type]

    def _best(self) -> Sequence[int]:
        """Return the client whose model is best on the validation rows; of equals, the first.

        Where something is promised, which does not cover validation rows, it is the first client.
        """
        if self._settings.privacy.on:
            return sorted(self._grid.trained_clients())[:1] if self._grid else ()
        return best_client(self._loop.history, self._grid.trained_clients() if self._grid else ())

    def _clients(self, clients: Sequence[int]) -> Iterator[_Kept]:
        assert self._grid is not None  # noqa: S101
        states = self._grid.client_states(clients)
        for client, state in zip(clients, states, strict=True):
            if state is None:
                reason = "it never trained: its weights are those that the seed gives"
                event = "model not kept"
                row = {"round": self._round, "client": client, "event": event, "reason": reason}
                self._loop.tell(row)
                continue
            # Of several models the first is the one that is judged.
            name, model = next(iter(named_models(self._loop.architecture(client)).items()))
            about: dict[str, Any] = {"whose": f"client {client}", "client": client}
            if self._data.client_names:
                about["client_name"] = self._data.client_names[client]
            yield _Kept(f"client-{client}", model, state.models[name].weights, about)

    def _content(self, kept: _Kept) -> bytes:
        settings = self._settings
        client = kept.about.get("client")
        data = self._data if client is None else self._data.of_client(client)
        module = self._module(kept.model, data)
        module.load_state_dict({name: as_tensor(array) for name, array in kept.weights.items()})
        info = ModelInfo(
            model=kept.model,
            input_shape=data.input_shape.sides,
            vocabulary=data.vocabulary,
            reading=data.reading,
            class_names=data.class_names,
            channel_mean=float_tuple(data.channel_mean),
            channel_std=float_tuple(data.channel_std),
            trained={
                "name": settings.name,
                "strategy": settings.strategy.name,
                "seed": settings.seed,
                **kept.about,
                "round": self._round,
                "validation_accuracy": _accuracy(module, data),
            },
        )
        return model_content(module.state_dict(), info)

    def _module(self, model: ModelSettings, data: FederatedData) -> nn.Module:
        """Return a module of an architecture, in evaluation mode; one for all of its models."""
        key = model.key, data.input_shape
        if key not in self._modules:
            self._modules[key] = build_model(
                model, input_shape=data.input_shape, num_classes=data.num_classes, seed=0
            ).eval()
        return self._modules[key]


def best_client(history: History, trained: Sequence[int]) -> Sequence[int]:
    """Return the one client whose last judged model was best on the validation rows.

    Args:
        history: what the rounds measured; a client that was left out is not chosen.
        trained: whose models there are; of others there is nothing to keep.
    """
    judged = {
        client: history.clients[client]["validation_accuracy"]
        for client in trained
        if client in history.clients and not history.clients[client].get("left_out")
    }
    if not judged:
        return trained[:1]
    # Who was judged in an earlier round only has another model now.
    last = max(history.clients[client]["round"] for client in judged)
    fresh = [client for client in judged if history.clients[client]["round"] == last]
    return [max(fresh, key=lambda client: (judged[client], -client))]


def _named_servers(servers: Mapping[str, FinishedModel]) -> Iterator[_Kept]:
    """Give the server's models names that files can have: ``server``, or ``server-mlp``, ...."""
    taken: set[str] = set()
    for own, finished in servers.items():
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", finished.model.name)
        name = "server" if len(servers) == 1 else f"server-{short}"
        number = 1
        while name in taken:
            number += 1
            name = f"server-{short}-{number}"
        taken.add(name)
        about = {"whose": "server", "model": own if own.isidentifier() else finished.model.label}
        yield _Kept(name, finished.model, finished.weights, about)


def kept_models(folder: Path) -> dict[str, Row]:
    """Return what is kept in the folder of a run, by name; see `ModelKeeper.finish`.

    Code of one's own that a file names is not run.
    """
    from fedkd.own_code import asking
    from fedkd.trained.files import ModelFileError, read_info
    from sim.settings.permission import looking

    found: dict[str, Row] = {}
    for path in model_files(folder):
        try:
            with asking(looking):
                info = read_info(path)
        except ModelFileError:
            continue
        if info is not None:
            found[path.stem] = {
                "file": f"{MODELS_FOLDER}/{path.name}",
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "round": info.trained.get("round"),
                "validation_accuracy": info.trained.get("validation_accuracy"),
            }
    return found


def kept_otherwise(folder: Path, settings: Settings) -> str:
    """Say that a finished run kept other models than are asked for now; empty where it did not."""
    if not is_finished(folder):
        return ""
    before = read_yaml(folder / SETTINGS_FILE, fast=True)
    now = settings.to_table()
    differs = [
        f"{key}: {before.get(key)} then, {now[key]} now"
        for key in ("keep_models", "keep_round")
        if before.get(key) != now[key]
    ]
    if not differs:
        return ""
    return f"finished already, and keeps what it kept ({'; '.join(differs)})"


def model_files(folder: Path) -> list[Path]:
    """Return the files of models in the folder of a run, by name; clients in their order."""

    def order(path: Path) -> tuple[str, int]:
        name, _, number = path.stem.rpartition("-")
        return (name, int(number)) if number.isdigit() else (path.stem, -1)

    there = (folder / MODELS_FOLDER).glob(f"[!.]*{SUFFIX}")
    return sorted(there, key=order)


def _accuracy(module: nn.Module, data: FederatedData) -> float:
    """Return the share of validation rows that a model gets right by its logits."""
    inputs = as_tensor(data.validation_inputs)
    with torch.inference_mode():
        classes = [module(some).argmax(-1).numpy() for some in inputs.split(PREDICT_ROWS)]
    return float((np.concatenate(classes) == data.validation_labels).mean())
