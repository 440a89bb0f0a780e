"""Values as briefly as a settings file may write them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.schedules import ConstantSchedule


def shorthand(value: object) -> str:
    """Write a value of a setting as YAML on one line.

    A schedule that stays the same is a number, a model its label, a term its weight where nothing
    else differs from its defaults.
    """
    if isinstance(value, ConstantSchedule):
        value = value.value
    elif isinstance(value, ModelSettings):
        value = value.label
    elif isinstance(value, Objective):
        value = {name: _term(name, term) for name, term in value.terms.items()}
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, Path):
        value = str(value)
    elif isinstance(value, tuple | list):
        value = [item.label if isinstance(item, ModelSettings) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _term(name: str, term: BaseModel) -> Any:
    given = {
        key: getattr(term, key).value if isinstance(getattr(term, key), ConstantSchedule) else value
        for key, value in term.model_dump(mode="json").items()
        if key == "weight"
        or (key == "kind" and value != name)
        or getattr(term, key) != type(term).model_fields[key].default
    }
    return given["weight"] if set(given) == {"weight"} else given
