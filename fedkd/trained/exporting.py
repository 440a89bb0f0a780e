"""A trained model in the formats of others: ``torch.export`` and ONNX, checked after writing."""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.randomness import Purpose, generator_for
from fedkd.trained.files import LoadedModel, ModelInfo

Format = Literal["torch", "onnx"]

ENDINGS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}

TOLERANCE = 1e-4
"""The largest difference of any logit, as a share of the largest logit or of 1, that counts as
agreement: float32 rounds at 6e-8, and another runtime may sum in another order."""

CHECKED_ROWS = (1, 7, 64)
"""Sizes of the random batches on which the file is compared with the model."""

ABOUT = ("class_names", "feature_names", "inputs", "fedkd")
"""What an exported file says of its model, each as JSON; see `about`."""

INPUT, OUTPUT = "inputs", "logits"
"""What the one input and the one output are called in an ONNX file."""


class ExportError(RuntimeError):
    """A model that cannot be exported, or a file that does not agree with it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export left.

    Attributes:
        path: of the file.
        largest_difference: of any logit between file and model, over all batches that were tried.
        rows: how many inputs were tried.
    """

    path: Path
    largest_difference: float
    rows: int


class Standardised(nn.Module):
    """A model that takes inputs as they are read, such as pixels in [0, 1]."""

    def __init__(self, module: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardise the inputs, and return their logits."""
        logits: Tensor = self.module((inputs - self.mean) / self.std)
        return logits


def export_model(
    loaded: LoadedModel,
    path: Path,
    *,
    format: Format,
    standardise: bool = True,
    rows: Float[np.ndarray, "rows *shape"] | None = None,
) -> Exported:
    """Write a model in a format of others, read it again, and compare both.

    The file takes batches of any size, ``[rows, *input_shape]`` in float32, and gives logits
    ``[rows, classes]``. It says what `about` does: as ``metadata_props`` in ONNX, as extra files
    ``<name>.json`` in that of ``torch.export``.

    Args:
        loaded: the model.
        path: where to write.
        format: ``torch``: by ``torch.export``, opened with ``torch.export.load``; ``onnx``: by
            ``torch.onnx.export``, for any ONNX runtime.
        standardise: put the standardisation into the file, so that it takes pixels in [0, 1].
        rows: inputs to compare on besides random ones; pixels in [0, 1].

    Raises:
        ExportError: the exporter refuses the model, a package is missing, or the file gives
            other logits than the model: by more than `TOLERANCE` of the largest, or of 1.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        exported = _exported(loaded, partial, format, rows, standardise=standardise)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return replace(exported, path=path)


def _exported(
    loaded: LoadedModel, path: Path, format: Format, rows: Any, *, standardise: bool
) -> Exported:
    module = loaded.module
    if standardise:
        module = Standardised(module, *loaded.scale)
    module = module.eval()
    shape = loaded.input_shape
    rng = generator_for(0, Purpose.EVALUATION)
    write = {"torch": _write_torch, "onnx": _write_onnx}[format]
    try:
        with _quiet(), _plain_attention(), torch.no_grad():
            write(module, _drawn(rng, 3, shape), path, about(loaded.info, standardise=standardise))
    except ExportError:
        raise
    # The exporters raise types of their own, and the model may be anybody's.
    except Exception as error:
        raise ExportError(
            f"{format} cannot export model {loaded.info.model.label!r}: {_told(error)}"
        ) from error
    batches = [_drawn(rng, size, shape) for size in CHECKED_ROWS]
    if rows is not None and len(rows):
        pixels = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
        batches.append(pixels if standardise else loaded.standardised(pixels))
    read = {"torch": _read_torch, "onnx": _read_onnx}[format]
    with _quiet():
        answers = read(path)
        largest, scale = 0.0, 1.0
        for batch in batches:
            with torch.no_grad():
                expected = module(batch)
            try:
                given = answers(batch)
            except Exception as error:
                raise ExportError(
                    f"the file cannot answer {len(batch)} inputs: {_told(error)}"
                ) from error
            if given.shape != expected.shape:
                raise ExportError(
                    f"the file gives {list(given.shape)} for {len(batch)} inputs, the model "
                    f"{list(expected.shape)}"
                )
            largest = max(largest, float((given - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
    # NaN is no agreement either.
    if not largest <= TOLERANCE * scale:
        raise ExportError(
            "the file does not agree with the model and is not kept: logits differ by up to "
            f"{largest:.3g}, of a largest of {scale:.3g}; at most {TOLERANCE * scale:.3g} would be "
            "rounding"
        )
    return Exported(path, largest, sum(map(len, batches)))


def about(info: ModelInfo, *, standardise: bool) -> dict[str, str]:
    """Return what a file has to say so that somebody else can use the model, each as JSON.

    Args:
        info: of the model.
        standardise: whether the file itself standardises its inputs.

    Returns:
        ``class_names`` in the order of the logits; ``feature_names`` in the order of an input
        (empty where inputs are no columns of a table); ``inputs``: ``as read`` or
        ``standardised``; ``fedkd``: all that the model's own file says, see `ModelInfo`.
    """
    values = (
        list(info.class_names),
        list(info.reading.feature_names),
        "as read" if standardise else "standardised",
        info.model_dump(mode="json", by_alias=True),
    )
    told = (json.dumps(value, ensure_ascii=False) for value in values)
    return dict(zip(ABOUT, told, strict=True))


def _drawn(rng: np.random.Generator, rows: int, shape: Sequence[int]) -> Tensor:
    """Return inputs in [0, 1)."""
    return torch.from_numpy(rng.random((rows, *shape), dtype=np.float32))


def _told(error: Exception) -> str:
    """Return what went wrong on one line, and what helps where a model fixes the batch's size."""
    lines = str(error).strip().splitlines()
    text = str(error)
    fixed = "specialized" in text or ("Got: 1 Expected: 3" in text)
    hint = "; it fixes the number of rows: write x.shape[0] in the model in the place of len(x)"
    return f"{type(error).__name__}: {lines[0] if lines else ''}" + hint * fixed


def check_format(format: str) -> Format:
    """Return the format, if it is one and what it needs is installed.

    Raises:
        ExportError: it is none, or names the package that is missing.
    """
    if format not in get_args(Format):
        raise ExportError(f"format must be {' or '.join(get_args(Format))}, got {format!r}")
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"format onnx needs {', '.join(missing)}: pip install 'fedkd[onnx]'; format torch "
            "needs nothing else"
        )
    return format  # type: ignore[return-value]


def _write_torch(module: nn.Module, example: Tensor, path: Path, told: Mapping[str, str]) -> None:
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: rows},))
    extra_files = {f"{name}.json": text for name, text in told.items()}
    torch.export.save(program, path, extra_files=extra_files)


def _read_torch(path: Path) -> Any:
    return torch.export.load(path).module()


def _write_onnx(module: nn.Module, example: Tensor, path: Path, told: Mapping[str, str]) -> None:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("rows", min=1)},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None  # noqa: S101
    program.model.metadata_props.update(told)
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answers(batch: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: batch.numpy()})
        return torch.from_numpy(logits)

    return answers


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Take attention apart: its fused form in evaluation mode is none that exporters know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters remark while they do as they are told."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
