"""What learning took is counted, clients' and server's, whatever runs them."""

from collections import Counter
from collections.abc import Callable

import pytest

from fedkd.inputs import InputShape
from fedkd.models import ModelSettings
from fedkd.training import Network, Work
from sim.commands.running import run
from sim.devices.effort import Effort, Efforts
from sim.keeping.records import read_rows
from sim.reports.runs import load_run
from sim.settings import Settings

MLP = ModelSettings(name="mlp", options={"hidden": [4]})
NETWORK = Network(MLP, InputShape((1, 2, 2)))
WORDS = ("rounds=2", "clients.count=3", "clients.models=[{name: mlp, options: {hidden: [8]}}]")


def efforts_of(result) -> list[dict[str, float]]:
    keys = [f"{whose}_{name}" for whose in ("client", "server") for name in Effort._fields]
    rows = [r for r in read_rows(result.folder / "metrics.jsonl") if r["scope"] == "federation"]
    return [{key: row[key] for key in keys if key in row} for row in rows]


def test_effort_of_known_work() -> None:
    # 4 x 4 and 4 x 3 weights: forwards 2 operations each; backwards as many for the weights, and
    # for the second layer's inputs again.
    work = Work(trained=Counter({NETWORK: 5}), predicted=Counter({NETWORK: 2}), steps=3)
    effort = Efforts(num_classes=3).of(work)
    forwards, backwards = 2 * 28, 2 * 28 + 2 * 12
    assert (effort.steps, effort.rows) == (3, 5)
    assert effort.gflops == pytest.approx((5 * (forwards + backwards) + 2 * forwards) / 1e9)


def test_efforts_add_up_and_unknown_operations_stay_unknown() -> None:
    assert Effort(1, 2, 0.5).plus(Effort(3, 4, 1.0)) == Effort(4, 6, 1.5)
    assert Effort(1, 2, None).plus(Effort(3, 4, 1.0)) == Effort(4, 6, None)


def test_what_a_client_reports_is_taken_out_of_its_metrics() -> None:
    metrics = {"loss/ce": 1.0, **Effort(7, 90, 0.25).metrics}
    assert Effort.taken(metrics) == Effort(7, 90, 0.25)
    assert metrics == {"loss/ce": 1.0}
    assert Effort.taken({}) == Effort(0, 0, None)


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
    result = run(small(*WORDS, "strategy.name=dsfl", "strategy.server_model=mlp"))
    record, rows = load_run(result.folder), efforts_of(result)
    assert record.effort("steps") == sum(r["client_steps"] + r["server_steps"] for r in rows)
    assert record.effort("steps", "server") == sum(r["server_steps"] for r in rows) > 0
    assert record.effort("gflops") == pytest.approx(
        sum(r["client_gflops"] + r["server_gflops"] for r in rows)
    )


def test_a_model_that_hides_its_arithmetic_is_counted_without(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("sim.devices.clock.row_flops", hidden)
    result = run(small(*WORDS, "strategy.name=local", "clients.local.steps=4"))
    assert [row["client_gflops"] for row in efforts_of(result)] == [None, None]
    assert load_run(result.folder).effort("gflops") is None
    assert load_run(result.folder).effort("steps") == 24
