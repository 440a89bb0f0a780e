"""`distill`: one distillation from settings to a run folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedkd.compression.quantisation import quantised_header
from fedkd.distillation.fit.workshop import EpochListener
from fedkd.distillation.judging.diagnostics import diagnose
from fedkd.distillation.judging.result import Distillation
from fedkd.distillation.run import running as library
from fedkd.distillation.run.checking import check
from fedkd.distillation.run.finishing import QUANTISED_STUDENT
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.distillation.task.teachers import teacher_names
from fedkd.threads import computing_threads
from fedkd.trained.files import ModelInfo, describes, float_tuple
from sim.commands.distilling.folder import DistillFolder
from sim.commands.interruption import Interruption, interruptible
from sim.keeping.provenance import provenance_of
from sim.keeping.records import StorageError, make_folder, new_run_folder
from sim.keeping.records import read_result as read_row
from sim.server.observers import Row
from sim.settings import SettingsError
from sim.settings.tables import yaml_text


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What a distillation leaves behind.

    Attributes:
        settings: as resolved.
        folder: where everything is written.
        row: the content of ``result.json``: what every model is worth and costs.
    """

    settings: DistillSettings
    folder: Path
    row: Row


def nobody(_name: str, _row: Mapping[str, Any]) -> None:
    """Watch nothing."""


def prepare(settings: DistillSettings) -> Rows:
    """Load the rows and check everything that can be checked before anything trains.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    with settings_at_fault(), computing_threads(settings.threads):
        device = library.choose_device(settings.device)
        rows = load_rows(settings.data, seed=settings.seed, device=device)
        check(settings, rows)
    return rows


def distill(
    settings: DistillSettings | None = None,
    *,
    folder: Path | None = None,
    observe: EpochListener = nobody,
    goes_on: str = "repeat the command",
) -> DistillResult:
    """Train or load a teacher, distil a student, and keep what comes of it.

    Args:
        settings: what to run; the digits default if None.
        folder: where to write; by default a new folder ``<output>/<name>/<time>-<id>``. What an
            interrupted distillation left in it is replaced.
        observe: told after every epoch of every model.
        goes_on: what to do after a `sim.keeping.records.StorageError`.

    Returns:
        The result; the same is on disk in ``result.json``.

    Raises:
        SettingsError: names the setting that cannot work, before anything trains wherever it can
            be known.
        FolderBusyError: another process writes into the folder.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM; the epochs until then are in the folder.
    """
    settings = settings or DistillSettings()
    rows = prepare(settings)
    identity = provenance_of(settings).to_row()
    if folder is None:
        folder = new_run_folder(settings.output, settings.name, yaml_text(settings.to_table()))
    else:
        make_folder(settings.output, folder)
    row: Row = {
        "status": "failed",
        "name": settings.name,
        "method": settings.method.name,
        "seed": settings.seed,
        "folder": str(folder),
    }
    started = time.monotonic()
    with (
        DistillFolder(
            folder, settings, device=rows.device.type, goes_on=goes_on, identity=identity
        ) as recorder,
        computing_threads(settings.threads),
    ):

        def watch(name: str, epoch: Mapping[str, Any]) -> None:
            recorder.epoch(name, epoch)
            observe(name, epoch)

        try:
            with interruptible(), settings_at_fault():
                distillation = library.distill(settings, rows=rows, observe=watch)
                row |= _measured(distillation, recorder)
            row["status"] = "finished"
        except KeyboardInterrupt as stop:
            row["status"] = "interrupted"
            raise Interruption.of(stop, folder) from None
        finally:
            row["seconds"] = time.monotonic() - started
            finished = row["status"] == "finished"
            with nullcontext() if finished else suppress(StorageError):
                recorder.result(row)
    return DistillResult(settings, folder, row)


def read_result(settings: DistillSettings, folder: Path) -> DistillResult:
    """Read a distillation that is finished."""
    return DistillResult(settings, folder, read_row(folder, rows=True))


def _measured(distillation: Distillation, recorder: DistillFolder) -> Row:
    """Write models and diagnostics, and return what every model is worth and costs."""
    rows = distillation.rows
    recorder.diagnostics(diagnose(distillation))
    digests = recorder.models(distillation.models, infos_of(distillation))
    measured = {}
    for name, scores in distillation.scores.items():
        cost = asdict(distillation.costs[name])
        latency = {str(size): seconds for size, seconds in cost.pop("latency_s").items()}
        measured[name] = {**scores, **cost, "latency_s": latency, "weights_sha256": digests[name]}
    return {
        "weights_sha256": digests["student"],
        "rows": {
            "transfer": len(rows.inputs),
            "labelled": rows.labelled,
            "validation": len(rows.validation_inputs),
            "test": len(rows.test_inputs),
        },
        "models": measured,
        "notes": distillation.notes,
    }


def infos_of(distillation: Distillation) -> dict[str, ModelInfo]:
    """Say of each model what it is, where the settings name its architecture.

    A teacher with a head for each task, or a student that a method built around, is none of the
    architectures by name.
    """
    settings, rows = distillation.settings, distillation.rows
    teachers = settings.teacher.models
    named = {"student": settings.student.model, "twin": settings.student.model}
    named |= dict(zip(teacher_names(len(teachers)), teachers, strict=True))
    named[QUANTISED_STUDENT] = settings.student.model
    found = {}
    for name, module in distillation.models.items():
        if name not in named:
            continue
        header: Any = quantised_header(module) or {}
        info = ModelInfo(
            model=named[name],
            input_shape=rows.input_shape.sides,
            vocabulary=rows.vocabulary,
            reading=rows.reading,
            class_names=rows.class_names,
            channel_mean=float_tuple(rows.mean.flatten().tolist()),
            channel_std=float_tuple(rows.std.flatten().tolist()),
            activations=header.get("activations"),
            trained={
                "name": settings.name,
                "method": settings.method.name,
                "seed": settings.seed,
                "whose": name,
                "validation_accuracy": _validation_accuracy(module, rows),
            },
        )
        if describes(info, module):
            found[name] = info
    return found


def _validation_accuracy(module: nn.Module, rows: Rows) -> float:
    classes = predict_logits(module, rows.validation_inputs).argmax(-1)
    return float((classes == rows.validation_labels).float().mean())


@contextmanager
def settings_at_fault() -> Iterator[None]:
    """What the library refuses is a setting that cannot work, named in the message."""
    try:
        yield
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(" ".join(str(error).split())) from error
