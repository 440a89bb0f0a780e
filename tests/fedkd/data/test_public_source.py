import numpy as np
import pytest
from PIL import Image

from fedkd.data import DataSettings, build_federated_data, public_source_files
from fedkd.data.public_source import LUMA, matched
from fedkd.data.public_source import numbered as numbers_of

SMALL = {"partition": {"kind": "iid"}, "test_fraction": 0.2}


@pytest.fixture
def letters(tmp_path, write_pictures, numbered):
    """120 grey 3x2 pictures of three classes."""
    labels = [number % 3 for number in range(120)]
    folder = tmp_path / "letters"
    write_pictures(folder, "train", numbered(120), labels, class_names=("a", "b", "c"))
    return str(folder)


@pytest.fixture
def others(tmp_path, write_pictures):
    """90 grey pictures of another size, of a class that the letters have and one that they lack."""
    pictures = [np.full((6, 4), number, np.uint8) for number in range(90)]
    labels = [number % 2 for number in range(90)]
    folder = tmp_path / "others"
    write_pictures(folder, "train", pictures, labels, class_names=("digit", "b"))
    return str(folder)


def build(private, **public):
    table = {**SMALL, "source": private, "public": {"size": 40, **public}}
    return build_federated_data(DataSettings.model_validate(table), num_clients=3, seed=5)


def test_public_rows_come_from_there_and_have_the_private_size(letters, others):
    data = build(letters, source=others)
    assert data.public_inputs.shape == (40, 1, 3, 2)
    assert data.public_labels is None
    assert data.class_names == ("a", "b", "c")
    assert data.other_classes == 0
    shade = data.public_inputs * data.channel_std[0] + data.channel_mean[0]
    assert len(np.unique(np.rint(shade[:, 0, 0, 0] * 255))) == 40


def test_the_private_source_keeps_all_its_rows(letters, others):
    # 120: 24 test, a tenth of the other 96 validation, and none public.
    data = build(letters, source=others)
    assert (len(data.test_labels), len(data.validation_labels)) == (24, 10)
    assert len(data.train_labels) == 86
    assert abs(float(np.concatenate([data.train_inputs, data.validation_inputs]).mean())) < 1e-6


def test_labelled_rows_of_other_classes_get_numbers_behind_the_private_ones(letters, others):
    data = build(letters, source=others, labelled=True)
    assert data.class_names == ("a", "b", "c", "digit")
    assert (data.num_classes, data.other_classes) == (4, 1)
    shade = data.public_inputs * data.channel_std[0] + data.channel_mean[0]
    number = np.rint(shade[:, 0, 0, 0] * 255).astype(int)
    np.testing.assert_array_equal(data.public_labels, np.where(number % 2, 1, 3))
    assert data.label_counts()[:, 3].sum() == 0


def test_classes_apart_are_all_others(letters, others):
    data = build(letters, source=others, labelled=True, classes="apart")
    assert data.class_names == ("a", "b", "c", "public digit", "public b")
    assert sorted(set(data.public_labels)) == [3, 4]


def test_numbers_by_name_whatever_the_order():
    numbers, names = numbers_of(("dog", "cat"), ("cat", "dog"), apart=False)
    np.testing.assert_array_equal(numbers, [1, 0])
    assert names == ("cat", "dog")


def test_grey_becomes_colour_and_colour_grey():
    grey = np.full((1, 1, 2, 2), 0.5, np.float32)
    np.testing.assert_array_equal(
        matched(grey, channels=3, size=(2, 2)), np.full((1, 3, 2, 2), 0.5)
    )
    red = np.zeros((1, 3, 2, 2), np.float32)
    red[:, 0] = 1
    np.testing.assert_allclose(matched(red, channels=1, size=(2, 2)), 0.299)
    assert LUMA.sum() == pytest.approx(1)


def test_a_source_that_repeats_the_private_rows_is_refused(letters):
    message = r"data\.public\.source .*: \d+ of 40 public rows have the very content of private"
    with pytest.raises(ValueError, match=message):
        build(letters, source=letters)


def test_more_rows_than_there_are_are_refused(letters, others):
    with pytest.raises(ValueError, match=r"data\.public\.size must be at most 90, .* got 91"):
        build(letters, source=others, size=91)


def test_errors_name_the_public_setting(letters, tmp_path, write_pictures, numbered):
    with pytest.raises(ValueError, match=r"data\.public\.source './nowhere'"):
        build(letters, source="./nowhere")
    with pytest.raises(ValueError, match=r"data\.public\.source './nowhere'"):
        public_source_files(DataSettings.model_validate({"public": {"source": "./nowhere"}}))
    folder = write_pictures(tmp_path / "odd", "train", numbered(9), [0, 1, 0] * 3)
    with pytest.raises(ValueError, match=r"data\.public\.label_column"):
        build(letters, source=str(folder), label_column="kind", size=5)


def test_parts_without_a_source_are_refused():
    with pytest.raises(ValueError, match=r"data\.public\.label_column belongs to data\.public\.s"):
        DataSettings.model_validate({"public": {"label_column": "kind"}})
    with pytest.raises(ValueError, match=r"classes: apart needs a data\.public\.source"):
        DataSettings.model_validate({"public": {"classes": "apart"}})


def test_files_of_the_public_source_are_known(letters, others):
    settings = DataSettings.model_validate({"source": letters, "public": {"source": others}})
    (file,) = public_source_files(settings)
    assert file.parent.name == "others"
    assert public_source_files(DataSettings(source=letters)) == ()


# --- without labels, and with columns that are named --------------------------------------------


def write_flat_pictures(folder, count=60):
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((6, 4), number, np.uint8)).save(folder / f"{number:02}.png")


def test_pictures_in_one_folder_are_public_rows_where_labels_are_not_needed(letters, tmp_path):
    write_flat_pictures(tmp_path / "flat")
    data = build(letters, source=str(tmp_path / "flat"))
    shade = data.public_inputs * data.channel_std[0] + data.channel_mean[0]
    assert len(np.unique(np.rint(shade[:, 0, 0, 0] * 255))) == 40
    assert data.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="lies in no folder that is named after its class"):
        build(letters, source=str(tmp_path / "flat"), labelled=True)
    # Pictures in one folder more are of one class, which tells nothing apart.
    (tmp_path / "flat").rename(tmp_path / "unknown")
    (tmp_path / "all").mkdir()
    (tmp_path / "unknown").rename(tmp_path / "all" / "unknown")
    assert build(letters, source=str(tmp_path / "all")).public_inputs.shape == (40, 1, 3, 2)


@pytest.fixture
def people(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{a:.3f},{b:.3f},{n % 3}" for n, (a, b) in enumerate(rng.normal(size=(150, 2)))]
    (tmp_path / "people.csv").write_text("\n".join(["a,b,label", *rows]))
    return str(tmp_path / "people.csv")


def test_a_table_or_arrays_without_labels_are_public_rows(people, tmp_path):
    rows = np.random.default_rng(1).normal(size=(80, 2)).round(3)
    lines = [f"{n},{b},{a}" for n, (a, b) in enumerate(rows)]
    (tmp_path / "others.csv").write_text("\n".join([",b,a", *lines]))  # as pandas writes it
    np.savez(tmp_path / "others.npz", x=rows)
    for name, table in (
        ("others.csv", {"feature_columns": ["a", "b"]}),
        ("others.npz", {}),
    ):
        data = build(people, source=str(tmp_path / name), **table)
        found = data.public_inputs * data.channel_std + data.channel_mean
        known = {tuple(row) for row in rows}
        assert {tuple(row) for row in found.astype(float).round(3)} <= known
        with pytest.raises(ValueError, match=r"data\.public\.(label_column|source)"):
            build(people, source=str(tmp_path / name), labelled=True, **table)


def test_the_text_column_of_the_public_source_is_named(tmp_path):
    words = ["aab", "abb", "bab", "bba", "aaa", "bbb"]
    for name, column in (("own", "said"), ("others", "written")):
        lines = [f"{words[n % 6]}{n % 10},note {n},{n % 2}" for n in range(150)]
        if name == "others":
            lines = [f"{words[n % 6]}x{n % 7},note {n},{n % 2}" for n in range(150)]
        (tmp_path / f"{name}.csv").write_text("\n".join([f"{column},note,label", *lines]))
    table = {**SMALL, "source": str(tmp_path / "own.csv"), "text_column": "said"}
    public = {"size": 40, "source": str(tmp_path / "others.csv"), "text_column": "written"}
    settings = DataSettings.model_validate({**table, "public": public})
    data = build_federated_data(settings, num_clients=3, seed=5)
    assert data.public_inputs.shape == (40, data.train_inputs.shape[1])
    public["text_column"] = "said"
    with pytest.raises(ValueError, match=r"^data\.public\.text_column must name a column"):
        build_federated_data(
            DataSettings.model_validate({**table, "public": public}), num_clients=3, seed=5
        )
    with pytest.raises(ValueError, match=r"feature_columns and data\.public\.text_column name"):
        DataSettings.model_validate({"public": {**public, "feature_columns": ["note"]}})
