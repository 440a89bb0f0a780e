import pytest

from sim.publishing.latex import escape, label_of


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("one_way", r"one\_way"),
        (r"50 % of $x & {y} #1", r"50 \% of \$x \& \{y\} \#1"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("p < 0.05 ± 1", r"p \textless{} 0.05 $\pm$ 1"),
        ("two\n\nlines\x07", "two lines"),
    ],
)
def test_what_is_special_is_written_out(text, written):
    assert escape(text) == written


def test_labels_have_letters_digits_and_dashes_alone():
    assert label_of("My Study_1 {x}") == "my-study-1-x"
    assert label_of("###") == "study"
