"""NPZ files, and functions of one's own, that give arrays."""

import numpy as np
import pytest

from fedkd import own_code
from fedkd.data import DataSettings, build_federated_data, source_files
from fedkd.data.sources import open_source

NINE = np.arange(9)


def saved(folder, **arrays):
    np.savez(folder / "rows.npz", **arrays)
    return folder / "rows.npz"


def opened(folder, settings=None, **arrays):
    return open_source(DataSettings(source=str(saved(folder, **arrays)), **(settings or {})))


def test_two_axes_are_features_and_a_single_split_is_for_training(tmp_path):
    source = opened(tmp_path, x=np.arange(6).reshape(3, 2), y=np.array([0, 1, 0]))
    assert source.train.read(np.array([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert (source.kind, source.test, source.name) == ("features", None, "rows.npz")


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("inputs", "labels", "inputs_test", "labels_test"),
    ],
)
def test_splits_are_found_by_name_and_others_left_aside(tmp_path, names):
    arrays = (np.zeros((2, 3)), np.array([0, 1]), np.ones((1, 3)), np.array([[1]]))
    source = opened(tmp_path, **dict(zip(names, arrays, strict=True)), val_images=np.zeros(2))
    assert source.test is not None
    assert source.test.read(np.array([0])).tolist() == [[1, 1, 1]]
    assert source.test.labels.tolist() == [1]  # also where labels stand in a column
    assert "not read: val_images" in source.notes[0]


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 1, 4, 5), (2, 4, 5, 1)])
def test_pictures_have_three_or_four_axes_and_whole_numbers_up_to_255(tmp_path, shape):
    pixels = np.full(shape, 51, np.uint8)
    source = opened(tmp_path, x=pixels, y=np.array([0, 1]))
    read = source.train.read(np.array([1]))
    assert (source.kind, read.shape) == ("pictures", (1, 1, 4, 5))
    assert np.allclose(read, 0.2)
    fractions = opened(tmp_path, {"resize": 8}, x=pixels / 255, y=np.array([0, 1]))
    assert np.allclose(fractions.train.read(np.array([0])), np.full((1, 1, 8, 8), 0.2))


def test_numbers_of_tokens_are_told_from_features_by_a_vocabulary(tmp_path):
    x, y = np.array([[1, 2, 0], [4, 3, 1]]), np.array([0, 1])
    assert opened(tmp_path, x=x, y=y).kind == "features"
    for source in (
        opened(tmp_path, x=x, y=y, vocabulary=np.array(5)),
        opened(tmp_path, {"text": {"vocabulary": 5}}, x=x, y=y),
    ):
        assert (source.kind, source.vocabulary) == ("text", 5)
        assert source.train.read(np.array([1])).tolist() == [[4, 3, 1]]
    source = opened(tmp_path, {"text": {"vocabulary": 4}}, x=x, y=y)
    with pytest.raises(
        ValueError, match=r"array 'x', index 1 .*: numbers of tokens must be from 0 to 3"
    ):
        source.train.read(np.array([0, 1]))


def test_texts_are_encoded_and_classes_have_names(tmp_path):
    source = opened(
        tmp_path, x=np.array(["ab", "b"]), y=np.array([1, 0]), class_names=np.array(["no", "yes"])
    )
    assert source.train.read(np.array([0, 1])).tolist() == [[2, 3], [3, 0]]
    assert (source.vocabulary, source.class_names) == (4, ("no", "yes"))
    grams = opened(tmp_path, {"text": {"form": "word_ngrams"}}, x=np.array(["a"] * 9), y=NINE % 2)
    assert (grams.kind, grams.train.read(NINE).shape) == ("features", (9, 1024))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        (
            {"x": np.array([{}, {}]), "y": [0, 1]},
            r"rows\.npz': array 'x' holds Python objects .*: give np\.asarray\(x, dtype=np\.float",
        ),
        (
            {"x": np.ones((2, 2)), "y": np.array([0, 1], object)},
            r"array 'y' .*give np\.asarray\(y, dtype=int\), or for class names .*y, dtype=str",
        ),
        ({"a": [1], "b": [2]}, "there must be inputs .* and labels .*, got a, b"),
        ({"x": np.zeros((3, 2)), "y": [0, 1]}, "'y' must have one class for each of the 3 rows"),
        ({"x": np.zeros((2, 2)), "y": np.eye(2)}, r"'y' must have one class .* got shape \(2, 2\)"),
        ({"x": np.zeros(2), "y": [0, 1]}, r"'x' must have the axes .* got float64 of shape \(2,\)"),
        ({"x": np.zeros((2, 2)), "y": [0.5, 1]}, "must hold class numbers or class names, got 0.5"),
        ({"x": np.zeros((2, 2), complex), "y": [0, 1]}, "'x' holds complex128"),
        (
            {"x": np.zeros((2, 2)), "inputs": [1], "y": [0, 1]},
            "x and inputs both look like",
        ),
        (
            {"x_train": np.zeros((2, 2)), "y_train": [0, 1], "x_test": [[1]], "y_test": [0]},
            r"must have one shape but for the rows, got \(2, 2\) and \(1, 1\)",
        ),
        ({"x": [[0.5]] * 2, "y": [0, 1], "vocabulary": 9}, "must hold numbers of tokens"),
        ({"x": [[1]] * 2, "y": [0, 1], "vocabulary": 2}, "'vocabulary' must be one whole number"),
    ],
)
def test_arrays_that_cannot_be_understood_are_refused(tmp_path, arrays, told):
    with pytest.raises(ValueError, match=rf"data\.source.*{told}"):
        opened(tmp_path, **{name: np.asarray(value) for name, value in arrays.items()})


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.array([[1.0], [np.nan]]), r"array 'x', index 1 .*: must hold finite numbers"),
        (np.full((2, 3, 3), 300), r"index 1 .*: whole numbers must be from 0 to 255"),
        (np.full((2, 3, 3), -0.1), r"index 1 .*: fractions must be from 0 to 1"),
        (np.zeros((2, 3, 5, 3)), "one of the second and the last axis must be 1 or 3 channels"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, x, told):
    source = opened(tmp_path, x=x, y=np.array([0, 1]))
    with pytest.raises(ValueError, match=told):
        source.train.read(np.array([1, 0]))


def test_what_is_no_npz_file_is_refused(tmp_path):
    (tmp_path / "rows.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"data\.source .*rows\.npz"):
        open_source(DataSettings(source=str(tmp_path / "rows.npz")))
    with pytest.raises(ValueError, match=r"data\.label_column does not apply"):
        opened(tmp_path, {"label_column": "y"}, x=np.zeros((2, 2)), y=np.array([0, 1]))


def test_an_array_may_say_whose_each_row_is(tmp_path):
    x, y = np.zeros((60, 2)), np.arange(60) % 2
    path = saved(tmp_path, x=x, y=y, speaker=np.arange(60) // 20 * 10)
    settings = DataSettings(
        source=str(path),
        public={"size": 0},
        test_fraction=0.1,
        partition={"kind": "natural", "column": "speaker", "min_rows": 1},
    )
    data = build_federated_data(settings, num_clients=3, seed=0)
    assert data.client_names == ("0", "10", "20")
    with pytest.raises(ValueError, match=r"column 'y_' must name one array of 60 .*known: x, y, s"):
        open_source(settings).ids("y_")


# --- a function of one's own --------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "import random\n"
        "import numpy as np\n"
        "def load(rows=40, width=3):\n"
        "    labels = np.arange(rows) % 2\n"
        "    noise = np.random.rand(rows, width) + random.random()\n"
        "    return {'x': labels[:, None] + noise, 'y': [['no', 'yes'][n] for n in labels]}\n"
        "def pair():\n"
        "    return [1], [2]\n"
        "def broken():\n"
        "    raise OSError('no such\\nfile')\n"
        "number = 5\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_called_with_the_options_and_gives_the_same_rows_each_time(own):
    settings = DataSettings(
        source="own_rows:load",
        options={"rows": 60, "width": 2},
        public={"size": 8},
        partition={"kind": "iid"},
    )
    one, other = (build_federated_data(settings, num_clients=2, seed=0) for _ in range(2))
    assert one.input_shape.sides == (2,)
    assert (one.name, one.class_names) == ("own_rows:load", ("no", "yes"))
    assert np.array_equal(one.train_inputs, other.train_inputs)
    assert source_files(settings) == ()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("own_rows:pair", {}, "must return a mapping of arrays .* got tuple"),
        ("own_rows:broken", {}, r"{}: OSError: no such file \(\S+own_rows\.py, line 10\)$"),
        ("own_rows:load", {"height": 2}, "failed with options .*TypeError: .*height"),
        ("own_rows:number", {}, "must name a callable, got int"),
        ("own_rows:gone", {}, "has no attribute 'gone'"),
    ],
)
def test_a_function_that_does_not_keep_the_contract_is_named(own, name, options, told):
    with pytest.raises(ValueError, match=rf"data\.source '{name}'.*{told}"):
        open_source(DataSettings(source=name, options=options))


@pytest.mark.parametrize("name", ["os:system", "numpy:load", "pandas:read_pickle", "torch:load"])
def test_what_takes_any_arguments_is_no_source(name):
    with pytest.raises(ValueError, match=f"'{name}' is no source: nothing in"):
        DataSettings(source=name)
    with pytest.raises(ValueError, match=f"'{name}' is no source: nothing in"):
        DataSettings(public={"source": name})


def test_code_that_must_not_be_named_is_refused_where_settings_are_read(own):
    def refuse(name):
        raise ValueError(f"{name} is not allowed here")

    with (
        own_code.asking(refuse),
        pytest.raises(ValueError, match="own_rows:load is not allowed here"),
    ):
        DataSettings(source="own_rows:load")


def test_options_need_a_function(own):
    with pytest.raises(ValueError, match=r"data\.options are arguments of .* 'digits'"):
        DataSettings(options={"rows": 3})
