"""Models that were kept: found in a run's folder, and opened."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.names import nearest
from fedkd.trained.exporting import ENDINGS, Exported, ExportError, check_format, export_model
from fedkd.trained.files import LoadedModel, ModelInfo
from fedkd.trained.files import load_model as load_file
from fedkd.trained.inputs import NoInputsError, files_in, read_pieces
from fedkd.trained.predicting import Prediction, predict_files
from sim.keeping.models import model_files
from sim.keeping.records import SETTINGS_FILE, storing
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.settings import SettingsError
from sim.settings.permission import permit_of

STUDENT = "student"
"""Which of a distillation's models is meant where none is named."""


def load_model(
    path: str | os.PathLike[str], *, model: str | None = None, allow: Sequence[str] = ()
) -> LoadedModel:
    """Open a trained model, ready to predict.

    Args:
        path: a model's file (``.safetensors``), or the folder of a run or a distillation that kept
            models.
        model: which one, by the name of its file without the ending, such as ``client-3``; needed
            where a run kept several. Of a distillation the student is meant.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Returns:
        The module in evaluation mode, with what it needs: `LoadedModel.predict` takes pixels in
        [0, 1]; ``class_names``, ``input_shape``, ``info``.

    Raises:
        SettingsError: there is no such model, the file is damaged, does not say what its model is,
            does not fit it, or names code that is not allowed; says what would work.

    Examples:
        >>> import fedkd
        >>> words = ["rounds=1", "clients.count=2", "clients.models=[mlp]", "engine.backend=inline"]
        >>> result = fedkd.run(fedkd.load_settings(None, words))
        >>> model = fedkd.load_model(result.folder)
        >>> model.info.model.name, model.info.input_shape, len(model.info.class_names)
        ('mlp', (1, 8, 8), 10)
    """
    file = find_model(Path(path), model)
    try:
        return load_file(file, permit=permit_of((), allow))
    except ValueError as error:
        raise SettingsError(str(error)) from None


SHOWN = 20
"""Predictions that a table shows; a file holds all."""

TOLD = 8
"""Classes that the line below a table counts, the most frequent ones."""

TRIED_ROWS = 256
"""Inputs from files on which an export is compared with the model, at most."""


@dataclass
class Predictions:
    """What a model said of the inputs in files.

    Attributes:
        model: that said it.
        each: of all inputs, in the order of the files; of a file for machines only the first
            `SHOWN` are held.
        counts: how many inputs of each class.
        problems: inputs that could not be read, with the reason.
        output: the file that holds all of them; None where none was asked for.
    """

    model: LoadedModel
    each: list[Prediction] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Prediction] = field(default_factory=list)
    output: Path | None = None

    @property
    def count(self) -> int:
        """How many inputs were predicted."""
        return self.counts.total()

    def to_row(self) -> dict[str, Any]:
        """Return plain values."""
        names = self.model.class_names
        return {
            "model": str(self.model.path),
            "classes": list(names),
            "predictions": [
                {
                    "file": str(each.file),
                    **({} if each.row is None else {"row": each.row}),
                    **(
                        {"error": each.problem}
                        if each.probabilities is None
                        else {
                            "class": each.class_name,
                            "probability": each.probability,
                            "probabilities": [float(p) for p in each.probabilities],
                        }
                    ),
                }
                for each in self.each
            ],
            "output": None if self.output is None else str(self.output),
        }

    def table(self) -> FittedTable:
        """Return the first predictions as a table."""
        shown = [each for each in self.each if not each.problem][:SHOWN]
        more = self.count - len(shown)
        ranked = self.counts.most_common()
        told = [f"{number} x {name}" for name, number in ranked[:TOLD]]
        if others := [number for _, number in ranked[TOLD:]]:
            told.append(f"{sum(others)} of {len(others)} more class{'es' * (len(others) > 1)}")
        caption = f"{self.count} inputs: {', '.join(told)}" if self.count > 1 else ""
        if more:
            caption += f"; {more} not shown"
            caption += "" if self.output else ": --output or --json gives all"
        return FittedTable(
            label="input",
            labels=[each.where for each in shown],
            columns=[
                Column(title="class", cells=[each.class_name or NOTHING for each in shown], rank=1),
                Column(
                    title="probability", cells=[f"{each.probability:.3f}" for each in shown], rank=2
                ),
            ],
            title=f"{self.model.path}: {self.model.info.model.label}",
            caption=caption,
        )


def _nobody(_done: int, _all: int) -> None:
    return None


def predict(
    path: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    *,
    model: str | None = None,
    column: str | None = None,
    output: str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    keep_all: bool = True,
    reached: Callable[[int, int], None] = _nobody,
) -> Predictions:
    """Predict the inputs in files with a model that was kept.

    Args:
        path: of the model, see `load_model`.
        files: pictures, tables (Parquet, CSV, NPZ), or folders of them.
        model: which of a run's models.
        column: of tables, with pictures or texts; None: that of training, or the only one.
        output: a CSV file to be written, with the probability of every class.
        allow: whose code the model's file may name.
        keep_all: hold all predictions, and not the first few.
        reached: told how many of how many files are done.

    Raises:
        SettingsError: there is no such model, or no inputs.
        StorageError: ``output`` cannot be written.
    """
    loaded = load_model(path, model=model, allow=allow)
    found = Predictions(loaded, output=None if output is None else Path(output))
    try:
        each = predict_files(loaded, [Path(file) for file in files], column=column, reached=reached)
        if found.output is None:
            for prediction in each:
                _note(found, prediction, keep_all)
            return found
        with (
            storing(found.output, goes_on="repeat the command"),
            found.output.open("w", encoding="utf-8", newline="") as target,
        ):
            writer = csv.writer(target)
            head = ["file", "row", "class", "probability"]
            writer.writerow([*head, *(f"p({name})" for name in loaded.class_names), "error"])
            for prediction in each:
                _note(found, prediction, keep_all)
                writer.writerow(_cells(prediction, len(loaded.class_names)))
    except NoInputsError as error:
        raise SettingsError(str(error)) from None
    return found


def _note(found: Predictions, prediction: Prediction, keep_all: bool) -> None:
    if prediction.problem:
        found.problems.append(prediction)
    else:
        found.counts[prediction.class_name] += 1
    if keep_all or len(found.each) < SHOWN:
        found.each.append(prediction)


def _cells(prediction: Prediction, classes: int) -> list[object]:
    row = "" if prediction.row is None else prediction.row
    if prediction.probabilities is None:
        return [prediction.file, row, *[""] * (classes + 2), prediction.problem]
    probabilities = [f"{p:.6g}" for p in prediction.probabilities]
    chosen = [prediction.class_name, f"{prediction.probability:.6g}"]
    return [prediction.file, row, *chosen, *probabilities, ""]


def export(
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    model: str | None = None,
    output: str | os.PathLike[str] | None = None,
    standardise: bool = True,
    inputs: Sequence[str | os.PathLike[str]] = (),
    allow: Sequence[str] = (),
) -> Exported:
    """Write a model that was kept in a format of others, and compare the file with the model.

    Args:
        path: of the model, see `load_model`.
        format: ``onnx`` or ``torch`` (``torch.export``).
        model: which of a run's models.
        output: the file; None: beside the model's, with the format's ending.
        standardise: put the standardisation into the file, so that it takes pixels in [0, 1].
        inputs: files on whose first inputs file and model are compared as well.
        allow: whose code the model's file may name.

    Raises:
        SettingsError: there is no such model or no such format, a package is missing, or
            ``inputs`` cannot be read.
        ExportError: the model cannot be exported, or the file does not agree with it.
        StorageError: the file cannot be written.
    """
    try:
        known = check_format(format)
    except ExportError as error:
        raise SettingsError(str(error)) from None
    loaded = load_model(path, model=model, allow=allow)
    target = loaded.path.with_suffix(ENDINGS[known]) if output is None else Path(output)
    if not target.parent.is_dir():
        raise SettingsError(f"--output {str(target)!r}: there is no folder {str(target.parent)!r}")
    rows = _tried_rows([Path(each) for each in inputs], loaded.info)
    with storing(target, goes_on="repeat the command"):
        return export_model(loaded, target, format=known, standardise=standardise, rows=rows)


def _tried_rows(paths: Sequence[Path], info: ModelInfo) -> np.ndarray | None:
    """Return the first inputs of files; None where no file is named.

    Raises:
        SettingsError: one of them cannot be read; names it, and why.
    """
    found: list[np.ndarray] = []
    try:
        for file in files_in(paths, info):
            for piece in read_pieces(file, info):
                if piece.inputs is None:
                    raise SettingsError(f"--inputs {piece.where!r}: {piece.problem}")
                found.append(piece.inputs)
                if sum(map(len, found)) >= TRIED_ROWS:
                    return np.concatenate(found)[:TRIED_ROWS]
    except NoInputsError as error:
        raise SettingsError(str(error)) from None
    return np.concatenate(found) if found else None


def find_model(path: Path, model: str | None = None) -> Path:
    """Return the file of a model; see `load_model`.

    Raises:
        SettingsError: there is none, or more than one; says what there is.
    """
    if not path.is_dir():
        if model is not None:
            raise SettingsError(
                f"{str(path)!r} is no folder: of a file there is no model {model!r} to be chosen"
            )
        return path
    files = {file.stem: file for file in model_files(path)}
    if not files:
        kept = (path / SETTINGS_FILE).is_file()
        raise SettingsError(
            f"{str(path)!r} holds no models: "
            + (
                "the run has not ended, or had keep_models: none"
                if kept
                else "it is not the folder of a run"
            )
        )
    named = ", ".join(list(files)[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
    if model is None:
        if len(files) == 1 or STUDENT in files:
            return files.get(STUDENT) or next(iter(files.values()))
        raise SettingsError(
            f"{str(path)!r} holds {len(files)} models: name one with --model (model= in Python): "
            f"{named}"
        )
    if model not in files:
        raise SettingsError(
            f"{str(path)!r} holds no model {model!r}, but {named}{nearest(model, files)}"
        )
    return files[model]
