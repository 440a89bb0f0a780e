import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedkd.data import DataSettings
from fedkd.data.sources import (
    digits,
    hugging_face_dataset,
    hugging_face_files,
    open_source,
    source_files,
)


def opened(folder, **table):
    return open_source(DataSettings(source=str(folder), **table))


def test_digits_are_those_of_scikit_learn_bit_for_bit():
    from sklearn.datasets import load_digits

    ours, theirs = digits(), load_digits()
    assert ours.train.labels.dtype == np.int64
    np.testing.assert_array_equal(ours.train.labels, theirs.target)
    np.testing.assert_array_equal(
        ours.train.read(np.arange(1797)), (theirs.images[:, None] / 16).astype(np.float32)
    )


def test_digits_without_scikit_learn_are_refused_in_words(monkeypatch):
    monkeypatch.setattr("fedkd.data.sources.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"data\.source 'digits' .*pip install scikit-learn"):
        digits()


def test_digits_are_1797_grey_8x8_images_scaled_to_one():
    source = open_source(DataSettings())
    assert source.class_names == tuple("0123456789")
    assert source.test is None
    assert len(source.train.labels) == 1797
    pixels = source.train.read(np.arange(1797))
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_rows_are_read_in_the_order_asked_for_across_files_and_row_groups(numbered_folder):
    source = opened(numbered_folder)
    assert source.name == "pictures"
    assert source.class_names == ("cat", "dog")
    rows = np.random.default_rng(0).permutation(300)[:120]
    high, low = np.rint(source.train.read(rows)[:, 0, 0].T * 255)
    np.testing.assert_array_equal(high * 256 + low, rows)
    np.testing.assert_array_equal(source.train.labels, np.arange(300) % 2)
    assert len(source.test.labels) == 60


def test_jpeg_in_colour_in_another_column_is_read_closely(tmp_path, write_pictures):
    colours = [np.full((8, 8, 3), (200, 30 * k, 10), dtype=np.uint8) for k in range(4)]
    labels = [0, 1, 0, 1]
    write_pictures(tmp_path, "train", colours, labels, image_column="img", picture_format="JPEG")
    pixels = opened(tmp_path).train.read(np.array([3, 0]))
    assert pixels.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(pixels[0].mean(axis=(1, 2)) * 255, (200, 90, 10), atol=4)


def test_files_in_a_data_subfolder_are_found(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path / "data", "train", numbered(4), [0, 1, 0, 1])
    assert len(opened(tmp_path).train.labels) == 4


def test_without_notes_of_datasets_classes_are_called_by_number(tmp_path, write_pictures, numbered):
    write_pictures(
        tmp_path, "train", numbered(4), [0, 1, 2, 1], label_column="labels", class_names=None
    )
    source = opened(tmp_path)
    assert source.class_names == ("0", "1", "2")
    assert source.test is None


def test_columns_can_be_named(tmp_path, write_pictures, numbered):
    write_pictures(
        tmp_path,
        "train",
        numbered(4),
        [0, 1, 0, 1],
        image_column="scan",
        label_column="finding",
        class_names=None,
    )
    source = opened(tmp_path, image_column="scan", label_column="finding")
    assert source.train.read(np.array([2])).shape == (1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"data\.image_column .*known: scan, finding"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"data\.label_column .*known: scan, finding"):
        opened(tmp_path, image_column="scan")
    with pytest.raises(ValueError, match=r"got 'picture'; known: scan, finding"):
        opened(tmp_path, image_column="picture", label_column="finding")


@pytest.mark.parametrize("missing", ["./nowhere", "~/no/where", "/no/where", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_without_asking_a_network(missing):
    with pytest.raises(ValueError, match=rf"data\.source '{missing}' is not an existing folder"):
        opened(missing)


def test_a_folder_without_parquet_files_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"train-\*\.parquet.*an empty folder"):
        opened(tmp_path)
    (tmp_path / "cat.png").touch()
    with pytest.raises(ValueError, match=r"train-\*\.parquet.*got cat\.png"):
        opened(tmp_path)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"no columns here")
    with pytest.raises(ValueError, match=r"data\.source .*not Parquet"):
        opened(tmp_path)


def test_files_with_different_columns_are_refused(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    pq.write_table(pa.table({"label": [0]}), tmp_path / "train-9.parquet")
    with pytest.raises(ValueError, match=r"train-9\.parquet and train-0.*same columns"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("labels", "class_names", "range_named"),
    [
        ([0, 1, -1, 1], None, "from 0 to 1, got -1 to 1"),
        ([0, 1, 2, 1], ("cat", "dog"), "from 0 to 1, got 0 to 2"),
        ([0, 1, 2024, 1], None, "from 0 to 3, got 0 to 2024"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(
    tmp_path, write_pictures, numbered, labels, class_names, range_named
):
    write_pictures(tmp_path, "train", numbered(4), labels, class_names=class_names)
    with pytest.raises(ValueError, match=f"data.label_column .*{range_named}"):
        opened(tmp_path)


def test_test_labels_are_checked_too(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    write_pictures(tmp_path, "test", numbered(2), [-1, -1])
    with pytest.raises(ValueError, match="got -1 to -1 in split 'test'"):
        opened(tmp_path)


@pytest.mark.parametrize("labels", [["a", "b"], [0.5, 1.0], [0, None]])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path, labels):
    pq.write_table(pa.table({"image": [b"", b""], "label": labels}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"data\.label_column 'label' .*whole numbers"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([{"path": "a.png"}, {"path": "b.png"}], "must hold encoded images"),
        ([[1, 2], [3, 4]], "must hold encoded images"),
        ([{"bytes": b"x"}, {"bytes": None}], "1 rows without 'bytes'"),
        ([b"no", b"picture"], "could not be read"),
    ],
)
def test_images_that_are_not_inside_the_file_are_refused(tmp_path, cells, complaint):
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=complaint):
        opened(tmp_path).train.read(np.arange(2))


def test_settings_that_a_source_does_not_know_are_refused(numbered_folder):
    with pytest.raises(ValueError, match=r"data\.config does not apply .*'small'"):
        opened(numbered_folder, config="small")
    with pytest.raises(ValueError, match=r"data\.label_column does not apply to .*'digits'"):
        open_source(DataSettings(label_column="target"))


def test_the_files_of_a_source_are_listed_in_the_order_they_are_read(numbered_folder):
    (numbered_folder / "readme.txt").touch()
    names = [path.name for path in source_files(DataSettings(source=str(numbered_folder)))]
    assert names == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "test-00000-of-00001.parquet",
    ]
    assert source_files(DataSettings()) == ()
    with pytest.raises(ValueError, match=r"data\.source '\./nowhere' is not an existing folder"):
        source_files(DataSettings(source="./nowhere"))


@pytest.mark.usefixtures("offline")
def test_the_files_of_a_hugging_face_dataset_are_those_in_its_cache(numbered_folder, tmp_path):
    settings = DataSettings(source=str(numbered_folder))
    files = hugging_face_files(settings, tmp_path / "cache")
    assert len(files) == 2
    assert all(path.is_file() and path.is_relative_to(tmp_path / "cache") for path in files)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_hugging_face_dataset_gives_the_same_rows_as_its_files(numbered_folder, tmp_path):
    settings = DataSettings(source=str(numbered_folder))
    files, loaded = open_source(settings), hugging_face_dataset(settings, tmp_path / "cache")
    assert loaded.class_names == files.class_names
    rows = np.array([250, 3, 77])
    for split in ("train", "test"):
        ours, theirs = getattr(files, split), getattr(loaded, split)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        chosen = rows % len(ours.labels)
        np.testing.assert_array_equal(ours.read(chosen), theirs.read(chosen))


@pytest.mark.usefixtures("offline")
def test_loading_a_hugging_face_dataset_reports_to_no_counter(
    numbered_folder, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: seen.append(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS) or {},
    )
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    with pytest.raises(ValueError, match="must have a split 'train'"):
        hugging_face_dataset(DataSettings(source="org/name"), tmp_path)
    assert seen == [False]
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "org/name"])
def test_a_name_out_of_reach_is_refused_with_the_alternatives(name):
    with pytest.raises(ValueError, match=rf"data\.source '{name}' .*neither .*network.*'digits'"):
        open_source(DataSettings(source=name))
