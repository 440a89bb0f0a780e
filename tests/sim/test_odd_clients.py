"""Runs whose clients have wrong labels, or see the world differently."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sim.commands.running import RunResult, run
from sim.settings import Settings

Small = Callable[..., Settings]
LOCAL = ("strategy.name=local", "clients.models=mlp", "rounds=1", "data.partition.kind=iid")


def last_of_clients(result: RunResult) -> list[dict[str, Any]]:
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["scope"] == "client" and row["round"] == 1]


def test_a_client_is_judged_under_its_own_shift_beside_the_common_test_rows(small: Small) -> None:
    shift = "data.feature_shift.shifts=[{kind: none}, {kind: colour, invert: true}]"
    settings = small(*LOCAL, shift, "clients.local.epochs=20")
    own = run(settings)
    as_is = run(small(*LOCAL, shift, "clients.local.epochs=20", "data.feature_shift.judged=as_is"))
    assert own.weights_sha256 == as_is.weights_sha256
    for client, (mine, plain) in enumerate(
        zip(last_of_clients(own), last_of_clients(as_is), strict=True)
    ):
        assert mine["accuracy"] == plain["accuracy"]
        assert mine["validation_accuracy"] == plain["validation_accuracy"]
        if client % 2:
            # It learnt from negatives, and knows no other pictures.
            assert mine["personal_accuracy"] > plain["personal_accuracy"] + 0.2
        else:
            assert mine["personal_accuracy"] == plain["personal_accuracy"]


def test_stacked_clients_are_judged_under_their_own_shifts_too(small: Small) -> None:
    words = (*LOCAL, "data.feature_shift.shifts=[{kind: none}, {kind: noise, std: 0.5}]")
    looped, stacked = (
        last_of_clients(run(small(*words, f"engine.vectorize={way}"))) for way in ("loop", "vmap")
    )
    for one, other in zip(looped, stacked, strict=True):
        assert one["personal_accuracy"] == pytest.approx(other["personal_accuracy"], abs=0.02)


def test_what_a_client_s_accuracy_is_worth_follows_its_true_classes(small: Small) -> None:
    # Each client holds one class, and all its labels say the next one: it is always wrong.
    result = run(
        small(
            *LOCAL[:-1],
            "data.partition={kind: pathological, classes_per_client: 1}",
            "data.label_noise={kind: pairwise, rate: 1.0}",
            "clients.local.epochs=30",
        )
    )
    assert [row["personal_accuracy"] for row in last_of_clients(result)] == [0.0] * 4


def test_noise_and_shift_are_what_tells_runs_apart(small: Small) -> None:
    plain = run(small(*LOCAL))
    for word in (
        "data.label_noise.rate=0.5",
        "data.feature_shift.shifts=[{kind: blur}]",
    ):
        other = run(small(*LOCAL, word))
        assert other.folder != plain.folder
        assert other.weights_sha256 != plain.weights_sha256
        assert other.weights_sha256 == run(small(*LOCAL, word)).weights_sha256
