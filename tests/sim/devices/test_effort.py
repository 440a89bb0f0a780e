"""What learning took is counted, clients' and server's, whatever runs them."""

from collections import Counter
from collections.abc import Callable

import pytest

from fedkd.inputs import InputShape
from fedkd.models import ModelSettings
from fedkd.training import Network, Work
from sim.commands.running import run, settings_of_run
from sim.devices.effort import Effort, network_rows, operations
from sim.keeping.records import read_rows
from sim.reports.runs import load_run
from sim.server.observers import Observer
from sim.settings import Settings

MLP = ModelSettings(name="mlp", options={"hidden": [4]})
NETWORK = Network(MLP, InputShape((1, 2, 2)))
WORDS = ("rounds=2", "clients.count=3", "clients.models=[{name: mlp, options: {hidden: [8]}}]")


def efforts_of(result) -> list[dict[str, float]]:
    rows = [r for r in read_rows(result.folder / "metrics.jsonl") if r["scope"] == "federation"]
    kinds = ("client_steps", "client_rows", "server_steps", "server_rows", "trained_", "predicted_")
    return [{key: row[key] for key in row if key.startswith(kinds)} for row in rows]


def test_operations_are_rows_times_what_a_row_costs() -> None:
    # 4 x 4 and 4 x 3 weights: forwards 2 operations each; backwards as many for the weights, and
    # for the second layer's inputs again.
    forwards, backwards = 2 * 28, 2 * 28 + 2 * 12
    known = network_rows([NETWORK, NETWORK], num_classes=3)
    rows = [{"trained_0": 5, "predicted_1": 2}, {"trained_0": 1}]
    assert operations(rows, known) == 6 * (forwards + backwards) + 2 * forwards
    # A network that nobody announced, and one of the user's own, whose code no reader runs.
    assert operations([{"trained_other": 1}], known) is None
    gone = [{**known[0], "model": {"name": "gone.module:build"}}]
    assert operations(rows, gone) is None


def test_effort_is_by_network_and_adds_up() -> None:
    other = Network(MLP, InputShape((1, 3, 3)))
    work = Work(trained=Counter({NETWORK: 5}), predicted=Counter({NETWORK: 2, other: 4}), steps=3)
    effort = Effort.of(work, [NETWORK])
    assert effort == Effort(3, Counter({"0": 5}), Counter({"0": 2, "other": 4}))
    assert effort.by_network == {"trained_0": 5, "predicted_0": 2, "predicted_other": 4}
    assert effort.plus(effort).by_network == {
        "trained_0": 10,
        "predicted_0": 4,
        "predicted_other": 8,
    }
    assert effort.row("server") == {"server_steps": 3, "server_rows": 5}
    assert Effort().row("server") == {}


def test_what_a_client_reports_is_taken_out_of_its_metrics() -> None:
    effort = Effort(7, Counter({"0": 90, "1": 4}), Counter({"1": 8}))
    metrics = {"loss/ce": 1.0, **effort.metrics}
    assert Effort.taken(metrics) == effort
    assert metrics == {"loss/ce": 1.0}
    assert Effort.taken({}) == Effort()
    # A stranger's client names no column of the record.
    odd = {
        "effort_trained_<b>": 5.0,
        "effort_predicted_01": 2.0,
        "effort_why": 1.0,
        "effort_steps": -3,
    }
    assert Effort.taken(odd) == Effort(0, Counter({"other": 5}), Counter({"other": 2}))
    assert odd == {}


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_steps_and_rows_are_those_that_settings_ask_for(
    small: Callable[..., Settings], vectorize: str
) -> None:
    words = (*WORDS, "strategy.name=dml", "clients.local.steps=4", "clients.batch_size=10")
    result = run(small(*words, f"engine.vectorize={vectorize}", "data.public.size=16"))
    first, second = efforts_of(result)
    # Nothing teaches in round 1; then every client takes the 16 public rows beside its own.
    assert first["client_steps"] == second["client_steps"] == 3 * 4
    assert second["client_rows"] - first["client_rows"] == 3 * 16
    assert not any(key.startswith("server") for key in first)


def test_two_models_of_a_client_are_two_optimizers_steps(small: Callable[..., Settings]) -> None:
    alone, pair = (
        efforts_of(run(small(*WORDS, f"strategy.name={name}", "clients.local.steps=4")))
        for name in ("local", "fml")
    )
    assert [row["client_steps"] for row in alone] == [12, 12]
    assert [row["client_steps"] for row in pair] == [24, 24]
    assert pair[0]["client_rows"] == 2 * alone[0]["client_rows"]


def test_what_a_teacher_took_before_the_first_round_belongs_to_the_run(
    small: Callable[..., Settings],
) -> None:
    words = (*WORDS, "strategy.name=one_way", "strategy.teacher_data=public")
    words = (*words, "data.public={size: 40, labelled: true}", "clients.batch_size=20")
    without, trained = (
        efforts_of(run(small(*words, "strategy.model=mlp", f"strategy.teacher_epochs={epochs}")))
        for epochs in (0, 3)
    )
    # On its 40 labelled public rows, three times, two steps a pass.
    assert trained[0]["server_steps"] - without[0].get("server_steps", 0) == 6
    assert trained[0]["server_rows"] - without[0].get("server_rows", 0) == 120
    assert trained[1] == without[1]


def test_a_run_says_what_it_took(small: Callable[..., Settings]) -> None:
    result = run(small(*WORDS, "strategy.name=dsfl", "strategy.server_model=cnn"))
    record, rows = load_run(result.folder), efforts_of(result)
    assert record.effort("steps") == sum(r["client_steps"] + r["server_steps"] for r in rows)
    assert record.effort("steps", "server") == sum(r["server_steps"] for r in rows) > 0
    assert [each["model"]["name"] for each in record.result["networks"]] == ["mlp", "cnn"]
    # The server's model only learns, the clients' also predict public rows.
    assert sum(row["trained_1"] for row in rows) == record.effort("rows", "server")
    assert all(row["predicted_0"] for row in rows)
    assert record.gflops is not None
    assert record.gflops > 0


def test_networks_of_features_are_known_as_well(small: Callable[..., Settings]) -> None:
    result = run(small(*WORDS, "strategy.name=fedgkt"))
    counted = [key for row in efforts_of(result) for key in row if key.endswith("_other")]
    assert counted == []
    assert load_run(result.folder).gflops


def test_a_resumed_run_counts_alike(small: Callable[..., Settings]) -> None:
    settings = small(*WORDS, "strategy.name=one_way", "rounds=3", "checkpoints.every=1")
    whole = run(settings)

    class Stop(Observer):
        def completed(self, round: int) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(settings, observers=[Stop()])
    folder = stopped.value.folder
    resumed = run(settings_of_run(folder), resume=folder)
    assert efforts_of(resumed) == efforts_of(whole)
    assert load_run(folder).result["networks"] == load_run(whole.folder).result["networks"]
