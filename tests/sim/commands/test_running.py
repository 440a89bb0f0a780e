import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sim.commands.running import load_data, run
from sim.keeping.records import read_rows
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError, load_settings

Small = Callable[..., Settings]


def test_a_run_leaves_a_folder_that_says_everything(small: Small) -> None:
    result = run(small("strategy.name=dml"))
    folder = result.folder
    assert folder.is_relative_to(result.settings.output)
    assert load_settings(folder / "settings.yaml") == result.settings
    environment = json.loads((folder / "environment.json").read_text())
    assert {"flwr", "ray", "torch"} <= environment["packages"].keys()
    metrics = read_rows(folder / "metrics.jsonl")
    assert [row["round"] for row in metrics if row["scope"] == "federation"] == [1, 2]
    assert sum(row["scope"] == "client" for row in metrics) == 2 * 4
    exchange = read_rows(folder / "exchange.jsonl")
    payload = 60 * 10 * 4
    assert {row["bytes"] for row in exchange} == {payload}
    # Nothing has been aggregated before the first round, so nothing comes down in it.
    assert [row["round"] for row in exchange if row["direction"] == "down"] == [2] * 4
    written = json.loads((folder / "result.json").read_text())
    assert written["status"] == "finished"
    assert written["weights_sha256"] == result.weights_sha256
    assert written["bytes_up"] == [2 * payload] * 4


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(small: Small) -> None:
    first, again, other = (run(small(f"seed={seed}")).weights_sha256 for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_arms_start_from_the_same_split_and_the_same_weights(small: Small) -> None:
    local, dml = (
        run(small(f"strategy.name={name}", "clients.local.epochs=0")) for name in ("local", "dml")
    )
    assert local.weights_sha256 == dml.weights_sha256


def test_clients_of_one_architecture_start_from_weights_of_their_own(small: Small) -> None:
    result = run(small("clients.models=[mlp]", "clients.local.epochs=0", "strategy.name=local"))
    accuracies = [row["accuracy"] for row in result.history.clients.values()]
    assert len(set(accuracies)) > 1


def test_no_exchange_means_no_bytes(small: Small) -> None:
    result = run(small("strategy.name=local"))
    assert result.history.bytes_up == {}
    assert result.to_row()["last"]["bytes_down"] == 0


def test_only_the_asked_for_rounds_are_judged_and_the_last_always(small: Small) -> None:
    result = run(small("rounds=5", "evaluation.every=2"))
    judged = [row["round"] for row in result.history.federation if "accuracy" in row]
    assert judged == [2, 4, 5]


def test_partial_participation_draws_other_clients_each_round(small: Small) -> None:
    result = run(small("rounds=6", "clients.count=6", "clients.participants=2"))
    trained = [
        {row["client"] for row in read_rows(result.folder / "exchange.jsonl") if row["round"] == r}
        for r in range(1, 7)
    ]
    assert {len(clients) for clients in trained} == {2}
    assert len({frozenset(clients) for clients in trained}) > 1


class Interrupt(Observer):
    """Presses Ctrl-C after the first round."""

    def metrics(self, rows: Sequence[Row]) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_what_was_measured(small: Small) -> None:
    settings = small()
    with pytest.raises(KeyboardInterrupt):
        run(settings, observers=[Interrupt()])
    (folder,) = (settings.output / settings.name).iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert read_rows(folder / "metrics.jsonl")[0]["round"] == 1


@pytest.mark.parametrize("strategy", ["dml", "fedmd", "one_way"])
def test_an_algorithm_that_needs_public_rows_says_so(small: Small, strategy: str) -> None:
    settings = small(f"strategy.name={strategy}", "data.public.size=0")
    with pytest.raises(SettingsError, match=r"data\.public\.size must be > 0"):
        load_data(settings)


def test_local_learning_needs_no_public_rows(small: Small) -> None:
    assert run(small("strategy.name=local", "data.public.size=0")).status == "finished"


def test_batch_norm_with_batches_of_one_is_refused_before_anything_starts(small: Small) -> None:
    settings = small(
        "clients.models=[{name: resnet8, options: {norm: batch}}]", "clients.batch_size=1"
    )
    with pytest.raises(SettingsError, match=r"clients\.models: resnet8.*BatchNorm"):
        load_data(settings)


def test_the_output_folder_must_be_writable(small: Small, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(SettingsError, match="output: cannot write"):
        run(small(f"output={in_the_way / 'runs'}"))


def test_the_ensemble_is_measured_where_predictions_are_exchanged(small: Small) -> None:
    last = run(small("strategy.name=fedmd")).history.federation[-1]
    assert 0 <= last["ensemble_accuracy"] <= 1
    assert 0 <= last["peer_disagreement"] <= 1
    local = run(small("strategy.name=local")).history.federation[-1]
    assert "ensemble_accuracy" not in local
    assert local["peer_disagreement"] is None


def test_the_selected_round_is_chosen_by_validation_alone(small: Small) -> None:
    result = run(small("rounds=4", "clients.optimizer.lr=0.05"))
    rows = result.history.federation
    best = max(row["validation_accuracy"] for row in rows)
    assert result.to_row()["selected"]["validation_accuracy"] == best


def test_target_entropy_lies_between_certainty_and_ignorance(small: Small) -> None:
    last = run(small("strategy.name=dml")).history.federation[-1]
    assert 0 < last["target_entropy"] <= np.log(10) + 1e-6


@pytest.mark.parametrize("term", ["crd", "adversarial"])
def test_terms_that_cannot_be_stacked_are_refused_before_anything_starts(
    small: Small, term: str
) -> None:
    settings = small(
        "strategy.name=fml",
        "strategy.meme=mlp",
        f"strategy.objective={{ce: 1, {term}: 1}}",
        "clients.models=[mlp]",
        "engine.vectorize=vmap",
    )
    where = rf"engine\.vectorize: vmap .* strategy\.objective\.{term}"
    with pytest.raises(SettingsError, match=where):
        load_data(settings)


@pytest.mark.parametrize("rows", [60, 150, 600])
def test_a_small_table_is_refused_with_all_that_has_to_change(tmp_path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    np.savez(tmp_path / "own.npz", x=rng.normal(size=(rows, 4)) + labels[:, None], y=labels)
    typed = [f"data.source={tmp_path / 'own.npz'}"]
    with pytest.raises(
        SettingsError, match=r"; add to what you typed: .*clients\.models=\[mlp\]"
    ) as no:
        load_data(load_settings(None, typed))
    added = str(no.value).split("typed: ")[1].split()
    data = load_data(load_settings(None, [*typed, *added]))
    assert len(data.public_inputs) >= rows // 5


def test_of_clients_as_few_as_necessary_are_taken_away(small: Small) -> None:
    words = ("clients.count=100", "data.partition.min_rows=8")
    with pytest.raises(SettingsError, match=r"typed: clients\.count=25$"):
        load_data(load_settings(None, words))
    load_data(load_settings(None, ["clients.count=25"]))
