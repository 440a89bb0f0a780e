import json
import os
from pathlib import Path

import pytest

from fedkd.data.layouts import find_layout


def touched(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root):
    layout = find_layout(root, "here")
    return tuple(
        [str(path.relative_to(root)) for path in files] for files in (layout.train, layout.test)
    )


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.parquet", "test.parquet"], ["train.parquet"], ["test.parquet"]),
        (["train-0.parquet", "train-1.parquet"], ["train-0.parquet", "train-1.parquet"], []),
        (["data/train-00000-of-00001.parquet"], ["data/train-00000-of-00001.parquet"], []),
        (
            ["default/train/0000.parquet", "default/test/0000.parquet"],
            ["default/train/0000.parquet"],
            ["default/test/0000.parquet"],
        ),
        (["mnist-train.parquet", "mnist-test.parquet"],) * 1
        + (["mnist-train.parquet"], ["mnist-test.parquet"]),
        (["TRAIN.PARQUET", "Test.Parquet"], ["TRAIN.PARQUET"], ["Test.Parquet"]),
        (["part-0.parquet", "part-1.parquet"], ["part-0.parquet", "part-1.parquet"], []),
        (["a b/größe.parquet"], ["a b/größe.parquet"], []),
        (["training/x.parquet", "evaluation/y.parquet"],) * 1
        + (["training/x.parquet"], ["evaluation/y.parquet"]),
        (["cat/1.png", "dog/2.JPG"], ["cat/1.png", "dog/2.JPG"], []),
        (["cat/test.png", "dog/2.png"], ["cat/test.png", "dog/2.png"], []),
        (
            ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png"],
            ["train/cat/1.png", "train/dog/2.png"],
            ["test/cat/3.png"],
        ),
        (["Train/cat/1.png", "Test/cat/1.png"], ["Train/cat/1.png"], ["Test/cat/1.png"]),
        (["train.csv", "test.csv", "more.csv"], ["train.csv"], ["test.csv"]),
        (["rows.npz", "notes.txt"], ["rows.npz"], []),
        (["cat/1.png", "dog/1.png", "labels.csv"], ["cat/1.png", "dog/1.png"], []),
    ],
)
def test_splits_are_found_by_the_names_of_folders_and_files(tmp_path, names, train, test):
    assert found(touched(tmp_path, *names)) == (train, test)


def test_a_name_that_only_begins_like_a_split_is_another_one(tmp_path):
    touched(tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    touched(tmp_path, "train_noisy-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
    assert found(tmp_path) == (["train-00000-of-00001.parquet"], ["test-00000-of-00001.parquet"])
    assert find_layout(tmp_path, "here").left_aside == ("train_noisy", "validation")


def test_what_is_not_data_is_not_seen(tmp_path):
    touched(tmp_path, "cat/1.png", "cat/Thumbs.db", "cat/.hidden.png", "dog/2.png", "README.md")
    touched(tmp_path, "__MACOSX/cat/._1.png", ".git/train-0.parquet", "cat/._1.png", "labels.csv")
    assert found(tmp_path) == (["cat/1.png", "dog/2.png"], [])


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["train-00000-of-00001.parquet", "train-00001-of-00002.parquet"],
            r"train-00000-of-00001\.parquet and train-00001-of-00002\.parquet are of two uploads",
        ),
        (
            ["train-00000-of-00001-aaaa.parquet", "train-00000-of-00001-bbbb.parquet"],
            r"aaaa\.parquet and .*bbbb\.parquet are of two uploads",
        ),
        (
            ["train-00000-of-00001.parquet", "train.parquet"],
            r"train-00000-of-00001\.parquet and train\.parquet are of two uploads",
        ),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "number 1 is missing"),
        (["train-0.parquet", "test-00001-of-00002.parquet"], "number 0 is missing"),
        (["train-00001-of-00001.parquet"], "number 0 is missing"),
        (["a/train/0.parquet", "b/train/0.parquet"], r"a/train/0\.parquet and b/train/0\.parquet"),
        (["cats-train.parquet", "dogs-train.parquet"], "both look like the split 'train'"),
        (["train.parquet", "data/train.parquet"], "both look like the split 'train'"),
        (["test.parquet"], r"must be a split 'train' .*got test\.parquet"),
        (["test/cat/1.png", "cat/2.png"], r"must be a split 'train'"),
        (["train.xlsx"], r"holds spreadsheets.* \(train\.xlsx\).*not read yet"),
        (["train.jsonl"], "holds text"),
        (["train.csv.gz"], "holds archives, which have to be unpacked"),
        (["cat.zip"], "holds archives"),
        (["x.npy"], "holds arrays"),
        (["a.npz", "b.npz"], r"several NPZ files \(a\.npz, b\.npz\): name one"),
        (["notes.md"], r"holds no data that can be read, but notes\.md"),
        ([], "is an empty folder"),
        (["cat/1.png", "metadata.csv"], r"labels in metadata\.csv are not read yet"),
    ],
)
def test_folders_that_cannot_be_understood_are_refused_with_their_files(tmp_path, names, complaint):
    with pytest.raises(ValueError, match=rf"data\.source 'here'.*{complaint}"):
        find_layout(touched(tmp_path, *names), "here")


def test_links_are_followed_but_not_in_circles(tmp_path):
    touched(tmp_path / "elsewhere", "train-0.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data") == (["linked/train-0.parquet"], [])


def test_a_pipe_and_a_link_to_nothing_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet is not a regular file"):
        find_layout(tmp_path, "here")
    with pytest.raises(ValueError, match=r"'pipe' is neither a folder nor a regular file"):
        find_layout(tmp_path / "train-0.parquet", "pipe")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train-0.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"train-0\.parquet is a link to nothing"):
        find_layout(other, "here")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"data\.source 'here': .*Permission denied"):
        find_layout(tmp_path, "here")


def test_a_single_file_is_for_training(tmp_path):
    file = touched(tmp_path, "pictures.parquet") / "pictures.parquet"
    assert find_layout(file, "here").train == (file,)
    (tmp_path / "pictures.xlsx").touch()
    with pytest.raises(ValueError, match=r"'here' is spreadsheets, .* as CSV: known: 'digits'"):
        find_layout(tmp_path / "pictures.xlsx", "here")


def saved(folder, names):
    touched(folder, *names, "dataset_info.json")
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def test_what_save_to_disk_wrote_is_found_with_all_that_describes_it(tmp_path):
    saved(tmp_path / "train", ["data-00000-of-00001.arrow"])
    saved(tmp_path / "unsupervised", ["data-00000-of-00001.arrow"])
    index = {"splits": ["train", "unsupervised"]}
    (tmp_path / "dataset_dict.json").write_text(json.dumps(index), encoding="utf-8")
    layout = find_layout(tmp_path, "here")
    assert layout.kind == "arrow"
    assert [path.name for path in layout.files] == [
        "dataset_dict.json",
        "state.json",
        "dataset_info.json",
        "data-00000-of-00001.arrow",
    ]
    assert layout.left_aside == ("unsupervised",)
    assert find_layout(tmp_path / "train", "here").train == layout.train


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"_data_files": [{"filename": "../train.arrow"}]}, r"\.\./train\.arrow, which .* missing"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow, which .* is missing"),
        ({"_data_files": [{"filename": 5}]}, "state.json does not list '_data_files'"),
        ([], "state.json does not list '_data_files'"),
    ],
)
def test_a_state_that_leads_elsewhere_or_nowhere_is_refused(tmp_path, state, complaint):
    touched(tmp_path, "train.arrow")
    inside = Path(touched(tmp_path, "saved/dataset_info.json")) / "saved"
    (inside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        find_layout(inside, "here")
