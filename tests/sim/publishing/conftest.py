"""One finished study and one sweep for all tests of this room."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sim.commands.study import compare
from sim.publishing.studies import Study, open_study
from sim.reports.runs import RunRecord
from sim.settings import load_settings

WORDS = (
    "rounds=2",
    "clients.count=2",
    "clients.models=[{name: mlp, options: {hidden: [8]}}]",
    "clients.local.epochs=1",
    "data.private_rows=80",
    "data.test_rows=60",
    "data.public.size=30",
    "data.partition={kind: dirichlet, alpha: 1, min_rows: 2}",
    "engine.backend=inline",
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds."""
    output = tmp_path_factory.mktemp("published")
    settings = load_settings(None, [*WORDS, f"output={output}", "name=small_study"])
    return compare(settings, arms=["local", "dml"], seeds=2).folder


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two settings, one seed."""
    output = tmp_path_factory.mktemp("published")
    words = ["study.sweep.strategy.temperature=[1,4]", "study.sweep.data.partition.alpha=[0.5,1]"]
    settings = load_settings(None, [*WORDS, f"output={output}", "name=swept", *words])
    return compare(settings, seeds=1).folder


@pytest.fixture
def study(finished: Path) -> Study:
    return open_study(finished)


@pytest.fixture
def with_accuracies(study: Study) -> Callable[[Mapping[str, Sequence[float]]], Study]:
    """Make a study of runs that measured what a test says, by arm and seed."""
    record = study.runs["dml"][0]

    def made(accuracies: Mapping[str, Sequence[float]]) -> Study:
        def run(arm: str, seed: int, accuracy: float) -> RunRecord:
            last = {**record.last, "accuracy": accuracy}
            return replace(
                record,
                arm=arm,
                seed=seed,
                settings={**record.settings, "strategy": {"name": arm}},
                result={**record.result, "last": last, "selected": last},
            )

        runs = {
            arm: [run(arm, seed, value) for seed, value in enumerate(values)]
            for arm, values in accuracies.items()
        }
        return replace(study, runs=runs, baseline=next(iter(runs)))

    return made
