import io

import datasets
import httpx
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image

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
    with pytest.raises(ValueError, match=r"data\.label_column must .*known: scan, finding"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"data\.image_column .*'picture'; known: scan, finding"):
        opened(tmp_path, image_column="picture", label_column="finding")
    with pytest.raises(ValueError, match=r"data\.image_column 'finding': holds numbers"):
        opened(tmp_path, image_column="finding", label_column="finding")


@pytest.mark.parametrize("missing", ["./nowhere", "~/no/where", "/no/where", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_without_asking_a_network(missing):
    with pytest.raises(ValueError, match=rf"data\.source '{missing}' is not an existing folder"):
        opened(missing)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"no columns here")
    with pytest.raises(ValueError, match=r"data\.source .*train-0\.parquet cannot be read"):
        opened(tmp_path)


def test_files_with_different_columns_are_refused(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1], files=2)
    other = tmp_path / "train-00001-of-00002.parquet"
    pq.write_table(pa.table({"label": [0]}), other)
    with pytest.raises(ValueError, match=r"train-00001.* and train-00000.* have the same columns"):
        opened(tmp_path)


def test_numbers_of_a_split_that_names_classes_in_another_order_mean_the_same(
    tmp_path, write_pictures, numbered
):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1], class_names=("ant", "bee"))
    write_pictures(tmp_path, "test", numbered(3), [0, 0, 1], class_names=("bee", "ant"))
    source = opened(tmp_path)
    assert source.class_names == ("ant", "bee")
    np.testing.assert_array_equal(source.test.labels, [1, 1, 0])


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_split_without_labels_is_left_aside_and_told(
    tmp_path, write_pictures, numbered, labels
):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    write_pictures(tmp_path, "test", numbered(2), labels)
    write_pictures(tmp_path, "validation", numbered(2), [0, 1])
    source = opened(tmp_path)
    assert source.test is None
    assert [note.split(": ", 1)[1] for note in source.notes] == [
        "not read: validation",
        "the split 'test' has no labels (empty or -1) and is left aside; 20% of the training rows "
        "are for testing (data.test_fraction)",
    ]


def test_a_test_split_without_a_label_column_is_left_aside(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    write_pictures(tmp_path, "test", numbered(2), [0, 1], label_column="id", class_names=None)
    assert opened(tmp_path).test is None


def test_a_row_without_a_class_is_named_by_file_and_row(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    write_pictures(tmp_path, "test", numbered(3), [0, -1, 1])
    with pytest.raises(
        ValueError,
        match=r"data\.label_column 'label' of data\.source .*got no label .*test-00000.*, row 2",
    ):
        opened(tmp_path)


def test_a_single_parquet_file_is_a_source(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(4), [0, 1, 0, 1])
    file = tmp_path / "train-00000-of-00001.parquet"
    source = opened(file)
    assert (source.name, len(source.train.labels)) == ("train-00000-of-00001.parquet", 4)
    assert source_files(DataSettings(source=str(file))) == (file,)
    with pytest.raises(ValueError, match=r"'gone\.parquet' is not an existing"):
        opened("gone.parquet")


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


def write_class_folders(folder, split, colours, size=(4, 6)):
    for name, grey in colours.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(np.full(size, grey + number, np.uint8))
            picture.save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def class_folders(tmp_path):
    write_class_folders(tmp_path / "animals", "train", {"dog": 10, "ant": 100, "cat eyes": 200})
    write_class_folders(tmp_path / "animals", "test", {"dog": 30, "ant": 130})
    (tmp_path / "animals" / "train" / "dog" / "Thumbs.db").touch()
    return tmp_path / "animals"


def test_folders_of_pictures_are_classes_in_alphabetical_order(class_folders):
    source = opened(class_folders)
    assert source.class_names == ("ant", "cat eyes", "dog")
    np.testing.assert_array_equal(source.train.labels, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(source.test.labels, [0, 0, 0, 2, 2, 2])
    pixels = source.train.read(np.array([7, 0]))
    assert pixels.shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(np.rint(pixels[:, 0, 0, 0] * 255), [11, 100])
    plain = opened(class_folders / "train")
    assert (plain.class_names, plain.test) == (source.class_names, None)
    assert len(source_files(DataSettings(source=str(class_folders)))) == 15


def test_pictures_in_no_folder_of_a_class_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "train" / "1.png")
    with pytest.raises(ValueError, match=r"train/1\.png lies in no folder .* its class"):
        opened(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"train/1\.png .*train/cat/1\.png|train/cat/1\.png .*"):
        opened(tmp_path)


def test_a_bad_picture_file_is_named(class_folders):
    (class_folders / "train" / "ant" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/ant/1\.png: the picture could not be read"):
        opened(class_folders).train.read(np.arange(3))


def test_columns_do_not_apply_to_folders_of_pictures(class_folders):
    with pytest.raises(ValueError, match=r"data\.image_column does not apply"):
        opened(class_folders, image_column="image")


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
def test_folders_of_pictures_are_read_as_datasets_reads_them(class_folders, tmp_path):
    settings = DataSettings(source=str(class_folders))
    files, loaded = open_source(settings), hugging_face_dataset(settings, tmp_path / "cache")
    assert loaded.class_names == files.class_names
    for split in ("train", "test"):
        ours, theirs = getattr(files, split), getattr(loaded, split)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        rows = np.arange(len(ours.labels))[::-1]
        np.testing.assert_array_equal(ours.read(rows), theirs.read(rows))


def test_pictures_are_decoded_as_datasets_decodes_them(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    pictures = [Image.fromarray(ramp).convert(mode) for mode in ("L", "RGB", "P", "RGBA", "1")]
    cells = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    stream = io.BytesIO()
    pictures[1].transpose(Image.Transpose.ROTATE_90).save(stream, "JPEG", exif=turned)
    cells.append({"bytes": stream.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    )
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 3}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    ours = opened(tmp_path).train.read(np.arange(6))
    for pixels, theirs in zip(ours, table["image"], strict=True):
        expected = np.asarray(theirs.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.rint(pixels * 255), expected)


def test_what_save_to_disk_wrote_is_read_again(numbered_folder, tmp_path):
    files = opened(numbered_folder)
    splits = datasets.load_dataset(str(numbered_folder), cache_dir=str(tmp_path / "cache"))
    splits.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    saved = opened(tmp_path / "saved")
    assert saved.class_names == files.class_names
    rows = np.array([250, 3, 77])
    np.testing.assert_array_equal(saved.train.labels, files.train.labels)
    np.testing.assert_array_equal(saved.train.read(rows), files.train.read(rows))
    assert len(saved.test.labels) == 60
    assert opened(tmp_path / "saved" / "train").test is None


def test_columns_of_arrays_are_read_as_datasets_writes_them(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5))
    features = datasets.Features(
        {
            "deep": datasets.Array3D((3, 4, 5), "uint8"),
            "flat": datasets.Array2D((4, 5), "float32"),
            "label": datasets.ClassLabel(names=["ant", "bee"]),
        }
    )
    table = {"deep": numbers, "flat": numbers[:, 0] / 255, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"data\.image_column must say .*: deep, flat"):
        opened(tmp_path)
    rows = np.array([4, 0])
    deep = opened(tmp_path, image_column="deep").train.read(rows)
    np.testing.assert_allclose(deep, numbers[rows] / 255, atol=1e-6)
    flat = opened(tmp_path, image_column="flat").train.read(rows)
    np.testing.assert_allclose(flat, numbers[rows, :1] / 255, atol=1e-6)


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
@pytest.mark.parametrize("name", ["a name/of three", "imagefolder", "csv", " ", "a:1"])
def test_what_is_no_name_of_a_dataset_is_refused_without_asking_for_it(name):
    with pytest.raises(ValueError, match="is neither a folder nor a name: known: 'digits'"):
        open_source(DataSettings(source=name))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "org/name"])
def test_a_name_out_of_reach_is_refused_with_the_alternatives(name):
    with pytest.raises(ValueError, match=rf"data\.source '{name}' .*neither .*network.*'digits'"):
        open_source(DataSettings(source=name))


def test_a_class_that_only_test_rows_have_is_told(tmp_path, write_pictures, numbered):
    names = ("cat", "dog", "emu")
    write_pictures(tmp_path / "zoo", "train", numbered(8), [0, 1] * 4, class_names=names)
    write_pictures(tmp_path / "zoo", "test", numbered(3), [0, 1, 2], class_names=names)
    source = open_source(DataSettings(source=str(tmp_path / "zoo")))
    assert any("no training row: emu; nobody can learn them" in note for note in source.notes)


def test_a_name_that_is_nearly_a_known_one_is_answered_without_asking_anybody(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers.csv").write_text("a,label\n1,0\n")
    for name, meant in (
        ("mnistt", "ylecun/mnist"),
        ("Digits", "digits"),
        ("flowers", r"flowers\.csv"),
    ):
        with pytest.raises(ValueError, match=f"did you mean data.source={meant}\\?"):
            open_source(DataSettings(source=name))


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (TimeoutError("too slow"), r"the hub does not answer \(TimeoutError: too slow\)"),
        (
            RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            ),
            "the hub has no dataset of this name",
        ),
    ],
)
def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_used(monkeypatch, trouble, told):
    asked = []

    class Hub:
        def __init__(self, endpoint):
            pass

        def dataset_info(self, name, *, timeout):
            asked.append((name, timeout))
            raise trouble

    def load(*_, **__):
        assert datasets.config.HF_HUB_OFFLINE
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=told):
        open_source(DataSettings(source="org/name"))
    assert asked == [("org/name", 5.0)]
    assert not datasets.config.HF_HUB_OFFLINE
