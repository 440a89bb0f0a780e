"""What a run is made of: data, code and libraries, and which run of equal settings is the same."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedkd.distillation.settings import DistillSettings
from sim.keeping import provenance
from sim.keeping.provenance import (
    CACHE_FILE,
    UNKNOWN,
    Changes,
    Provenance,
    changes,
    check_same_make,
    file_digests,
    place_run,
    provenance_of,
)
from sim.keeping.records import IDENTITY_FILE
from sim.settings import Settings, SettingsError, load_distill_settings, load_settings

Small = Callable[..., Settings]
FACTORY = "def make(*, input_shape, num_classes, width=4):\n    raise NotImplementedError\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules of one's own are imported."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("lone_models", "lone_helper", "lone_package"):
        sys.modules.pop(name, None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# -- code --------------------------------------------------------------------------------------


def test_our_code_counts_but_not_what_only_shows_numbers(small: Small) -> None:
    code = provenance_of(small()).code
    assert {
        "strategies/mutual/dml.py",
        "fedkd/losses/response.py",
        "sim/server/rounds.py",
    } <= code.keys()
    assert not [name for name in code if name.startswith(("sim/reports/", "sim/commands/cli/"))]
    assert not [name for name in code if "__pycache__" in name]


def test_the_whole_package_of_an_own_model_counts(small: Small, own: Path) -> None:
    package = own / "lone_package"
    write(package / "__init__.py", "")
    write(package / "nets" / "__init__.py", FACTORY)
    write(package / "layers.py", "x = 1\n")
    write(package / "notes.txt", "no code")
    settings = small("clients.models=['lone_package.nets:make']")
    before = provenance_of(settings)
    mine = {name for name in before.code if name.startswith("lone")}
    assert mine == {
        "lone_package/__init__.py",
        "lone_package/nets/__init__.py",
        "lone_package/layers.py",
    }
    write(package / "layers.py", "x = 2\n")
    found = changes(before, provenance_of(settings))
    assert found == Changes(code=("lone_package/layers.py changed",))
    assert "lone_package" not in sys.modules  # nothing was run to find that out


def test_what_a_lone_module_imports_from_beside_itself_counts(small: Small, own: Path) -> None:
    write(own / "lone_models.py", f"import math\nfrom lone_helper import x\n{FACTORY}")
    write(own / "lone_helper.py", "x = 1\n")
    write(own / "bystander.py", "x = 1\n")
    settings = small("clients.models=['lone_models:make', mlp]")
    before = provenance_of(settings)
    assert {"lone_models.py", "lone_helper.py"} <= before.code.keys()
    assert "bystander.py" not in before.code
    write(own / "lone_helper.py", "x = 2\n")
    write(own / "bystander.py", "x = 2\n")
    assert changes(before, provenance_of(settings)).code == ("lone_helper.py changed",)


def test_a_model_of_the_server_counts_too(small: Small, own: Path) -> None:
    write(own / "lone_models.py", FACTORY)
    settings = small("strategy={name: one_way, model: 'lone_models:make'}")
    assert "lone_models.py" in provenance_of(settings).code
    assert "lone_models.py" not in provenance_of(small()).code
    student = load_distill_settings(None, ["student.model=lone_models:make"])
    assert "lone_models.py" in provenance_of(student).code


def test_a_function_that_deals_the_rows_counts_too(small: Small, own: Path) -> None:
    write(own / "lone_models.py", "def deal(labels, *, num_clients, rng):\n    return None\n")
    settings = small("data.partition={kind: 'lone_models:deal'}")
    before = provenance_of(settings)
    write(own / "lone_models.py", "def deal(labels, *, num_clients, rng):\n    return 1\n")
    assert changes(before, provenance_of(settings)).code == ("lone_models.py changed",)


def test_code_that_cannot_be_found_is_never_the_same(small: Small) -> None:
    settings = small("clients.models=['nowhere_at_all:make']")
    before = provenance_of(settings)
    assert before.code["nowhere_at_all"] == UNKNOWN
    assert changes(before, before).code == ("nowhere_at_all cannot be found",)


def test_libraries_count_by_their_versions(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    before = provenance_of(small())
    assert {"torch", "numpy"} <= before.versions.keys()
    monkeypatch.setattr(provenance, "version", lambda _: "99")
    (torch, *_) = changes(before, provenance_of(small())).code
    assert torch == f"torch {before.versions['torch']}, now 99"


# -- data --------------------------------------------------------------------------------------


def test_a_file_is_read_once_as_long_as_nothing_about_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = tmp_path / CACHE_FILE, tmp_path / "train.parquet"
    path.write_bytes(b"one")
    monkeypatch.setattr(provenance, "_FRESH_S", -1.0)
    (first,) = file_digests([path], cache)
    read = []
    original = Path.open

    def spy(self: Path, *args: object, **options: object) -> object:
        read.append(self)
        return original(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", spy)
    assert file_digests([path], cache) == [first]
    assert path not in read
    # The same size and, as after a copy that keeps times, the same time of modification.
    seen = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    (second,) = file_digests([path], cache)
    assert second != first
    assert path in read


def test_a_file_that_is_still_young_is_not_believed(tmp_path: Path) -> None:
    cache, path = tmp_path / CACHE_FILE, tmp_path / "train.parquet"
    path.write_bytes(b"one")
    file_digests([path], cache)
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', "[" * 100_000])
def test_a_damaged_cache_is_no_cache(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"one")
    (right,) = file_digests([path], tmp_path / "none.json")
    (tmp_path / CACHE_FILE).write_text(text)
    assert file_digests([path], tmp_path / CACHE_FILE) == [right]


def test_every_picture_of_a_folder_counts_although_they_are_called_alike(tmp_path: Path) -> None:
    pictures = [
        tmp_path / "animals" / split / kind / "1.png"
        for split in ("train", "test")
        for kind in ("ant", "bee")
    ]
    for number, picture in enumerate(pictures):
        picture.parent.mkdir(parents=True)
        picture.write_bytes(bytes([number]))
    settings = load_settings(
        None, [f"data.source={tmp_path / 'animals'}", f"output={tmp_path / 'runs'}"]
    )
    before = provenance_of(settings).data
    assert list(before) == [
        f"animals/{split}/{kind}/1.png" for split in ("train", "test") for kind in ("ant", "bee")
    ]
    for picture in pictures:
        kept = picture.read_bytes()
        picture.write_bytes(b"another")
        assert provenance_of(settings).data != before
        picture.write_bytes(kept)


def test_files_of_public_rows_are_data(tmp_path: Path, small: Small) -> None:
    for folder in ("private", "public"):
        write(tmp_path / folder / "train.parquet", folder)
    words = [f"data.source={tmp_path}/private", f"data.public.source={tmp_path}/public"]
    data = provenance_of(load_settings(None, [*words, f"output={tmp_path}/runs"])).data
    assert data.keys() == {"private/train.parquet", "public: public/train.parquet"}
    write(tmp_path / "public" / "train.parquet", "other")
    after = provenance_of(load_settings(None, [*words, f"output={tmp_path}/runs"])).data
    assert [name for name in data if data[name] != after[name]] == ["public: public/train.parquet"]


def test_weights_that_a_distillation_begins_with_are_data(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"one")
    settings = DistillSettings.model_validate(
        {"output": str(tmp_path), "teacher": {"models": ["mlp"], "weights": str(path)}}
    )
    before = provenance_of(settings)
    path.write_bytes(b"two")
    (changed,) = changes(before, provenance_of(settings)).data
    assert changed.endswith("teacher.safetensors changed")


# -- which run is the same ---------------------------------------------------------------------

MADE = Provenance({"a/train.parquet": "1"}, {"strategies/mutual/dml.py": "1"}, {"torch": "2"})
OTHER_CODE = Provenance(MADE.data, {"strategies/mutual/dml.py": "2"}, MADE.versions)
OTHER_DATA = Provenance({"a/train.parquet": "2"}, MADE.code, MADE.versions)


def keep(folder: Path, made_of: Provenance | None) -> Path:
    folder.mkdir(parents=True)
    if made_of is not None:
        write(folder / IDENTITY_FILE, json.dumps(made_of.to_row()))
    return folder


def place(folder: Path, now: Provenance, *, accept_code: bool = False) -> provenance.Place:
    return place_run(folder, now, accept_code=accept_code, begun=Path.is_dir)


def test_a_run_made_of_something_else_is_kept_and_the_new_one_gets_a_number(
    tmp_path: Path,
) -> None:
    first = tmp_path / "seed-0"
    assert place(first, MADE) == provenance.Place(first)
    keep(first, MADE)
    assert place(first, MADE).folder == first
    for now, said in (
        (OTHER_CODE, "code: strategies/mutual/dml.py"),
        (OTHER_DATA, "data: a/train"),
    ):
        found = place(first, now)
        assert (found.folder.name, found.kept) == ("seed-0-2", first)
        assert found.note.startswith(said)
    keep(tmp_path / "seed-0-2", OTHER_CODE)
    # The earlier code is back, and so is its run.
    assert [place(first, now).folder.name for now in (MADE, OTHER_CODE, OTHER_DATA)] == [
        "seed-0",
        "seed-0-2",
        "seed-0-3",
    ]


def test_other_code_can_be_accepted_and_other_data_cannot(tmp_path: Path) -> None:
    first = keep(tmp_path / "seed-0", MADE)
    accepted = place(first, OTHER_CODE, accept_code=True)
    assert (accepted.folder, accepted.kept) == (first, None)
    assert "taken as it is" in accepted.note
    refused = place(first, OTHER_DATA, accept_code=True)
    assert (refused.folder.name, refused.kept) == ("seed-0-2", first)
    assert "--accept-code" not in refused.note


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 1, "code": {}, "versions": {}}'])
def test_a_run_that_does_not_say_what_it_is_made_of_is_not_taken(tmp_path: Path, text: str) -> None:
    first = keep(tmp_path / "seed-0", None)
    write(first / IDENTITY_FILE, text)
    assert place(first, MADE).folder.name == "seed-0-2"
    assert "not recorded" in place(first, MADE).note


def test_going_on_with_other_code_needs_the_flag_and_other_data_is_refused(tmp_path: Path) -> None:
    folder = keep(tmp_path / "run", MADE)
    assert check_same_make(folder, MADE, accept_code=False) == (MADE, Changes())
    with pytest.raises(SettingsError, match=r"strategies/mutual/dml\.py changed.*--accept-code"):
        check_same_make(folder, OTHER_CODE, accept_code=False)
    for accept_code in (False, True):
        with pytest.raises(SettingsError, match=r"a/train\.parquet changed"):
            check_same_make(folder, OTHER_DATA, accept_code=accept_code)


def test_a_run_of_two_kinds_of_code_is_a_run_of_neither(tmp_path: Path) -> None:
    folder = keep(tmp_path / "run", MADE)
    mixed, accepted = check_same_make(folder, OTHER_CODE, accept_code=True)
    assert str(accepted) == "code: strategies/mutual/dml.py changed"
    assert mixed.latest() == OTHER_CODE
    write(folder / IDENTITY_FILE, json.dumps(mixed.to_row()))
    for now in (MADE, OTHER_CODE):
        assert place(folder, now).kept == folder
    # It goes on with its last code without a word, and with its first one not.
    assert check_same_make(folder, OTHER_CODE, accept_code=False) == (mixed, Changes())
    with pytest.raises(SettingsError, match="--accept-code"):
        check_same_make(folder, MADE, accept_code=False)
