"""The audit of a run: it stays below true claims, and contradicts one without noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from fedkd.training.private import PrivateCall
from sim.commands.cli import app
from sim.commands.privacy import privacy as outlook
from sim.commands.running import load_data, run
from sim.engine.runtime import build_strategy, federation_of
from sim.reports.html import write_report
from sim.reports.html.protection import audits_of
from sim.reports.runs import load_run
from sim.reports.tables import audit_text
from sim.server.audit import audit_told, audited
from sim.server.observers import Observer
from sim.settings import SettingsError, load_settings

AUDIT = ("privacy.audit.canaries=40", "privacy.audit.client=1", "data.partition={kind: iid}")
DP_SGD = ("privacy.mechanism=dp_sgd", "privacy.epsilon=4")
ALONE = (
    "strategy.name=local",
    "rounds=1",
    "clients.count=1",
    "clients.models=[{name: mlp, options: {hidden: [256]}}]",
    "clients.optimizer={name: adam, lr: 0.01}",
    "clients.batch_size=200",
    "clients.local.epochs=100",
    "data.public.size=0",
    "data.validation_fraction=0.02",
    "data.test_fraction=0.1",
    "engine.backend=inline",
    "privacy.audit.canaries=1000",
)
"""One client with most of the rows, of which 1000 are canaries."""


@pytest.fixture
def alone(tmp_path):
    """Make settings of a run on rows without any pattern, which can only be known by heart."""
    rng = np.random.default_rng(0)
    lines = [",".join([*(f"f{place}" for place in range(100)), "label"])]
    for row, label in zip(rng.normal(size=(1300, 100)), rng.integers(0, 10, 1300), strict=True):
        lines.append(",".join([*(f"{number:.3f}" for number in row), f"c{label}"]))
    path = tmp_path / "noise.csv"
    path.write_text("\n".join(lines) + "\n")
    fixed = (*ALONE, *DP_SGD, f"data.source={path}", f"output={tmp_path}")
    return lambda *words: load_settings(None, [*fixed, *words])


def test_the_bound_is_in_the_result_beside_the_claim(small):
    done = run(small(*AUDIT, *DP_SGD))
    told = json.loads((done.folder / "result.json").read_text())["privacy"]
    audit = told["audit"]
    assert (audit["client"], audit["canaries"], audit["confidence"]) == (1, 40, 0.95)
    assert 0 <= audit["right"] <= audit["guesses"] <= 40
    assert audit["claimed"] == told["clients"]["1"]
    assert audit["contradicted"] is False
    assert 0 <= audit["epsilon_lower"] < 3 < audit["claimed"] <= 4
    assert done.privacy["audit"] == audit
    assert run(resume=done.folder).privacy["audit"] == audit
    (sentence,) = audits_of({"dp": [load_run(done.folder)]})
    assert "audit of client 1" in sentence
    assert "claimed 4" in sentence


def test_without_a_claim_the_audit_says_what_it_finds(small):
    done = run(small(*AUDIT, "strategy.name=local"))
    assert done.privacy.keys() == {"audit"}
    report = write_report({"alone": [load_run(done.folder)]}, done.folder, title="one").read_text()
    assert "guesses right" in report
    assert "nothing was claimed" in report
    assert "Renyi bound" not in report
    assert (done.privacy["audit"]["claimed"], done.privacy["audit"]["contradicted"]) == (
        None,
        False,
    )


def test_of_a_client_that_never_trained_only_chance_can_be_seen(small):
    told = []
    for seed in range(20):
        settings = small(*AUDIT, "clients.models=mlp", f"seed={seed}")
        data = load_data(settings)
        architecture = build_strategy(settings, federation_of(settings, data)).architecture(1)
        spent = {"epsilon": 5.0, "clients": {"0": 5.0, "1": 2.0}}
        told.append(audited(settings, data, architecture, None, spent))
    assert sum(audit["epsilon_lower"] > 0 for audit in told) <= 4  # of 20, one of 20 is expected
    assert {(audit["canaries"], audit["claimed"]) for audit in told} == {(40, 2.0)}


def test_a_client_that_knows_its_rows_by_heart_gives_them_away(small):
    done = run(
        small(*AUDIT, "strategy.name=local", "clients.models=mlp", "clients.local.epochs=60")
    )
    audit = done.privacy["audit"]
    assert audit["right"] / audit["guesses"] > 0.85
    assert audit["epsilon_lower"] > 0.5


class Stopping(Observer):
    """Presses Ctrl-C in the second round."""

    def metrics(self, rows):
        if rows[0]["round"] == 2:
            raise KeyboardInterrupt


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("how", [pytest.param("ray", marks=pytest.mark.slow), "resumed"])
def test_the_bits_depend_on_neither_workers_nor_interruptions(how, small):
    settings = small(*AUDIT, "checkpoints.every=1", "clients.models=mlp")
    whole = run(settings)
    if how == "ray":
        again = run(small(*AUDIT, "clients.models=mlp", "engine.backend=ray"))
    else:
        with pytest.raises(KeyboardInterrupt) as stop:
            run(settings, observers=[Stopping()])
        again = run(resume=stop.value.folder)
    assert again.weights_sha256 == whole.weights_sha256
    assert again.privacy == whole.privacy
    assert whole.privacy["audit"]["right"] > 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "499 of 1,000 guesses right, so epsilon > 4.319 (95%); claimed 4, CONTRADICTED"),
        ({"contradicted": False, "epsilon_lower": 0.0}, "which proves nothing (95%); claimed 4"),
        ({"contradicted": False, "claimed": None}, "4.319 (95%); nothing was claimed"),
    ],
)
def test_what_was_found_in_words(changed, words):
    found = {
        "client": 2,
        "canaries": 1000,
        "guesses": 1000,
        "right": 499,
        "delta": 1e-5,
        "epsilon_lower": 4.319,
        "confidence": 0.95,
        "claimed": 4.0,
        "contradicted": True,
    }
    told = audit_text(found | changed)
    assert told.startswith("audit of client 2: ")
    assert told.endswith(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["privacy.audit.canaries=19"], "must be 0 or at least 20"),
        (["privacy.audit.client=4"], "must be below clients.count"),
        (["privacy.audit.canaries=190"], "canaries must be at most .* rows of client 1"),
        (
            ["strategy.name=fedmd", "privacy.mechanism=gaussian", "privacy.noise=4"],
            "gaussian does not protect",
        ),
        (["adversary={kind: fdla, clients: [1]}"], "is controlled by adversary fdla"),
    ],
)
def test_what_cannot_be_audited_is_refused(words, message, small):
    with pytest.raises(SettingsError, match=message):
        load_data(small(*AUDIT, *words))


def test_nodes_of_flower_keep_their_models(small):
    with pytest.raises(SettingsError, match=r"privacy.audit .* use fedkd run"):
        load_data(small(*AUDIT), nodes=True)


def test_what_can_be_proven_is_said_before(small):
    told = audit_told(small(*AUDIT))
    # sigmoid(epsilon)^40 = 0.05 / 4: 2.156; a little less with delta 1e-5.
    assert "40 of its rows are canaries" in told
    assert "epsilon > 2.15" in told
    assert audit_told(small()) == ""
    assert any("epsilon > 2.15" in each for each in outlook(small(*AUDIT, *DP_SGD)).assumptions)


def test_the_command_says_it_before_and_after(small_words, tmp_path):
    words = [*small_words, *AUDIT, *DP_SGD, f"output={tmp_path}"]
    shown = CliRunner().invoke(app, ["run", *words])
    assert shown.exit_code == 0
    said = " ".join(shown.output.split())
    assert "audit of client 1: 40 of its rows are canaries" in said
    assert "claimed 4" in said


def without_noise(monkeypatch):
    """Plant the bug: the ledger goes on charging for noise that nobody adds."""
    plain = PrivateCall.rule

    def rule(self, asked, key, method):
        made = plain(self, asked, key, method)
        return replace(made, noise_multipliers=tuple(1e-9 for _ in made.noise_multipliers))

    monkeypatch.setattr(PrivateCall, "rule", rule)


@pytest.mark.parametrize("claim", [1, 4])
def test_noise_that_is_only_claimed_is_contradicted(claim, alone, monkeypatch):
    without_noise(monkeypatch)
    audit = run(alone(f"privacy.epsilon={claim}")).privacy["audit"]
    assert audit["claimed"] == pytest.approx(claim, abs=1e-3)
    assert audit["epsilon_lower"] > 4.2
    assert audit["contradicted"] is True


@pytest.mark.parametrize("claim", [1, 4])
def test_noise_that_is_added_is_not_contradicted(claim, alone):
    audit = run(alone(f"privacy.epsilon={claim}")).privacy["audit"]
    assert audit["claimed"] == pytest.approx(claim, abs=1e-3)
    assert audit["epsilon_lower"] < claim / 2
    assert audit["contradicted"] is False
