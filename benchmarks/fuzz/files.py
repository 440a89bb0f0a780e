"""Damaged and forged files: of a run's folder, of data, of a teacher.

A stopped and a finished run, a data set and a file of weights are made once; each case damages a
copy and does what a user would do next: resume, read the result again, report, load. Right is a
refusal in one line that names the file, or the very numbers of the file that is not damaged:
a run that goes on from an older checkpoint says so and ends with the bits of one that was whole.

Damage that nobody could see is not thrown: other numbers in a label or in weights, where the format
has no checksum, and forgeries that are consistent in themselves.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import HARMLESS, Case
from PIL import Image
from safetensors.numpy import load_file, save

from fedkd.data import DataSettings, build_federated_data
from fedkd.distillation.task.first_weights import load_weights
from fedkd.models import ModelSettings, build_model
from sim.commands import running
from sim.commands.cli.ending import code_of
from sim.commands.running import run
from sim.keeping.checkpoints import _manifest_text
from sim.keeping.records import read_rows
from sim.reports import report
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError, load_settings

ROWS = ("metrics.jsonl", "exchange.jsonl", "events.jsonl")
CLASSES = 3


# -- what is damaged -------------------------------------------------------------------------


class _Stop(Observer):
    def metrics(self, rows: Any) -> None:
        if rows[0]["round"] == 5:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Made:
    """What is damaged, in copies, and what comes of it where it is whole."""

    stopped: Path
    finished: Path
    data: Path
    weights: Path
    digest: str
    rows: tuple[Row, ...]
    data_digest: str
    model: Any


def make(folder: Path) -> Made:
    """Make the runs, the data and the weights."""
    settings = load_settings(
        None,
        [
            "rounds=5",
            "strategy.name=dml",
            "clients={count: 3, models: [{name: mlp, options: {hidden: [8]}}]}",
            "data={private_rows: 90, test_rows: 40, public: {size: 20}}",
            "data.partition.kind=iid",
            "engine.backend=inline",
            "checkpoints.every=1",
            "faults=[{kind: dropout, clients: [1], rounds: [2]}]",
        ],
    )
    # Loaded once; the settings of a copy may ask for other data, and are refused for that.
    whole = running.load_data(settings)
    loaded = {settings.data.model_dump_json(): whole}

    def load(of_run: Settings, **options: Any) -> Any:
        key = of_run.data.model_dump_json()
        if key not in loaded or of_run.clients.count != settings.clients.count:
            return _load_data(of_run, **options)
        return loaded[key]

    _load_data = running.load_data
    running.load_data = load
    (folder / "finished").mkdir()
    done = run(settings, folder=folder / "finished")
    (folder / "stopped").mkdir()
    with suppress(KeyboardInterrupt):
        run(settings, folder=folder / "stopped", observers=[_Stop()])
    data = folder / "data"
    _write_data(data)
    model = build_model(
        ModelSettings(name="mlp", options={"hidden": [8]}),
        input_shape=(1, 8, 8),
        num_classes=CLASSES,
        seed=0,
    )
    weights = folder / "teacher.safetensors"
    weights.write_bytes(save({name: t.numpy() for name, t in model.state_dict().items()}))
    return Made(
        stopped=folder / "stopped",
        finished=folder / "finished",
        data=data,
        weights=weights,
        digest=str(done.weights_sha256),
        rows=_timeless(folder / "finished"),
        data_digest=_data_digest(data),
        model=model,
    )


def _write_data(folder: Path) -> None:
    """Write a training and a test split of small pictures as Parquet."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 40)):
        pictures = []
        for _ in range(count):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(stream, "PNG")
            pictures.append({"bytes": stream.getvalue(), "path": None})
        labels = (np.arange(count) % CLASSES).tolist()
        table = pa.table({"image": pictures, "label": pa.array(labels, pa.int64())})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=40)


def _data_digest(folder: Path) -> str:
    data = build_federated_data(
        DataSettings.model_validate(
            {"source": str(folder), "public": {"size": 10}, "partition": {"kind": "iid"}}
        ),
        num_clients=2,
        seed=0,
    )
    digest = hashlib.sha256()
    for array in (data.train_inputs, data.train_labels, data.test_inputs, data.test_labels):
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _timeless(folder: Path) -> tuple[Row, ...]:
    rows = [row for name in ROWS[:2] for row in read_rows(folder / name)]
    return tuple({key: row[key] for key in row if "seconds" not in key} for row in rows)


# -- what a user does next -------------------------------------------------------------------


def refusal(error: Exception, names: tuple[str, ...]) -> str:
    """Return "" for an error that is shown as one line and names what is damaged."""
    if code_of(error) is None:
        raise error
    text = str(error)
    if len(text.splitlines()) != 1 or not text.isprintable():
        return f"not one line: {text!r}"
    return "" if any(name in text for name in names) else f"does not name {names}: {text}"


def resume(made: Made, folder: Path, names: tuple[str, ...]) -> str:
    """Resume a run, then report on it; return what became of it."""
    try:
        result = run(resume=folder)
        told = [row["event"] for row in read_rows(folder / "events.jsonl")]
        report([folder], folder / "report")
    except Exception as error:
        return refusal(error, names)
    if result.weights_sha256 != made.digest:
        return "the weights are others"
    if {"checkpoint unusable", "rows damaged"} & set(told):
        return ""
    return HARMLESS if _timeless(folder) == made.rows else "the rows are others, without a word"


def read_data(made: Made, folder: Path, names: tuple[str, ...]) -> str:
    """Read the data as a run does."""
    try:
        digest = _data_digest(folder)
    except ValueError as error:
        return refusal(SettingsError(str(error)), names)
    return HARMLESS if digest == made.data_digest else "the data are others, without a word"


def read_weights(made: Made, path: Path, names: tuple[str, ...]) -> str:
    """Load a teacher's weights."""
    try:
        load_weights(made.model, path, setting="teacher.weights")
    except ValueError as error:
        return refusal(SettingsError(str(error)), names)
    whole = load_file(made.weights)
    same = all(
        np.array_equal(whole[name], tensor.numpy())
        for name, tensor in made.model.state_dict().items()
    )
    return HARMLESS if same else "the weights are others, without a word"


# -- kinds of damage -------------------------------------------------------------------------


def _pick(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def damage(path: Path, rng: np.random.Generator) -> str:
    """Damage any file; return how."""
    content = path.read_bytes()
    place = int(rng.integers(max(len(content), 1)))
    how = _pick(rng, "flip", "flip", "flip", "cut", "gone", "zeros", "twice", "empty", "a folder")
    match how:
        case "flip" if content:
            bit = 1 << int(rng.integers(8))
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            return f"bit {bit} of byte {place}"
        case "cut":
            path.write_bytes(content[:place])
        case "gone":
            path.unlink()
        case "zeros":
            path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
        case "twice":
            path.write_bytes(content + content)
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()
            path.mkdir()
    return f"{how} at {place}"


JUNK: tuple[Any, ...] = (
    None, True, -1, 10**30, 1.5, "x", "\x1b[31m", [], [[]], {}, {"a": 1}, "9" * 5000, 1e308,
)  # fmt: skip


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every place in a nested table."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from _spots(item, (*path, key))


def forge_table(table: Any, rng: np.random.Generator) -> str:
    """Put something else into some place of a nested table, or take the place away."""
    # Another temperature is as good as the one that was written.
    spots = [spot for spot in _spots(table) if spot[-1] != "temperature"]
    spot = spots[rng.integers(len(spots))]
    for key in spot[:-1]:
        table = table[key]
    before = table[spot[-1]]
    if rng.random() < 0.2:
        del table[spot[-1]]
        return f"{spot} taken away"
    value = _pick(rng, *(value for value in JUNK if value != before))
    table[spot[-1]] = value
    return f"{spot}: {str(value)[:40]!r} for {str(before)[:40]!r}"


def newest(folder: Path) -> Path:
    """Return a run's newest checkpoint."""
    return max((folder / "checkpoints").glob("round-*"))


def sign(checkpoint: Path) -> None:
    """Make every checksum of a checkpoint right."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest.pop("sha256", None)
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (checkpoint / "MANIFEST.json").write_bytes(_manifest_text(manifest))


def damaged_checkpoint(folder: Path, rng: np.random.Generator) -> str:
    """Damage a file of the newest checkpoint."""
    path = _pick(rng, *sorted(newest(folder).iterdir()))
    return f"{path.name}: {damage(path, rng)}"


FREE = ("values", "reason")


def forged_values(folder: Path, rng: np.random.Generator) -> str:
    """Forge the plain values of the newest checkpoint, with right checksums."""
    path = newest(folder) / "state.json"
    table = json.loads(path.read_text())
    told = forge_table(table, rng)
    path.write_text(json.dumps(table))
    sign(path.parent)
    return told


def forged_manifest(folder: Path, rng: np.random.Generator) -> str:
    """Forge the manifest of the newest checkpoint, with a right checksum of its own."""
    path = newest(folder) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    # Versions of packages are said to have changed, and that is all.
    packages = manifest.pop("packages")
    told = forge_table(manifest, rng)
    path.write_bytes(_manifest_text({**manifest, "packages": packages}))
    return told


def forged_arrays(folder: Path, rng: np.random.Generator) -> str:
    """Forge the arrays of the newest checkpoint, with right checksums."""
    path = newest(folder) / "arrays-00001.safetensors"
    arrays = dict(load_file(path))
    name = _pick(rng, *sorted(arrays))
    array = arrays[name]
    how = _pick(rng, "gone", "shape", "type", "name", "table", "bytes", "client")
    match how:
        case "gone":
            del arrays[name]
        case "shape":
            arrays[name] = np.zeros((*array.shape, 2), array.dtype)
        case "type":
            arrays[name] = array.astype(np.float16 if array.dtype != np.float16 else np.float64)
        case "name":
            arrays[name + "x"] = arrays.pop(name)
        case "table":
            arrays[_pick(rng, "other", "other/x", "", "/", "client-/x", "client-1")] = array
        case "client":
            arrays[f"client-{_pick(rng, 3, -1, 10**9, 'x')}/model/weights/x"] = array
    content = save(arrays)
    if how == "bytes":
        content = _pick(rng, content[:100], b"\xff" * 8 + content[8:], b"", b"{}" * 50, content * 2)
    path.write_bytes(content)
    sign(path.parent)
    return f"{how}: {name}"


def damaged_rows(folder: Path, rng: np.random.Generator) -> str:
    """Damage the lines of a file of rows."""
    path = folder / _pick(rng, *ROWS)
    return f"{path.name}: {damage(path, rng)}"


def forged_row(folder: Path, rng: np.random.Generator) -> str:
    """Put something else into a row that is still JSON."""
    path = folder / _pick(rng, *ROWS)
    lines = path.read_text().splitlines()
    number = int(rng.integers(len(lines)))
    row = json.loads(lines[number])
    told = forge_table(row, rng)
    lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}, line {number + 1}: {told}"


def named(name: str) -> Callable[[Path, np.random.Generator], str]:
    """Return what damages a file of this name."""
    return lambda folder, rng: damage(folder / name, rng)


def forged_json(name: str) -> Callable[[Path, np.random.Generator], str]:
    """Return what forges a JSON file of this name."""

    def forge(folder: Path, rng: np.random.Generator) -> str:
        table = json.loads((folder / name).read_text())
        told = forge_table(table, rng)
        (folder / name).write_text(json.dumps(table))
        return told

    return forge


def damaged_parquet(folder: Path, rng: np.random.Generator) -> str:
    """Damage what a Parquet file says about itself: its ends, or its whole."""
    path = _pick(rng, *sorted(folder.iterdir()))
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    how = _pick(rng, "cut", "empty", "zeros", "footer's size", "magic", "a text", "gone")
    match how:
        case "cut":
            path.write_bytes(content[: rng.integers(len(content))])
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(content[:-footer] + bytes(footer))
        case "footer's size":
            path.write_bytes(content[:-8] + rng.bytes(4) + content[-4:])
        case "magic":
            path.write_bytes(content[:-4] + rng.bytes(4))
        case "a text":
            path.write_text("label,image\n1,a.png\n")
        case _:
            # Without a test split, rows of the training split are for testing.
            path = folder / "train-00000-of-00001.parquet"
            path.unlink()
    return f"{path.name}: {how}"


def odd_parquet(folder: Path, rng: np.random.Generator) -> str:
    """Write a Parquet file that is whole, with columns that are not pictures and labels."""
    path = _pick(rng, *sorted(folder.iterdir()))
    table = pq.read_table(path)
    how = _pick(rng, "no label", "no image", "floats", "nulls", "lists", "no rows", "text", "huge")
    match how:
        case "no label" | "no rows":
            # A test split without labels or rows is left aside, with a note.
            path = folder / "train-00000-of-00001.parquet"
            table = pq.read_table(path)
            table = table.drop_columns("label") if how == "no label" else table.slice(0, 0)
        case "no image":
            table = table.drop_columns("image")
        case "text":
            table = table.set_column(0, "image", pa.array(["a.png"] * table.num_rows))
        case _:
            labels: list[Any] = table["label"].to_pylist()
            labels[3] = {"floats": 0.5, "nulls": None, "lists": [1], "huge": 2**60}[how]
            column = [[label] if how == "lists" else label for label in labels]
            if how == "lists":
                column[3] = labels[3]
            table = table.set_column(1, "label", pa.array(column))
    pq.write_table(table, path)
    return f"{path.name}: {how}"


def bad_picture(folder: Path, rng: np.random.Generator) -> str:
    """Damage one picture of a Parquet file that is whole."""
    path = _pick(rng, *sorted(folder.iterdir()))
    table = pq.read_table(path)
    pictures = table["image"].to_pylist()
    number = int(rng.integers(len(pictures)))
    content = pictures[number]["bytes"]
    how = _pick(rng, "cut", "flip", "empty", "null", "text", "another size", "zeros")
    place = int(rng.integers(16, len(content)))
    other = io.BytesIO()
    Image.new("L", (9, 9)).save(other, "PNG")
    pictures[number]["bytes"] = {
        "cut": content[: min(place, len(content) - 16)],
        "flip": content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :],
        "empty": b"",
        "null": None,
        "text": b"GIF89a no picture",
        "another size": other.getvalue(),
        "zeros": content[:8] + bytes(len(content) - 8),
    }[how]
    kind = table["image"].type
    pq.write_table(table.set_column(0, "image", pa.array(pictures, kind)), path)
    return f"{path.name}, picture {number}: {how} at {place}"


def damaged_weights(path: Path, rng: np.random.Generator) -> str:
    """Damage or forge a safetensors file where it can be seen."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    arrays = dict(load_file(path))
    name = _pick(rng, *sorted(arrays))
    how = _pick(rng, "cut", "header", "size", "json", "nan", "type", "shape", "gone", "more", "zip")
    match how:
        case "cut":
            path.write_bytes(content[: rng.integers(len(content))])
        case "header":
            place = int(rng.integers(8, header))
            path.write_bytes(content[:place] + rng.bytes(1) + content[place + 1 :])
        case "size":
            path.write_bytes(rng.bytes(8) + content[8:])
        case "json":
            text = _pick(rng, b"{}", b"[]", b"{" * 1000, b'{"a": {"dtype": "F32"}}', b"\xff")
            path.write_bytes(len(text).to_bytes(8, "little") + text)
        case "zip":
            path.write_bytes(b"PK\x03\x04" + content)
        case _:
            array = arrays[name]
            if how == "nan":
                arrays[name] = np.full_like(array, _pick(rng, np.nan, np.inf))
            elif how == "type":
                arrays[name] = array.astype(_pick(rng, np.float64, np.float16, np.int8, np.bool_))
            elif how == "shape":
                arrays[name] = np.zeros((*array.shape, 1), array.dtype)
            elif how == "gone":
                del arrays[name]
            else:
                arrays["more"] = array
            path.write_bytes(save(arrays))
    return f"{how}: {name}"


Attempt = Callable[[Made, Path, tuple[str, ...]], str]
RUN = ("checkpoint", *ROWS, "settings.yaml", "result.json", "environment.json")

KINDS: dict[str, tuple[float, str, Callable[[Path, np.random.Generator], str], Attempt]] = {
    "damaged checkpoints": (0.14, "stopped", damaged_checkpoint, resume),
    "forged values, checksums right": (0.16, "stopped", forged_values, resume),
    "forged arrays, checksums right": (0.12, "stopped", forged_arrays, resume),
    "forged manifests": (0.06, "stopped", forged_manifest, resume),
    "damaged rows": (0.1, "stopped", damaged_rows, resume),
    "forged rows": (0.06, "stopped", forged_row, resume),
    "rows of a finished run": (0.04, "finished", damaged_rows, resume),
    "settings.yaml": (0.05, "stopped", named("settings.yaml"), resume),
    "result.json": (0.03, "finished", named("result.json"), resume),
    "result.json, forged": (0.03, "finished", forged_json("result.json"), resume),
    "environment.json": (0.03, "finished", named("environment.json"), resume),
    "environment.json, forged": (0.02, "finished", forged_json("environment.json"), resume),
    "damaged Parquet": (0.05, "data", damaged_parquet, read_data),
    "odd Parquet": (0.03, "data", odd_parquet, read_data),
    "bad pictures": (0.04, "data", bad_picture, read_data),
    "teachers": (0.04, "weights", damaged_weights, read_weights),
}
"""By name: its share, what is copied, how it is damaged, what is done then."""


def cases(rng: np.random.Generator, count: int, folder: Path) -> Iterator[Case]:
    """Yield so many cases."""
    made = make(folder)
    shares = np.array([share for share, *_ in KINDS.values()])
    kinds = rng.choice(len(KINDS), size=count, p=shares / shares.sum())
    for number, kind in enumerate(kinds):
        name, (_, what, spoil, attempt) = list(KINDS.items())[kind]
        copy = folder / f"case-{number}"
        original: Path = getattr(made, what)
        (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
        told = spoil(copy, rng)
        names = (
            RUN if what in ("stopped", "finished") else ("image", "label", copy.name, ".parquet")
        )
        yield Case(name, f"number {number}: {told}", partial(attempt, made, copy, names))
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
