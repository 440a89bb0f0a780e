"""`attack`: attacks on a finished run, and where their figures are kept."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedkd.data.partition_settings import NaturalPartition
from fedkd.training import Arrays
from sim.attacks.evidence import Tell, attacked_data, evidence_of
from sim.attacks.inversion import inversion_of
from sim.attacks.labels import labels_of
from sim.attacks.membership import (
    Figures,
    Membership,
    judged,
    learnt_by_heart,
    look_control,
    negative_control,
    positive_control,
)
from sim.attacks.readings import UnreadableError
from sim.attacks.scene import PLACES, Scene
from sim.attacks.settings import AttackSettings
from sim.attacks.shadows import Made, learn_alone, shadow_seed
from sim.attacks.stealing import stealing_of
from sim.engine.runtime import fix_numerics
from sim.keeping.exchange import CLIENTS_FILE, KEPT_FOLDER
from sim.keeping.identity import data_digest, numbers_of
from sim.keeping.parts import DamagedFileError
from sim.keeping.records import (
    is_finished,
    read_result,
    storing,
    to_json,
    write_text,
)
from sim.reports.runs import ATTACKS_FILE
from sim.server.observers import Row
from sim.settings import Settings, SettingsError

SHELF = ".shadows"
"""Folder beside runs of one name, or of one study, for models that attacks on several share."""

CONTROL = "control "
"""Begins the names under which models of the positive control are kept there."""

CURVE_POINTS = 200
"""Points of a ROC curve that are kept at most."""


@dataclass(frozen=True)
class AttackResult:
    """What attacks on a run found.

    Attributes:
        folder: of the run.
        row: plain values, the content of ``attacks.json``.
    """

    folder: Path
    row: Row

    @property
    def path(self) -> Path:
        """The file of the figures."""
        return self.folder / ATTACKS_FILE


def attack(
    folder: Path,
    settings: Settings,
    wanted: AttackSettings,
    *,
    tell: Tell = lambda _: None,
) -> AttackResult:
    """Attack a finished run.

    Args:
        folder: of the run.
        settings: of the run.
        wanted: which attacks, and how.
        tell: is told of progress, a line at a time.

    Returns:
        What was found; it is in ``attacks.json`` in the run's folder as well.

    Raises:
        SettingsError: the run is not finished, or cannot be attacked; names the setting.
        DamagedFileError: what was kept of the run is not of its clients.
        StorageError: the folder cannot be written.
    """
    if not is_finished(folder):
        raise SettingsError(
            f"{folder} is no finished run: fedkd run --resume {folder} ends it, then attack it"
        )
    if not wanted.kinds:
        raise SettingsError(
            "attacks must be all or some of membership, labels, inversion, stealing"
        )
    started = time.perf_counter()
    fix_numerics(torch.device("cpu"))
    data = attacked_data(settings)
    evidence = evidence_of(folder, settings, data, tell)
    shelf = settings.output / settings.name / SHELF
    keep = _Shelf(shelf, settings, wanted, data_digest(data)).keep
    scene = Scene(settings, wanted, data, evidence, tell, keep)
    for client in scene.clients:
        shapes = {name: array.shape for name, array in evidence.models[client].items()}
        if shapes != scene.bench.shapes(scene.model_of(client)):
            path = folder / KEPT_FOLDER / CLIENTS_FILE
            raise DamagedFileError(
                path,
                f"client {client} has weights of another model; without {KEPT_FOLDER}/ the run is "
                "repeated from its seed",
            )
    row: Row = {
        "attacks": wanted.model_dump(mode="json"),
        "run": read_result(folder).get("weights_sha256"),
        "clients": list(scene.clients),
    }
    if "membership" in wanted.kinds:
        row["membership"] = _membership(scene)
    for kind, made in (
        ("labels", labels_of),
        ("inversion", inversion_of),
        ("stealing", stealing_of),
    ):
        if kind in wanted.kinds:
            tell(f"{kind}")
            row[kind] = made(scene)
    row["seconds"] = time.perf_counter() - started
    write_text(folder / ATTACKS_FILE, to_json(row, indent=1) + "\n")
    return AttackResult(folder, row)


def is_attacked(folder: Path, wanted: AttackSettings) -> bool:
    """Tell whether a run was attacked so before, as it is now."""
    row = read_attacks(folder)
    return (
        row is not None
        and row.get("attacks") == wanted.model_dump(mode="json")
        and row.get("run") == read_result(folder).get("weights_sha256")
    )


def read_attacks(folder: Path) -> Row | None:
    """Return what attacks on a run found; None: nobody attacked it, or the file is no table."""
    path = folder / ATTACKS_FILE
    if not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) else None


def _membership(scene: Scene) -> Row:
    if isinstance(scene.settings.data.partition, NaturalPartition):
        return {
            "missing": "clients are dealt rows by whose they are (data.partition.kind: natural), "
            "and test rows are other people's: members would be told by whose they are"
        }
    places: Row = {}
    for place in PLACES:
        scene.tell(f"membership, from the {place}")
        try:
            seen = scene.seen_from(place)
        except UnreadableError as error:
            places[place] = {"missing": str(error)}
            continue
        places[place] = _row(judged(seen))
        if place == "model":
            negative = _row(negative_control(seen, scene.settings.seed))
            look = _row(look_control(seen))
    scene.tell("membership, positive control")
    by_heart = learnt_by_heart(scene.settings)
    wanted = scene.wanted

    def learn(pool: Any, models: Sequence[Any], rows: Sequence[np.ndarray]) -> list[Arrays]:
        seed = shadow_seed(scene.settings, 1)
        made = scene.keep(
            CONTROL + models[0].key,
            lambda: learn_alone(by_heart, scene.data, pool, models, rows, seed, scene.tell),
        )
        # All of them had their turn: see `learnt_by_heart`.
        return [own for own in made if own is not None]

    positive = positive_control(
        scene.settings,
        scene.pool,
        scene.targets[0].model,
        scene.bench,
        learn,
        models=wanted.controls,
        wrong=wanted.wrong,
        population=scene.data.validation_inputs,
        population_labels=scene.data.validation_labels,
    )
    return {
        "places": places,
        "controls": {"positive": _row(positive), "negative": negative, "look": look},
    }


def _row(found: Membership) -> Row:
    return {
        "figures": [_figures(each) for each in found.figures],
        "missing": dict(found.missing),
    }


def _figures(found: Figures) -> Row:
    return {
        "attack": found.attack,
        "auc": _interval(found.auc),
        "rates": {str(rate): _interval(value) for rate, value in found.rates.items()},
        "members": found.members,
        "others": found.others,
        "curve": _curve(found),
    }


def _interval(value: Any) -> list[float] | None:
    return None if value is None else [value.value, value.low, value.high]


def _curve(found: Figures) -> Row:
    """Thin a curve out, so that it looks the same on a logarithmic axis."""
    false, true = found.curve.false_positive_rates, found.curve.true_positive_rates
    if len(false) > CURVE_POINTS:
        least = 1 / max(found.others, 1)
        wanted = np.concatenate([[0], np.geomspace(least, 1, CURVE_POINTS - 1)])
        # The last point that passes no more: of a step its top.
        places = np.unique(np.searchsorted(false, wanted, side="right") - 1)
        false, true = false[places], true[places]
    return {
        "false": [round(float(x), 6) for x in false],
        "true": [round(float(x), 6) for x in true],
    }


class _Shelf:
    """Keeps what shadows learnt, for runs whose clients learn alike.

    Args:
        folder: where.
        settings: of the run.
        wanted: how many shadows there are, of whom.
        data: digest of the run's data.
    """

    def __init__(self, folder: Path, settings: Settings, wanted: AttackSettings, data: str) -> None:
        self._folder = folder
        numbers = numbers_of(settings)
        own = {
            path: value
            for path, value in numbers.items()
            if path.startswith(("clients.", "rounds", "seed", "data."))
        }
        asked = wanted.model_dump(mode="json", include={"controls", "wrong"})
        self._control_key = json.dumps([own, asked, data], sort_keys=True)
        if settings.privacy.mechanism.learns:
            own |= {p: value for p, value in numbers.items() if p.startswith("privacy.")}
        asked = wanted.model_dump(mode="json", include={"clients", "shadows"})
        self._key = json.dumps([own, asked, data], sort_keys=True)

    def keep(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what was made of this name before, or make it."""
        # Models of the control learn without privacy, whatever the run does.
        key = self._control_key if name.startswith(CONTROL) else self._key
        digest = hashlib.sha256(f"{name} {key}".encode()).hexdigest()
        path = self._folder / f"{digest[:32]}.safetensors"
        # What cannot be read is made again.
        with suppress(OSError, SafetensorError):
            return _apart(load_file(path))
        made = make()
        with storing(self._folder, goes_on="the same command"):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Attacks on two runs may share what they make, and make it at once.
            partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
            partial.write_bytes(save(_together(made)))
            partial.replace(path)
        return made


_NOBODY: Mapping[str, np.ndarray] = {"": np.empty(0, np.float32)}
"""Stands in a file for a shadow that never had its turn."""


def _together(models: Made) -> Arrays:
    return {
        f"{number}/{name}": np.ascontiguousarray(array)
        for number, own in enumerate(models)
        for name, array in (_NOBODY if own is None else own).items()
    }


def _apart(arrays: Mapping[str, np.ndarray]) -> Made:
    found: dict[int, Arrays] = {}
    for key, array in arrays.items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = array
    return [None if own.keys() == _NOBODY.keys() else own for _, own in sorted(found.items())]
