"""Figures of attacks are drawn where there is something to show."""

import json
from dataclasses import replace

import pytest

from sim.reports.attack_figures import defence_of, draw_attacks
from sim.reports.attacks import leakage_cells, leakage_table
from sim.reports.runs import RunRecord

INTERVAL = [0.7, 0.6, 0.8]
FIGURES = {
    "attack": "lira_online",
    "auc": INTERVAL,
    "rates": {"0.01": INTERVAL},
    "members": 20,
    "others": 20,
    "curve": {"false": [0, 0.1, 1], "true": [0, 0.5, 1]},
}
FOUND = {
    "membership": {
        "places": {"model": {"figures": [FIGURES], "missing": {}}, "upload": {"missing": "none"}},
        "controls": {},
    },
    "labels": {"first": {"mean_prediction": [0.2, 0.1, 0.3]}},
    "stealing": {"rounds": [{"seen": 1, "agreement": INTERVAL}]},
}
SETTINGS = {
    "strategy": {"name": "dml"},
    "exchange": {"up": {"kind": "float32"}},
    "privacy": {"mechanism": {"kind": "none"}, "where": "client"},
}


@pytest.fixture
def record(tmp_path):
    row = {"round": 2, "scope": "federation", "accuracy": 0.9}
    return RunRecord(
        folder=tmp_path,
        arm="plain",
        seed=0,
        settings=SETTINGS,
        status="finished",
        result={"last": row},
        federation=(row,),
        clients=(),
        server=(),
        bytes_up={0: 1000, 1: 3000},
        bytes_down={0: 1000, 1: 1000},
        attacks=FOUND,
    )


def test_one_run_has_roc_curves_of_its_attacks_and_two_arms_have_points(record):
    assert list(draw_attacks({"plain": [record]})) == ["membership_roc"]
    runs = {"plain": [record], "other": [replace(record, arm="other")]}
    figures = draw_attacks(runs)
    assert list(figures) == ["membership_roc", "accuracy_by_leak"]
    # Only leaks that some arm has a figure of: from the model, labels, stealing.
    assert len(figures["accuracy_by_leak"].axes) == 3
    assert draw_attacks({"plain": [replace(record, attacks={})]}) == {}


def test_where_membership_is_not_asked_there_are_no_curves(record):
    found = {**record.attacks, "membership": {"missing": "clients are people"}}
    assert draw_attacks({"plain": [replace(record, attacks=found)]}) == {}


def test_cells_say_what_was_found_what_it_costs_and_what_there_is_not(record):
    refused: list[RunRecord] = []
    cells = leakage_cells({"plain": [record], "gone": refused})
    assert cells["accuracy"] == ["90.0", "–"]  # noqa: RUF001
    assert cells["kB"][0] == "3.0"
    assert cells["members, model"][0] == "0.700"
    assert cells["members, upload"] == ["–", "–"]  # noqa: RUF001
    assert cells["labels, first upload"][0] == "0.200"
    assert leakage_table({"plain": [record], "gone": refused}).labels == ["plain", "gone (refused)"]


@pytest.mark.parametrize(
    ("privacy", "up", "words"),
    [
        ({"mechanism": {"kind": "none"}}, {"kind": "float32"}, "no defence"),
        ({"mechanism": {"kind": "dp_sgd", "epsilon": 8.0}}, {"kind": "float32"}, "dp_sgd 8"),
        (
            {"mechanism": {"kind": "gaussian", "noise": 1.0, "epsilon": None}, "where": "server"},
            {"kind": "top_k", "k": 1},
            "gaussian at the server, top_k 1",
        ),
    ],
)
def test_defences_are_named_by_what_settings_do(record, privacy, up, words):
    settings = {**SETTINGS, "privacy": privacy, "exchange": {"up": up}}
    assert defence_of(replace(record, settings=json.loads(json.dumps(settings)))) == words
