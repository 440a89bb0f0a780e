"""A checkpoint is whole or it is refused: written in one piece, believed only to the last byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sim.keeping import checkpoints
from sim.keeping.checkpoints import (
    MANIFEST_FILE,
    STATE_FILE,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
)

IDENTITY = {"settings": "a" * 64, "data": "b" * 64}
PACKAGES = {"torch": "2.0"}


def values_of(round: int) -> dict[str, object]:
    return {"round": round, "text": "Zürich", "number": 0.1 + 0.2}


def tables_of(round: int) -> list[tuple[str, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(round)
    return [
        ("strategy", {"w": rng.standard_normal((3, 4)).astype(np.float32)}),
        *(
            (
                f"client-{client}",
                {
                    "model/weights/0.weight": rng.standard_normal((2, 5)),
                    "model/weights/steps": np.array(client, np.int64),
                    "model/weights/mask": np.array([True, False]),
                    "model/weights/none": np.empty((0, 3), np.float32),
                },
            )
            for client in range(5)
        ),
    ]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", identity=IDENTITY, packages=PACKAGES)


def bits(checkpoint: Checkpoint | None) -> object:
    """Return everything that a checkpoint gives back, comparable."""
    if checkpoint is None:
        return None
    tables = {
        table: {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
        for table, arrays in checkpoint.tables()
    }
    return checkpoint.round, dict(checkpoint.values), dict(checkpoint.packages), tables


def expected_bits(round: int) -> object:
    tables = {
        table: {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
        for table, arrays in tables_of(round)
    }
    return round, values_of(round), PACKAGES, tables


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 200, 2**20])
def test_what_was_written_comes_back_bit_for_bit(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", shard_bytes)
    folder = store.write(7, values_of(7), iter(tables_of(7)))
    shards = {1: 6, 200: 2, 2**20: 1}[shard_bytes]
    assert len(list(folder.glob("*.safetensors"))) == shards
    newest, problems = store.newest()
    assert problems == []
    assert bits(newest) == expected_bits(7)


def test_memory_is_bounded_by_a_shard_however_many_clients_there_are(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1000)
    alive: list[int] = []
    made = 0

    def tables():
        nonlocal made
        for client in range(100):
            made += 1
            yield f"client-{client}", {"w": np.zeros(50, np.float64)}

    real = checkpoints.save

    def save(shard):
        alive.append(sum(array.nbytes for array in shard.values()))
        return real(shard)

    monkeypatch.setattr(checkpoints, "save", save)
    store.write(1, {}, tables())
    assert made == 100
    assert max(alive) < 2000


def test_nothing_is_there_before_the_first(store: CheckpointStore) -> None:
    assert store.newest() == (None, [])


def test_the_last_two_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for round in (1, 2, 5, 11):
        store.write(round, values_of(round), tables_of(round))
    assert names(tmp_path / "checkpoints") == ["round-000005", "round-000011"]
    assert bits(store.newest()[0]) == expected_bits(11)


def test_a_future_that_was_not_is_removed(store: CheckpointStore, tmp_path: Path) -> None:
    for round in (3, 8, 9):
        store.write(round, values_of(round), tables_of(round))
    store.write(4, values_of(4), tables_of(4))
    # Rounds 8 and 9 were of before the run went back.
    assert names(tmp_path / "checkpoints") == ["round-000004"]


def test_a_bad_checkpoint_does_not_push_out_a_good_one(
    store: CheckpointStore, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for round in (1, 2):
        store.write(round, values_of(round), tables_of(round))
    (folder / "round-000002" / STATE_FILE).write_text("{}")
    newest, (problem,) = store.newest()
    assert newest is not None
    assert newest.round == 1
    assert "round-000002: state.json has 2 bytes, the manifest says" in problem
    store.write(3, values_of(3), tables_of(3))
    assert names(folder) == ["round-000001", "round-000003"]


def test_a_round_that_is_run_again_replaces_its_bad_checkpoint(store: CheckpointStore) -> None:
    folder = store.write(2, values_of(2), tables_of(2))
    (folder / MANIFEST_FILE).unlink()
    assert store.newest()[0] is None
    store.write(2, values_of(2), tables_of(2))
    assert bits(store.newest()[0]) == expected_bits(2)


# -- damage ------------------------------------------------------------------------------------


def flip(folder: Path, rng: np.random.Generator) -> str:
    path = pick(folder, rng)
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    return f"bit {bit} of {path.name}"


def truncate(folder: Path, rng: np.random.Generator) -> str:
    path = pick(folder, rng)
    size = int(rng.integers(path.stat().st_size))
    os.truncate(path, size)
    return f"{path.name} cut to {size}"


def lengthen(folder: Path, rng: np.random.Generator) -> str:
    path = pick(folder, rng)
    with path.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 20))))
    return f"{path.name} lengthened"


def delete(folder: Path, rng: np.random.Generator) -> str:
    path = pick(folder, rng)
    path.unlink()
    return f"{path.name} deleted"


def swap(folder: Path, rng: np.random.Generator) -> str:
    one, other = rng.choice(sorted(folder.iterdir()), 2, replace=False)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} and {other.name} swapped"


def overwrite(folder: Path, rng: np.random.Generator) -> str:
    path = pick(folder, rng)
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    block = bytes(min(len(content) - start, int(rng.integers(1, 64))))
    if content[start : start + len(block)] == block:
        block = b"\x01" * len(block)
    content[start : start + len(block)] = block
    path.write_bytes(content)
    return f"{path.name} overwritten from {start}"


def borrow(folder: Path, rng: np.random.Generator) -> str:
    """Put a file of the other checkpoint, whole in itself, in the place of this one's."""
    path = pick(folder, rng)
    (other,) = (f for f in folder.parent.glob("round-*") if f != folder)
    shutil.copy(other / path.name, path)
    return f"{path.name} of another round"


def pick(folder: Path, rng: np.random.Generator) -> Path:
    return Path(rng.choice(sorted(folder.iterdir())))


DAMAGE: tuple[Callable[[Path, np.random.Generator], str], ...] = (
    flip,
    truncate,
    lengthen,
    delete,
    swap,
    overwrite,
    borrow,
)


def corrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 300)
    # What is written here need not outlive a power cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store = CheckpointStore(tmp_path / "checkpoints", identity=IDENTITY, packages=PACKAGES)
    pristine = [store.write(round, values_of(round), tables_of(round)) for round in (1, 2)][-1]
    spare = tmp_path / "spare"
    shutil.copytree(pristine, spare)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        what = DAMAGE[seed % len(DAMAGE)](pristine, rng)
        newest, problems = store.newest()
        assert bits(newest) == expected_bits(1), f"{what} went unseen"
        assert len(problems) == 1, what
        assert "round-000002" in problems[0]
        shutil.rmtree(pristine)
        shutil.copytree(spare, pristine)
    assert bits(store.newest()[0]) == expected_bits(2)


def test_any_damage_is_seen_and_the_previous_checkpoint_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupted(tmp_path, monkeypatch, range(105))


@pytest.mark.slow
def test_two_thousand_kinds_of_damage_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupted(tmp_path, monkeypatch, range(1000, 3000))


def test_every_byte_of_the_manifest_is_covered(store: CheckpointStore) -> None:
    folder = store.write(1, {}, tables_of(1))
    manifest = folder / MANIFEST_FILE
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        manifest.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"round-000001: MANIFEST\.json"):
            store.read(folder)
    manifest.write_bytes(whole)
    assert store.read(folder).round == 1


@pytest.mark.parametrize("what", ["settings", "data"])
def test_a_checkpoint_of_another_run_is_refused_by_name(
    store: CheckpointStore, tmp_path: Path, what: str
) -> None:
    store.write(1, {}, [])
    other = CheckpointStore(
        tmp_path / "checkpoints", identity={**IDENTITY, what: "c" * 64}, packages=PACKAGES
    )
    newest, (problem,) = other.newest()
    assert newest is None
    assert f"belongs to other {what} (" in problem


def test_a_checkpoint_of_another_schema_is_refused_by_name(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SCHEMA", 99)
    store.write(1, {}, [])
    monkeypatch.undo()
    _, (problem,) = store.newest()
    assert problem.endswith("MANIFEST.json has schema 99, this version reads 1")


def test_a_checkpoint_under_another_name_is_refused(store: CheckpointStore) -> None:
    folder = store.write(1, {}, [])
    folder.rename(folder.with_name("round-000009"))
    _, (problem,) = store.newest()
    assert problem.endswith("round-000009: MANIFEST.json is of round 1")


def test_a_reason_of_the_caller_s_own_passes_a_checkpoint_over(store: CheckpointStore) -> None:
    for round in (1, 2):
        store.write(round, values_of(round), tables_of(round))
    newest, problems = store.newest(lambda found: "not this one" if found.round == 2 else None)
    assert newest is not None
    assert newest.round == 1
    assert problems[0].endswith("round-000002: not this one")


def test_no_file_outside_the_checkpoint_is_read(store: CheckpointStore, tmp_path: Path) -> None:
    folder = store.write(1, {}, tables_of(1))
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    del manifest["sha256"]
    outside = tmp_path / "outside.safetensors"
    (folder / "arrays-00001.safetensors").rename(outside)
    manifest["files"]["../../outside.safetensors"] = manifest["files"].pop(
        "arrays-00001.safetensors"
    )
    (folder / MANIFEST_FILE).write_bytes(checkpoints._manifest_text(manifest))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is not a manifest: files"):
        store.read(folder)


# -- interrupted writing -----------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nothing that it would still have done is done."""


class CrashingDisk:
    """Stands for `os`: after so many calls that change the disk, none is carried out any more."""

    CHANGES = ("open", "write", "fsync", "rename", "mkdir")

    def __init__(self, after: int, *, torn: bool = False) -> None:
        self.left = after
        self.torn = torn

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def call(*arguments: object, **options: object) -> object:
            if self.left == 0:
                if name == "write" and self.torn:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])  # type: ignore[call-overload,arg-type]
                raise Crash(name)
            self.left -= 1
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_at_any_step_of_writing_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 300)
    steps = 0
    outcomes = []
    while True:
        folder = tmp_path / f"crash-{steps}"
        folder.mkdir()
        store = CheckpointStore(folder / "checkpoints", identity=IDENTITY, packages=PACKAGES)
        for round in (1, 2):
            store.write(round, values_of(round), tables_of(round))
        with monkeypatch.context() as crashing:
            crashing.setattr(checkpoints, "os", CrashingDisk(steps, torn=torn))
            try:
                store.write(3, values_of(3), tables_of(3))
                crashed = False
            except Crash:
                crashed = True
        # Another process comes along.
        store = CheckpointStore(folder / "checkpoints", identity=IDENTITY, packages=PACKAGES)
        newest, problems = store.newest()
        assert newest is not None
        assert problems == []
        outcomes.append(newest.round)
        assert bits(newest) == expected_bits(newest.round)
        store.write(4, values_of(4), tables_of(4))
        assert names(folder / "checkpoints")[-1] == "round-000004"
        assert not list((folder / "checkpoints").glob(".*")), "leftovers must go"
        if not crashed:
            break
        steps += 1
    assert steps >= 15
    assert outcomes[0] == 2
    assert outcomes[-1] == 3
    assert sorted(outcomes) == outcomes


def test_a_checkpoint_has_its_name_only_once_everything_in_it_is_on_the_disk(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(1, values_of(1), tables_of(1))
    done: list[tuple[str, str]] = []
    where: dict[int, str] = {}

    class Watched:
        def __getattr__(self, name: str) -> object:
            return {"open": self.open, "fsync": self.fsync, "rename": self.rename}.get(
                name, getattr(os, name)
            )

        def open(self, path: Path, *arguments: int) -> int:
            descriptor = os.open(path, *arguments)
            where[descriptor] = path.name
            return descriptor

        def fsync(self, descriptor: int) -> None:
            done.append(("fsync", where[descriptor]))
            os.fsync(descriptor)

        def rename(self, source: Path, target: Path) -> None:
            done.append(("rename", target.name))
            os.rename(source, target)

    monkeypatch.setattr(checkpoints, "os", Watched())
    store.write(2, values_of(2), tables_of(2))
    assert done == [
        ("fsync", "arrays-00001.safetensors"),
        ("fsync", STATE_FILE),
        ("fsync", MANIFEST_FILE),
        ("fsync", ".round-000002.partial"),
        ("rename", "round-000002"),
        ("fsync", "checkpoints"),
    ]


@pytest.mark.parametrize("step", ["open", "write", "fsync", "rename"])
def test_a_disk_that_refuses_leaves_the_previous_checkpoint_and_no_garbage(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.write(1, values_of(1), tables_of(1))

    class FullDisk:
        def __getattr__(self, name: str) -> object:
            def refuse(*_: object) -> None:
                raise OSError(28, "No space left on device")

            return refuse if name == step else getattr(os, name)

    with monkeypatch.context() as full:
        full.setattr(checkpoints, "os", FullDisk())
        with pytest.raises(OSError, match="No space left"):
            store.write(2, values_of(2), tables_of(2))
    assert names(tmp_path / "checkpoints") == ["round-000001"]
    assert bits(store.newest()[0]) == expected_bits(1)
