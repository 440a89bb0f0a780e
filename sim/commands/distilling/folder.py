"""The folder that a distillation leaves."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedkd.compression.cost import model_file
from fedkd.compression.pruning import dense_state
from fedkd.compression.quantisation import quantised_header
from fedkd.distillation.settings import DistillSettings
from fedkd.trained.files import ModelInfo, model_content
from sim.keeping.records import METRICS_FILE, RESULT_FILE, Recorder, storing, to_json, write_text
from sim.reports.distillation import DIAGNOSTICS_FILE
from sim.server.observers import Row
from sim.settings.tables import yaml_text

MODELS_FOLDER = "models"


class DistillFolder(Recorder):
    """Writes what happens in a distillation as it happens; a new one starts with empty files.

    Args:
        folder: exists already.
        settings: of the distillation.
        device: that it computes on.
        goes_on: what to do after a `sim.keeping.records.StorageError`.
        identity: what it is made of, see `sim.keeping.provenance`.
        anew: whether rows that are there already are removed.
    """

    def __init__(
        self,
        folder: Path,
        settings: DistillSettings,
        *,
        device: str,
        goes_on: str,
        identity: Row,
        anew: bool = True,
    ) -> None:
        super().__init__(
            folder,
            settings=yaml_text(settings.to_table()),
            device=device,
            files=(METRICS_FILE,),
            identity=identity,
            goes_on=goes_on,
        )
        if anew:
            self._files[METRICS_FILE].cut(0)
            (folder / RESULT_FILE).unlink(missing_ok=True)

    def __enter__(self) -> "DistillFolder":
        return self

    def epoch(self, model: str, row: Mapping[str, Any]) -> None:
        """Append what an epoch of a model measured."""
        plain = {key: value for key, value in row.items() if key != "epochs"}
        self.append(METRICS_FILE, [{"model": model, **plain}])

    def models(
        self, models: Mapping[str, nn.Module], infos: Mapping[str, ModelInfo]
    ) -> dict[str, str]:
        """Write all models as ``models/<name>.safetensors``; return SHA-256s of their tensors.

        Names of tensors are those of the plain model, so that ``teacher.weights`` can load them.

        Args:
            models: by name.
            infos: what they are, as far as it can be told.
        """
        digests = {}
        with storing(self.folder, goes_on=self._goes_on):
            target = self.folder / MODELS_FOLDER
            target.mkdir(exist_ok=True)
            for name, model in models.items():
                # Without what the file says of it, so that equal weights have equal digests.
                digests[name] = hashlib.sha256(model_file(model)).hexdigest()
                header = quantised_header(model)
                content = model_content(dense_state(model), infos.get(name), header)
                (target / f"{file_name(name)}.safetensors").write_bytes(content)
        return digests

    def diagnostics(self, row: Row) -> None:
        """Write what the report draws of the finished models."""
        with storing(self.folder, goes_on=self._goes_on):
            write_text(self.folder / DIAGNOSTICS_FILE, to_json(row) + "\n")


def file_name(model: str) -> str:
    """Turn the name of a model into the name of a file: ``teacher 1`` into ``teacher-1``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model)
