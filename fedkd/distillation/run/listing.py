"""What a distillation can be made of, read from the code: names, meaning, source, defaults."""

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedkd import schedules
from fedkd.data.augmentation import AUGMENTATIONS
from fedkd.distillation.methods import METHODS
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.selection import Selection
from fedkd.models import describe_models
from fedkd.objectives import describe_terms
from fedkd.training.optimizers import OptimizerSettings


class Entry(NamedTuple):
    """One thing that a setting can name.

    Attributes:
        name: as a settings file writes it.
        summary: what it is, one line.
        source: whose idea it is; empty for what has no author.
        defaults: its own settings with their defaults.
        required: its own settings that have none.
    """

    name: str
    summary: str
    source: str
    defaults: dict[str, Any]
    required: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what it is, where it comes from and its defaults, a line each."""
        settings = [f"{key}: required" for key in self.required]
        settings += [f"{key}: {json.dumps(value)}" for key, value in self.defaults.items()]
        lines = [self.summary.replace("``", ""), self.source and f"source: {self.source}"]
        return [line for line in (*lines, ", ".join(settings)) if line]


def list_components() -> dict[str, tuple[Entry, ...]]:
    """Return everything that can be chosen, by section.

    ``terms`` (of ``objective``), ``methods``, ``schedules``, ``targets`` (settings of ``targets``
    and ``teacher.combine``), ``models``, ``augmentations`` and ``optimizers``.
    """
    return {
        "terms": tuple(
            Entry(term["name"], term["summary"], term["source"], _plain_numbers(term["defaults"]))
            for term in describe_terms()
        ),
        "methods": tuple(
            _entry(name, first_line(method), method.source, method.Settings, "name")
            for name, method in METHODS.items()
        ),
        "schedules": tuple(_schedule(kind) for kind in get_args(get_args(schedules.Schedule)[0])),
        "targets": (
            *_options("targets", Selection),
            *_options("teacher.combine", Combination),
        ),
        "models": tuple(
            Entry(model.name, "", model.source, model.options) for model in describe_models()
        ),
        "augmentations": tuple(
            Entry(
                name,
                first_line(augmentation.function),
                source_of(augmentation.function) or augmentation.source,
                dict(augmentation.defaults),
            )
            for name, augmentation in AUGMENTATIONS.items()
        ),
        "optimizers": tuple(
            _optimizer(name) for name in get_args(OptimizerSettings.model_fields["name"].annotation)
        ),
    }


def first_line(documented: object) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def source_of(documented: object) -> str:
    """Return what stands under ``Source:`` in a docstring, on one line; empty without one."""
    _, _, section = (inspect.getdoc(documented) or "").partition("\nSource:\n")
    return " ".join(re.split(r"\n(?=\S)", section)[0].split())


def _schedule(kind: type[BaseModel]) -> Entry:
    name = kind.model_fields["kind"].default
    function = getattr(schedules, name)
    return _entry(name, first_line(function), source_of(function), kind, "kind")


def _options(where: str, settings: type[BaseModel]) -> tuple[Entry, ...]:
    """Return an entry for each setting, and one for each choice of those that offer several."""
    entries = []
    for name, field in settings.model_fields.items():
        extra = field.json_schema_extra
        own = extra.get("source", "") if isinstance(extra, Mapping) else ""
        entries.append(
            Entry(
                f"{where}.{name}",
                field.description or "",
                str(own) or source_of(settings),
                {name: _default(field), **_choices(field)},
            )
        )
    return tuple(entries)


def _choices(field: FieldInfo) -> dict[str, Any]:
    if get_origin(field.annotation) is not Literal:
        return {}
    return {"choices": list(get_args(field.annotation))}


def _optimizer(name: str) -> Entry:
    settings = OptimizerSettings.model_validate({"name": name})
    kind = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[name]
    defaults = _plain_numbers(settings.model_dump(mode="json", exclude={"name"}))
    if name not in ("sgd", "rmsprop"):
        del defaults["momentum"]
    if name != "sgd":
        del defaults["nesterov"]
    link = f"https://docs.pytorch.org/docs/stable/generated/torch.optim.{kind}.html"
    return Entry(name, f"torch.optim.{kind}", link, defaults)


def _entry(name: str, summary: str, source: str, settings: type[BaseModel], without: str) -> Entry:
    fields = {key: field for key, field in settings.model_fields.items() if key != without}
    return Entry(
        name,
        summary,
        source,
        {key: _default(field) for key, field in fields.items() if not field.is_required()},
        tuple(key for key, field in fields.items() if field.is_required()),
    )


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = [
            item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value
        ]
    return _plain_number(value)


def _plain_numbers(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_number(value) for name, value in defaults.items()}


def _plain_number(value: Any) -> Any:
    """Write a schedule that never changes as the number that it is in a settings file."""
    if isinstance(value, Mapping) and value.get("kind") == "constant":
        return value["value"]
    return value
