import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.exchange.values import Value, digest, flatten, read_only, unflatten


@dataclass(frozen=True)
class Inner(Value):
    numbers: np.ndarray
    note: str | None = None


@dataclass(frozen=True)
class Outer(Value):
    tables: Mapping[int, Inner]
    pair: tuple[int, float]
    names: Mapping[str, np.ndarray]
    more: tuple[Inner, ...] = ()


def outer(shift: float = 0.0) -> Outer:
    return Outer(
        tables={3: Inner(np.arange(4.0) + shift), 0: Inner(np.zeros((0, 2), np.int64), "none")},
        pair=(1, 2.5),
        names={"0.weight": np.ones((2, 3), np.float32), "a/b": np.array(7)},
        more=(Inner(np.array([True, False])),),
    )


def again(value: Value) -> object:
    arrays, plain = flatten(value)
    return unflatten(arrays, json.loads(json.dumps(plain)))


def test_a_value_is_made_again_from_arrays_and_json():
    made = again(outer())
    assert isinstance(made, Outer)
    assert digest(made) == digest(outer())
    assert made.tables.keys() == {3, 0}
    assert made.more[0].numbers.dtype == bool


def test_the_digest_sees_every_bit():
    assert digest(outer()) != digest(outer(shift=1e-12))
    assert digest(Inner(np.zeros(2))) != digest(Inner(np.zeros(2), "x"))
    assert digest(Inner(np.zeros(2))) != digest(Inner(np.zeros((2, 1))))


def test_arrays_are_no_copies_and_can_be_closed():
    value = outer()
    assert flatten(value).arrays["tables/3/numbers"] is value.tables[3].numbers
    read_only(value)
    with pytest.raises(ValueError, match="read-only"):
        value.names["a/b"][...] = 1


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda flat: flat.arrays.clear(), "there is no array"),
        (lambda flat: flat.arrays.update(extra=np.zeros(1)), "without a place"),
        (lambda flat: flat.plain.update(value="os:system"), "unknown kind of value"),
        (lambda flat: flat.plain["fields"].pop("pair"), "fields"),
        (lambda flat: flat.plain["fields"].update(pair={"tuple": [1, "x"]}), "pair is"),
        (lambda flat: flat.plain["fields"].update(pair={"tuple": [True, 1.0]}), "pair is"),
        (lambda flat: flat.plain["fields"].update(tables={"map": [["3", None]]}), "tables is"),
        (
            lambda flat: flat.plain["fields"].update(names={"map": [["a"]]}),
            "a mapping that is none",
        ),
        (lambda flat: flat.plain["fields"].update(more=[1]), "no part of a value"),
    ],
)
def test_what_is_no_value_of_ours_is_refused(break_it, told):
    flat = flatten(outer())
    break_it(flat)
    with pytest.raises(ValueError, match=told):
        unflatten(flat.arrays, flat.plain)


def test_endless_nesting_is_refused():
    plain: object = 1
    for _ in range(10_000):
        plain = {"tuple": [plain]}
    with pytest.raises(ValueError, match="within each other"):
        unflatten({}, plain)


def test_what_cannot_travel_is_named_when_it_is_taken_apart():
    with pytest.raises(TypeError, match="note: a set cannot be kept or sent"):
        flatten(Inner(np.zeros(1), {1}))  # type: ignore[arg-type]


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["array", "value", "fields", "map", "tuple", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(JUNK)
def test_junk_makes_a_plain_value_or_a_value_error(junk):
    try:
        made = unflatten({}, junk)
    except ValueError:
        return
    assert made is None or isinstance(made, bool | int | float | str | tuple | dict)
