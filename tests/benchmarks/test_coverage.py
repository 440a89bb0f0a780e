"""The t-interval holds what it promises where differences are normal; a bootstrap does not."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sim.reports.statistics import paired_difference

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
DRAWS = 100_000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def normal(script):
    return script.normal(np.random.default_rng(0), (DRAWS, 5))


def test_the_t_interval_of_five_seeds_covers_95_percent(script, normal):
    # The standard error of this share is 0.07 points.
    assert script.coverage_of_t(normal) == pytest.approx(0.95, abs=0.003)
    assert (script.p_of_t(normal) < 0.05).mean() == pytest.approx(0.05, abs=0.003)


def test_a_percentile_bootstrap_of_five_seeds_covers_84_percent(script, normal):
    found = script.coverage_of_bootstrap(normal[:20_000], np.random.default_rng(1))
    assert found == pytest.approx(0.84, abs=0.01)


def test_holm_keeps_the_error_of_a_family_and_the_detectable_effect_is_found(script):
    rng = np.random.default_rng(2)
    assert script.family_error(rng, script.normal, 5, 20_000, corrected=True) <= 0.055
    assert script.family_error(rng, script.normal, 5, 20_000, corrected=False) > 0.1
    assert script.power_at_detectable(rng, 5, DRAWS) == pytest.approx(0.8, abs=0.006)


def test_what_is_simulated_is_what_reports_compute(script, normal):
    for row, p, signs in zip(
        normal[:50], script.p_of_t(normal[:50]), script.p_of_signs(normal[:50]), strict=True
    ):
        found = paired_difference([0.0] * 5, row.tolist())
        assert found.p_value == pytest.approx(p, abs=1e-12)
        assert found.p_sign_flip == pytest.approx(signs, abs=1e-12)
        assert (found.low <= 0 <= found.high) == bool(script.coverage_of_t(row[None]))


@pytest.mark.parametrize("law", ["normal", "bounded (359 test rows, 95 and 97 %)"])
def test_laws_have_the_mean_that_intervals_are_to_hold(script, law):
    drawn = script.LAWS[law](np.random.default_rng(3), (DRAWS, 2))
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(1, abs=0.02)
