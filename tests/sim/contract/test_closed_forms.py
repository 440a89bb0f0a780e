"""Every mean-type rule of the table leads closed-form students to the fixed point of its mean."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedkd.closed_forms import (
    fixed_points,
    kernel_student,
    linear_student,
    mean_of,
    mean_of_others,
    one_before,
    rate,
    rbf,
    smoothing_student,
)
from sim.contract.closed_forms import Member, converged
from sim.contract.toy import ROWS, toy_data, toy_settings

CLIENTS = len(ROWS)
DATA = toy_data()
KINDS = {
    "linear": lambda *rows, **more: linear_student(*rows, ridge=1.0, **more),
    "kernel": lambda *rows, **more: kernel_student(*rows, kernel=rbf(1.0), ridge=0.5, **more),
    "smoother": lambda *rows, **more: smoothing_student(*rows, kernel=rbf(0.5), **more),
}
ROUNDS = 60

ALL, OTHERS, RING = mean_of(CLIENTS), mean_of_others(CLIENTS), one_before(CLIENTS)
BY_ROWS = mean_of(CLIENTS, ROWS)
NO_CHANGE = {"kind": "constant", "value": 1.0}
"""A temperature at which a softmax of logarithms gives the probabilities back."""


@cache
def members(kind: str) -> list[Member]:
    """Return a closed-form student on each client's rows of the toy data."""

    def features(inputs: np.ndarray) -> np.ndarray:
        return inputs.reshape(len(inputs), -1).astype(np.float64) / 8

    public = features(DATA.public_inputs)
    found = []
    for rows in DATA.client_rows:
        given = features(DATA.train_inputs[rows]), np.eye(3)[DATA.train_labels[rows]], public
        alone = KINDS[kind](*given, public_weight=0.0)
        found.append(Member(KINDS[kind](*given), alone.base))
    return found


# The algorithm, its settings, whose mean it takes, and more settings.
LOGITS: dict[str, tuple[str, dict[str, Any], np.ndarray, dict[str, Any]]] = {
    "fedmd": ("fedmd", {}, ALL, {}),
    "fedmd by rows": ("fedmd", {"weighting": "examples"}, BY_ROWS, {}),
    "fedmd, sums": ("fedmd", {}, ALL, {"exchange": {"view": "sum"}}),
    "fedmd by rows, sums": (
        "fedmd",
        {"weighting": "examples"},
        BY_ROWS,
        {"exchange": {"view": "sum"}},
    ),
    "fedmd, nothing trimmed": ("fedmd", {"aggregation": "trimmed_mean", "trim": 0}, ALL, {}),
    "fedmd, nobody filtered": ("fedmd", {"aggregation": "filter", "dishonest": 0}, ALL, {}),
    "fedmd, all within norms": ("fedmd", {"aggregation": "norm_check", "factor": 1000}, ALL, {}),
    "fedmd, no outliers": ("fedmd", {"aggregation": "outlier_check", "factor": 1000}, ALL, {}),
    "fccl": ("fccl", {}, ALL, {}),
    "fccl, sums": ("fccl", {}, ALL, {"exchange": {"view": "sum"}}),
    "kdcl": ("kdcl", {"rule": "mean"}, ALL, {}),
    "dml": ("dml", {"average": "logit"}, OTHERS, {}),
    "dml, itself included": ("dml", {"average": "logit", "include_self": True}, ALL, {}),
    "dml, nobody filtered": (
        "dml",
        {"average": "logit", "aggregation": "filter", "dishonest": 0},
        OTHERS,
        {},
    ),
    "dml, ring": ("dml", {"average": "logit", "peers": "ring"}, RING, {}),
    "dml, ring and itself": (
        "dml",
        {"average": "logit", "peers": "ring", "include_self": True},
        (RING + np.eye(CLIENTS)) / 2,
        {},
    ),
    "dml, all at random": (
        "dml",
        {"average": "logit", "peers": "random-k", "k": CLIENTS - 1},
        OTHERS,
        {},
    ),
    "dml, all that agree": (
        "dml",
        {"average": "logit", "peers": "best-k", "k": CLIENTS - 1},
        OTHERS,
        {},
    ),
}

PROBABILITIES: dict[str, tuple[str, dict[str, Any], np.ndarray, dict[str, Any]]] = {
    "dsfl": ("dsfl", {"sharpening": "sa"}, ALL, {}),
    "dsfl, sums": ("dsfl", {"sharpening": "sa"}, ALL, {"exchange": {"view": "sum"}}),
    "dsfl, power 1": ("scarlet", {"sharpening": "enhanced_era", "power": 1, "cache": 1}, ALL, {}),
    "scarlet": ("scarlet", {"sharpening": "sa", "cache": 1}, ALL, {}),
    "scarlet, cached": ("scarlet", {"sharpening": "sa", "cache": 3}, ALL, {}),
    "cronus, nobody filtered": ("cronus", {"dishonest": 0}, ALL, {}),
    "cronus, mean": ("cronus", {"aggregation": "mean"}, ALL, {}),
    "cfd, without a server's model": ("cfd", {"directions": ["clients"]}, ALL, {}),
    "comet, one cluster": ("comet", {"clusters": 1}, ALL, {}),
    "selective_fd": ("selective_fd", {"ambiguous": None}, ALL, {}),
    "dml": ("dml", {"temperature": NO_CHANGE}, OTHERS, {}),
    "dml, itself included": ("dml", {"temperature": NO_CHANGE, "include_self": True}, ALL, {}),
    "dml, ring": ("dml", {"temperature": NO_CHANGE, "peers": "ring"}, RING, {}),
    "codistillation": ("codistillation", {"interval": 1}, OTHERS, {}),
    "codistillation, stale": ("codistillation", {"interval": 3, "burn_in": 2}, OTHERS, {}),
}


def distance(kind: str, case: tuple[str, dict[str, Any], np.ndarray, dict[str, Any]]) -> float:
    """Return how far from the fixed point of a mixing an algorithm ends."""
    name, options, mixing, more = case
    students = members(kind)
    pulls = [member.taught for member in students]
    # Or the rounds would not be enough, whatever the rule.
    slowest = rate(pulls, mixing)
    period = options.get("interval", options.get("cache", 1))
    rounds = ROUNDS * period
    assert slowest**ROUNDS < 1e-8, slowest
    settings = toy_settings(name, options=options, rounds=rounds + 1, **more)
    says = "logs" if kind == "smoother" else "scores"
    held = converged(settings, DATA, students, rounds=rounds, says=says)
    assert sorted(held) == list(range(CLIENTS))
    expected = fixed_points(pulls, mixing)
    return max(float(np.abs(held[client] - expected[client]).max()) for client in held)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
@pytest.mark.parametrize("case", LOGITS.values(), ids=LOGITS)
def test_means_of_logits_lead_to_their_fixed_point(
    case: tuple[str, dict[str, Any], np.ndarray, dict[str, Any]], kind: str
) -> None:
    assert distance(kind, case) < 1e-6


@pytest.mark.parametrize("case", PROBABILITIES.values(), ids=PROBABILITIES)
def test_means_of_probabilities_lead_to_their_fixed_point(
    case: tuple[str, dict[str, Any], np.ndarray, dict[str, Any]],
) -> None:
    assert distance("smoother", case) < 1e-6


@pytest.mark.parametrize(
    ("kind", "case", "other"),
    [
        ("linear", LOGITS["fedmd by rows"], ALL),
        ("linear", LOGITS["dml"], ALL),
        ("linear", LOGITS["dml, itself included"], OTHERS),
        ("kernel", LOGITS["dml, ring"], OTHERS),
        ("kernel", LOGITS["fedmd"], mean_of(CLIENTS, [1, 1, 1, 0])),
        ("smoother", PROBABILITIES["codistillation"], ALL),
        ("smoother", PROBABILITIES["dsfl"], BY_ROWS),
    ],
)
def test_another_mean_has_another_fixed_point(
    kind: str, case: tuple[str, dict[str, Any], np.ndarray, dict[str, Any]], other: np.ndarray
) -> None:
    name, options, _, more = case
    # A thousand times the tolerance: none of the tests above could pass by chance.
    assert distance(kind, (name, options, other, more)) > 1e-3


def test_what_sharpens_has_not_the_fixed_point_of_the_mean() -> None:
    assert distance("smoother", ("dsfl", {"sharpening": "era"}, ALL, {})) > 1e-2


def test_an_answer_that_was_not_asked_for_is_refused() -> None:
    # Scores that are no distributions, where soft labels are asked for.
    with pytest.raises(ValueError, match="DSFL, client 0: soft labels are no distributions"):
        distance("linear", PROBABILITIES["dsfl"])


RIDGE = 0.5


@pytest.mark.parametrize(
    ("rounds", "epochs", "tolerance"),
    [(30, 8, 1e-3), pytest.param(60, 20, 1e-6, marks=pytest.mark.slow)],
)
def test_training_by_steps_leads_there_too(
    simulate: Callable[..., Any], rounds: int, epochs: int, tolerance: float
) -> None:
    """The whole engine: a linear model, full batches, squared loss, float32."""
    settings = toy_settings(
        "own_squared:Squared",
        options={"average": "logit"},
        clients={
            "models": [{"name": "own_squared:linear"}],
            "batch_size": 64,
            "local": {"epochs": epochs},
            # Weight decay is the gradient of half of it times the squared norm.
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 2 * RIDGE},
        },
        rounds=rounds,
        evaluation={"every": rounds},
        engine={"backend": "inline", "vectorize": "vmap"},
    )
    boundary = simulate(settings, DATA).loop.boundary

    def features(inputs: np.ndarray) -> np.ndarray:
        return inputs.reshape(len(inputs), -1).astype(np.float64)

    public = features(DATA.public_inputs)
    students = [
        linear_student(
            features(DATA.train_inputs[rows]),
            np.eye(3)[DATA.train_labels[rows]],
            public,
            ridge=RIDGE,
            # Both terms are means over rows.
            private_weight=1 / len(rows),
            public_weight=1 / len(public),
        )
        for rows in DATA.client_rows
    ]
    taught = np.stack([boundary.state.others[client].values for client in range(CLIENTS)])
    assert np.abs(taught - fixed_points(students, OTHERS)).max() < tolerance
    # What the others say, and nothing else.
    assert np.abs(taught - fixed_points(students, ALL)).max() > 3e-3
