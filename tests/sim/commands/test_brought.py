"""Weights that were trained elsewhere: clients start from them, a teacher teaches with them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sim.commands.running import load_data, run
from sim.engine.runtime import ClientRuntime
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import changes, provenance_of
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]


@pytest.fixture
def trained(small: Small, tmp_path: Path) -> Path:
    """A model that another run kept."""
    folder = run(
        small("strategy.name=fedavg", "clients.models=mlp", "clients.local.epochs=6")
    ).folder
    return Path(shutil.copy(folder / "models" / "server.safetensors", tmp_path / "mlp.safetensors"))


def test_clients_start_from_a_file(small: Small, trained: Path) -> None:
    words = ("strategy.name=fedavg", f"clients.first_weights=[{trained}, null]", "rounds=1")
    settings = small(*words)
    data = load_data(settings)
    runtime, fresh = ClientRuntime(settings, data), ClientRuntime(small(), data)
    weights = load_file(trained)
    for client in range(4):
        own = runtime.initial_state(client).models["model"].weights
        expected = (
            weights if client % 2 == 0 else fresh.initial_state(client).models["model"].weights
        )
        assert own.keys() == expected.keys()
        assert all(np.array_equal(own[name], expected[name]) for name in own)
    # What trains from there is another run, and the same whenever it is repeated.
    first, again = run(settings), run(settings)
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_sha256 != run(small("strategy.name=fedavg", "rounds=1")).weights_sha256


def test_a_trained_start_is_ahead(small: Small, trained: Path) -> None:
    # Without a step of training clients are as good as the file says.
    words = ("strategy.name=local", "rounds=1", "clients.models=mlp", "clients.optimizer.lr=1e-9")
    ahead = run(small(*words, f"clients.first_weights={trained}")).history.federation[-1]
    behind = run(small(*words)).history.federation[-1]
    assert ahead["accuracy"] > behind["accuracy"] + 0.1


def test_a_teacher_from_a_file_teaches_without_being_trained(small: Small, trained: Path) -> None:
    words = ("strategy.name=one_way", "strategy.model=mlp", "keep_models=server")
    result = run(small(*words, f"strategy.teacher_weights={trained}"))
    kept = load_file(result.folder / "models" / "server.safetensors")
    assert all(np.array_equal(kept[name], array) for name, array in load_file(trained).items())
    rows = result.history.federation
    assert rows[0]["server_accuracy"] == rows[-1]["server_accuracy"]
    assert rows[0]["bytes_down"] > 0


def test_a_teacher_without_epochs_stays_as_it_was_built(small: Small) -> None:
    words = ("strategy.name=one_way", "strategy.model=mlp", "keep_models=server", "rounds=1")
    result = run(small(*words, "strategy.teacher_epochs=0"))
    trained = run(small(*words, "strategy.teacher_epochs=1"))
    kept, other = (
        load_file(each.folder / "models" / "server.safetensors") for each in (result, trained)
    )
    assert not any(np.array_equal(kept[name], other[name]) for name in kept)
    # Nothing was learnt: the accuracy is that of a guess.
    assert result.history.federation[-1]["server_accuracy"] < 0.35


def test_what_does_not_fit_is_refused_by_tensor_before_the_run(
    small: Small, trained: Path, tmp_path: Path
) -> None:
    wider = "clients.models={name: mlp, options: {hidden: [16]}}"
    for words, told in (
        ([wider, f"clients.first_weights={trained}"], r"clients\.first_weights: .*1\.weight is \["),
        (
            ["clients.models=cnn", f"clients.first_weights={trained}"],
            "it has 1.bias, the model has none",
        ),
        ([f"clients.first_weights={tmp_path / 'no.safetensors'}"], "does not exist"),
        ([f"clients.first_weights={tmp_path / 'no.pt'}"], r"may run code when they are read"),
        (
            ["strategy.name=one_way", f"strategy.teacher_weights={trained}"],
            r"strategy\.teacher_weights: .*does not fit the model",
        ),
        (
            [
                "strategy.name=one_way",
                f"strategy.teacher_weights={trained}",
                "strategy.direction=server_to_clients",
            ],
            "strategy.teacher_weights is for strategy.direction: teacher_to_clients",
        ),
    ):
        with pytest.raises(SettingsError, match=told):
            load_data(small("strategy.name=local", *words))
    with pytest.raises(SettingsError, match="needs one file, or one for each"):
        small("clients.models=[mlp, cnn, gru]", f"clients.first_weights=[{trained}, {trained}]")
    with pytest.raises(SettingsError, match="is there twice and starts from"):
        small("clients.models=[mlp, mlp]", f"clients.first_weights=[{trained}, null]")
    with pytest.raises(SettingsError, match="nodes of Flower's own runtimes need not have"):
        load_data(small("clients.models=mlp", f"clients.first_weights={trained}"), nodes=True)


def test_a_file_with_other_classes_is_refused(small: Small, trained: Path, tmp_path: Path) -> None:
    content = trained.read_bytes()
    other = tmp_path / "other.safetensors"
    names = b'[\\"0\\", \\"1\\", '
    assert content.count(names) == 1
    other.write_bytes(content.replace(names, b'[\\"1\\", \\"0\\", '))
    with pytest.raises(SettingsError, match=r"has logits of other classes \(1, 0, 2"):
        load_data(small("clients.models=mlp", f"clients.first_weights={other}"))


def test_a_file_that_changed_is_another_run(small: Small, trained: Path) -> None:
    for word in (f"clients.first_weights={trained}", f"strategy.teacher_weights={trained}"):
        settings = small("strategy.name=one_way", "strategy.model=mlp", "clients.models=mlp", word)
        assert fingerprint(settings) != fingerprint(small())
        before = provenance_of(settings)
        assert not changes(before, provenance_of(settings))
        arrays = load_file(trained)
        name = next(iter(arrays))
        save_file({**arrays, name: arrays[name] + 1}, trained)
        found = changes(before, provenance_of(settings))
        assert found.data == (f"{trained.parent.name}/mlp.safetensors changed",)
