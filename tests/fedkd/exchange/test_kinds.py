import sys
import types
from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from fedkd import own_code
from fedkd.bounds import Whole
from fedkd.exchange.adversaries import AdversaryField, NoAdversary
from fedkd.exchange.codecs import CodecField, Float16, Float32
from fedkd.exchange.kinds import UnreadStage
from fedkd.exchange.mechanisms import MechanismField
from fedkd.exchange.release import NoRelease
from fedkd.exchange.views import All, Sum, ViewField


class Section(BaseModel):
    up: CodecField = Float32()
    view: ViewField = All()
    release: MechanismField = NoRelease()
    adversary: AdversaryField = NoAdversary()


class Coarse(Float16):
    kind: str  # type: ignore[assignment]
    bits: Whole = 3


class Named(Float32):
    kind: Literal["named"] = "named"  # type: ignore[assignment]


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("my_codecs")
    module.Coarse, module.Named, module.number = Coarse, Named, 3
    monkeypatch.setitem(sys.modules, "my_codecs", module)


@pytest.mark.usefixtures("mine")
def test_a_stage_of_another_package_is_called_by_its_full_name():
    section = Section(up={"kind": "my_codecs:Coarse", "bits": 5})
    assert type(section.up) is Coarse
    assert section.up.bits == 5
    table = section.model_dump(mode="json")
    assert table["up"] == {"kind": "my_codecs:Coarse", "bits": 5}
    assert Section(**table) == section
    assert type(Section(up="my_codecs:Coarse").up) is Coarse


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("my_codecs:Nobody", "codec 'my_codecs:Nobody'"),
        ("no_such_package:Codec", "cannot import 'no_such_package'"),
        ("my_codecs:number", "must be a class"),
        ("my_codecs:Named", "leave 'kind' out of the class"),
        ({"kind": "my_codecs:Coarse", "bits": True}, "my_codecs:Coarse: bits: Input should be"),
    ],
)
def test_a_stage_that_cannot_be_used_is_named_in_one_line(given, told):
    with pytest.raises(ValidationError) as error:
        Section(up=given)
    (first,) = error.value.errors()
    assert told in first["msg"]
    assert "\n" not in first["msg"]


def test_a_class_of_another_stage_is_refused(mine):
    with pytest.raises(ValidationError, match="must be a subclass of"):
        Section(view="my_codecs:Coarse")


def test_code_that_nobody_allowed_is_not_loaded():
    given = {"kind": "no_such_package:Codec", "bits": 5}
    with own_code.asking(lambda name: False):
        section = Section(up=given)
    assert isinstance(section.up, UnreadStage)
    assert section.model_dump(mode="json")["up"] == given

    def refuse(name: str) -> bool:
        raise ValueError(f"{name} does not run unasked")

    with own_code.asking(refuse), pytest.raises(ValidationError, match="does not run unasked"):
        Section(up=given)


def test_every_stage_has_its_kinds():
    section = Section(view="sum", release="none", adversary={"kind": "none"})
    assert section == Section(view=Sum())
    for field, told in (
        ("view", "unknown view 'x'; known: all, sum"),
        ("release", "unknown mechanism 'x'; known: none"),
        ("adversary", "unknown adversary 'x'; known: none"),
    ):
        with pytest.raises(ValidationError, match=told):
            Section(**{field: "x"})
