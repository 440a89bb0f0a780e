"""A trained model in one safetensors file: its tensors, and in the header what they are."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedkd import own_code
from fedkd.bounds import LONGEST_TEXT, Real, Whole
from fedkd.compression import QuantisationSettings, quantise
from fedkd.compression.pruning import dense_state
from fedkd.compression.storage import plain_tensors
from fedkd.data.reading import Reading
from fedkd.data.settings import LONGEST_SIDE
from fedkd.inputs import InputShape, per_channel
from fedkd.models import ModelSettings, build_model
from fedkd.names import printable

HEADER = "fedkd"
"""The key of a file's header under which `ModelInfo` stands, as JSON."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
"""How files are called that hold code to be run on reading."""

MOST_FEATURES = 10_000_000
"""Numbers of a list of features, or tokens of a text; sides of pictures are far shorter."""

EXPORTS = {".onnx": "onnxruntime", ".pt2": "torch.export.load"}
"""How exports are called, and what opens them."""

PREDICT_ROWS = 256
"""Rows that a model predicts at once."""

_Side = Annotated[Whole, Field(ge=1, le=MOST_FEATURES)]
_ClassName = Annotated[str, Field(max_length=LONGEST_TEXT)]


class ModelInfo(BaseModel):
    """What a file says of the model in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = Field(1, alias="format")
    model: ModelSettings
    """Architecture, with all options."""
    input_shape: tuple[_Side, ...]
    """Of one input: channels, height and width, or how many features or tokens."""
    vocabulary: Whole | None = Field(None, ge=3, le=2**24)
    """How many tokens texts are made of; None for other inputs."""
    class_names: tuple[_ClassName, ...] = Field(min_length=2, max_length=1_000_000)
    """In the order of the logits."""
    channel_mean: tuple[Real, ...]
    """What an input is standardised with: ``(pixel - channel_mean) / channel_std``, for each
    channel or feature; a single 0, and 1, for texts."""
    channel_std: tuple[Annotated[Real, Field(gt=0)], ...]
    reading: Reading = Reading()
    """How rows of tables become inputs: columns, categories, what encodes texts."""
    activations: Literal["float", "int8"] | None = None
    """Of a model with int8 weights: how its inputs are rounded; None: weights are floats."""
    trained: dict[str, JsonValue] = Field(default_factory=dict)
    """Where it is from, as far as it is known: ``run``, ``strategy``, ``seed``, ``whose`` (a client
    or the server), ``round``, ``validation_accuracy`` (of these weights, in [0, 1])."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "ModelInfo":
        shape = self.shape
        longest = max(self.input_shape[1:], default=0)
        if longest > LONGEST_SIDE:
            raise ValueError(f"sides must be at most {LONGEST_SIDE}, got {longest}")
        channels = 1 if shape.kind == "text" else self.input_shape[0]
        if not len(self.channel_mean) == len(self.channel_std) == channels:
            raise ValueError(
                f"channel_mean and channel_std need one number for each of {channels} channels"
            )
        width = self.reading.width
        if width is not None and (width,) != self.input_shape:
            raise ValueError(f"reading gives inputs of {width}, the model takes {shape}")
        for column in self.reading.columns:
            if column.width < 1 or (column.categories and len(column.categories) != column.width):
                raise ValueError(f"reading: column {column.name!r} has no width of its own")
        return self

    @property
    def shape(self) -> InputShape:
        """What one input is."""
        return InputShape(self.input_shape, self.vocabulary)

    def to_json(self) -> str:
        """Return it as the header holds it."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), ensure_ascii=False)


class ModelFileError(ValueError):
    """A file of a model that cannot be used; the text names it and says what would work."""


def model_content(
    tensors: Mapping[str, Tensor],
    info: ModelInfo | None,
    header: Mapping[str, str] | None = None,
) -> bytes:
    """Return a model as the content of a file.

    Args:
        tensors: parameters and buffers by their plain names.
        info: what they are; None where nobody can tell.
        header: what else the file says of itself, see `fedkd.compression.quantised_header`.
    """
    header = dict(header or {})
    if info is not None:
        header[HEADER] = info.to_json()
    return safetensors.torch.save(plain_tensors(tensors), header or None)


def read_info(path: Path) -> ModelInfo | None:
    """Return what a file says of its model; None where it says nothing.

    Code of others that it names has to be allowed where this is called, see
    `fedkd.own_code.asking`.

    Raises:
        ModelFileError: the file cannot be read, or says what no such file can.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        header: Mapping[str, str] = file.metadata() or {}
    if HEADER not in header:
        return None
    try:
        return ModelInfo.model_validate_json(header[HEADER])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in problem["loc"])
        told = printable(f"{place}: {problem['msg'].removeprefix('Value error, ')}".lstrip(": "))
        raise ModelFileError(f"{str(path)!r}: what it says of its model is wrong: {told}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        ModelFileError: it cannot be read.
    """
    with _reading(path):
        return safetensors.torch.load_file(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file that cannot be read inside the block; never open a pickle."""
    if path.suffix.lower() in EXPORTS:
        raise ModelFileError(
            f"{str(path)!r} is an export for {EXPORTS[path.suffix.lower()]}: open the .safetensors "
            "file that it was made from"
        )
    if path.suffix.lower() in PICKLES:
        raise ModelFileError(
            f"{str(path)!r}: files of this kind may run code when they are read, and are not read "
            "here: where you trust it, write its tensors with safetensors.torch.save_file("
            "torch.load(PATH, weights_only=True), 'weights.safetensors') and name that file"
        )
    try:
        yield
    except FileNotFoundError:
        raise ModelFileError(f"{str(path)!r} does not exist") from None
    except (OSError, SafetensorError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise ModelFileError(f"cannot read {str(path)!r}: {reason}") from None


def fill(model: nn.Module, tensors: Mapping[str, Tensor], file: str) -> None:
    """Copy the tensors of a file into a model.

    Args:
        model: of the file's architecture; left in the mode it has.
        tensors: all of its parameters and buffers.
        file: how the file is called in messages, with the setting that names it.

    Raises:
        ModelFileError: naming the file and the first tensors that do not fit.
    """
    own = {name: each for name, each in model.state_dict().items() if isinstance(each, Tensor)}
    problems = [f"it has no {_named(name)}" for name in own if name not in tensors]
    problems += [f"it has {_named(name)}, the model has none" for name in tensors.keys() - own]
    for name in own.keys() & tensors.keys():
        loaded, wanted = tensors[name], own[name]
        if loaded.shape != wanted.shape:
            problems.append(
                f"{_named(name)} is {list(loaded.shape)}, the model's {list(wanted.shape)}"
            )
        elif loaded.dtype != wanted.dtype:
            problems.append(
                f"{_named(name)} holds {_type(loaded)}, the model's {_type(wanted)}: save the "
                "weights as the model has them"
            )
        # A buffer may hold what the fresh model's holds, such as the minus infinity of a mask.
        elif not torch.isfinite(loaded).all() and not torch.equal(loaded, wanted.cpu()):
            problems.append(f"{_named(name)} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelFileError(
            f"{file} does not fit the model: {'; '.join(sorted(problems)[:3])}{more}"
        )
    model.load_state_dict(dict(tensors))


def _named(name: str) -> str:
    return printable(name[:100])


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model that is ready to predict.

    Attributes:
        module: maps standardised inputs ``[rows, *input_shape]`` to logits ``[rows, classes]``; in
            evaluation mode, without gradients, on the CPU.
        info: what its file says of it.
        path: of the file.
    """

    module: nn.Module
    info: ModelInfo
    path: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.info.class_names

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, height and width, or how many features or tokens."""
        return self.info.input_shape

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """What inputs are standardised with: mean and deviation, shaped to compute with a row."""
        mean, std = (
            per_channel(torch.tensor(each, dtype=torch.float32), len(self.input_shape))
            for each in (self.info.channel_mean, self.info.channel_std)
        )
        return mean, std

    def standardised(self, pixels: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows *shape"]:
        """Return what the module takes: ``(pixel - channel_mean) / channel_std``."""
        mean, std = self.scale
        return (pixels - mean) / std

    def logits(self, inputs: Any) -> Float[np.ndarray, "rows classes"]:
        """Return the logits of inputs; see `predict`."""
        if is_table(inputs):
            # It reads what this describes.
            from fedkd.trained.inputs import inputs_of_rows

            inputs = inputs_of_rows(inputs, self.info)
        encoder = self.info.reading.encoder
        if encoder is not None and isinstance(inputs, list | tuple) and all_texts(inputs):
            inputs = encoder.encode(list(inputs))
        pixels = torch.as_tensor(np.asarray(inputs))
        if not pixels.is_floating_point() and self.info.shape.kind == "pictures":
            raise ValueError(
                f"inputs must be pixels as floats in [0, 1], got {_type(pixels)}: divide bytes "
                "by 255"
            )
        if tuple(pixels.shape[1:]) != self.input_shape:
            raise ValueError(
                f"inputs must be [rows, {', '.join(map(str, self.input_shape))}], "
                f"got {list(pixels.shape)}"
            )
        pixels = pixels.float()
        with torch.inference_mode():
            pieces = [self.module(self.standardised(some)) for some in pixels.split(PREDICT_ROWS)]
        if not pieces:
            return np.empty((0, len(self.class_names)), np.float32)
        logits: np.ndarray = torch.cat(pieces).float().numpy()
        return logits

    def predict(self, inputs: Any) -> Float[np.ndarray, "rows classes"]:
        """Return the probability of each class for each input.

        Args:
            inputs: array or tensor ``[rows, *input_shape]``: pixels as floats in [0, 1], features
                as they were before they were standardised, which is done here, or numbers of
                tokens. A list of texts where the model learnt from a column of text. Rows of a
                table, a list of dicts or a dict of columns, where it learnt from a table: columns
                are found by their names, categories become numbers, more columns do no harm.

        Returns:
            float32 ``[rows, classes]``, in [0, 1]; each row sums to 1.

        Raises:
            ValueError: for another shape, whole numbers as pixels, or a row that lacks what the
                model takes; names the row and the column.
        """
        logits = torch.from_numpy(self.logits(inputs))
        probabilities: np.ndarray = F.softmax(logits, dim=-1).numpy()
        return probabilities


def describes(info: ModelInfo, module: nn.Module) -> bool:
    """Tell whether a module has the tensors of what it is said to be: names, shapes and types."""
    plain = build_model(
        info.model, input_shape=info.shape, num_classes=len(info.class_names), seed=0
    )
    if info.activations is not None:
        plain = quantise(plain, QuantisationSettings(activations=info.activations))
    one, other = (
        {name: (each.shape, each.dtype) for name, each in of.items()}
        for of in (plain.state_dict(), dense_state(module))
    )
    return one == other


def load_model(path: Path, *, permit: own_code.Permit = own_code.refuse) -> LoadedModel:
    """Read a model from its file.

    Args:
        path: of a file that a federation or ``fedkd distill`` wrote.
        permit: tells whether code of others that the file names may run.

    Raises:
        ModelFileError: the file cannot be read, does not say what its model is, or does not fit
            what it says.
        ValueError: it names code that is not permitted, or that fails.
    """
    with own_code.asking(permit):
        info = read_info(path)
        if info is None:
            raise ModelFileError(
                f"{str(path)!r} does not say what its model is: it was not written by fedkd run or "
                "fedkd distill, or its architecture is no setting of theirs"
            )
        module = build_model(
            info.model,
            input_shape=info.shape,
            num_classes=len(info.class_names),
            seed=0,
        )
    if info.activations is not None:
        module = quantise(module, QuantisationSettings(activations=info.activations))
    fill(module, read_tensors(path), str(path))
    return LoadedModel(module.eval().requires_grad_(False), info, path)


def all_texts(inputs: Sequence[object]) -> bool:
    """Tell whether these are texts, and not rows of numbers."""
    return bool(inputs) and all(isinstance(each, str) for each in inputs)


def is_table(inputs: object) -> bool:
    """Tell whether these are rows of a table: a mapping of columns, or a list of mappings."""
    return isinstance(inputs, Mapping) or (
        isinstance(inputs, list | tuple)
        and bool(inputs)
        and all(isinstance(each, Mapping) for each in inputs)
    )


def float_tuple(values: Iterable[Any]) -> tuple[float, ...]:
    """Return plain numbers, as JSON holds them; a float32 keeps its value exactly."""
    return tuple(map(float, values))
