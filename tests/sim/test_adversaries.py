"""Adversaries in whole runs: who is controlled, what comes of it, and what is refused before."""

import json
from functools import cache

import numpy as np
import pytest

from fedkd import own_code
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import digest
from sim.commands.overview import data as overview
from sim.commands.running import load_data, run
from sim.contract import sections_of
from sim.contract.toy import ListeningGrid, simulate, toy_data, toy_parts, toy_table
from sim.engine.data import goal_of, poisoned
from sim.keeping.records import read_rows
from sim.server.observers import Observer
from sim.server.replies import QuorumError
from sim.settings import SettingsError, load_settings, merge_tables, settings_from_table
from sim.wire.messages import read_reply
from strategies import STRATEGIES

ALONE = [
    {"kind": "sign_flip", "mode": "naive"},
    {"kind": "sign_flip", "mode": "fixed"},
    {"kind": "fdla"},
    {"kind": "scaled", "factor": -2},
    {"kind": "shuffled", "what": "rows"},
    {"kind": "shuffled", "what": "classes"},
    {"kind": "free_rider"},
]
TOGETHER = [
    {"kind": "sign_flip", "mode": "adversarial"},
    {"kind": "lma"},
    {"kind": "cpa"},
    {"kind": "hips", "mode": "lma"},
    {"kind": "hips", "mode": "cpa"},
]
OF_PUBLIC_ROWS = (
    *("cfd", "codistillation", "comet", "cronus", "dml", "dsfl", "fccl", "fedgems", "fedmd"),
    *("kdcl", "ktpfl", "okddip", "one", "pcl", "rhfl", "scarlet", "selective_fd"),
)
"""Algorithms whose clients send predictions of public rows."""


def attacked(strategy, adversary, **sections):
    """Return settings and data of a toy run with an adversary."""
    needs = sections_of(STRATEGIES[strategy].card.needs)
    labelled = bool(needs.get("data", {}).get("public", {}).get("labelled"))
    table = merge_tables(toy_table(strategy), needs)
    settings = settings_from_table(merge_tables(table, {"adversary": adversary, **sections}))
    return settings, poisoned(toy_data(labelled=labelled), settings)


@cache
def honest_run(strategy):
    return simulate(*attacked(strategy, {"kind": "none"}, rounds=2))


def shown(run):
    """What an upload can change: clients, what they were taught, and how they disagreed."""
    return run.digest, [
        (row["target_entropy"], row["peer_disagreement"]) for row in run.history.federation
    ]


# -- every kind with every algorithm -------------------------------------------------------------


def test_the_list_of_algorithms_is_whole():
    found = set()
    for name in STRATEGIES:
        settings, data = attacked(name, {"kind": "none"})
        strategy, server = toy_parts(settings, data)
        asked = strategy.asks(strategy.begin(server), 0, strategy.federation.round(1), server)
        kinds = [] if asked is None else [asked.kind, *(part.kind for part in asked.parts.values())]
        if Predictions in kinds:
            found.add(name)
    assert found == set(OF_PUBLIC_ROWS)


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([ALONE[0], TOGETHER[1]], id="two"),
        pytest.param(ALONE, id="alone", marks=pytest.mark.slow),
        pytest.param(TOGETHER, id="together", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("strategy", OF_PUBLIC_ROWS)
def test_every_lie_passes_and_changes_something(strategy, kinds):
    honest = honest_run(strategy)
    for kind in kinds:
        settings, data = attacked(strategy, {**kind, "clients": [1, 2]}, rounds=2)
        strategy_made, _ = toy_parts(settings, data)
        up, down = strategy_made.up, strategy_made.down
        settings.stages.check(up=up, down=down, sums=strategy_made.sums)
        run = simulate(settings, data)
        assert run.events == [], kind
        assert shown(run) != shown(honest), kind
        assert [row["bytes"] for row in run.exchange if row["round"] == 1] == [
            row["bytes"] for row in honest.exchange if row["round"] == 1
        ]
        assert [row["replies"] for row in run.history.federation] == [4, 4]


@pytest.mark.parametrize("kind", [{"kind": "lma"}, {"kind": "fdla"}])
def test_nobody_controlled_is_nobody_there(kind):
    run = simulate(*attacked("dsfl", {**kind, "fraction": 0.2}, rounds=2))
    assert run.digest == honest_run("dsfl").digest
    for row in run.history.federation:
        assert row["honest_accuracy"] == row["accuracy"]
    assert "honest_accuracy" not in honest_run("dsfl").history.federation[-1]


def test_before_its_first_round_an_adversary_is_honest():
    later = {"kind": "lma", "clients": [0], "from_round": 3}
    run = simulate(*attacked("dsfl", later, rounds=2))
    assert run.digest == honest_run("dsfl").digest
    now = simulate(*attacked("dsfl", {**later, "from_round": 2}, rounds=2))
    first, last = now.history.federation
    honest_first, honest_last = honest_run("dsfl").history.federation
    assert first["peer_disagreement"] == honest_first["peer_disagreement"]
    assert last["peer_disagreement"] != honest_last["peer_disagreement"]


# -- the seat at the server ----------------------------------------------------------------------


def test_the_server_is_told_what_the_adversary_makes_of_honest_answers():
    settings, data = attacked("dsfl", {"kind": "lma", "clients": [0, 2]}, rounds=1)
    grid = ListeningGrid(settings, data)
    run = simulate(settings, data, grid)
    honest = simulate(*attacked("dsfl", {"kind": "none"}, rounds=1), ListeningGrid(settings, data))
    # What travelled is honest: the lie is made where all answers are.
    assert [row["bytes"] for row in run.exchange] == [row["bytes"] for row in honest.exchange]
    sent = {client: read_reply(m.content).payload for client, m in grid.replies["train"][0].items()}
    mean = (sent[1].values.astype(np.float64) + sent[3].values) / 2
    least = np.eye(3)[mean.argmin(1)]
    told = (2 * least + sent[1].values + sent[3].values) / 4
    (lesson,) = {digest(piece): piece for piece in _pieces(run)}.values()
    sharp = np.exp((told - told.max(1, keepdims=True)) / 0.1)
    np.testing.assert_allclose(lesson.values, sharp / sharp.sum(1, keepdims=True), atol=1e-5)


def _pieces(run):
    """Yield what clients are taught after the last round."""
    loop = run.loop
    strategy, state = loop._strategy, loop.boundary.state
    for client in range(4):
        key = strategy.receives(state, client, strategy.federation.round(1))
        yield strategy.payload(state, key)


@pytest.mark.parametrize("below", ["skip", "retry"])
def test_a_lie_that_is_no_answer_is_left_out_like_any_bad_reply(below):
    name = "own_adversaries:Careless"
    with own_code.asking(lambda _: True):
        settings, data = attacked(
            "dsfl",
            {"kind": name, "clients": [1]},
            rounds=1,
            engine={"backend": "inline", "below_quorum": below, "quorum": 0.75},
        )
    run = simulate(settings, data)
    assert [(event["client"], event["event"], event["reason"]) for event in run.events] == [
        (1, "rejected", "NaN or infinity among the scores")
    ]
    assert run.history.federation[0]["replies"] == 3


def test_lies_that_leave_too_few_answers_are_asked_for_again():
    with own_code.asking(lambda _: True):
        settings, data = attacked(
            "dsfl", {"kind": "own_adversaries:Careless", "clients": [1, 2]}, rounds=1
        )
    engine = settings.engine.model_copy(update={"quorum": 0.75})
    settings = settings.model_copy(update={"engine": engine})
    with pytest.raises(QuorumError, match="2 of 4 clients gave a usable answer"):
        simulate(settings, data)


def test_disagreement_is_that_of_what_the_server_sees():
    """A copycat agrees with whom it copies."""
    with own_code.asking(lambda _: True):
        settings, data = attacked(
            "dsfl", {"kind": "own_adversaries:Copycat", "clients": [1, 2, 3]}, rounds=1
        )
    assert simulate(settings, data).history.federation[0]["peer_disagreement"] == 0
    assert honest_run("dsfl").history.federation[0]["peer_disagreement"] > 0


@pytest.mark.parametrize(
    "sections",
    [
        {"exchange": {"up": "one_bit"}},
        {"exchange": {"up": "cfd_delta", "down": "int8"}},
        {"exchange": {"budget_kb": 3}},
        {"exchange": {"view": "sum"}},
        {"privacy": {"mechanism": "dp_sgd", "noise": 1}},
        {"clients": {"participation": 0.5}},
    ],
    ids=str,
)
def test_lies_pass_whatever_else_happens_to_answers(sections):
    strategy = "dsfl" if "cfd" in str(sections) or "bit" in str(sections) else "fedmd"
    one_model = {"clients": {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}}
    sections = merge_tables(merge_tables({"rounds": 3}, one_model), sections)
    honest = simulate(*attacked(strategy, {"kind": "none"}, **sections))
    for kind in ("lma", "fdla"):
        run = simulate(*attacked(strategy, {"kind": kind, "clients": [1, 2]}, **sections))
        assert run.events == []
        assert shown(run) != shown(honest)
        totals = [sum(row["bytes"] for row in each.exchange) for each in (run, honest)]
        # Of cfd_delta bytes depend on what changed, which lies and lessons made of them decide.
        assert totals[0] == totals[1] or "cfd_delta" in str(sections)


@pytest.mark.parametrize("kind", ["lma", "shuffled"])
def test_numbers_do_not_depend_on_cohorts(kind):
    runs = [
        simulate(
            *attacked(
                "dsfl",
                {"kind": kind, "fraction": 0.5},
                rounds=2,
                clients={"models": [{"name": "mlp", "options": {"hidden": [8]}}]},
                engine={"backend": "inline", "cohort_size": size, "vectorize": "loop"},
            )
        )
        for size in (1, 3)
    ]
    assert runs[0].digest == runs[1].digest
    assert runs[0].digest != honest_run("dsfl").digest


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_and_inline_and_a_resumed_run_end_with_the_same_bits(small):
    from sim.engine.session import RaySession
    from sim.settings import EngineSettings

    class Stopping(Observer):
        def metrics(self, rows):
            if rows[0]["round"] == 2:
                raise KeyboardInterrupt

    with RaySession(EngineSettings()) as session:
        for kind in ("lma", "free_rider"):
            words = (
                f"adversary={{kind: {kind}, fraction: 0.4}}",
                *("strategy.name=dsfl", "clients.count=6", "rounds=3", "engine.cohort_size=2"),
            )
            inline = run(small(*words))
            by_ray = run(small(*words, "engine.backend=ray"), session=session)
            assert by_ray.weights_sha256 == inline.weights_sha256
            with pytest.raises(KeyboardInterrupt) as stop:
                run(small(*words, "checkpoints.every=1"), observers=[Stopping()])
            assert run(resume=stop.value.folder).weights_sha256 == inline.weights_sha256


# -- what a run says -----------------------------------------------------------------------------


def test_a_run_says_who_was_controlled_and_how_the_honest_fare(small):
    lma = "adversary={kind: lma, fraction: 0.5}"
    result = run(small("strategy.name=dsfl", lma))
    row = json.loads((result.folder / "result.json").read_text())
    controlled = row["adversary"].pop("controlled")
    assert row["adversary"] == {"kind": "lma", "seat": "server"}
    assert len(controlled) == 2
    rows = read_rows(result.folder / "metrics.jsonl")
    accuracies = {
        r["client"]: r["accuracy"] for r in rows if r["scope"] == "client" and r["round"] == 2
    }
    honest = [value for client, value in accuracies.items() if client not in controlled]
    assert len(honest) == 2
    assert row["last"]["honest_accuracy"] == pytest.approx(np.mean(honest))
    # Paired: arms of one seed have the same clients.
    for kind in ("fdla", "label_flip"):
        other = small("strategy.name=fedmd", f"adversary={{kind: {kind}, fraction: 0.5}}")
        assert sorted(other.stages.controlled) == controlled


def test_the_first_line_of_a_run_says_it(small, capsys):
    from rich.console import Console

    from sim.commands.progress import Lines, ProgressObserver

    settings = small("adversary={kind: hips, clients: [3, 1]}")
    with Lines(Console(stderr=True, width=200), "rounds") as signs:
        ProgressObserver(signs, "mine").started(settings, load_data(settings))
    assert "mine: adversary hips controls 2 of 4 clients: 1, 3" in capsys.readouterr().err


# -- private rows --------------------------------------------------------------------------------


def test_flipped_labels_are_those_of_the_controlled_clients_alone(small):
    settings = small("adversary={kind: label_flip, clients: [1, 3], share: 0.5}")
    clean, dirty = load_data(small()), load_data(settings)
    changed = np.flatnonzero(clean.train_labels != dirty.train_labels)
    for client, rows in enumerate(clean.client_rows):
        own = np.intersect1d(changed, rows)
        assert len(own) == (len(rows) // 2 if client in (1, 3) else 0)
        np.testing.assert_array_equal(dirty.train_labels[own], 9 - clean.train_labels[own])
    np.testing.assert_array_equal(dirty.wrong_labels.rows, changed)
    np.testing.assert_array_equal(dirty.wrong_labels.true_labels, clean.train_labels[changed])
    for name in (
        "train_inputs",
        "public_inputs",
        "test_labels",
        "test_inputs",
        "validation_labels",
    ):
        np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name))
    told = overview(settings)
    note = f"adversary label_flip: {len(changed)} of "
    assert any(text.startswith(note) and "clients 1, 3 are changed" in text for text in told.notes)
    assert [row["wrong_labels"] > 0 for row in told.rows] == [False, True, False, True]


def test_one_class_becomes_another(small):
    settings = small("adversary={kind: label_flip, clients: [0], source: 3, target: 8}")
    clean, dirty = load_data(small()), load_data(settings)
    own = clean.client_rows[0]
    before, after = clean.train_labels[own], dirty.train_labels[own]
    assert (before == 3).any()
    assert (after[before == 3] == 8).all()
    assert (after == before)[before != 3].all()
    goal = goal_of(dirty, settings)
    assert len(goal.inputs) == (clean.test_labels == 3).sum()
    scores = np.eye(10)[np.where(np.arange(len(goal.inputs)) % 4 == 0, 8, 3)]
    assert goal.success(scores) == pytest.approx(np.ceil(len(goal.inputs) / 4) / len(goal.inputs))


def test_labels_that_were_wrong_before_keep_what_they_truly_are(small):
    noise = "data.label_noise.rate=0.5"
    clean, noisy = load_data(small()), load_data(small(noise))
    both = load_data(small(noise, "adversary={kind: label_flip, clients: [0]}"))
    true = both.train_labels.copy()
    true[both.wrong_labels.rows] = both.wrong_labels.true_labels
    np.testing.assert_array_equal(true, clean.train_labels)
    assert (both.train_labels != noisy.train_labels).sum() == len(clean.client_rows[0])


@pytest.mark.parametrize("corner", ["top_left", "bottom_right"])
def test_a_trigger_is_a_bright_square_in_a_corner_of_some_pictures(small, corner):
    words = f"adversary={{kind: backdoor, clients: [2], size: 2, target: 7, corner: {corner}}}"
    settings = small(words)
    clean, dirty = load_data(small()), load_data(settings)
    moved = np.flatnonzero((clean.train_inputs != dirty.train_inputs).any((1, 2, 3)))
    own = clean.client_rows[2]
    assert set(moved) <= set(own)
    assert (dirty.train_labels[moved] == 7).all()
    assert len(moved) == len(own) // 2
    place = (slice(2), slice(2)) if corner == "top_left" else (slice(6, 8), slice(6, 8))
    pixels = dirty.train_inputs * clean.channel_std[0] + clean.channel_mean[0]
    assert pixels[moved][:, :, *place] == pytest.approx(np.ones((len(moved), 1, 2, 2)), abs=1e-6)
    rest = dirty.train_inputs[moved].copy()
    rest[:, :, *place] = clean.train_inputs[moved][:, :, *place]
    np.testing.assert_array_equal(rest, clean.train_inputs[moved])
    goal = goal_of(dirty, settings)
    assert len(goal.inputs) == (clean.test_labels != 7).sum()
    shown = goal.inputs * clean.channel_std[0] + clean.channel_mean[0]
    assert shown[:, :, *place] == pytest.approx(np.ones((len(shown), 1, 2, 2)), abs=1e-6)
    np.testing.assert_array_equal(load_data(settings).train_inputs, dirty.train_inputs)


LEARNING = (
    *("rounds=2", "clients.models=[mlp]", "clients.local.epochs=8", "data.private_rows=500"),
    *("data.partition.kind=iid", "strategy.name=fedavg"),
)


def test_a_backdoor_makes_honest_models_say_its_class(small):
    words = "kind: backdoor, target: 3, size: 3"
    closed = run(small(*LEARNING, f"adversary={{{words}, fraction: 0}}"))
    opened = run(small(*LEARNING, f"adversary={{{words}, fraction: 0.5}}"))
    before, after = (each.history.federation[-1] for each in (closed, opened))
    assert before["attack_success"] < 0.3
    assert after["attack_success"] > before["attack_success"] + 0.4
    assert after["honest_accuracy"] > 0.6
    rows = [r for r in read_rows(opened.folder / "metrics.jsonl") if r["scope"] == "client"]
    controlled = opened.to_row()["adversary"]["controlled"]
    last = [r["attack_success"] for r in rows if r["round"] == 2 and r["client"] not in controlled]
    assert after["attack_success"] == pytest.approx(np.mean(last))


def test_a_server_s_model_is_asked_as_well(small):
    adversary = "adversary={kind: label_flip, clients: [0], source: 3, target: 8}"
    model = "strategy.server_model=mlp"
    result = run(small("strategy.name=dsfl", model, adversary))
    server = result.to_row()["server"]
    assert 0 <= server["attack_success"] <= 1
    last = result.history.federation[-1]
    assert last["server_attack_success"] == server["attack_success"]


# -- refused before ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("strategy.name=fedavg", "adversary={kind: lma, fraction: 0.5}"),
            "adversary lma: it has nothing to lie about in weights; use an algorithm that sends "
            "predictions or class_table",
        ),
        (
            ("strategy.name=local", "adversary={kind: scaled, fraction: 0.5}"),
            "adversary scaled: clients send nothing that it could replace",
        ),
        (("adversary={kind: lma, clients: [4]}",), r"below clients.count \(4\), got 4"),
        (("adversary={kind: lma, clients: [0, 1, 2, 3]}",), "leave an honest client"),
        (("adversary=lma",), "lma: needs either fraction .* or clients"),
        (
            ("adversary={kind: backdoor, fraction: 0.5, size: 8}",),
            r"adversary.size must be less than a picture's smaller side \(8 pixels\), got 8",
        ),
        (
            ("adversary={kind: backdoor, fraction: 0.5, target: 10}",),
            "adversary.target must be a class of private rows, 0 to 9, got 10",
        ),
        (
            ("adversary={kind: label_flip, fraction: 0.5, source: 1}",),
            "needs both source and target, or neither",
        ),
        (
            ("adversary={kind: label_flip, fraction: 0.5, source: 1, target: 1}",),
            "source and target must differ",
        ),
        (
            (
                *("strategy.name=fedmd", "privacy.mechanism=gaussian", "privacy.noise=1"),
                *("privacy.where=server", "adversary={kind: lma, fraction: 0.5}"),
            ),
            "made of answers of others before they are protected",
        ),
    ],
)
def test_what_cannot_work_is_named_before_the_run(small, words, told):
    with pytest.raises(SettingsError, match=told):
        load_data(small(*words))


def test_a_backdoor_needs_pictures(on_wards, small_words):
    words = [*small_words, *on_wards, "data.private_rows=120", "data.public.size=40"]
    backdoor = "adversary={kind: backdoor, fraction: 0.5}"
    with pytest.raises(SettingsError, match=r"puts a square into pictures, and .* has features"):
        load_data(load_settings(None, [*words, "engine.backend=inline", backdoor]))
