"""Columns of numbers, of lists and of categories become features."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedkd.data import DataSettings, build_federated_data
from fedkd.data.features import FeatureColumn, read_features
from fedkd.data.sources import open_source
from fedkd.data.tables import ParquetTable


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def opened(path, **columns):
    write(path / "train.parquet", **columns)
    return open_source(DataSettings(source=str(path)))


def read(path, rows, **columns):
    return opened(path, **columns).train.read(np.array(rows)).tolist()


def test_a_column_of_lists_is_as_many_features_as_a_list_has_numbers(tmp_path):
    features = pa.array([[1.0, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2))
    rows = read(tmp_path, [2, 0], features=features, role=[7, 8, 9], label=[0, 1, 0])
    assert rows == [[5, 6], [1, 2]]


def test_plain_columns_are_features_in_their_order_and_texts_are_one_hot(tmp_path):
    rows = read(
        tmp_path,
        [1, 2, 0],
        age=[30, 40, 50],
        city=["rome", "bern", "rome"],
        member=[True, False, True],
        target=[0, 1, 1],
    )
    # age; bern, rome; member
    assert rows == [[40, 1, 0, 0], [50, 0, 1, 1], [30, 0, 1, 1]]


def test_categories_are_those_of_all_files_and_row_numbers_of_pandas_are_left_aside(tmp_path):
    write(tmp_path / "test.parquet", **{"Unnamed: 0": [0], "a": ["z"], "b": [9], "label": [1]})
    columns = {"Unnamed: 0": [5, 6], "a": ["x", "y"], "b": [7, 8], "label": [0, 1]}
    source = opened(tmp_path, **columns)
    assert source.train.read(np.array([0, 1])).tolist() == [[1, 0, 0, 7], [0, 1, 0, 8]]
    assert source.test.read(np.array([0])).tolist() == [[0, 0, 1, 9]]
    assert "not read: column 'Unnamed: 0'" in source.notes[0]


def test_feature_columns_says_which_and_in_which_order(tmp_path):
    write(
        tmp_path / "train.parquet", a=[1, 2], b=[[3], [4]], c=[[[5], [6]], [[7], [8]]], label=[0, 1]
    )
    settings = DataSettings(source=str(tmp_path), feature_columns=["c", "a"])
    source = open_source(settings)
    assert source.train.read(np.array([1])).tolist() == [[7, 8, 2]]
    assert DataSettings(feature_columns="c").feature_columns == ("c",)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"a": [1.0, None]}, "row 2 .counted from 1., column 'a': the cell is empty"),
        (
            {"a": [1.0, float("nan")]},
            "row 2 .counted from 1., column 'a': must hold finite numbers",
        ),
        (
            {"a": [1.0, 1e39]},
            "row 2 .counted from 1., column 'a': must hold finite numbers of at most 3.4e38",
        ),
        ({"a": ["x", None]}, "row 2 .counted from 1., column 'a': the cell is empty"),
        (
            {"features": [[1, 2], [3]]},
            "row 2 .counted from 1., column 'features': must hold 2 numbers.* got 1",
        ),
        ({"features": [[1, 2], [3, None]]}, "row 2.*the list has an empty place"),
        (
            {"features": [[1, 2], None]},
            "row 2 .counted from 1., column 'features': the cell is empty",
        ),
    ],
)
def test_what_is_missing_or_odd_is_named_by_file_row_and_column(tmp_path, columns, told):
    columns = {"first": [1, 2], **columns} if "a" in columns else columns
    source = opened(tmp_path, **columns, label=[0, 1])
    with pytest.raises(ValueError, match=rf"train\.parquet, {told}"):
        source.train.read(np.array([1, 0]))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"a": ["1", "2", "n/a"]},
            r"'a' must hold numbers or texts, not both.*row 3 .* has 'n/a'",
        ),
        ({"when": pa.array([0, 1, 2], pa.timestamp("s"))}, "holds when|timestamp"),
        ({"b": [[1]] * 3, "c": [[1]] * 3}, r"data\.feature_columns must say which .*: b, c"),
    ],
)
def test_columns_that_can_be_no_features_are_named(tmp_path, columns, told):
    first = {} if "b" in columns else {"first": [1, 2, 3]}
    settings = {"feature_columns": ["when"]} if "when" in columns else {}
    write(tmp_path / "train.parquet", **first, **columns, label=[0, 1, 0])
    with pytest.raises(ValueError, match=told):
        open_source(DataSettings(source=str(tmp_path), **settings))


def test_many_different_texts_are_no_categories(tmp_path):
    names = [f"name {number}" for number in range(101)]
    with pytest.raises(ValueError, match=r"'who' .*more than 100 different texts.*feature_columns"):
        opened(tmp_path, who=names, age=list(range(101)), label=[0, 1] * 50 + [0])


@pytest.mark.parametrize("odd", ["NA", "?", "1,5"])
def test_a_column_of_many_numbers_with_one_cell_that_is_none_is_told_so(tmp_path, odd):
    cells = [f"{number / 7}" for number in range(300)]
    cells[123] = odd
    with pytest.raises(ValueError, match=rf"not both: .*row 124 .* has '{odd.replace('?', '.')}'"):
        opened(tmp_path, density=cells, age=list(range(300)), label=[0, 1] * 150)


def test_a_cell_of_the_test_file_that_is_no_number_is_named_however_many_there_are(tmp_path):
    lines = "".join(f"{number / 7},1,{number % 2}\n" for number in range(300))
    (tmp_path / "train.csv").write_text(f"density,age,label\n{lines}")
    (tmp_path / "test.csv").write_text("density,age,label\n1.5,1,0\nNA,1,1\n")
    with pytest.raises(ValueError, match=r"not both: test\.csv, line 3 has 'NA'"):
        open_source(DataSettings(source=str(tmp_path)))


def test_a_cell_of_another_file_that_is_no_number_is_named(tmp_path):
    plan = [FeatureColumn("density", 1)]
    write(tmp_path / "new.parquet", density=["1.5", "NA", "2"], label=[0, 1, 0])
    with pytest.raises(
        ValueError, match=r"row 2 .counted from 1., column 'density': must hold a number, got 'NA'"
    ):
        read_features([ParquetTable(tmp_path / "new.parquet")], plan, np.arange(3))


def test_settings_that_are_for_pictures_are_refused(tmp_path):
    write(tmp_path / "train.parquet", features=[[1.0, 2]] * 4, label=[0, 1] * 2)
    with pytest.raises(ValueError, match=r"data\.resize is for pictures, .* holds features"):
        open_source(DataSettings(source=str(tmp_path), resize=8))
    with pytest.raises(ValueError, match=r"image_column and data\.feature_columns name inputs"):
        DataSettings(source=str(tmp_path), image_column="a", feature_columns=["b"])
    with pytest.raises(ValueError, match=r"data\.feature_columns does not apply to .*'digits'"):
        open_source(DataSettings(feature_columns=["a"]))


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal([5.0, -3.0, 2.0], [10.0, 0.1, 0.0], (200, 3)).astype(np.float32)
    write(tmp_path / "train.parquet", features=list(values), label=np.arange(200) % 2)
    return tmp_path / "train.parquet"


def built(path, **settings):
    fields = {"source": str(path), "public": {"size": 20}, **settings}
    return build_federated_data(DataSettings(**fields), num_clients=3, seed=0)


def test_features_are_standardised_each_by_itself(table):
    data = built(table)
    used = np.concatenate([data.train_inputs, data.public_inputs, data.validation_inputs])
    assert (data.input_shape.kind, data.input_shape.sides) == ("features", (3,))
    assert np.allclose(used.mean(0), 0, atol=1e-4)
    assert np.allclose(used.std(0), [1, 1, 0], atol=1e-4)  # what never changes stays at 0
    assert data.channel_mean.shape == data.channel_std.shape == (3,)
    assert np.allclose(data.channel_mean, [5, -3, 2], atol=2)


def test_public_features_of_another_source_must_be_as_many(table, tmp_path):
    other = tmp_path / "other.parquet"
    write(other, features=[[float(n), 1, 1] for n in range(30)], label=[0, 1] * 15)
    data = built(table, public={"size": 10, "source": str(other)})
    assert data.public_inputs.shape == (10, 3)
    write(other, features=[[1.0, 1]] * 30, label=[0, 1] * 15)
    with pytest.raises(ValueError, match=r"data\.public\.source must have the 3 features .*got 2"):
        built(table, public={"size": 10, "source": str(other)})
    with pytest.raises(ValueError, match=r"must hold features as data\.source does, got pictures"):
        built(table, public={"size": 10, "source": "digits"})
