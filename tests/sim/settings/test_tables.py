import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.settings.tables import DEEPEST, fill_in, read_word, read_yaml, yaml_text

texts = st.text(
    st.one_of(
        st.sampled_from("\\${}:.'\"#&*!|>%@`-?, []0123456789xoeE+_nytrue~<="),
        st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")),
    ),
    max_size=12,
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def written(text: str, folder: Path) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@settings(deadline=None, max_examples=300)
@given(table=st.dictionaries(texts.filter(lambda key: key != "<<"), plain, max_size=4))
def test_what_is_written_is_read_back_the_same(
    table: dict[str, Any], tmp_path_factory: Any
) -> None:
    path = written(yaml_text(table), tmp_path_factory.getbasetemp())
    for fast in (False, True):
        again = fill_in(read_yaml(path, fast=fast))
        assert again == table
        # 1 == 1.0 == True, so equal is not yet the same.
        assert repr(again) == repr(table)


def test_both_readers_refuse_the_same_in_the_same_words(tmp_path: Path) -> None:
    deep = "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)
    for text in (f"a: {deep}", "a: 1\na: 2", "a: [1", "<<: {a: 1}", "a: !!python/name:os.system"):
        path = written(text, tmp_path)
        told = []
        for fast in (False, True):
            with pytest.raises(ValueError, match=r"cannot read config") as error:
                read_yaml(path, fast=fast)
            told.append(str(error.value))
        assert told[0] == told[1]
    path = written(f"a: {deep[1:-1]}", tmp_path)
    assert read_yaml(path, fast=True) == read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("2026-01-01", "2026-01-01"),
        ("010", 10),
        ("0o10", 8),
        ("1e3", 1000.0),
        ("1_000", 1000),
        (".5", 0.5),
        ("", None),
        ("~", None),
        ("[a, 'b c']", ["a", "b c"]),
        ("{on: {2: x}}", {"on": {"2": "x"}}),
    ],
)
def test_words_follow_yaml_1_2(text: str, value: object) -> None:
    assert read_word(f"a.b={text}") == (("a", "b"), value)


BROKEN = {
    "[" * 5000: "nested deeper than 32 levels",
    "&a [*a]": "nested deeper than 32 levels",
    "9" * 5000: "a number of 5000 characters",
    "0x" + "f" * 4000: "must be a number below 2**63, got a number of more than 4300 digits",
    "!!binary aGk=": "must be text, a number",
    "!!set {a}": "must be text, a number",
    "!!python/name:os.system": "could not determine a constructor",
    '"a\\0b"': "without control characters",
    "caf\udce9": "special characters are not allowed",
    "{a: 1, a: 2}": "'a' stands there twice",
    "{<<: {a: 1}}": "merge keys",
    "{[1]: 2}": "a key must be text",
    ".inf": "must be a finite number, got inf",
    "1e999": "must be a finite number, got inf",
    "*x": "undefined alias",
    "{a: 'x": "cannot read",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_word_that_cannot_be_read_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read_word(f"rounds={text}")
    assert BROKEN[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("word", ["a..b=1", ".=1", "=1", "a", ".".join("a" * 40) + "=1"])
def test_a_word_names_a_setting(word: str) -> None:
    with pytest.raises(ValueError, match=r"key=value|no setting has a name like"):
        read_word(word)


def test_aliases_do_not_multiply_a_file(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="more than 100000 values"):
        read_yaml(written("\n".join(lines), tmp_path))


@pytest.mark.parametrize(
    "value", ["${k%d}${k%d}", ["${k%d}", "${k%d}"], {"a": "${k%d}", "b": "${k%d}"}]
)
def test_references_do_not_multiply_either(value: Any) -> None:
    def of(number: int) -> Any:
        text = repr(value).replace("%d", str(number))
        return eval(text)  # noqa: S307 - our own three literals

    table = {f"k{i}": of(i + 1) for i in range(30)} | {"k30": "lol"}
    with pytest.raises(ValueError, match=r"a text of|more than 100000 values"):
        fill_in(table)


def test_references_take_the_value_with_its_type_or_as_part_of_a_text() -> None:
    table = {"a": "${b.c}", "d": "x-${b.c}-${b.e}", "b": {"c": 3, "e": True}, "f": "${g.1}"}
    filled = fill_in({**table, "g": ["p", "q"]})
    assert (filled["a"], filled["d"], filled["f"]) == (3, "x-3-true", "q")


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"a": "${b}"}, "'b' not found"),
        ({"a": "${a}"}, "round and round"),
        ({"a": {"b": "${a}"}}, "round and round"),
        ({"a": "${b}", "b": "x ${a}"}, "round and round"),
        ({f"k{i}": f"${{k{i + 1}}}" for i in range(5000)} | {"k5000": 1}, "too far"),
        ({"a": "x${b}", "b": [1]}, "cannot be a part of a text"),
        ({"a": "${b"}, "takes the name of another key"),
        ({"a": "${${b}}", "b": "c"}, "takes the name of another key"),
        ({"a": "${oc.env:HOME}"}, "not the environment"),
        ({"a": "${oc.env:HOME,x}"}, "not the environment"),
        ({"a": "${oc.create:x}"}, "not the environment"),
    ],
)
def test_a_reference_that_leads_nowhere_names_its_key(
    table: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=r"^[ak]") as caught:
        fill_in(table)
    assert complaint in str(caught.value)


def test_an_escaped_reference_is_text_and_stays_text(tmp_path: Path) -> None:
    table = fill_in(read_yaml(written(r"a: 'x \${oc.env:HOME}'", tmp_path)))
    assert table == {"a": "x ${oc.env:HOME}"}
    assert fill_in(read_yaml(written(yaml_text(table), tmp_path))) == table


def test_a_file_that_is_no_settings_file_is_named(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is a pipe"):
        read_yaml(pipe)
    with pytest.raises(ValueError, match="more than 524288 bytes"):
        read_yaml(Path("/dev/zero"))
    (tmp_path / "latin").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"cannot read config .*latin"):
        read_yaml(tmp_path / "latin")
    with pytest.raises(ValueError, match="must be a table"):
        read_yaml(Path(os.devnull))
    with pytest.raises(ValueError, match="the name of a config"):
        read_yaml(tmp_path / "a\0b")


def test_as_deep_as_allowed_is_read() -> None:
    text = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert read_word(f"a={text}")[1] != []
