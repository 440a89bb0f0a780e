"""Every number that settings take has two bounds and a strict type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fedkd.bounds import Count, PathText, Real, Share, Text, Whole, check_text, shown
from fedkd.distillation.settings import DistillSettings
from fedkd.models import _MODELS as MODELS
from fedkd.objectives.table import TERMS
from sim.settings import Settings


def models() -> set[type[BaseModel]]:
    """All classes that settings are made of."""
    kinds: list[type[BaseModel]] = [Settings, DistillSettings, *MODELS.values(), *TERMS.values()]
    found: set[type[BaseModel]] = set()
    while kinds:
        kind = kinds.pop()
        if kind not in found:
            found.add(kind)
            kinds += [
                part for field in kind.model_fields.values() for part in within(field.annotation)
            ]
    return found


def within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from within(part)


def numbers(annotation: Any, metadata: list[Any]) -> Iterator[tuple[type, list[Any]]]:
    """Yield int and float leaves of an annotation with all that constrains them."""
    if annotation in (int, float):
        yield annotation, metadata
    elif hasattr(annotation, "__metadata__"):
        extra = [
            part
            for given in annotation.__metadata__
            for part in (given.metadata if isinstance(given, FieldInfo) else [given])
        ]
        yield from numbers(get_args(annotation)[0], [*metadata, *extra])
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from numbers(part, metadata)


def test_every_number_has_two_bounds_and_takes_neither_text_nor_true() -> None:
    lacking = []
    assert len(models()) > 80
    for model in models():
        for name, field in model.model_fields.items():
            for kind, metadata in numbers(field.annotation, list(field.metadata)):
                low = sum(hasattr(part, "ge") or hasattr(part, "gt") for part in metadata)
                high = sum(hasattr(part, "le") or hasattr(part, "lt") for part in metadata)
                strict = any(getattr(part, "strict", False) for part in metadata)
                # Of two bounds of one kind pydantic keeps the last only, unless a check of ours
                # stands between them, as for whole numbers.
                once = low == high == 1 or kind is int
                if not (low and high and strict and once):
                    lacking.append(f"{model.__name__}.{name}: {kind.__name__}")
    assert sorted(lacking) == []


@pytest.mark.parametrize(
    "value", [True, "3", "12:30", 2.5, None, [3], {"a": 1}, 1e30, float("nan")]
)
def test_a_count_is_a_whole_number(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Count).validate_python(value)


def test_a_whole_number_with_an_exponent_is_one() -> None:
    three = TypeAdapter(Whole).validate_python(3e0)
    assert (three, type(three)) == (3, int)
    # Beyond 2**53 a float says only about which number it is.
    with pytest.raises(ValidationError):
        TypeAdapter(Whole).validate_python(1e17)


@pytest.mark.parametrize("value", [False, "0.5", float("inf"), float("nan"), 10**400])
def test_a_share_is_a_finite_number(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Share).validate_python(value)
    assert TypeAdapter(Real).validate_python(1) == 1.0


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31m", "a\nb", "caf\udce9", "a\u2028b", "x" * 5000])
def test_text_has_no_control_characters_and_an_end(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        check_text(text)
    for kind, value in ((Text, text), (PathText, Path(text))):
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize("text", ["Übung 3", "日本語", "a\u00a0b", "👩\u200d🔬", ""])
def test_text_of_any_language_is_text(text: str) -> None:
    assert check_text(text) == text


def test_any_value_can_be_shown() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "a number of more than 4300 digits"
    assert "nested too deeply" in shown(deep)
    assert len(shown("x" * 10_000)) < 100
    while deep:  # or Python takes it apart recursively
        deep = deep.pop()
