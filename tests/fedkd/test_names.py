import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.names import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat", "cat"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eexe.txt", r"\u202eexe.txt"),
        ("\udc80", r"\udc80"),
        ("größe 猫 😀", "größe 猫 😀"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ],
)
def test_what_could_move_a_cursor_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_nothing_is_left_to_escape(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    printable(text).encode()
