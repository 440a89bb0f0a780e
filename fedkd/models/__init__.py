"""Models by name: the table of built-in families, their settings, and one seeded builder.

Every model maps inputs [batch, *shape] to class logits [batch, classes], adapts to the shape and
to the number of classes, and runs under ``torch.func.vmap``. Inputs are pictures [channels, height,
width], features [features], or texts [length] of numbers of tokens; each family says which of them
it takes. Besides the names in the table, ``package.module:callable`` builds a model of your own,
and ``timm:resnet18`` one of the timm package (extra ``timm``), always with fresh weights.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from functools import cached_property
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import nn

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.inputs import InputShape, Kind, Shape, blank, input_shape_of
from fedkd.models.cnn import CNNOptions, LeNetOptions
from fedkd.models.dropout import seed_dropout
from fedkd.models.mlp import MLPOptions
from fedkd.models.options import ModelOptions
from fedkd.models.outside import copy_inputs
from fedkd.models.recurrent import GRUOptions, LSTMOptions
from fedkd.models.resnet import ResNet8Options, ResNet20Options
from fedkd.models.transformer import TransformerOptions
from fedkd.models.tutorial import TutorialStudentOptions, TutorialTeacherOptions
from fedkd.names import nearest
from fedkd.randomness import seeded_for

__all__ = [
    "ModelDescription",
    "ModelOptions",
    "ModelSettings",
    "build_model",
    "count_parameters",
    "describe_models",
    "ignores_seed",
    "known_models",
    "models_for",
    "takes_kind",
    "uses_batch_norm",
]

_MODELS: dict[str, type[ModelOptions]] = {
    "mlp": MLPOptions,
    "cnn": CNNOptions,
    "lenet": LeNetOptions,
    "resnet8": ResNet8Options,
    "resnet20": ResNet20Options,
    "gru": GRUOptions,
    "lstm": LSTMOptions,
    "transformer": TransformerOptions,
    "tutorial_teacher": TutorialTeacherOptions,
    "tutorial_student": TutorialStudentOptions,
}

_TIMM = "timm:"
_TIMM_NAME = re.compile(r"timm:[A-Za-z0-9_.\-]+")
_TIMM_FIXED = (
    "in_chans",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)
"""Arguments of ``timm.create_model`` that follow from the data, or would fetch or unpickle."""

NO_MODELS = sys.stdlib_module_names | {"torch"}
"""Packages that cannot name a model. Nothing in them takes ``input_shape`` and ``num_classes``, and
what takes anything, such as ``os:system`` or ``torch.hub:load``, would run what options say."""


class ModelDescription(NamedTuple):
    """One line of a listing of models."""

    name: str
    source: str
    """Where the architecture comes from."""
    takes: tuple[Kind, ...]
    """The kinds of inputs that it is for."""
    options: dict[str, Any]
    """Each option with its default."""


class ModelSettings(BaseModel):
    """Which architecture, with which options; in YAML a plain string is the name alone.

    Options are completed with their defaults: saved settings rebuild the same network after a
    default has changed, and settings that spell a default equal those that leave it out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="a known model, package.module:callable, or timm:<name> (extra timm)"
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="options of that model; of a callable or timm: passed on as keyword arguments",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: object) -> object:
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict):
            return given
        name, options = given.get("name"), given.get("options", {})
        if not isinstance(name, str) or name not in _MODELS or not isinstance(options, dict):
            return given
        return {**given, "options": _validated(name, options).model_dump(mode="json")}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in _MODELS:
            return name
        # A name of timm may have hyphens, which no callable's has.
        if name.startswith(_TIMM):
            if _TIMM_NAME.fullmatch(name):
                return name
        elif own_code.is_own_code(name):
            package = own_code.package_of(name)
            if package in NO_MODELS:
                raise ValueError(
                    f"{name!r} is no model: nothing in {package} builds one for an image "
                    "and a number of classes; write a function that returns a torch.nn.Module"
                )
            own_code.may_load(name)
            return name
        known = ", ".join(_MODELS)
        raise ValueError(
            f"unknown model {shown(name)}; known: {known}; or package.module:callable or "
            "timm:<name>" + nearest(name, _MODELS)
        )

    @model_validator(mode="after")
    def _leave_fixed_arguments(self) -> "ModelSettings":
        fixed = [option for option in self.options if option in _TIMM_FIXED]
        if self.name.startswith(_TIMM) and fixed:
            raise ValueError(
                f"option {fixed[0]!r} of model {self.name!r} is not yours to set: channels and "
                "classes follow the data, and weights are always fresh"
            )
        return self

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def is_callable(self) -> bool:
        """Whether the name is that of somebody's own code."""
        return self.name not in _MODELS and not self.name.startswith(_TIMM)

    @cached_property
    def key(self) -> str:
        """Text to group clients by: settings with equal keys build the same architecture."""
        return f"{self.name} {json.dumps(self.options, sort_keys=True)}"

    @property
    def is_own(self) -> bool:
        """Whether its code is not ours: a callable of the user's, or timm's."""
        return self.name not in _MODELS

    @cached_property
    def channels_last(self) -> bool:
        """Whether a processor trains it faster with the channels of a pixel side by side."""
        return not self.is_own and _validated(self.name, self.options).channels_last

    @property
    def label(self) -> str:
        """Short text for tables: the name and the options that differ from their defaults."""
        family = _MODELS.get(self.name)
        defaults = family().model_dump(mode="json") if family else {}
        changed = [
            f"{option}={value if isinstance(value, str) else json.dumps(value)}"
            for option, value in self.options.items()
            if option not in defaults or value != defaults[option]
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def known_models() -> tuple[str, ...]:
    """Return the built-in names."""
    return tuple(_MODELS)


def describe_models() -> tuple[ModelDescription, ...]:
    """Return name, source and default options of every built-in model."""
    return tuple(
        ModelDescription(name, family.source, family.takes, family().model_dump(mode="json"))
        for name, family in _MODELS.items()
    )


def build_model(
    settings: ModelSettings, *, input_shape: Shape, num_classes: int, seed: int
) -> nn.Module:
    """Build a freshly initialised network; the same arguments give the same bits.

    The global generators are left as they were: torch's, and for a model of your own Python's and
    NumPy's too. A model of your own is run on two blank inputs in eval mode, so that lazy layers
    know their shapes and a wrong output is found; `fedkd.training.trial` tries it in earnest. It
    gets a copy of its input in every forward pass. Every plain ``nn.Dropout`` becomes a
    `fedkd.models.dropout.SeededDropout`, whose masks belong to a client.

    Args:
        settings: the architecture.
        input_shape: of one input. A bare (channels, height, width) is that of pictures, with sides
            of at least `ModelOptions.smallest_side` for built-in models; a bare (features,) that
            of features.
        num_classes: logits per input, >= 2.
        seed: of the initial weights, see `fedkd.randomness.torch_seed_for`.

    Returns:
        The network in training mode, on the CPU.

    Raises:
        ValueError: if the shape or the options cannot work together, or if a callable cannot be
            imported, fails, or returns something that is no such network.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    input_shape = input_shape_of(input_shape)
    _check_takes(settings, input_shape)
    with seeded_for(own_code=settings.is_own, seed=seed):
        if settings.is_own:
            model = _build_from_callable(settings, input_shape, num_classes)
        else:
            try:
                model = _validated(settings.name, settings.options).build(input_shape, num_classes)
            # RuntimeError: torch's, for sizes beyond any memory.
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"model {settings.label!r}: {error}") from error
    seed_dropout(model)
    return model.train()


def _check_takes(settings: ModelSettings, shape: InputShape) -> None:
    """Refuse inputs that a model is not for."""
    family = _MODELS.get(settings.name)
    if takes_kind(settings, shape.kind):
        smallest = 1 if family is None else family.smallest_side
        if shape.kind == "pictures" and min(shape.sides[1:]) < smallest:
            raise ValueError(
                f"input_shape of model {settings.name!r} must be (channels, height, width) with "
                f"channels >= 1 and sides >= {smallest}, got {shape.sides}"
            )
        return
    takes: tuple[Kind, ...] = ("pictures",) if family is None else family.takes
    fitting = models_for(shape.kind)
    raise ValueError(
        f"model {settings.name!r} takes {' and '.join(takes)}, and the data's inputs are {shape}: "
        f"use {', '.join(fitting)}, as in clients.models=[{', '.join(fitting)}], or your own "
        "package.module:callable"
    )


def takes_kind(settings: ModelSettings, kind: Kind) -> bool:
    """Tell whether a model is for a kind of inputs; one of your own may be for any."""
    family = _MODELS.get(settings.name)
    return settings.is_callable or kind in (("pictures",) if family is None else family.takes)


def models_for(kind: Kind) -> list[str]:
    """Return the names of the built-in models that take a kind of inputs."""
    return [name for name, family in _MODELS.items() if kind in family.takes]


def ignores_seed(settings: ModelSettings, *, input_shape: Shape, num_classes: int) -> bool:
    """Tell whether a model has the same first weights whatever the seed.

    So it is where a factory seeds torch itself, reads weights or fills in constants.
    """
    one, other = (
        build_model(settings, input_shape=input_shape, num_classes=num_classes, seed=seed)
        for seed in (1, 2)
    )
    return all(map(torch.equal, one.parameters(), other.parameters()))


def uses_batch_norm(module: nn.Module) -> bool:
    """Tell whether examples of a batch influence each other through BatchNorm.

    Such a model cannot train on a batch of one and has running statistics besides its parameters.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(part, kinds) for part in module.modules())


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers an optimizer may change; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _validated(name: str, options: dict[str, Any]) -> ModelOptions:
    family = _MODELS[name]
    known = list(family.model_fields)
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option {option!r} of model {name!r}; known: {', '.join(known) or 'none'}"
                + nearest(str(option), known)
            )
    try:
        return family.model_validate(options)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {shown(problem['input'])}"
            if problem["loc"]
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise ValueError(f"option of model {name!r}: {'; '.join(problems)}") from error


def _load_callable(name: str) -> Callable[..., object]:
    target = own_code.load(name, "model")
    if not callable(target):
        raise ValueError(f"model {name!r} must name a callable, got {type(target).__name__}")
    origin = str(getattr(target, "__module__", ""))
    named_there = isinstance(target, type | FunctionType | BuiltinFunctionType)
    if named_there and origin.split(".")[0] in NO_MODELS:
        # A name that a package imported for itself; `mine:load` may be torch.hub's.
        raise ValueError(f"model {name!r} is {origin}'s, which has no models")
    return cast("Callable[..., object]", target)


def _timm_factory(settings: ModelSettings) -> Callable[..., object]:
    """Return a function that builds the named model of timm without pretrained weights."""
    name = settings.name.removeprefix(_TIMM)
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"model {settings.name!r} needs the extra timm (pip install 'fedkd[timm]'): {error}"
        ) from error
    if not timm.is_model(name):
        raise ValueError(
            f"model {settings.name!r}: timm {timm.__version__} has no {name!r}"
            + nearest(name, timm.list_models())
        )

    def build(*, input_shape: tuple[int, ...], num_classes: int, **options: JsonValue) -> object:
        return timm.create_model(
            name, pretrained=False, in_chans=input_shape[0], num_classes=num_classes, **options
        )

    return build


def _build_from_callable(
    settings: ModelSettings, input_shape: InputShape, num_classes: int
) -> nn.Module:
    if settings.name.startswith(_TIMM):
        factory = _timm_factory(settings)
    else:
        factory = _load_callable(settings.name)
    shape: dict[str, Any] = {"input_shape": input_shape.sides}
    if input_shape.vocabulary is not None:
        shape["vocabulary"] = input_shape.vocabulary
    try:
        model = factory(**shape, num_classes=num_classes, **settings.options)
    # Somebody else's code may fail in any way; the message must still say which model it was.
    except Exception as error:
        raise ValueError(
            f"model {settings.label!r} failed to build for "
            f"{', '.join(f'{name}={value}' for name, value in shape.items())}, "
            f"num_classes={num_classes}: {own_code.told(error, settings.name)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {settings.label!r} must return a torch.nn.Module, got {type(model).__name__}"
        )
    copy_inputs(model)
    inputs = blank(input_shape, 2)
    try:
        with torch.no_grad():
            logits: object = model.eval()(inputs)
    except Exception as error:
        raise ValueError(
            f"model {settings.label!r} failed on inputs of shape {list(inputs.shape)}: "
            f"{own_code.told(error, settings.name)}"
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"model {settings.label!r} must return a tensor of logits, got {type(logits).__name__}"
        )
    if logits.shape != (2, num_classes) or not logits.is_floating_point():
        raise ValueError(
            f"model {settings.label!r} must map {list(inputs.shape)} to floating-point logits "
            f"[2, {num_classes}], got {logits.dtype} of shape {list(logits.shape)}"
        )
    return model
