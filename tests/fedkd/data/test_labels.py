from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from fedkd.data.labels import LabelColumn, common_classes, has_labels, read_label_column


def read(values, kind=None, names=None, file="a.parquet"):
    column = pa.chunked_array([pa.array(values, kind)])
    return read_label_column(column, file=file, names=names)


def classes(train, test=None):
    splits = {"train": train} if test is None else {"train": train, "test": test}
    return common_classes(splits, "data.label_column 'label'")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 5, 9], pa.int8()),
        ([0, 5, 9], pa.uint8()),
        ([0, 5, 9], pa.uint64()),
        ([0.0, 5.0, 9.0], pa.float32()),
        ([Decimal(0), Decimal(5), Decimal(9)], pa.decimal128(4, 1)),
        (pa.array([0, 5, 9]).dictionary_encode(), None),
    ],
)
def test_whole_numbers_of_any_type_are_class_numbers(values, kind):
    found = classes([read(values, kind), read([1] * 8)])
    assert found.names == tuple("0123456789")
    np.testing.assert_array_equal(found.numbers["train"], [0, 5, 9] + [1] * 8)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_texts_are_classes_in_alphabetical_order_over_all_files(kind):
    found = classes([read(["dog", "cat"], kind), read(["ant", "dog"], kind)], [read(["cat"], kind)])
    assert found.names == ("ant", "cat", "dog")
    np.testing.assert_array_equal(found.numbers["train"], [2, 1, 0, 2])
    np.testing.assert_array_equal(found.numbers["test"], [1])


def test_categories_of_pandas_and_truth_values_are_read_by_what_they_say():
    categories = pa.array(["dog", "cat", "dog"]).dictionary_encode()
    np.testing.assert_array_equal(classes([read(categories)]).numbers["train"], [1, 0, 1])
    truth = classes([read([True, False])], [read([True, True])])
    assert truth.names == ("False", "True")
    np.testing.assert_array_equal(truth.numbers["test"], [1, 1])


def test_numbers_of_files_that_name_classes_in_another_order_mean_the_same_classes():
    one = read([0, 1, 2], names=("ant", "bee", "cat"), file="one")
    other = read([0, 1, 2], names=("cat", "bee", "ant"), file="other")
    found = classes([one], [other])
    assert found.names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(found.numbers["test"], [2, 1, 0])
    # A shard that knows only some of them, and one that writes names instead of numbers.
    np.testing.assert_array_equal(
        classes([one, read([1, 0], names=("cat", "bee"))]).numbers["train"], [0, 1, 2, 1, 2]
    )
    np.testing.assert_array_equal(classes([one], [read(["cat", "bee"])]).numbers["test"], [2, 1])


def test_a_class_that_the_first_file_does_not_know_is_refused_with_both_files():
    one = read([0, 1], names=("ant", "bee"), file="one")
    with pytest.raises(ValueError, match=r"other has a class 'wasp' that one does not have"):
        classes([one], [read([0, 1], names=("ant", "wasp"), file="other")])


def test_names_in_one_file_and_numbers_in_another_are_refused_with_both_files():
    with pytest.raises(ValueError, match=r"one and other must both hold class names or both"):
        classes([read(["ant", "bee"], file="one")], [read([0, 1], file="other")])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([0, 1, -1, 1], r"from 0 to 1, got no label .*in a\.parquet, row 3"),
        ([0, None, 1, None], r"got no label .*row 2 \(counted from 1\) and 1 more"),
        ([0, 1, -5, 1], r"got -5 in a\.parquet, row 3"),
        ([0.0, 1.0, float("nan"), 1.0], r"got no label .*row 3"),
        (["ant", None, "bee"], r"got no label .*row 2"),
        ([0, 1, 2024, 1], r"from 0 to 3 .*got 2024 in a\.parquet, row 3"),
    ],
)
def test_rows_without_a_class_are_named(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        classes([read(values)])


def test_numbers_beyond_the_names_of_the_file_are_named():
    with pytest.raises(ValueError, match=r"from 0 to 1, got 2 in a\.parquet, row 2"):
        classes([read([0, 2], names=("ant", "bee"))])
    # Also where the file's own order is another than the common one.
    one = read([0, 1], names=("bee", "ant"))
    with pytest.raises(ValueError, match=r"from 0 to 1, got 7 in other, row 1"):
        classes([one, read([7], names=("ant", "bee"), file="other")])


@pytest.mark.parametrize(
    ("values", "kind", "complaint"),
    [
        ([0.5, 1.0], None, r"a\.parquet, row 1 .counted from 1.: .*got 0\.5"),
        ([1.0, float("inf")], None, r"row 2 .counted from 1.: .*got inf"),
        ([[1, 0], [0, 1]], None, r"a\.parquet: must hold class numbers .*got list"),
        ([2**63 + 1], pa.uint64(), r"a\.parquet: must hold class numbers"),
        ([b"\xff"], None, r"got binary"),
    ],
)
def test_what_is_no_class_is_refused_by_file(values, kind, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(values, kind)


def test_texts_that_hardly_repeat_are_no_classes():
    with pytest.raises(ValueError, match=r"300 different texts in 300 rows.*data\.label_column"):
        classes([read([f"file{number}" for number in range(300)])])


def test_a_split_without_any_label_has_none():
    assert not has_labels([read([-1, -1]), read([None], pa.null()), read([None, None], pa.int64())])
    assert has_labels([read([-1, -1]), read([-1, 0])])


def test_a_class_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"a\.parquet calls two classes 'ant'"):
        classes([read([0, 1], names=("ant", "ant"))])


def test_one_class_and_no_label_are_nothing_to_learn():
    with pytest.raises(ValueError, match="at least two classes apart, got one, '0'"):
        classes([read([0, 0])])
    with pytest.raises(ValueError, match="'label': no row has a label"):
        classes([read([-1, None])])


def test_names_cannot_steer_a_terminal():
    names = ("\x1b[31mred\x1b[0m", "two\nlines", "gnp.\u202exe", "plain ü", "\udcff")
    shown = classes([LabelColumn("a", np.arange(5), names, declared=True)]).names
    assert all(name.isprintable() for name in shown)
    assert shown[0] == r"\x1b[31mred\x1b[0m"
    assert shown[3] == "plain ü"
