"""Parquet files as people have them, written with pyarrow alone."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedkd.data import DataSettings
from fedkd.data.sources import open_source


def png(grey=0, size=(2, 3), mode="L"):
    stream = io.BytesIO()
    Image.new("L", size[::-1], grey).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def opened(folder, note=None, name="train.parquet", settings=None, **columns):
    table = pa.table(columns)
    if note is not None:
        table = table.replace_schema_metadata({"huggingface": note})
    pq.write_table(table, folder / name)
    return open_source(DataSettings(source=str(folder), **(settings or {})))


def pixels_of(source, rows=2):
    return np.rint(source.train.read(np.arange(rows))[:, 0, 0, 0] * 255)


def note_of(**features):
    return json.dumps({"info": {"features": features}})


CELLS = [png(10), png(20)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(CELLS, pa.binary()),
        pa.array(CELLS, pa.large_binary()),
        pa.array(CELLS, pa.binary_view()),
        pa.array([{"bytes": cell} for cell in CELLS]),
        pa.array([{"path": "x", "bytes": cell} for cell in CELLS]),
        pa.array([[[10, 0], [0, 0]], [[20, 0], [0, 0]]]),
        pa.array([[[10, 0]], [[20, 0]]], pa.list_(pa.list_(pa.uint8(), 2), 1)),
        pa.array([[[10 / 255]], [[20 / 255]]], pa.large_list(pa.list_(pa.float32()))),
        pa.array([[[[10], [0]]] * 2, [[[20], [0]]] * 2]),
    ],
    ids=lambda column: str(column.type),
)
def test_pictures_are_read_from_every_kind_of_column_that_can_hold_them(tmp_path, column):
    source = opened(tmp_path, scan=column, label=[0, 1])
    np.testing.assert_array_equal(pixels_of(source), [10, 20])


def test_truth_values_are_black_and_white(tmp_path):
    source = opened(tmp_path, image=[[[True, False]], [[False, False]]], label=["on", "off"])
    np.testing.assert_array_equal(pixels_of(source), [255, 0])
    assert source.class_names == ("off", "on")


def test_the_column_called_image_is_taken_before_another_that_holds_pictures(tmp_path):
    note = note_of(mask={"_type": "Image"}, image={"_type": "Image"})
    columns = {"mask": [png(1), png(2)], "image": CELLS, "label": [0, 1]}
    np.testing.assert_array_equal(pixels_of(opened(tmp_path, note, **columns)), [10, 20])
    columns["photo"] = columns.pop("image")
    with pytest.raises(ValueError, match=r"data\.image_column must say .*: mask, photo"):
        opened(tmp_path, note_of(mask={"_type": "Image"}, photo={"_type": "Image"}), **columns)


def test_a_mode_that_datasets_notes_is_kept(tmp_path):
    note = note_of(image={"_type": "Image", "mode": "RGB"})
    source = opened(tmp_path, note, image=CELLS, label=[0, 1])
    assert source.train.read(np.arange(2)).shape == (2, 3, 2, 3)


@pytest.mark.parametrize(
    "note", ['{"info": null}', "[]", "5", '{"info": {"features": [1]}}', '{"info": {}}']
)
def test_a_note_that_says_nothing_about_columns_is_none(tmp_path, note):
    source = opened(tmp_path, note, image=CELLS, label=[0, 1])
    assert source.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("note", "complaint"),
    [
        ("{oops", r"train\.parquet: its note 'huggingface' .*not JSON"),
        ("[" * 100_000, r"train\.parquet: its note 'huggingface' .*not JSON"),
        (note_of(label={"names": "ab"}), r"train\.parquet: .*class names must be a list"),
    ],
)
def test_a_note_that_would_lose_class_names_is_refused_by_file(tmp_path, note, complaint):
    with pytest.raises(ValueError, match=complaint):
        opened(tmp_path, note, image=CELLS, label=[0, 1])


def test_a_column_that_stands_there_twice_is_refused(tmp_path):
    columns = [pa.array(CELLS), pa.array([0, 1]), pa.array([0, 1])]
    table = pa.Table.from_arrays(columns, names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has more than one column 'label'"):
        open_source(DataSettings(source=str(tmp_path)))


@pytest.mark.parametrize("column", ["label", "image"])
def test_a_damaged_page_names_file_and_column(tmp_path, column):
    path = tmp_path / "train.parquet"
    opened(tmp_path, image=[png(number) for number in range(60)], label=[0, 1] * 30)
    damaged = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    for number in range(group.num_columns):
        about = group.column(number)
        if about.path_in_schema == column:
            start = about.dictionary_page_offset or about.data_page_offset
            for position in range(start, start + about.total_compressed_size):
                damaged[position] ^= 0x5A
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=rf"train\.parquet, column '{column}' cannot be read"):
        open_source(DataSettings(source=str(tmp_path))).train.read(np.arange(60))


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        (
            [png(), b""],
            r"row 2 .counted from 1.: the picture could not be read: no picture \(0 bytes\)",
        ),
        ([png(), None], r"row 2 .counted from 1.: there is no picture"),
        ([{"bytes": png()}, None], r"row 2 .counted from 1.: there is no picture"),
        ([{"bytes": png(), "path": None}, {"bytes": None, "path": "/etc/a.png"}], "only names"),
        (
            [png(), png(size=(5, 5))],
            r"row 2 .counted from 1.: .*one height x width, got 5x5 here and 2x3 .*row 1",
        ),
        ([png(), png(mode="I;16")], r"row 2 .counted from 1.: images must have at most 8 bits"),
        (
            [[[0, 1], [2, 3]], [[0, 1], [2]]],
            r"row 2 .counted from 1.: the lines .* not of one length",
        ),
        ([[[0, 1]], [[0, None]]], r"row 2 .counted from 1.: the picture has empty cells"),
        (
            [[[0, 1]], [[0, 256]]],
            r"row 2 .counted from 1.: whole numbers must be from 0 to 255, got 0 to 256",
        ),
        ([[[0.0]], [[float("nan")]]], r"row 2 .counted from 1.: fractions must be from 0 to 1"),
        ([[[0.5]], [[-0.5]]], r"row 2 .counted from 1.: fractions must be from 0 to 1, got -0.5"),
        (
            [[[[0] * 5] * 5] * 5] * 2,
            r"row 1 .counted from 1.: one of the first and the last .*got 5x5x5",
        ),
        ([[[0]], []], r"row 2 .counted from 1.: the picture is empty"),
        ([[[0]], [[]]], r"row 2 .counted from 1.: the picture is empty"),
    ],
)
def test_a_bad_picture_is_named_by_file_and_row(tmp_path, cells, complaint):
    source = opened(tmp_path, image=cells, label=[0, 1])
    with pytest.raises(ValueError, match=rf"train\.parquet.*{complaint}"):
        source.train.read(np.array([1, 0]))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({}, "holds nothing but labels"),
        ({"image": [{"path": "a.png"}] * 2}, "holds paths of files"),
    ],
)
def test_what_is_not_read_is_said_in_words(tmp_path, columns, complaint):
    with pytest.raises(ValueError, match=rf"data\.source .*train\.parquet {complaint}.*not read"):
        opened(tmp_path, **columns, label=[0, 1])


def test_sound_is_no_picture_although_it_is_bytes(tmp_path):
    cells = [{"bytes": b"RIFF", "path": None}] * 2
    with pytest.raises(ValueError, match="holds audio"):
        opened(tmp_path, note_of(audio={"_type": "Audio"}), audio=cells, label=[0, 1])


def test_files_may_differ_in_what_makes_no_difference(tmp_path):
    one = {"image": pa.array(CELLS, pa.large_binary()), "label": pa.array([0, 1], pa.int8())}
    opened(tmp_path, name="train-0.parquet", **one)
    other = {"label": pa.array([1, 0], pa.int64()), "image": pa.array(CELLS, pa.binary())}
    source = opened(tmp_path, name="train-1.parquet", **other)
    np.testing.assert_array_equal(source.train.labels, [0, 1, 1, 0])
    np.testing.assert_array_equal(pixels_of(source, 4), [10, 20, 10, 20])


def test_empty_files_and_row_groups_are_no_rows(tmp_path):
    kinds = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(tmp_path / "train-1.parquet", kinds) as writer:
        for rows in ([], [0], []):
            writer.write_table(pa.table([[CELLS[r] for r in rows], rows], schema=kinds))
    pq.write_table(pa.table([[], []], schema=kinds), tmp_path / "train-0.parquet")
    source = opened(tmp_path, name="train-2.parquet", image=CELLS[1:], label=[1])
    np.testing.assert_array_equal(pixels_of(source), [10, 20])
    for path in tmp_path.glob("train-[12].parquet"):
        path.unlink()
    with pytest.raises(ValueError, match="no rows in split 'train'"):
        open_source(DataSettings(source=str(tmp_path)))


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (tmp_path / "train-00000-of-00001.parquet").write_text(pointer, encoding="ascii")
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet .*git lfs pull"):
        open_source(DataSettings(source=str(tmp_path)))


def test_only_a_part_of_a_large_row_group_is_in_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 2**20), dtype=np.uint8)
    table = pa.table({"image": [png() + bytes(each) for each in noise], "label": [0, 1] * 32})
    pq.write_table(table, tmp_path / "train.parquet", use_dictionary=False, write_batch_size=1)
    source = open_source(DataSettings(source=str(tmp_path)))
    del noise, table
    before = pa.total_allocated_bytes()
    peak = 0
    for _, piece in source.train.read.func.__self__._tables[0].pieces("image", np.arange(64)):
        peak = max(peak, pa.total_allocated_bytes() - before)
        del piece
    assert peak < 50 * 2**20


def test_resize_makes_pictures_of_any_size_one(tmp_path):
    source = opened(
        tmp_path,
        image=[png(10), png(20, (50, 7))],
        label=[0, 1],
        settings={"resize": (4, 4)},
    )
    assert source.train.read(np.arange(2)).shape == (2, 1, 4, 4)
