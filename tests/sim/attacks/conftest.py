"""Runs on digits that know their rows by heart, and attacks on them in a second or two."""

from collections.abc import Callable

import pytest

from sim.attacks import membership
from sim.attacks.evidence import attacked_data, evidence_of
from sim.attacks.scene import Scene
from sim.commands.running import run
from sim.settings import Settings, load_settings

WORDS = (
    "name=attacked",
    "rounds=2",
    "clients.count=4",
    "clients.models=[{name: mlp, options: {hidden: [32]}}]",
    "clients.local.epochs=12",
    "clients.optimizer.lr=0.01",
    "data.public.size=100",
    "data.private_rows=240",
    "data.partition={kind: dirichlet, alpha: 0.5}",
    "engine.backend=inline",
    "evaluation.every=2",
    "seed=7",
    "attacks.controls=16",
    "attacks.shadows=8",
    "attacks.student_epochs=10",
)


@pytest.fixture(scope="session")
def attacked(tmp_path_factory) -> Callable[..., Settings]:
    def settings(*words: str) -> Settings:
        return load_settings(None, [*WORDS, f"output={tmp_path_factory.mktemp('runs')}", *words])

    return settings


@pytest.fixture(scope="session")
def scene_of(attacked) -> Callable[..., Scene]:
    def scene(*words: str) -> Scene:
        settings = attacked("exchange.keep=true", *words)
        result = run(settings)
        data = attacked_data(settings)
        kept = evidence_of(result.folder, settings, data, lambda _: None)
        return Scene(settings, settings.attacks, data, kept, lambda _: None, lambda _, make: make())

    return scene


@pytest.fixture(scope="session")
def alone(scene_of) -> Scene:
    """Mutual learning, shadows that learn alone."""
    return scene_of("attacks.train=models")


@pytest.fixture(scope="session")
def together(scene_of) -> Scene:
    """The same run, shadows in federations."""
    return scene_of("attacks.train=federations")


@pytest.fixture
def short_control(monkeypatch):
    monkeypatch.setattr(membership, "CONTROL_STEPS", 1200)
