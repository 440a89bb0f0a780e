"""`distill`: one distillation from settings to a run folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkd.distillation.fit.workshop import EpochListener
from fedkd.distillation.judging.diagnostics import diagnose
from fedkd.distillation.judging.result import Distillation
from fedkd.distillation.run import running as library
from fedkd.distillation.run.checking import check
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.threads import computing_threads
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
    digests = recorder.models(distillation.models)
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


@contextmanager
def settings_at_fault() -> Iterator[None]:
    """What the library refuses is a setting that cannot work, named in the message."""
    try:
        yield
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(" ".join(str(error).split())) from error
