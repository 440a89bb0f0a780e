"""What would break a promise is refused before the run, and what is promised is kept in a run."""

from collections import Counter
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pytest

from fedkd.exchange.adversaries import NoAdversary
from fedkd.exchange.release import ReleaseRule
from fedkd.exchange.spending import spent_by_client
from fedkd.privacy import Gaussian, spent
from sim.commands.privacy import privacy as outlook
from sim.commands.running import load_data
from sim.contract import sections_of
from sim.contract.toy import (
    ListeningGrid,
    losing,
    simulate,
    toy_data,
    toy_parts,
    toy_table,
)
from sim.engine.inline import InlineGrid
from sim.server.privacy import PrivacyPlan, check_privacy, unsound
from sim.server.rounds import RoundLoop
from sim.server.validation import AuthorError
from sim.settings import SettingsError, load_settings, merge_tables, settings_from_table
from sim.wire.messages import read_reply
from strategies import STRATEGIES
from strategies.contract import PrivateUse

MLP = [{"name": "mlp", "options": {"hidden": [8]}}]
DP_SGD = {"mechanism": "dp_sgd", "noise": 1.0}
GAUSSIAN = {"mechanism": "gaussian", "noise": 0.5}
AT_SERVER = {**GAUSSIAN, "where": "server"}
VOTES = {"mechanism": "votes", "noise": 1.0, "where": "server"}
ANSWERS = {"mechanism": "randomized_response", "noise": 1.0}


def parts_of(strategy, privacy, *, options=None, **sections):
    """Return settings, an algorithm and its data; sections that its card asks for are filled in."""
    needs = sections_of(STRATEGIES[strategy].card.needs)
    labelled = bool(needs.get("data", {}).get("public", {}).get("labelled"))
    table = toy_table(strategy, options=options)
    for more in (needs, sections, {"privacy": privacy}):
        table = merge_tables(table, more)
    settings = settings_from_table(table)
    data = toy_data(labelled=labelled)
    return settings, toy_parts(settings, data)[0], data


def reason(strategy, privacy, **options):
    settings, made, _ = parts_of(strategy, privacy, options=options)
    return unsound(made, settings.privacy.mechanism, settings.privacy.where)


def check(strategy, privacy, **sections):
    settings, made, data = parts_of(strategy, privacy, **sections)
    check_privacy(settings, made, data, nodes=False)
    settings.stages.check(up=made.up, down=made.down, sums=made.sums)


# -- refusals ------------------------------------------------------------------------------------

EQUAL = {"weighting": "equal"}


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("fml", EQUAL, "private model, which is not protected, teaches the one that travels"),
        ("proxyfl", {}, "private model, which is not protected, teaches the one that travels"),
        ("fedkd", EQUAL, "a mentor, which is not protected, teaches the mentee"),
        ("fd", {}, "clients also send means of what a model says of the private rows"),
        ("feddistill_plus", EQUAL, "clients also send mean logits of the private rows"),
        ("fedproto", {}, "clients also send mean features of the private rows"),
        ("fedtgp", {}, "clients also send mean features of the private rows"),
        ("fedgen", EQUAL, "clients also send how many private rows of each class"),
        ("fedgkt", {}, "clients also send features, logits and labels of private rows"),
        ("rhfl", {}, "clients also send the loss on private rows"),
        ("selective_fd", {}, "clients also send which public rows are near to private ones"),
    ],
)
def test_what_is_made_of_private_rows_past_dp_sgd_is_refused(strategy, options, words):
    told = reason(strategy, DP_SGD, **options)
    assert words in told
    assert "such as dml" in told


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "feddf", "fedkd", "fedgen"])
@pytest.mark.parametrize("privacy", [DP_SGD, GAUSSIAN, AT_SERVER])
def test_weights_by_private_counts_are_refused(strategy, privacy):
    told = reason(strategy, privacy)
    assert "weighs clients by how many private rows they have" in told
    assert "strategy.weighting: equal" in told


def test_equal_weights_are_taken():
    assert reason("fedavg", DP_SGD, **EQUAL) is None
    assert "strategy.weighting: count" in reason("fd", GAUSSIAN, weighting="count")


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("feddf", EQUAL, "how long students learn is chosen by validation rows"),
        ("fedgkd", {**EQUAL, "teacher": "vote"}, "how much each past model counts is chosen by"),
    ],
)
def test_what_validation_rows_choose_is_refused(strategy, options, words):
    assert words in reason(strategy, DP_SGD, **options)


@pytest.mark.parametrize("privacy", [DP_SGD, GAUSSIAN, AT_SERVER])
def test_rows_of_several_clients_in_one_place_are_refused(privacy):
    assert "one client learns from the rows of all" in reason("pooled", privacy)
    for rows in ("pooled", "largest_client"):
        told = reason("one_way", privacy, teacher_data=rows)
        assert "the teacher learns from private rows at the server" in told
        assert "strategy.teacher_data: public" in told


def test_a_teacher_of_public_rows_is_taken():
    assert reason("one_way", DP_SGD, direction="clients_to_server") is None


@pytest.mark.parametrize("strategy", ["fedmd", "dml"])
@pytest.mark.parametrize("privacy", [DP_SGD, GAUSSIAN])
def test_a_round_or_models_chosen_by_validation_rows_are_refused(strategy, privacy):
    with pytest.raises(ValueError, match=r"^keep_models: best chooses by validation rows"):
        check(strategy, privacy, keep_models="best")
    with pytest.raises(ValueError, match=r"^keep_round: selected chooses by validation rows"):
        check(strategy, privacy, keep_round="selected")


def test_batch_norm_is_refused_and_group_norm_is_what_to_use():
    norm = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}
    with pytest.raises(ValueError, match=r"BatchNorm2d, which mixes the rows.*{norm: group}"):
        check("dml", DP_SGD, clients={"models": [*MLP, norm]})
    group = {"name": "cnn", "options": {"channels": [8], "norm": "group"}}
    check("dml", DP_SGD, clients={"models": [*MLP, group]})
    # It is learning that it breaks, not noise on what is sent.
    check("dml", GAUSSIAN, clients={"models": [norm]})


def test_terms_that_compare_rows_are_refused():
    options = {"objective": {"ce": 1.0, "dist": 1.0}}
    with pytest.raises(ValueError, match="no row has a gradient of its own; use terms of each row"):
        check("dml", DP_SGD, options=options)


@pytest.mark.parametrize("codec", [{"kind": "top_k", "k": 2}, {"kind": "hard_label"}])
@pytest.mark.parametrize("privacy", [GAUSSIAN, {**GAUSSIAN, "mechanism": "laplace"}])
def test_codecs_that_cannot_write_noise_are_refused_behind_it(codec, privacy):
    with pytest.raises(ValueError, match=rf"^exchange.up {codec['kind']}: it cannot write what"):
        check("dml", privacy, exchange={"up": codec})


@pytest.mark.parametrize("privacy", [GAUSSIAN, {**GAUSSIAN, "mechanism": "laplace"}, ANSWERS])
def test_a_byte_budget_whose_codecs_cannot_write_noise_is_refused(privacy):
    words = rf"^exchange.budget_kb 100 may choose .* {privacy['mechanism']} releases; leave the"
    with pytest.raises(ValueError, match=words):
        check("fedmd", privacy, exchange={"budget_kb": 100})
    # What a protected model says are predictions like others, and a trusted server adds its noise
    # to what it has decoded.
    check("fedmd", DP_SGD, exchange={"budget_kb": 100})
    check("fedmd", AT_SERVER, exchange={"budget_kb": 100})


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("dml", {}),
        ("dml", {"peers": "ring", "average": "logit"}),
        ("dml", {"average": "logit", "include_self": True}),
        ("ktpfl", {}),
        ("codistillation", {}),
    ],
)
@pytest.mark.parametrize("privacy", [AT_SERVER, VOTES])
def test_who_needs_each_answer_is_refused_at_a_trusted_server(strategy, options, privacy):
    told = reason(strategy, privacy, **options)
    assert "this algorithm needs each of them; use privacy.where: client" in told


def test_means_of_all_others_have_noise_and_no_votes():
    assert reason("dml", AT_SERVER, average="logit") is None
    assert "each client gets a mean of its own" in reason("dml", VOTES, average="logit")


def test_a_mechanism_refuses_what_it_cannot_bound_and_the_wrong_place():
    assert "got weights, of which nothing bounds" in reason("fedavg", GAUSSIAN, **EQUAL)
    assert "nothing that clients send is released" in reason("local", GAUSSIAN)
    assert "privacy.where: client" in reason("dml", {**DP_SGD, "where": "server"})
    assert "privacy.where: server" in reason("fedmd", {**VOTES, "where": "client"})


def test_a_budget_without_a_mechanism_is_refused():
    with pytest.raises(ValueError, match=r"^privacy.budget 4 needs a mechanism"):
        check("dml", {"budget": 4.0})


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"below_quorum": "skip"}},
        {"clock": {"speed": 1.0, "deadline_s": 5.0}},
    ],
)
def test_clients_that_may_be_new_twice_are_refused_where_being_new_costs_more(sections):
    transfer = {"private_transfer_epochs": 1}
    with pytest.raises(ValueError, match="would train so again without being charged"):
        check("fedmd", DP_SGD, options=transfer, **sections)
    check("fedmd", DP_SGD, options=transfer)
    check("fedmd", DP_SGD, **sections)
    # Noise on what is sent costs the same, whoever is new.
    check("fedmd", GAUSSIAN, options=transfer, **sections)


def test_refusals_come_from_loading_data_and_name_the_setting():
    table = merge_tables(toy_table("fml", options=EQUAL), {"privacy": DP_SGD})
    with pytest.raises(SettingsError, match=r"^privacy.mechanism dp_sgd with strategy fml: "):
        load_data(settings_from_table(table))


# -- what an algorithm says of itself is true ------------------------------------------------------

FAST = ("dml", "fedmd", "fedavg", "fedproto", "kdcl")
EVERY = [
    pytest.param(
        strategy,
        privacy,
        marks=[pytest.mark.slow] * (strategy not in FAST),
        id=f"{strategy}-{privacy['mechanism']}-{privacy.get('where', 'client')}",
    )
    for strategy in STRATEGIES
    for privacy in (DP_SGD, GAUSSIAN, AT_SERVER)
]


@pytest.mark.parametrize(("strategy", "privacy"), EVERY)
def test_every_algorithm_is_refused_with_a_remedy_or_runs_and_is_charged(strategy, privacy):
    settings, made, data = parts_of(strategy, privacy, rounds=1)
    if "strategy.weighting: equal" in (unsound(made, settings.privacy.mechanism, "client") or ""):
        settings, made, data = parts_of(strategy, privacy, options=EQUAL, rounds=1)
    told = unsound(made, settings.privacy.mechanism, settings.privacy.where)
    if told is not None:
        assert "use " in told
        return
    check_privacy(settings, made, data, nodes=False)
    if strategy == "selective_fd":
        # What is asked for is known when the run begins; nothing has left by then.
        with pytest.raises(SettingsError, match="which public rows a client sends says something"):
            simulate(settings, data)
        return
    run = simulate(settings, data)
    assert not [row for row in run.events if row["event"] == "rejected"], "refused while it ran"
    charged = sorted(client for row in run.charges for client in row["clients"])
    assert charged == [0, 1, 2, 3]
    if privacy is DP_SGD:
        plan = PrivacyPlan(settings, made)
        paid = {c: row["figures"]["count"] for row in run.charges for c in row["clients"]}
        assert paid == {c: plan.learning(c, first=True).steps for c in range(4)}


@pytest.mark.parametrize("strategy", ["fml", "proxyfl", "fedkd", "fd", "fedproto", "rhfl"])
def test_an_algorithm_that_lied_would_be_refused_when_it_learns(strategy, monkeypatch):
    """The second lock, for algorithms of one's own: what is not told fails, and nothing leaves."""
    monkeypatch.setattr(STRATEGIES[strategy], "private_use", PrivateUse())
    settings, made, data = parts_of(strategy, DP_SGD, rounds=1)
    assert unsound(made, settings.privacy.mechanism, "client") is None
    with pytest.raises(AuthorError, match="PrivacyError: "):
        simulate(settings, data)


# -- means of all others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options"), [("dml", {"average": "logit", "kd_weight": 1.0}), ("fd", {})]
)
def test_clients_that_compare_what_they_were_sent_cannot_take_the_noise_off(strategy, options):
    """Who took part has a mean of the others, who did not that of all: of one noisy sum.

    Were the second one a plain mean of the protected answers, the two would have different
    multiples of one noise, and together would give the exact sum away.
    """
    settings, made, data = parts_of(
        strategy, AT_SERVER, options=options, rounds=1, clients={"participants": 3}
    )
    grid = ListeningGrid(settings, data)
    state = simulate(settings, data, grid).loop.boundary.state
    rule = settings.privacy.mechanism
    answers = {
        client: rule.bounded(read_reply(reply.content).payload).values.astype(np.float64)
        for client, reply in grid.replies["train"][0].items()
    }
    (away,) = set(range(4)) - set(answers)
    following = made.federation.round(2)

    def told(client):
        return made.payload(state, made.receives(state, client, following)).values

    noisy_sum = 3 * told(away).astype(np.float64)
    for client, own in answers.items():
        of_others = (noisy_sum - own) / 2
        if strategy == "fd":
            of_others = np.maximum(of_others, 0)
        np.testing.assert_allclose(told(client), of_others, atol=1e-4)
    assert np.abs(noisy_sum - sum(answers.values())).mean() > 0.5


# -- what is spent -------------------------------------------------------------------------------

GAUSSIAN_2 = {"mechanism": "gaussian", "noise": 2.0}


def epsilon_of(rounds):
    """Return what so many releases of `GAUSSIAN_2` cost a client."""
    return spent([Gaussian(rounds, 2.0)], delta=1e-5).epsilon


def limited(budget, *, rounds=4, change=None, **sections):
    """Run `fedmd` with noise of every client and a budget; return the run and its grid."""
    settings, _, data = parts_of(
        "fedmd",
        {**GAUSSIAN_2, "budget": budget, **sections.pop("privacy", {})},
        **sections,
        rounds=rounds,
    )
    grid = ListeningGrid(settings, data, change)
    return simulate(settings, data, grid), grid


@pytest.mark.parametrize("where", ["client", "server"])
@pytest.mark.parametrize(("budget", "done"), [(epsilon_of(2), 2), (epsilon_of(3) - 1e-4, 2)])
def test_a_run_ends_before_the_round_that_would_exceed_its_budget(where, budget, done):
    """Also where two rounds take the budget to its last digit."""
    run, grid = limited(budget, privacy={"where": where})
    assert run.loop.boundary.round == done
    (event,) = [row for row in run.events if row["event"] == "privacy budget spent"]
    assert event["round"] == done
    assert f"round {done + 1} would bring client 0 to epsilon" in event["reason"]
    assert f"privacy.budget is {budget:g}" in event["reason"]
    assert len(grid.told["train"]) == done
    assert [row["round"] for row in run.charges] == [1, 2]
    by_client = spent_by_client(run.loop.boundary.exchange.ledger, delta=1e-5)
    for own in by_client.values():
        assert own.epsilon == pytest.approx(epsilon_of(done))
        assert own.epsilon <= budget * (1 + 1e-9)
    assert list(by_client) == [0, 1, 2, 3]


def test_a_budget_below_one_round_is_refused_before_anything_leaves():
    with pytest.raises(SettingsError, match=r"^privacy.budget: round 1 would bring client 0"):
        limited(epsilon_of(1) - 1e-4)


@pytest.mark.parametrize(
    ("strategy", "privacy"),
    [
        ("dml", {"mechanism": "gaussian", "epsilon": 4.0}),
        pytest.param("fedmd", {"mechanism": "laplace", "epsilon": 4.0}, marks=pytest.mark.slow),
        ("fedmd", {"mechanism": "gaussian", "epsilon": 4.0, "where": "server"}),
        ("fedmd", {"mechanism": "randomized_response", "epsilon": 4.0}),
        ("fedmd", {"mechanism": "votes", "epsilon": 4.0, "where": "server"}),
        pytest.param("dml", {"mechanism": "dp_sgd", "epsilon": 4.0}, marks=pytest.mark.slow),
    ],
)
def test_noise_for_a_wanted_epsilon_lasts_for_all_rounds_and_spends_it(strategy, privacy):
    settings, _, data = parts_of(strategy, privacy, rounds=3, clients={"models": MLP})
    run = simulate(settings, data)
    assert run.loop.boundary.round == 3
    for own in spent_by_client(run.loop.boundary.exchange.ledger, delta=1e-5).values():
        assert 3.99 < own.epsilon <= 4.0 * (1 + 1e-9)


def test_who_is_asked_again_is_charged_again_and_answers_with_other_noise():
    engine = {"backend": "inline", "quorum": 1.0, "below_quorum": "retry"}
    run, grid = limited(100.0, rounds=1, engine=engine, change=losing([1], "lost"))
    charged = [
        (c, a) for row in run.charges for c, a in zip(row["clients"], row["attempts"], strict=True)
    ]
    assert sorted(charged) == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]
    by_client = spent_by_client(run.loop.boundary.exchange.ledger, delta=1e-5)
    assert by_client[0].epsilon == pytest.approx(epsilon_of(1))
    assert by_client[1].epsilon == pytest.approx(epsilon_of(2))
    assert [sorted(asked) for asked in grid.told["train"]] == [[0, 1, 2, 3], [1]]


def test_an_answer_for_which_there_is_no_room_is_not_asked_for_again():
    engine = {"backend": "inline", "quorum": 1.0, "below_quorum": "retry"}
    run, grid = limited(epsilon_of(1), rounds=2, engine=engine, change=losing([1], "lost"))
    assert [sorted(asked) for asked in grid.told["train"]] == [[0, 1, 2, 3]]
    assert any(
        "another answer of client 1 in round 1" in row.get("reason", "") for row in run.events
    )
    # What the others sent has left, and counts, though nothing was made of it.
    ledger = run.loop.boundary.exchange.ledger
    assert {client for charge in ledger.charges for client in charge.clients} == {0, 1, 2, 3}


def test_who_takes_part_less_often_spends_less():
    run, _ = limited(100.0, rounds=3, clients={"participants": 2})
    by_client = spent_by_client(run.loop.boundary.exchange.ledger, delta=1e-5)
    counts = Counter(client for row in run.charges for client in row["clients"])
    assert sum(counts.values()) == 6
    for client, own in by_client.items():
        assert own.epsilon == pytest.approx(epsilon_of(counts[client]))


# -- what tells of private rows without being sent -----------------------------------------------


def with_odd_row(data, client):
    """Return the data where one row of a client is so large that its loss is beyond any limit."""
    inputs = data.train_inputs.copy()
    inputs[data.client_rows[client][0]] = 3e38
    return replace(data, train_inputs=inputs)


@pytest.mark.parametrize(
    ("strategy", "privacy", "options"),
    [("fedavg", DP_SGD, EQUAL), ("fedmd", GAUSSIAN, {}), ("fedmd", AT_SERVER, {})],
)
def test_whether_an_answer_counts_depends_on_no_private_row(strategy, privacy, options):
    """Nobody's loss leaves them out: who is missing would tell of one row, past all noise."""
    settings, _, data = parts_of(strategy, privacy, options=options, rounds=1)
    run = simulate(settings, with_odd_row(data, 0))
    (round,) = [row for row in run.metrics if row["scope"] == "federation"]
    assert round["replies"] == 4
    assert not [row for row in run.events if row["event"] == "rejected"]
    # The losses of a run that promises nothing are still looked at.
    settings, _, data = parts_of(strategy, {}, options=options, rounds=1)
    assert simulate(settings, with_odd_row(data, 0)).events


@pytest.mark.parametrize("privacy", [AT_SERVER, VOTES])
def test_a_model_that_diverged_is_in_the_mean_of_a_trusted_server(privacy, monkeypatch):
    """Without it the mean would be of fewer, which others would see."""
    settings, made, data = parts_of("fedmd", privacy, rounds=1)
    honest = type(made).client

    def diverged(self, cohort, received, call):
        answers = honest(self, cohort, received, call)
        spoilt = [np.full_like(each.values, np.nan) for each in answers]
        return [
            replace(each, values=odd) if client == 0 else each
            for client, each, odd in zip(cohort.clients, answers, spoilt, strict=True)
        ]

    monkeypatch.setattr(type(made), "client", diverged)
    run = simulate(settings, data)
    (charge,) = run.charges
    assert charge["clients"] == [0, 1, 2, 3]
    assert not [row for row in run.events if row["event"] == "rejected"]


def test_how_long_a_client_takes_does_not_depend_on_the_rows_that_were_drawn():
    """A deadline would tell how many they are, which amplification by sampling takes for secret."""
    seconds = set()
    for seed in (1, 2, 3):
        settings, _, data = parts_of(
            "fedavg", DP_SGD, options=EQUAL, rounds=1, seed=seed, clock={"speed": 1e6}
        )
        run = simulate(settings, data)
        seconds.add(tuple(r["simulated_s"] for r in run.metrics if r["scope"] == "client"))
    assert len(seconds) == 1


def test_models_that_are_kept_are_charged_where_nothing_is_sent():
    assert "privacy.where: client" in reason("local", {**DP_SGD, "where": "server"})
    settings, _, data = parts_of("local", DP_SGD, rounds=1)
    assert simulate(settings, data).loop.spent()["epsilon"] > 1


def test_a_mean_by_private_counts_is_refused_whatever_an_algorithm_says_of_itself(monkeypatch):
    monkeypatch.setattr(STRATEGIES["fedmd"], "sums", "examples")
    monkeypatch.setattr(STRATEGIES["fedmd"], "private_use", PrivateUse())
    assert "its mean weighs clients by how many private rows" in reason("fedmd", AT_SERVER)


def test_a_mechanism_of_ones_own_cannot_say_that_it_protects_learning():
    _, made, _ = parts_of("dml", {})

    class Own(ReleaseRule):
        kind: Literal["own"] = "own"
        learns: ClassVar[bool] = True

        def cost(self, occasion):
            return None

        def release(self, payload, occasion, rng):
            return payload

    assert "they learn by none but DP-SGD" in unsound(made, Own(), "client")


def test_clients_learn_from_their_own_rows_alone_by_which_they_are_charged(monkeypatch):
    """Of half of its rows a client draws each with twice the probability that is charged."""
    cls = STRATEGIES["fedavg"]
    settings, made, data = parts_of("fedavg", DP_SGD, options=EQUAL)
    check_privacy(settings, made, data, nodes=False)
    twice = tuple(np.append(rows, rows[:1]) for rows in data.client_rows)
    with pytest.raises(ValueError, match=r"of the data is dealt out 2 times, and charged for once"):
        check_privacy(settings, made, replace(data, client_rows=twice), nodes=False)
    monkeypatch.setattr(
        cls, "private_rows", lambda self, client, data: data.client_rows[client][::2]
    )
    with pytest.raises(ValueError, match=r"client 0 learns from 6 rows that are not the 12 rows"):
        check_privacy(settings, made, data, nodes=False)


def test_a_clock_that_shows_sizes_of_unprotected_answers_is_refused():
    clock = {"clock": {"speed": 1.0, "up": 100.0, "deadline_s": 5.0}}
    check("fedmd", AT_SERVER, **clock)
    check("fedmd", GAUSSIAN, exchange={"up": "int8"}, **clock)
    top_k = {"exchange": {"up": {"kind": "top_k", "k": 2}}}
    with pytest.raises(ValueError, match="how many bytes an answer has before it is protected"):
        check("fedmd", AT_SERVER, **top_k, **clock)
    check("fedmd", AT_SERVER, **top_k)


def test_rounds_that_ask_for_no_row_cost_no_answers_and_the_others_are_foreseen(monkeypatch):
    settings, _, data = parts_of(
        "codistillation", ANSWERS, options={"burn_in": 2, "interval": 1}, rounds=3
    )
    run = simulate(settings, data)
    assert [row["of_round"] for row in run.charges] == [2, 3]
    monkeypatch.setattr("sim.commands.privacy.load_data", lambda settings: data)
    spent_most = max(
        own.epsilon
        for own in spent_by_client(run.loop.boundary.exchange.ledger, delta=1e-5).values()
    )
    assert outlook(settings).epsilon >= spent_most > 1


class Together(NoAdversary):
    """Its clients see what the others have sent."""

    together: ClassVar[bool] = True


def test_an_adversary_that_sees_unprotected_answers_is_refused():
    """What it sends is made of them, and charged to its own clients alone."""
    settings, made, data = parts_of("fedmd", GAUSSIAN)
    check_privacy(settings, made, data, nodes=False)
    watched = settings.model_copy(update={"adversary": Together()})
    with pytest.raises(ValueError, match="made of answers of others as they travel, with their"):
        check_privacy(watched, made, data, nodes=False)
    settings, made, data = parts_of("fedmd", AT_SERVER)
    watched = settings.model_copy(update={"adversary": Together()})
    with pytest.raises(ValueError, match="made of answers of others before they are protected"):
        check_privacy(watched, made, data, nodes=False)
    settings, made, data = parts_of("fedmd", DP_SGD)
    watched = settings.model_copy(update={"adversary": Together()})
    check_privacy(watched, made, data, nodes=False)


def test_what_a_round_has_spent_that_was_broken_off_is_told(tiny_settings, tiny_data):
    """Answers of it have left, whatever became of the round."""
    settings = tiny_settings("fedmd", privacy={"mechanism": "gaussian", "noise": 2.0}, rounds=2)
    data = tiny_data()

    class Broken(InlineGrid):
        def send_and_receive(self, messages, *given, **named):
            asked = list(messages)
            if asked[0].metadata.group_id == "2" and asked[0].metadata.message_type == "train":
                raise KeyboardInterrupt
            return super().send_and_receive(asked, *given, **named)

    loop = RoundLoop(Broken(settings, data), settings, data, [])
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.boundary.round == 1
    two = spent([Gaussian(2, 2.0)], delta=settings.privacy.delta).epsilon
    assert loop.spent()["epsilon"] == pytest.approx(two)


@pytest.mark.parametrize(("delta", "is_said"), [(1e-5, False), (0.2, True)])
def test_a_delta_that_would_let_a_row_be_published_is_said(delta, is_said):
    words = ["strategy.name=fedmd", "privacy.mechanism=gaussian", "privacy.noise=4"]
    said = outlook(
        load_settings(None, [*words, f"privacy.delta={delta}", "clients.models=[mlp]"])
    ).assumptions
    assert said[0].startswith(f"privacy.delta {delta:g} is no less than 1 / rows") == is_said


@pytest.mark.parametrize("privacy", [AT_SERVER, VOTES])
@pytest.mark.parametrize(("strategy", "rule"), [("fedmd", "median"), ("cronus", "filter")])
def test_a_robust_rule_is_named_where_a_mean_would_be_protected(strategy, rule, privacy):
    told = reason(strategy, privacy, aggregation=rule)
    assert f"strategy.aggregation is {rule}: use mean" in told
