"""Code of one's own is found by its name, or a line says why not; nothing is loaded unasked."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedkd import own_code

MODULE = """
import json
from collections import UserDict

class Thing(UserDict):
    class Inner(UserDict):
        pass

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    (tmp_path / "own_things.py").write_text(MODULE)
    (tmp_path / "own_failing.py").write_text("\n1 / 0\n")
    (tmp_path / "own_ending.py").write_text("raise SystemExit('usage: own_ending')\n")
    (tmp_path / "own_garbled.py").write_text("def f(:\n")
    (tmp_path / "own_lonely.py").write_text("import nowhere_at_all\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["mine:Net", "a.b_c.d1:E.f", "_a:_B"])
def test_a_name_is_modules_a_colon_and_what_is_in_the_last(name: str) -> None:
    assert own_code.is_own_code(name)
    assert own_code.package_of(name) == name.partition(":")[0].partition(".")[0]


@pytest.mark.parametrize("name", ["mine", "a.net", "a-b:c", ":c", "a:", "a:b:c", "1a:b", None, 3])
def test_other_texts_are_no_such_names(name: object) -> None:
    assert not own_code.is_own_code(name)


def test_what_a_name_stands_for_is_imported(folder: Path) -> None:
    assert own_code.load("own_things:number", "x") == 3
    from collections import UserDict

    found = own_code.load_class("own_things:Thing.Inner", UserDict, "x")
    assert found.__name__ == "Inner"


@pytest.mark.parametrize(
    ("name", "complaint"),
    {
        "own_nothing:X": "cannot import 'own_nothing': No module named 'own_nothing'; .*PYTHONPATH",
        "own_lonely:X": "cannot import 'own_lonely': No module named 'nowhere_at_all'$",
        "own_failing:X": r"ZeroDivisionError: division by zero \(.*own_failing.py, line 2\)",
        "own_ending:X": "cannot import 'own_ending': SystemExit: usage: own_ending",
        "own_garbled:X": r"SyntaxError: invalid syntax \(own_garbled.py, line 1\)",
        "own_things:Nope": "module 'own_things' has no attribute 'Nope'",
        "own_things:json.decoder.X": "write modules before the colon, got 'json' after it",
        "own_things:number": "must be a class that is a collections.UserDict, got a int",
        "own_things:json": "got 'json' after it",
        "pathlib:Path": "must be a subclass of collections.UserDict, and is none",
    }.items(),
)
def test_what_is_not_there_or_is_something_else_is_one_line(
    folder: Path, name: str, complaint: str
) -> None:
    from collections import UserDict

    with pytest.raises(ValueError, match=f"^some.setting '{name}'.*{complaint}") as caught:
        own_code.load_class(name, UserDict, "some.setting")
    assert "\n" not in str(caught.value)


def test_a_class_that_lacks_methods_is_told_which(folder: Path) -> None:
    from collections.abc import Sized

    (folder / "own_lacking.py").write_text(
        "from collections.abc import Sized\nclass Thing(Sized):\n    pass\n"
    )
    with pytest.raises(ValueError, match=r"lacks __len__ of collections\.abc\.Sized"):
        own_code.load_class("own_lacking:Thing", Sized, "x")


def test_a_package_of_one_s_own_that_is_called_like_ours_is_named(folder: Path) -> None:
    (folder / "fedkd").mkdir()
    with pytest.raises(ValueError, match=rf"fedkd's own package .* hides '{folder}/fedkd': rename"):
        own_code.load("fedkd.mine:X", "x")
    (folder / "json.py").touch()
    with pytest.raises(ValueError, match=r"another package .* hides '.*json.py': rename yours"):
        own_code.load("json:X", "x")


def test_nothing_is_loaded_that_is_not_permitted(folder: Path) -> None:
    def refuse(name: str) -> bool:
        raise ValueError(f"{name!r} is refused")

    with own_code.asking(refuse), pytest.raises(ValueError, match=r"^x: 'own_things:Thing' is"):
        own_code.load("own_things:Thing", "x")
    with own_code.asking(lambda name: False), pytest.raises(ValueError, match="only looked at"):
        own_code.load("own_things:Thing", "x")
    assert "own_things" not in sys.modules
    with own_code.asking(lambda name: name == "own_things:Thing"):
        assert own_code.load("own_things:Thing", "x")
    assert own_code.load("own_things:number", "x")


class Base(BaseModel):
    name: str


def test_settings_have_to_be_settings_that_hold_the_full_name() -> None:
    class Named(Base):
        name: str
        count: int = 3

    class Fixed(Base):
        name: type = int

    own_code.check_settings(type("A", (), {"Settings": Named}), Base, "x")
    for owner, complaint in (
        ({}, "x needs Settings, a class derived from .*Base; got None"),
        ({"Settings": {"count": 3}}, "got {'count': 3}"),
        ({"Settings": dict}, "got <class 'dict'>"),
        ({"Settings": Fixed}, "x: its Settings must have 'name: str', got 'name: <class 'type'>'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            own_code.check_settings(type("A", (), owner), Base, "x")


def test_the_folder_of_a_package_is_known_without_running_it(folder: Path) -> None:
    (folder / "own_package").mkdir()
    (folder / "own_package" / "__init__.py").write_text("raise RuntimeError\n")
    for name in ("own_package", "own_failing"):
        assert own_code.folder_of(name) == str(folder)
    assert own_code.folder_of("nowhere_at_all") is None


def test_an_error_is_told_with_the_line_of_the_package_that_led_there(folder: Path) -> None:
    (folder / "own_parts").mkdir()
    (folder / "own_parts" / "__init__.py").write_text("")
    (folder / "own_parts" / "nets.py").write_text(
        "import json\n\ndef make():\n    return json.loads('{')\n"
    )
    make = own_code.load("own_parts.nets:make", "model")
    with pytest.raises(ValueError, match="Expecting") as failed:
        make()
    # The error came up in the standard library; what can be changed is in the package.
    told = own_code.told(failed.value, "own_parts.nets:make")
    assert told.startswith("JSONDecodeError: Expecting property name")
    assert told.endswith(f" ({folder / 'own_parts' / 'nets.py'}, line 4)")
    with pytest.raises(TypeError) as wrong:
        make(depth=2)
    assert own_code.told(wrong.value, "own_parts.nets:make").endswith("'depth'")
