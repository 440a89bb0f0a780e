"""The doctor looks at a public set, forecasts, names what to do, and leaves nothing."""

import csv
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedkd.metrics.forecast import COVERAGE
from fedkd.metrics.public_set import PublicSetFigures
from sim.commands.doctor import (
    FORECAST_FILE,
    MOST_CLIENTS,
    doctor,
    examine,
    expected_gains,
    features_of,
)
from sim.commands.running import load_data
from sim.settings import SettingsError, load_settings

ROOT = Path(__file__).resolve().parents[3]

WORDS = [
    "data.private_rows=300",
    "data.test_rows=100",
    "data.public.size=60",
    "data.partition.alpha=0.5",
    "clients.count=4",
    "clients.models=[{name: mlp, options: {hidden: [16]}}]",
    "strategy.name=dml",
]


def settings(*words):
    return load_settings(None, [*WORDS, *words])


@pytest.fixture(scope="module")
def checkup():
    return doctor(settings(), epochs=2)


def test_it_is_the_same_for_the_same_seed_and_leaves_nothing(checkup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = doctor(settings(), epochs=2)
    assert json.dumps(again.to_row()) == json.dumps(checkup.to_row())
    assert not list(tmp_path.iterdir())


def test_a_row_says_what_was_seen(checkup):
    row = checkup.to_row()
    assert (row["public_rows"], row["clients"], row["epochs"]) == (60, 4, 2)
    assert sum(each["private_rows"] for each in row["classes"]) == 300
    assert sum(each["confident_rows"] for each in row["classes"]) <= 60
    assert row["figures"]["rows_per_class"] == 6
    assert row["public_accuracy"] is None
    for own in row["expected"].values():
        assert own["low"] <= own["gain"] <= own["high"]


def test_the_table_fits_a_terminal(checkup):
    assert checkup.table().natural_width <= 80
    told = checkup.sentences()
    assert [line.split(":")[0] for line in told[:2]] == ["dml", "fedmd"]
    assert f"{100 * COVERAGE:.0f} % interval" in told[0]
    assert any(line.startswith("- ") for line in told)


def test_the_codec_faults_and_adversary_of_a_run_change_no_figure(checkup):
    other = settings(
        "exchange.up=float16",
        "faults=[{kind: dropout, probability: 0.5}]",
        "adversary={kind: sign_flip, clients: [0]}",
        "clients.local.steps=1",
    )
    again = doctor(other, epochs=2)
    assert again.seen.figures == checkup.seen.figures
    assert [note.split(":")[0] for note in again.notes[:2]] == ["adversary", "exchange"]


def test_public_labels_are_looked_at_where_that_is_allowed(checkup):
    labelled = doctor(settings("data.public.labelled=true"), epochs=2)
    assert labelled.seen.figures == checkup.seen.figures
    assert 0 <= labelled.seen.public_accuracy <= 1
    assert "data.public.labelled" in " ".join(labelled.notes)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["strategy.name=fedavg"], "'fedavg', as it is set up, clients send no predictions"),
        (["strategy.name=local"], "'local', as it is set up, clients send no predictions"),
        (["strategy.name=one_way"], "'one_way', as it is set up"),
        (["data.public.size=0"], "data.public.size must be > 0"),
    ],
)
def test_what_exchanges_no_predictions_is_refused(words, named):
    with pytest.raises(SettingsError, match=named):
        doctor(settings(*words))


def test_epochs_are_bounded():
    with pytest.raises(SettingsError, match="--epochs must be from 1 to 1000, got 0"):
        doctor(settings(), epochs=0)


def test_of_many_clients_some_answer():
    many = settings("clients.count=24", "data.partition.alpha=10", "data.partition.min_rows=2")
    assert examine(many, load_data(many), epochs=1).clients == MOST_CLIENTS


def test_rows_that_are_nothing_like_the_private_ones_are_named():
    own = settings()
    data = load_data(own)
    rng = np.random.default_rng(0)
    noise = rng.normal(3, 2, data.public_inputs.shape).astype(np.float32)
    seen = examine(own, replace(data, public_inputs=noise), epochs=1)
    assert seen.figures.domain_auc > 0.95
    assert seen.figures.overlap < 0.5


def test_advice_names_what_is_wrong(monkeypatch):
    from sim.commands import doctor as room

    own = settings("data.public.size=20")
    data = load_data(own)
    kept = [rows[data.train_labels[rows] != 3] for rows in data.client_rows]
    broken = replace(data, client_rows=tuple(kept))
    monkeypatch.setattr(room, "load_data", lambda _: broken)
    told = "\n".join(doctor(own, epochs=1).advice)
    assert "too few rows: 2.0 for each class; data.public.size=50 has 5" in told
    assert "no client holds class 3: nobody can teach it" in told
    assert "hardly any public row is surely" in told


def test_texts_are_seen_as_counts_of_tokens():
    from sim.commands.doctor import _columns

    data = replace(load_data(settings()), vocabulary=3)
    inputs = np.array([[0, 2, 2], [1, 1, 1]], np.float32)
    assert _columns(data, inputs).tolist() == [[1, 0, 2], [0, 3, 0]]


# -- the forecast that is shipped ------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "doctor_benchmark", ROOT / "benchmarks" / "doctor.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_shipped_forecast_is_that_of_the_shipped_table(benchmark):
    shipped = json.loads((ROOT / "sim" / "commands" / FORECAST_FILE).read_text())
    content, _ = benchmark.fitted(benchmark.read_table())
    assert shipped["about"] == content["about"]
    for name, row in shipped["algorithms"].items():
        for key, value in row.items():
            assert value == pytest.approx(content["algorithms"][name][key], rel=1e-6)
    assert content["about"]["federations"] >= 100


def test_the_forecast_knows_nothing_of_what_became_of_a_run(benchmark):
    with (ROOT / "benchmarks" / "doctor.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    assert set(PublicSetFigures.__dataclass_fields__) < set(columns)
    (row, *_) = benchmark.read_table()
    figures = PublicSetFigures(
        **{name: row[name] for name in PublicSetFigures.__dataclass_fields__}
    )
    for own in expected_gains(figures).values():
        assert -1 <= own.low <= own.gain <= own.high <= 1
    assert next(iter(features_of(figures))) == "ensemble_gain"


def test_a_figure_that_is_not_known_counts_as_harmless():
    figures = PublicSetFigures(**dict.fromkeys(PublicSetFigures.__dataclass_fields__, 0.5))
    lone = replace(figures, domain_auc=math.nan, disagreement=math.nan)
    assert features_of(lone)["domain_shift"] == features_of(lone)["disagreement"] == 0
