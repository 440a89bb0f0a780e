"""`fedkd value`: what clients of a run are worth to the others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedkd.metrics.valuation import coalitions_of, drawn_permutations, shapley_values
from sim.commands.running import run
from sim.counterfactual import valuing
from sim.counterfactual.replaying import Wanted, replay
from sim.counterfactual.valuing import Asked, value
from sim.keeping.records import read_result
from sim.reports.counterfactual import is_of_run, value_table
from sim.reports.html import report
from sim.server.observers import Row
from sim.settings import SettingsError, load_settings

WORDS = (
    "rounds=2",
    "clients.count=3",
    "clients.models=[mlp]",
    "clients.local.epochs=2",
    "clients.optimizer.lr=0.01",
    "data.private_rows=150",
    "data.test_rows=200",
    "data.public.size=60",
    "data.partition={kind: iid}",
    "engine.backend=inline",
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("valued")
    return run(load_settings(None, [*WORDS, f"output={place}"])).folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, for whoever writes into it."""
    copy = tmp_path / "run"
    shutil.copytree(kept, copy)
    return copy


def mean(row: Row, *clients: int) -> float:
    found = {each["client"]: each["accuracy"] for each in row["clients"]}
    return sum(found[client] for client in clients) / len(clients)


def test_leave_one_out_is_what_others_lose(folder: Path) -> None:
    found = value(folder).row
    whole = read_result(folder)
    assert [row["client"] for row in found["clients"]] == [0, 1, 2]
    for row in found["clients"]:
        others = [client for client in range(3) if client != row["client"]]
        without = replay(folder, Wanted(without=(row["client"],), words=(f"output={folder}",)))
        expected = mean(whole, *others) - mean(without.result.to_row(), *others)
        assert row["leave_one_out"] == pytest.approx(expected)
        assert row["accuracy"] == mean(whole, row["client"])
    assert found["all"] == pytest.approx(whole["last"]["accuracy"])
    assert found["coalitions"] == 4
    assert "shapley" not in found["clients"][0]
    assert sum(row["rows"] for row in found["clients"]) == 150
    assert json.loads((folder / "value.json").read_text()) == found


def test_shapley_values_share_out_what_exchange_brings(folder: Path) -> None:
    found = value(folder, Asked("both", permutations=6, seed=1)).row
    local = run(
        load_settings(None, [*WORDS, "strategy.name=local", f"output={folder / 'local'}"])
    ).to_row()
    # With nobody who teaches everybody learns alone.
    assert found["nobody"] == pytest.approx(local["last"]["accuracy"])
    total = sum(row["shapley"] for row in found["clients"])
    assert total == pytest.approx(found["all"] - found["nobody"])
    assert found["all"] > found["nobody"]
    orders = drawn_permutations(3, 6, np.random.default_rng(1))
    assert found["coalitions"] == len({*coalitions_of(orders)} | {frozenset({0, 1})})
    assert all(row["standard_error"] >= 0 for row in found["clients"])


def test_all_orders_give_exact_values_of_the_game_that_was_run(folder: Path) -> None:
    achieved: dict[frozenset[int], float] = {}
    found = value(folder, Asked("shapley", permutations=60)).row
    for place in (folder / "value").iterdir():
        if not (place / "settings.yaml").is_file():
            continue
        settings = load_settings(place / "settings.yaml")
        teach = frozenset(range(3)) - set(settings.counterfactual.without)
        achieved[teach] = valuing._achieved(place).mean("test")
    assert len(achieved) == 8
    exact = shapley_values(achieved.__getitem__, 3)
    for row, worth in zip(found["clients"], exact, strict=True):
        assert abs(row["shapley"] - worth) < 4 * row["standard_error"] + 1e-9


def test_each_coalition_runs_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    really = valuing.run_coalition

    def counted(settings: object, place: Path, **more: object) -> None:
        made.append(place)
        really(settings, place, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(valuing, "run_coalition", counted)
    first = value(folder, Asked("both", permutations=2)).row
    count = len(made)
    assert count == first["coalitions"]
    again = value(folder, Asked("both", permutations=2)).row
    assert len(made) == count
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    # Nor is anything run to look at it on other rows.
    other = value(folder, Asked("both", permutations=2, split="validation")).row
    assert len(made) == count
    assert other["all"] != first["all"]
    # Of their models nothing is kept.
    assert not list((folder / "value").glob("*/checkpoints"))
    assert not list((folder / "value").glob("*/models/*"))


def test_what_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, made = valuing.run_coalition, []

    def stops(settings: object, place: Path, **more: object) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(place)
        really(settings, place, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(valuing, "run_coalition", stops)
    with pytest.raises(KeyboardInterrupt):
        value(folder)
    assert not (folder / "value.json").exists()
    monkeypatch.setattr(valuing, "run_coalition", really)
    told: list[str] = []
    value(folder, tell=told.append)
    assert told == ["3 runs of coalitions, 1 of them known, beside the whole federation's"]


def test_coalitions_of_other_code_do_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value(folder)
    for place in (folder / "value").iterdir():
        path = place / "identity.json"
        if path.is_file():
            row = json.loads(path.read_text())
            row["versions"]["torch"] = "0.0"
            path.write_text(json.dumps(row))
    told: list[str] = []
    value(folder, tell=told.append)
    assert "0 of them known" in told[0]


@pytest.mark.slow
def test_bits_do_not_depend_on_how_many_processes_there_are(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    one, two = value(folder).row, value(other, workers=2).row
    assert one["clients"] == two["clients"]


def test_a_server_model_may_be_what_is_judged(tmp_path: Path) -> None:
    words = ("strategy.name=one_way", "strategy.direction=server_to_clients", f"output={tmp_path}")
    folder = run(load_settings(None, [*WORDS, *words])).folder
    found = value(folder, Asked(of="server")).row
    assert found["all"] == read_result(folder)["server"]["accuracy"]


def test_values_of_a_run_that_ends_otherwise_here_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        valuing,
        "read_result",
        lambda place: (
            {**read_result(place), "weights_sha256": "0" * 64}
            if place == folder
            else read_result(place)
        ),
    )
    with pytest.raises(SettingsError, match="the run ends with other weights"):
        value(folder)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked(method="all"), "--method must be one of loo, shapley, both, got 'all'"),  # type: ignore[arg-type]
        (Asked(of="me"), "--of must be one of clients, server, got 'me'"),  # type: ignore[arg-type]
        (Asked(split="train"), "--split must be one of test, validation"),  # type: ignore[arg-type]
        (Asked(permutations=0), "--permutations must be 1 to"),
        (Asked(tolerance=2.0), "--truncate must be 0 to 1"),
        (Asked(of="server"), "--of server: the server of dml has no model"),
    ],
)
def test_what_cannot_be_is_named(folder: Path, asked: Asked, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        value(folder, asked)


def test_a_tolerance_saves_runs(folder: Path) -> None:
    found = value(folder, Asked("shapley", permutations=4, tolerance=1.0)).row
    assert found["truncated"] == 12
    assert found["coalitions"] == 2
    assert all(row["shapley"] == 0 for row in found["clients"])


def test_the_report_has_them(folder: Path) -> None:
    asked = Asked("both", permutations=2)
    found = value(folder, asked).row
    text = report([folder]).read_text()
    assert "What clients are worth to the others" in text
    assert "with nobody who teaches" in text
    worth = f"{100 * found['clients'][0]['leave_one_out']:+.2f}"
    assert worth in text
    assert is_of_run(found, found["run"])
    # Of another run, or of nobody's making, they are not shown.
    for broken in ({**found, "run": "0" * 64}, {**found, "clients": [{}]}, {"run": found["run"]}):
        assert not is_of_run(broken, found["run"])


def test_the_table_names_whom_and_how_sure() -> None:
    found = {
        "asked": {"method": "both", "of": "clients", "split": "test", "permutations": 4},
        "all": 0.8,
        "nobody": 0.5,
        "truncated": 0,
        "coalitions": 9,
        "clients": [
            {
                "client": client,
                "rows": 10,
                "classes": [0, 1, 2, 4, 6, 7],
                "accuracy": 0.7,
                "leave_one_out": worth,
                "shapley": 0.15,
                "standard_error": error,
            }
            for client, worth, error in ((0, -0.0123, None), (1, 0.05, 0.004))
        ],
    }
    table = value_table(found)
    assert table.labels == ["1", "0"]
    cells = {column.title: column.cells for column in table.columns}
    assert cells["leave one out"] == ["+5.00", "-1.23"]
    assert cells["Shapley"] == ["+15.00 ±0.40", "+15.00"]
    assert cells["classes"] == ["0-2,4,6,7"] * 2
    assert "share out the +30.0 between over 4 orders" in table.caption
