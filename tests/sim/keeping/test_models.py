"""Which models a run leaves in its folder, and that they are the run's."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedkd
from fedkd.data import build_federated_data
from sim.commands.running import load_data, run, settings_of_run
from sim.keeping import models
from sim.keeping.checkpoints import CheckpointStore
from sim.keeping.models import best_client
from sim.server.history import History
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]


def files(folder: Path) -> list[str]:
    return [path.stem for path in models.model_files(folder)]


def trained(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Return the clients' weights in the last checkpoint."""
    (newest,) = sorted((folder / "checkpoints").glob("round-*"))[-1:]
    store = CheckpointStore(folder / "checkpoints", identity={}, packages={})
    tables = dict(store.read(newest).tables())
    return {
        int(name.removeprefix("client-")): {
            key.removeprefix("model/weights/"): array
            for key, array in arrays.items()
            if key.startswith("model/weights/")
        }
        for name, arrays in tables.items()
        if name.startswith("client-")
    }


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["strategy.name=dml", "keep_models=none"], []),
        (["strategy.name=dml", "keep_models=clients"], [f"client-{c}" for c in range(4)]),
        (["strategy.name=dml", "keep_models=[2, 0]"], ["client-0", "client-2"]),
        (["strategy.name=fedavg", "keep_models=server"], ["server-cnn", "server-mlp"]),
        (["strategy.name=fedavg", "clients.models=mlp"], ["server"]),
        (["strategy.name=pooled", "clients.models=mlp"], ["server"]),
        (["strategy.name=one_way", "strategy.model=mlp"], ["server"]),
        (["strategy.name=fedet"], ["server-cnn", "server-mlp", "server-cnn-2"]),
    ],
)
def test_what_is_asked_for_is_kept(small: Small, words: Sequence[str], names: list[str]) -> None:
    result = run(small("rounds=1", *words))
    assert sorted(files(result.folder)) == sorted(names)
    assert sorted(result.models) == sorted(names)


def test_a_client_s_file_holds_its_weights_and_what_they_are(small: Small) -> None:
    settings = small("strategy.name=dml", "keep_models=clients")
    result = run(settings)
    data = build_federated_data(settings.data, num_clients=4, seed=settings.seed)
    for client, weights in trained(result.folder).items():
        kept = load_file(result.folder / "models" / f"client-{client}.safetensors")
        assert kept.keys() == weights.keys()
        assert all(np.array_equal(kept[name], weights[name]) for name in kept)
        loaded = fedkd.load_model(result.folder, model=f"client-{client}")
        assert loaded.info.model == settings.model_of(client)
        # What is loaded gets pixels, and is as good on them as the run says.
        mean, std = data.channel_mean[:, None, None], data.channel_std[:, None, None]
        predicted = loaded.predict(data.test_inputs * std + mean).argmax(-1)
        row = result.history.clients[client]
        assert (predicted == data.test_labels).mean() == pytest.approx(row["accuracy"])
        about = loaded.info.trained
        assert about["validation_accuracy"] == pytest.approx(row["validation_accuracy"])
        assert (about["round"], about["whose"]) == (2, f"client {client}")


def test_the_best_is_chosen_on_validation_rows() -> None:
    history = History()
    rows = [(0, 2, 0.7), (1, 2, 0.8), (2, 2, 0.8), (3, 1, 0.9), (4, 2, 0.95)]
    for client, round, validation in rows:
        history.clients[client] = {"round": round, "validation_accuracy": validation}
    # Client 3 was judged in an earlier round only; client 4 never trained.
    assert list(best_client(history, [0, 1, 2, 3])) == [1]
    assert list(best_client(History(), [5, 6])) == [5]


def test_the_selected_round_is_kept_also_where_later_ones_are_worse(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    def selected(history: History) -> dict[str, Any]:
        # Round 2 is the best of three.
        rounds = [row["round"] for row in history.federation]
        return {"round": min(max(rounds), 2)} if rounds else {}

    monkeypatch.setattr(models, "selected_round", selected)
    words = ("strategy.name=local", "rounds=3", "keep_models=[1]")
    chosen = run(small(*words, "keep_round=selected"))
    assert chosen.models["client-1"]["round"] == 2
    after_two = run(small(*words, "rounds=2", "keep_round=last"))
    kept, expected = (
        load_file(result.folder / "models" / "client-1.safetensors")
        for result in (chosen, after_two)
    )
    assert all(np.array_equal(kept[name], expected[name]) for name in kept)


def test_a_resumed_run_keeps_what_is_asked_for_then(small: Small, tmp_path: Path) -> None:
    stopped = run(small("strategy.name=fedavg", "keep_models=none", "clients.models=mlp"))
    (stopped.folder / "result.json").unlink()
    settings = settings_of_run(stopped.folder, ["keep_models=server", "keep_round=selected"])
    resumed = run(settings, resume=stopped.folder)
    assert resumed.weights_sha256 == stopped.weights_sha256
    assert files(resumed.folder) == ["server"]
    with pytest.raises(SettingsError, match="a finished run keeps what it kept"):
        run(settings_of_run(stopped.folder, ["keep_models=clients"]), resume=stopped.folder)


def test_what_there_is_not_is_refused_before_the_run(small: Small) -> None:
    with pytest.raises(SettingsError, match=r"keep_models: server .* that of 'dml' has none: use"):
        load_data(small("strategy.name=dml", "keep_models=server"))
    with pytest.raises(SettingsError, match=r"'fedgkt' has none that takes the run's inputs"):
        load_data(small("strategy.name=fedgkt", "keep_models=server"))
    for wrong, told in (("all", "must be auto, none, server"), ("[4]", r"below clients.count \(4")):
        with pytest.raises(SettingsError, match=f"keep_models.*{told}"):
            small(f"keep_models={wrong}")


def test_a_client_that_never_trained_is_named(small: Small) -> None:
    settings = small("strategy.name=local", "rounds=1", "clients.participants=2")
    result = run(settings.model_copy(update={"keep_models": "clients"}))
    events = (result.folder / "events.jsonl").read_text().splitlines()
    absent = [row["client"] for row in map(json.loads, events) if row["event"] == "model not kept"]
    assert len(absent) == len(files(result.folder)) == 2
    assert not {f"client-{client}" for client in absent} & set(files(result.folder))


def test_which_model_is_opened(small: Small, tmp_path: Path) -> None:
    folder = run(small("strategy.name=fedavg", "rounds=1")).folder
    with pytest.raises(SettingsError, match=r"holds 2 models: .*server-cnn, server-mlp"):
        fedkd.load_model(folder)
    with pytest.raises(SettingsError, match="did you mean 'server-mlp'"):
        fedkd.load_model(folder, model="server-mpl")
    file = folder / "models" / "server-mlp.safetensors"
    assert fedkd.load_model(file).info == fedkd.load_model(folder, model="server-mlp").info
    with pytest.raises(SettingsError, match="is no folder"):
        fedkd.load_model(file, model="server-mlp")
    with pytest.raises(SettingsError, match="is not the folder of a run"):
        fedkd.load_model(tmp_path)


def test_a_study_says_which_finished_runs_kept_other_models(small: Small) -> None:
    def notes(*words: str) -> Sequence[str]:
        settings = small("rounds=1", "clients.models=mlp", *words)
        return fedkd.compare(settings, arms=["local"], seeds=1).notes

    assert not any("keeps what it kept" in note for note in [*notes(), *notes()])
    (note,) = [note for note in notes("keep_models=clients") if "kept" in note]
    assert note == (
        "local seed 0: finished already, and keeps what it kept (keep_models: auto then, "
        "clients now)"
    )
