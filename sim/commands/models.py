"""Models that were kept: found in a run's folder, and opened."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedkd.names import nearest
from fedkd.trained.files import LoadedModel
from fedkd.trained.files import load_model as load_file
from sim.keeping.models import model_files
from sim.keeping.records import SETTINGS_FILE
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
    """
    file = find_model(Path(path), model)
    try:
        return load_file(file, permit=permit_of((), allow))
    except ValueError as error:
        raise SettingsError(str(error)) from None


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
