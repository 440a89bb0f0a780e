"""Each tracker for real: a small federation is run, and the tracker's own library reads it back."""

import importlib.util
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sim.commands.running import RunResult, run
from sim.settings import load_settings

pytestmark = [
    pytest.mark.slow,  # they take seconds to import and to set up
    pytest.mark.filterwarnings("ignore"),  # what these libraries say among themselves
]


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: fedkd[{module}]")


def tracked(folder: Path, small_words: tuple[str, ...], tracker: str) -> RunResult:
    words = (*small_words, "clients.models=[mlp]", f"output={folder}", "name=tiny", "seed=5")
    return run(load_settings(None, [*words, f"trackers=[{tracker}]"]))


def accuracies(result: RunResult) -> list[float]:
    return [row["accuracy"] for row in result.history.federation]


@needs("tensorboard")
def test_tensorboard(tmp_path: Path, small_words: tuple[str, ...]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tracked(tmp_path, small_words, "{kind: tensorboard, tags: {who: me}}")
    read = EventAccumulator(str(result.folder / "tensorboard"))
    read.Reload()
    scalars = read.Scalars("federation/accuracy")
    assert [scalar.step for scalar in scalars] == [1, 2]
    assert [scalar.value for scalar in scalars] == pytest.approx(accuracies(result))
    assert {f"client_accuracy/{client}" for client in range(4)} <= set(read.Tags()["scalars"])
    (settings,) = read.Tensors("settings/text_summary")
    text = settings.tensor_proto.string_val[0].decode()
    assert "| clients.count | 4 |" in text
    assert "| who | me |" in text
    (ended,) = read.Tensors("result/text_summary")
    assert str(result.weights_sha256) in ended.tensor_proto.string_val[0].decode()


@needs("mlflow")
def test_mlflow(tmp_path: Path, small_words: tuple[str, ...]) -> None:
    from mlflow.tracking import MlflowClient

    result = tracked(tmp_path, small_words, "{kind: mlflow, tags: {who: me}}")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "federation/accuracy")
    assert [metric.step for metric in history] == [1, 2]
    assert [metric.value for metric in history] == accuracies(result)
    assert found.data.params["clients.count"] == "4"
    tags = found.data.tags
    assert (tags["status"], tags["who"], tags["seed"]) == ("finished", "me", "5")
    assert tags["weights_sha256"] == result.weights_sha256
    assert found.info.status == "FINISHED"
    # Neither who ran it nor where, nor what git says.
    assert not {tag for tag in tags if tag.startswith(("mlflow.user", "mlflow.source"))}


@needs("wandb")
def test_wandb(tmp_path: Path, small_words: tuple[str, ...]) -> None:
    result = tracked(tmp_path, small_words, "{kind: wandb, tags: {who: me}}")
    (file,) = (result.folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(records_in(file))
    history = [values_of(record.history.item) for record in records if record.HasField("history")]
    assert [row["round"] for row in history] == ["1", "2"]
    assert [float(row["federation/accuracy"]) for row in history] == pytest.approx(
        accuracies(result)
    )
    assert "client_accuracy/3" in history[0]
    (begun,) = [record.run for record in records if record.HasField("run")]
    assert begun.project == "tiny"
    assert list(begun.tags) == ["who: me"]
    config = {item.key: item.value_json for item in begun.config.update}
    assert config["clients.count"] == "4"
    assert not begun.git.commit
    assert begun.host == "localhost"
    summary: dict[str, str] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= values_of(record.summary.update)
    assert summary["weights_sha256"] == f'"{result.weights_sha256}"'
    # Nothing of the machine: neither its packages nor what was called.
    assert not [path.name for path in file.parent.joinpath("files").glob("*.txt")]
    assert not list(file.parent.glob("files/wandb-metadata.json"))


def values_of(items: Any) -> Mapping[str, str]:
    return {item.key or "/".join(item.nested_key): item.value_json for item in items}


def records_in(path: Path) -> Iterator[Any]:
    """Read the records of a run: blocks of 32 KiB as of LevelDB's log, after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
