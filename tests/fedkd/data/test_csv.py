"""CSV files as strangers write them."""

import numpy as np
import pytest

from fedkd.data import DataSettings, build_federated_data, source_files
from fedkd.data.csv_tables import csv_tables
from fedkd.data.sources import open_source


def opened(folder, text, name="train.csv", **settings):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(DataSettings(source=str(path), **settings))


def rows(source, count):
    return source.train.read(np.arange(count)).tolist()


def test_numbers_are_features_texts_one_hot_and_labels_are_found_by_name(tmp_path):
    source = opened(
        tmp_path,
        'age, city,"income",target\r\n30,rome,1e3,no\r\n40,"bern",-2.5,yes\r\n'
        "\r\n50, rome,0,no\r\n",
    )
    assert rows(source, 3) == [[30, 0, 1, 1000], [40, 1, 0, -2.5], [50, 0, 1, 0]]
    assert (source.class_names, source.train.labels.tolist()) == (("no", "yes"), [0, 1, 0])
    assert source.kind == "features"


def test_quoted_cells_may_hold_delimiters_quotes_and_ends_of_lines(tmp_path):
    source = opened(tmp_path, 'text,label\n"a, ""b""\nc",0\n  d ,1\n')
    assert source.kind == "text"
    shown = rows(source, 2)
    assert [sum(token > 0 for token in row) for row in shown] == [8, 4]  # blanks of texts are kept


@pytest.mark.parametrize(
    ("text", "name"),
    [("a;b;label\n1;2,x;0\n3;4,y;1\n", "x.csv"), ("a\tb\tlabel\n1\t2,x\t0\n3\t,y\t1\n", "x.tsv")],
)
def test_the_delimiter_is_what_divides_the_first_line_most(tmp_path, text, name):
    assert opened(tmp_path, text, name).train.read(np.arange(2))[:, 0].tolist() == [1, 3]


def test_a_byte_order_mark_and_the_row_numbers_of_pandas_are_left_aside(tmp_path):
    source = opened(tmp_path, b"\xef\xbb\xbf,a,label\n0,5,0\n1,6,1\n")
    assert rows(source, 2) == [[5], [6]]
    assert "not read: column ''" in source.notes[0]


def test_training_and_test_files_of_a_folder_have_the_same_features(tmp_path):
    (tmp_path / "train.csv").write_text("a,kind,label\n1,x,0\n2,y,1\n3,x,0\n4,y,1\n")
    (tmp_path / "test.csv").write_text("label,kind,a\n1,z,5\n")
    settings = DataSettings(
        source=str(tmp_path), public={"size": 0}, partition={"kind": "iid", "min_rows": 1}
    )
    source = open_source(settings)
    assert rows(source, 1) == [[1, 1, 0, 0]]
    assert source.test.read(np.array([0])).tolist() == [[5, 0, 0, 1]]
    data = build_federated_data(settings, num_clients=2, seed=0)
    assert data.input_shape.sides == (4,)
    names = [path.name for path in source_files(settings)]
    assert names == ["train.csv", "test.csv"]


def test_the_column_of_natural_ids_is_no_feature(tmp_path):
    text = "a,site,label\n" + "".join(f"{n},{n % 3},{n % 2}\n" for n in range(40))
    source = opened(tmp_path, text, partition={"kind": "natural", "column": "site"})
    assert rows(source, 2) == [[0], [1]]
    assert source.ids("site").names == ("0", "1", "2")


def test_a_test_file_without_labels_is_left_aside_with_what_it_lacks(tmp_path):
    (tmp_path / "train.csv").write_text("a,b,label\n1,x,0\n2,y,1\n")
    (tmp_path / "test.csv").write_text("a\n5\n")
    source = open_source(DataSettings(source=str(tmp_path)))
    assert source.test is None
    assert "the split 'test' has no labels" in source.notes[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,label\n1,0\n,1\n", r"train\.csv, line 3, column 'a': the cell is empty"),
        ("a,b,label\n1,x,0\n2,,1\n", r"train\.csv, line 3, column 'b': the cell is empty"),
        (
            "a,b,label\n1,1,0\nnan,1,1\n",
            r"train\.csv, line 3, column 'a': must hold finite numbers",
        ),
        ('text,label\nx,0\n"",1\n', r"train\.csv, line 3, column 'text': there is no text"),
    ],
)
def test_missing_cells_are_named_by_file_row_and_column(tmp_path, text, told):
    source = opened(tmp_path, text)
    with pytest.raises(ValueError, match=told):
        rows(source, 2)


def test_lines_are_those_of_the_file_whatever_is_in_its_cells(tmp_path):
    # Line 1 names the columns, a cell goes on in line 3, line 5 is blank.
    file = tmp_path / "own.csv"
    file.write_text('a,text,label\n1,"x\ny",0\n2,z,1\n\n3,,1\n')
    source = open_source(DataSettings(source=str(file)))
    with pytest.raises(ValueError, match=r"^own\.csv, line 6, column 'text': there is no text"):
        rows(source, 3)
    (table,) = csv_tables({"train": [file]}, DataSettings())["train"]
    assert [table.where(row) for row in range(3)] == [f"own.csv, line {n}" for n in (2, 4, 6)]
    settings = DataSettings(source=str(file), public={"size": 0}, partition={"min_rows": 1})
    with pytest.raises(ValueError, match=r"^data\.source '\S*own\.csv', line 6, column 'text'"):
        build_federated_data(settings, num_clients=1, seed=0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b,label\n1,0,0\n2,0,1\n?,0,1\n", r"'a' must hold numbers or texts.*line 4 has '\?'"),
        ("a,label\n1,0\n2,\n3,1\n", r"got no label .* in train\.csv, line 3"),
        ("a;b;label\n1;2,5;0\n3;4,5;1\n", r"'b' holds numbers with a comma.*: write 2\.5"),
        (
            "5.1,3.5,0\n4.9,3.0,1\n",
            r"train\.csv' has no header: .* got 5\.1, 3\.5, 0",
        ),
        ("a,a,label\n1,2,0\n", r"train\.csv' has more than one column 'a'"),
        (
            "a,label\n1,0\n2,1,3\n",
            r"train\.csv' cannot be read: .*Expected 2 columns, got 3",
        ),
        ("", r"train\.csv' is empty"),
        ("a,label\n", r"has no rows in split 'train'"),
        ("a,b\n1,2\n", r"label_column must name the column .* known: a, b"),
        (b"a,label\n\xff,0\n\xfe,1\n", r"train\.csv' cannot be read: .*UTF-?8"),
    ],
)
def test_files_that_cannot_be_understood_are_refused(tmp_path, text, told):
    with pytest.raises(ValueError, match=rf"data\..*{told}"):
        opened(tmp_path, text)
