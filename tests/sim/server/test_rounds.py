"""The round loop: who is left out, when it stops, what it writes down, which round it selects."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import digest
from fedkd.metrics.calibration import expected_calibration_error
from fedkd.metrics.diversity import ensemble_entropy, jensen_shannon, target_entropy
from sim.engine.grid import FIRST_NODE_ID, Outcome
from sim.engine.inline import InlineGrid
from sim.engine.runtime import build_strategy, federation_of, judge, server_tools
from sim.server.history import History, selected_round, summary
from sim.server.replies import QuorumError
from sim.server.rounds import RoundLoop, of_clients
from sim.settings import SettingsError
from sim.wire.messages import read_reply
from strategies.contract import ServerTools

# -- replies that are left out -----------------------------------------------------------------


def test_a_bad_reply_is_named_in_an_event(tiny_settings, tiny_data, simulate, listening_grid, lose):
    settings, data = tiny_settings(), tiny_data()
    run = simulate(settings, data, listening_grid(settings, data, lose([2], "spoilt")))
    assert run.events == [
        {
            "round": 1,
            "client": 2,
            "event": "rejected",
            "reason": "NaN or infinity among the scores",
        }
    ]
    assert [row["replies"] for row in run.history.federation] == [3, 4, 4]
    assert [row["participants"] for row in run.history.federation] == [4, 4, 4]


def test_a_lost_reply_is_named_with_the_client_s_own_words(
    tiny_settings, tiny_data, simulate, listening_grid, lose
):
    settings, data = tiny_settings(), tiny_data()
    run = simulate(settings, data, listening_grid(settings, data, lose([1])))
    (event,) = run.events
    assert (event["round"], event["client"], event["event"]) == (1, 1, "rejected")
    assert "OSError: client 1 is gone" in event["reason"]


@pytest.mark.parametrize("strategy", ["dml", "fedavg", "fedmd"])
def test_a_rejected_upload_counts_no_more_than_a_lost_one(
    tiny_settings, tiny_data, simulate, listening_grid, lose, strategy
):
    settings, data = tiny_settings(strategy), tiny_data()
    runs = []
    for how in ("spoilt", "lost"):
        grid = listening_grid(settings, data, lose([2], how))
        runs.append((simulate(settings, data, grid), grid))
    (rejected, spoilt_grid), (lost, lost_grid) = runs
    assert rejected.digest == lost.digest
    for one, other in zip(spoilt_grid.sent["train"], lost_grid.sent["train"], strict=True):
        assert same_pieces(one, other)
    untouched = simulate(settings, data)
    assert rejected.digest != untouched.digest


def same_pieces(one, other):
    """Tell whether two exchanges told the same clients the same, bit for bit."""
    first, second = (
        {client: None if piece is None else digest(piece) for client, piece in told.items()}
        for told in (one, other)
    )
    return first == second


def test_bytes_of_a_rejected_upload_are_counted_they_were_sent(
    tiny_settings, tiny_data, simulate, listening_grid, lose
):
    settings, data = tiny_settings(rounds=1), tiny_data()
    for how, clients in (("spoilt", [0, 1, 2, 3]), ("lost", [0, 1, 3])):
        run = simulate(settings, data, listening_grid(settings, data, lose([2], how)))
        assert [row["client"] for row in run.exchange if row["direction"] == "up"] == clients


def test_a_client_that_cannot_be_judged_is_named_and_left_out_of_the_mean(
    tiny_settings, tiny_data, simulate, listening_grid, lose
):
    settings, data = tiny_settings(rounds=1), tiny_data()
    run = simulate(settings, data, listening_grid(settings, data, lose([3], phase="evaluate")))
    (event,) = run.events
    assert (event["client"], event["event"]) == (3, "evaluation failed")
    assert sorted(run.history.clients) == [0, 1, 2]
    accuracies = [row["accuracy"] for row in run.history.clients.values()]
    assert run.history.federation[0]["accuracy"] == pytest.approx(np.mean(accuracies))


def never_judged(clients=None, attempts=None):
    return {"kind": "crash", "phases": ["evaluate"], "clients": clients, "attempts": attempts}


def test_a_run_in_which_too_few_can_be_judged_ends_as_one_in_which_too_few_train(
    tiny_settings, tiny_data, simulate
):
    settings = tiny_settings(rounds=2, faults=[never_judged([0, 1, 3])])
    with pytest.raises(QuorumError) as raised:
        simulate(settings, tiny_data())
    assert str(raised.value).startswith(
        "round 1: 1 of 4 clients could be judged, engine.quorum = 0.5 asks for more (client 0: "
    )
    assert "\n" not in str(raised.value)


def test_who_could_not_be_judged_is_asked_again_and_nothing_else_is_different(
    tiny_settings, tiny_data, simulate
):
    calm = simulate(tiny_settings(rounds=2), tiny_data())
    run = simulate(tiny_settings(rounds=2, faults=[never_judged([0, 1, 3], 1)]), tiny_data())
    assert run.digest == calm.digest
    names = ("accuracy", "worst_accuracy", "validation_accuracy")
    for row, calm_row in zip(run.history.federation, calm.history.federation, strict=True):
        assert [row[name] for name in names] == [calm_row[name] for name in names]
        assert row["ensemble_accuracy"] == pytest.approx(calm_row["ensemble_accuracy"])
    kinds = [event["event"] for event in run.events]
    assert kinds == ["evaluation failed"] * 3 + ["round retried"] + ["evaluation failed"] * 3 + [
        "round retried"
    ]


def test_a_judgement_below_the_quorum_may_be_left_out_but_not_every_one(
    tiny_settings, tiny_data, simulate
):
    engine = {"backend": "inline", "below_quorum": "skip"}
    rule = {**never_judged(), "rounds": [1]}
    run = simulate(tiny_settings(rounds=2, engine=engine, faults=[rule]), tiny_data())
    assert ["accuracy" in row for row in run.history.federation] == [False, True]
    assert run.events[-1]["event"] == "evaluation skipped"
    with pytest.raises(QuorumError, match="no client could be judged in any round"):
        simulate(tiny_settings(rounds=2, engine=engine, faults=[never_judged()]), tiny_data())
    none_needed = {**engine, "quorum": 0.0}
    with pytest.raises(QuorumError, match="no client could be judged in any round"):
        simulate(tiny_settings(rounds=2, engine=none_needed, faults=[never_judged()]), tiny_data())


def test_a_second_judgement_of_one_client_is_named_and_counts_for_nothing(
    tiny_settings, tiny_data, simulate, listening_grid
):
    class Twice(listening_grid):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in super().send_and_receive(messages):
                yield reply
                if reply.metadata.message_type == "evaluate" and reply.metadata.src_node_id == 4:
                    yield reply

    settings, data = tiny_settings(rounds=1), tiny_data()
    run = simulate(settings, data, Twice(settings, data))
    (event,) = run.events
    assert (event["client"], event["reason"]) == (2, "a second reply to round 1")
    calm = simulate(settings, data)
    judged = {key: row["accuracy"] for key, row in run.history.clients.items()}
    assert judged == {key: row["accuracy"] for key, row in calm.history.clients.items()}
    ensemble = "ensemble_accuracy"
    assert run.history.federation[0][ensemble] == calm.history.federation[0][ensemble]


# -- quorum ------------------------------------------------------------------------------------


def abort_below(quorum):
    return {"backend": "inline", "quorum": quorum, "below_quorum": "abort"}


def test_too_few_usable_answers_stop_the_run_and_say_why(
    tiny_settings, tiny_data, simulate, listening_grid, lose
):
    settings = tiny_settings(engine=abort_below(0.75))
    data = tiny_data()
    with pytest.raises(QuorumError) as stopped:
        simulate(settings, data, listening_grid(settings, data, lose([1, 3])))
    assert str(stopped.value) == (
        "round 1: 2 of 4 clients gave a usable answer, engine.quorum = 0.75 asks for more "
        "(client 1: OSError: client 1 is gone; client 3: OSError: client 3 is gone)"
    )


def test_rejected_uploads_are_not_usable_answers(
    tiny_settings, tiny_data, simulate, listening_grid, lose
):
    settings, data = tiny_settings(engine=abort_below(0.5)), tiny_data()
    with pytest.raises(
        QuorumError, match=r"round 1: 0 of 4 .*\(client 0: NaN or infinity among the scores; .*"
    ):
        simulate(settings, data, listening_grid(settings, data, lose([0, 1, 2, 3], "spoilt")))


@pytest.mark.parametrize(
    ("quorum", "lost", "stops"),
    [
        (0.5, [1, 3], False),  # exactly half is enough
        (0.5, [0, 1, 3], True),
        (1.0, [1], True),
        (0.0, [0, 1, 2, 3], False),
    ],
)
def test_quorum_is_a_fraction_of_those_who_were_asked(
    tiny_settings, tiny_data, simulate, listening_grid, lose, quorum, lost, stops
):
    settings = tiny_settings(rounds=2, engine=abort_below(quorum))
    data = tiny_data()
    grid = listening_grid(settings, data, lose(lost))
    if stops:
        with pytest.raises(QuorumError):
            simulate(settings, data, grid)
    else:
        assert len(simulate(settings, data, grid).history.federation) == 2


def dropping(clients, rounds, **engine):
    """Make settings in which clients do not answer; ``attempts`` of them, by default the first."""
    attempts = engine.pop("attempts", 1)
    fault = {"kind": "dropout", "clients": clients, "rounds": rounds, "attempts": attempts}
    return {"faults": [fault], "engine": {"backend": "inline", "quorum": 0.75, **engine}}


def test_who_failed_is_asked_again_before_a_round_is_given_up(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings(**dropping([0, 2], [2])), tiny_data())
    assert [row["replies"] for row in run.history.federation] == [4, 4, 4]
    kinds = [(event["round"], event["event"], event.get("client")) for event in run.events]
    assert kinds == [(2, "rejected", 0), (2, "rejected", 2), (2, "round retried", None)]
    assert run.events[-1]["attempt"] == 2
    assert run.events[-1]["reason"] == "2 of 4 clients gave a usable answer; asking 2 again"


@pytest.mark.parametrize("strategy", ["dml", "fedavg"])
def test_uploads_of_a_second_attempt_come_last_in_client_order(
    tiny_settings, tiny_data, simulate, monkeypatch, strategy
):
    from strategies import STRATEGIES

    kind = STRATEGIES[strategy]
    folded = []
    aggregate = kind.aggregate

    def listening(self, state, uploads, round, server):
        def heard():
            for upload in uploads:
                folded.append((round.number, upload.client))
                yield upload

        return aggregate(self, state, heard(), round, server)

    monkeypatch.setattr(kind, "aggregate", listening)
    simulate(tiny_settings(strategy, rounds=2, **dropping([0, 2], [2])), tiny_data())
    assert folded == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (2, 0), (2, 2)]


def test_a_client_that_is_asked_again_starts_from_where_the_round_began(
    tiny_settings, tiny_data, simulate
):
    # With weights that the round does not bring, training twice would be seen.
    fault = {"kind": "bad_reply", "clients": [0, 2], "rounds": [2]}
    engine = {"backend": "inline", "quorum": 0.75}
    run = simulate(tiny_settings(faults=[fault], engine=engine), tiny_data())
    assert "round retried" in [event["event"] for event in run.events]
    honest = simulate(tiny_settings(), tiny_data())
    for state, expected in zip(run.states, honest.states, strict=True):
        (step,) = {int(s) for n, s in state.to_arrays().items() if "/optimizer/step/" in n}
        (steps,) = {int(s) for n, s in expected.to_arrays().items() if "/optimizer/step/" in n}
        assert step == steps


def test_when_asking_again_does_not_help_the_run_stops(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(**dropping([0, 2], [2], attempts=None, round_retries=2))
    data = tiny_data()
    with pytest.raises(QuorumError, match=r"round 2: 2 of 4 .*client 0: dropped out"):
        simulate(settings, data)
    # It was asked three times in all; the third answer would have been good.
    assert simulate(tiny_settings(**dropping([0, 2], [2], attempts=2, round_retries=2)), data)


@pytest.mark.parametrize("strategy", ["dml", "fedavg", "fedmd", "one_way", "local"])
def test_a_skipped_round_leaves_models_and_lessons_as_they_were(
    tiny_settings, tiny_data, simulate, listening_grid, strategy
):
    options = {"direction": "server_to_clients"} if strategy == "one_way" else {}
    settings = tiny_settings(
        strategy, options=options, **dropping([0, 2], [2], below_quorum="skip")
    )
    data = tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    skipped = run.history.federation[1]
    assert [row.get("skipped") for row in run.history.federation] == [None, True, None]
    assert skipped["replies"] == 2
    (event,) = [event for event in run.events if event["event"] == "round skipped"]
    assert event["round"] == 2
    # The third round's clients receive what the second's did, and start from the same weights.
    assert same_pieces(grid.sent["train"][1], grid.sent["train"][2])
    for name in ("accuracy", "server_accuracy", "ensemble_accuracy"):
        assert run.history.federation[0].get(name) == skipped.get(name)


# -- what is written down ----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "one_way", "pooled"])
def test_the_server_remembers_nothing_of_a_skipped_round(tiny_settings, tiny_data, strategy):
    options = {"direction": "server_to_clients"} if strategy == "one_way" else {}
    settings = tiny_settings(
        strategy, options=options, **dropping([0, 2], [2], below_quorum="skip")
    )
    data = tiny_data()
    loop = RoundLoop(InlineGrid(settings, data), settings, data, [])
    states = []
    loop.run(lambda: states.append(digest(loop.boundary.state)))
    after_first, after_skipped, after_third = states
    assert after_first == after_skipped != after_third


def test_only_the_round_s_participants_are_judged_where_that_is_asked_for(
    tiny_settings, tiny_data, simulate
):
    run = simulate(
        tiny_settings(clients={"participants": 2}, evaluation={"clients": "participants"}),
        tiny_data(),
    )
    for number in (1, 2, 3):
        rows = [r for r in run.metrics if r["scope"] == "client" and r["round"] == number]
        assert len(rows) == 2
        assert all("loss/ce" in row and "accuracy" in row for row in rows)
        federation = run.history.federation[number - 1]
        assert federation["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in rows]))


def test_a_panel_of_clients_is_drawn_once_and_a_larger_one_holds_the_smaller(
    tiny_settings, tiny_data, simulate
):
    panels = []
    for size in (2, 3):
        run = simulate(tiny_settings(evaluation={"clients": size}, seed=5), tiny_data())
        judged = [
            {row["client"] for row in run.metrics if is_judged(row) and row["round"] == number}
            for number in (1, 2, 3)
        ]
        assert judged[0] == judged[1] == judged[2]
        assert len(judged[0]) == size
        panels.append(judged[0])
    assert panels[0] < panels[1]


def is_judged(row):
    return row["scope"] == "client" and "accuracy" in row


def test_looking_at_few_clients_changes_nothing(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    digests = {
        simulate(tiny_settings(evaluation={"clients": whom}), data).digest
        for whom in ("all", "participants", 1)
    }
    assert len(digests) == 1


def test_history_keeps_one_row_a_client_however_many_rounds_there_are(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    short, long = (
        simulate(tiny_settings("one_way", rounds=rounds), data).history for rounds in (2, 6)
    )
    assert len(long.federation) == 6
    assert long.clients.keys() == short.clients.keys()
    assert isinstance(long.server, dict)
    assert long.server["round"] == 6
    assert len(long.bytes_down) == len(short.bytes_down) == 4


def test_rows_of_a_round(tiny_settings, tiny_data, simulate):
    options = {"direction": "server_to_clients"}
    run = simulate(tiny_settings("one_way", options=options, rounds=2), tiny_data())
    scopes = [(row["round"], row["scope"], row.get("client")) for row in run.metrics]
    assert scopes == [
        (number, scope, client)
        for number in (1, 2)
        for scope, client in [
            ("federation", None),
            *(("client", client) for client in range(4)),
            ("server", None),
        ]
    ]
    client = run.metrics[1]
    assert {"accuracy", "personal_accuracy", "macro_recall", "loss/ce", "seconds"} <= client.keys()
    last = run.history.federation[-1]
    of_clients = [row for row in run.metrics if row["scope"] == "client" and row["round"] == 2]
    for name in ("accuracy", "personal_accuracy", "macro_recall", "validation_accuracy"):
        assert last[name] == pytest.approx(np.mean([row[name] for row in of_clients]))
    assert last["worst_accuracy"] == min(row["accuracy"] for row in of_clients)
    for name in ("accuracy", "personal_accuracy"):
        assert last[f"{name}_spread"] == pytest.approx(np.std([row[name] for row in of_clients]))
        assert last[f"{name}_worst_tenth"] == min(row[name] for row in of_clients)
    errors = [row["calibration_error"] for row in of_clients]
    assert last["calibration_error"] == pytest.approx(np.mean(errors))
    assert last["server_calibration_error"] == run.metrics[-1]["calibration_error"]


def test_a_client_forgets_from_its_best_round_on(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings(rounds=4), tiny_data())
    rows = [row for row in run.metrics if row["scope"] == "client"]
    own = np.array([row["personal_accuracy"] for row in rows]).reshape(4, 4)
    assert not any("forgetting" in row for row in rows[:4])
    for number in (1, 2, 3):
        lost = own[:number].max(axis=0) - own[number]
        told = [row["forgetting"] for row in rows[4 * number : 4 * number + 4]]
        assert told == pytest.approx(lost)
        assert run.history.federation[number]["forgetting"] == pytest.approx(lost.mean())


def test_rows_that_are_read_again_know_the_best_of_each_client():
    history = History()
    known = {"scope": "client", "accuracy": 0.5}
    history.add_metrics(
        [
            {**known, "client": 0, "personal_accuracy": 0.8},
            {**known, "client": 1, "personal_accuracy": None},
            {**known, "client": 0, "personal_accuracy": 0.6},
            {"scope": "client", "client": 2},
        ]
    )
    assert history.best_personal == {0: 0.8}
    assert history.forgotten(0, {"personal_accuracy": 0.7}) == pytest.approx({"forgetting": 0.1})
    assert history.forgotten(1, {"personal_accuracy": 0.7}) == {}
    assert history.forgotten(0, {"personal_accuracy": math.nan}) == {}


def test_who_has_no_value_is_no_part_of_a_mean():
    row = {"accuracy": 0.5, "personal_accuracy": 0.6, "macro_recall": 0.5}
    row["validation_accuracy"] = 0.4
    known = {**row, "forgetting": 0.1, "calibration_error": 0.2}
    found = of_clients([known, row, {**known, "calibration_error": math.nan}])
    assert (found["forgetting"], found["calibration_error"]) == pytest.approx((0.1, 0.2))
    assert not {"forgetting", "calibration_error"} & of_clients([row]).keys()


def test_distances_to_prototypes_are_no_beliefs(tiny_settings, tiny_data, simulate):
    for judge_by, known in (("prototype", False), ("head", True)):
        settings = tiny_settings("fedproto", options={"judge": judge_by}, rounds=1)
        last = simulate(settings, tiny_data()).history.federation[-1]
        assert ("calibration_error" in last) is known


def test_the_entropy_of_targets_is_that_of_those_which_somebody_received_in_the_round(
    tiny_settings, tiny_data, simulate, listening_grid
):
    settings, data = tiny_settings(rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    # Every client of dml receives a mean of its own, so the mean of all is for nobody.
    received = grid.sent["train"][1].values()
    expected = np.mean([target_entropy(piece.probabilities()) for piece in received])
    first, second = (row["target_entropy"] for row in run.history.federation)
    assert first is None
    assert second == pytest.approx(expected, abs=1e-12)
    state = run.loop.boundary.state
    shared = target_entropy(state.shared.probabilities())
    others = [target_entropy(piece.probabilities()) for piece in state.others.values()]
    assert np.mean(others) != pytest.approx(shared, abs=1e-6)


def test_a_lesson_that_is_in_logits_has_the_entropy_of_its_soft_labels(
    tiny_settings, tiny_data, simulate, listening_grid
):
    settings, data = tiny_settings("fedmd", rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    logits = grid.sent["train"][1][0].values.astype(np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    soft = powers / powers.sum(-1, keepdims=True)
    by_hand = -(soft * np.log(soft)).sum(-1).mean()
    assert run.history.federation[1]["target_entropy"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_scores_that_are_no_numbers_have_no_accuracy(tiny_data, split):
    data = tiny_data()
    scores = {
        "test": np.zeros((len(data.test_labels), 3)),
        "validation": np.zeros((len(data.validation_labels), 3)),
    }
    judge(data, scores["test"], scores["validation"])
    scores[split][1, 2] = np.nan
    with pytest.raises(ValueError, match=f"NaN for rows of the {split} split"):
        judge(data, scores["test"], scores["validation"])


def test_a_server_whose_model_predicts_no_numbers_is_named_and_not_judged(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    options = {"direction": "clients_to_server"}
    monkeypatch.setattr(
        ServerTools, "predict", lambda self, model, inputs: np.full((len(inputs), 3), np.nan)
    )
    run = simulate(tiny_settings("one_way", options=options, rounds=1), tiny_data())
    (event,) = run.events
    assert event["event"] == "evaluation failed"
    assert (
        event["reason"] == "the server's model: the model predicts NaN for rows of the test split"
    )
    assert "server_accuracy" not in run.history.federation[0]


def test_bytes_of_a_round_are_those_of_its_messages(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings(exchange={"rows_per_round": 6}), tiny_data())
    payload = 6 * 3 * 4
    assert [row["bytes_up"] for row in run.history.federation] == [4 * payload] * 3
    # Nobody receives anything before the first aggregate.
    assert [row["bytes_down"] for row in run.history.federation] == [0, 4 * payload, 4 * payload]
    assert run.history.bytes_up == dict.fromkeys(range(4), 3 * payload)
    assert run.history.bytes_down == dict.fromkeys(range(4), 2 * payload)
    assert run.exchange[0] == {
        "round": 1,
        "client": 0,
        "direction": "up",
        "kind": "logits",
        "bytes": payload,
    }


def test_models_are_judged_every_so_many_rounds_and_at_the_end(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    often = simulate(tiny_settings(rounds=5), data)
    seldom = simulate(tiny_settings(rounds=5, evaluation={"every": 2}), data)
    judged = [row["round"] for row in seldom.history.federation if "accuracy" in row]
    assert judged == [2, 4, 5]
    # Looking changes nothing.
    assert seldom.digest == often.digest
    for number in judged:
        one, other = (run.history.federation[number - 1]["accuracy"] for run in (often, seldom))
        assert one == other


def test_ensemble_is_the_mean_of_the_clients_probabilities(
    tiny_settings, tiny_data, simulate, listening_grid
):
    settings, data = tiny_settings(rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    tables = [
        reply.content.array_records["test"]["probabilities"].numpy()
        for reply in grid.replies["evaluate"][-1].values()
    ]
    classes = np.mean(np.stack(tables).astype(np.float64), axis=0).argmax(-1)
    expected = (classes == data.test_labels).mean()
    last = run.history.federation[-1]
    assert last["ensemble_accuracy"] == pytest.approx(expected)
    assert last["ensemble_gain"] == pytest.approx(expected - last["accuracy"])
    mean = np.mean(np.stack(tables), axis=0)
    assert last["ensemble_calibration_error"] == pytest.approx(
        expected_calibration_error(mean, data.test_labels)
    )


def test_entropy_and_diversity_are_those_of_what_clients_sent(
    tiny_settings, tiny_data, simulate, listening_grid
):
    settings, data = tiny_settings(rounds=1), tiny_data()
    grid = listening_grid(settings, data)
    (row,) = simulate(settings, data, grid).history.federation
    sent = np.stack(
        [read_reply(reply.content).payload.values for reply in grid.replies["train"][-1].values()]
    )
    peers = ensemble_entropy(sent, from_logits=True).peers
    assert row["peer_entropy"] == pytest.approx(peers.mean(), rel=1e-5)
    assert row["peer_diversity"] == pytest.approx(jensen_shannon(sent, from_logits=True), rel=1e-5)
    (row,) = simulate(tiny_settings("fedavg", rounds=1), data).history.federation
    assert row["peer_entropy"] is row["peer_diversity"] is None


# -- selection ---------------------------------------------------------------------------------


def judged(number, validation, accuracy):
    return {"round": number, "validation_accuracy": validation, "accuracy": accuracy}


def test_validation_selects_the_round_and_the_test_split_has_no_say():
    history = History(federation=[judged(1, 0.5, 0.9), judged(2, 0.8, 0.4), judged(3, 0.7, 0.99)])
    assert selected_round(history)["round"] == 2


def test_the_earliest_of_equals_is_selected():
    history = History(federation=[judged(1, 0.1, 0.1), judged(2, 0.8, 0.2), judged(3, 0.8, 0.9)])
    assert selected_round(history)["round"] == 2


def test_rounds_that_were_not_judged_cannot_be_selected():
    history = History(federation=[{"round": 1}, judged(2, 0.1, 0.1), {"round": 3}])
    assert selected_round(history)["round"] == 2
    assert selected_round(History(federation=[{"round": 1}])) == {}
    assert selected_round(History()) == {}


def test_of_several_models_of_the_server_the_first_leads():
    history = History()
    rows = [
        {"round": 1, "scope": "server", "accuracy": 0.9},
        {"round": 1, "scope": "server", "accuracy": 0.1, "model": "second"},
    ]
    history.add_metrics(rows)
    assert history.server == rows[0]


def test_a_summary_shows_the_last_and_the_selected_round():
    history = History(
        federation=[judged(1, 0.9, 0.5), judged(2, 0.8, 0.6), {"round": 3}],
        clients={1: {"accuracy": 0.3}, 0: {"accuracy": 0.2}},
        bytes_up={1: 20, 0: 10},
    )
    shown = summary(history, 3)
    assert (shown["last"]["round"], shown["selected"]["round"]) == (2, 1)
    assert [row["accuracy"] for row in shown["clients"]] == [0.2, 0.3]
    assert (shown["bytes_up"], shown["bytes_down"], shown["server"]) == (
        [10, 20, 0],
        [0, 0, 0],
        None,
    )


# -- replies that say nothing, or nothing readable -------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "payload", "reason"),
    [
        ("dml", None, "expected predictions, got nothing"),
        ("fedavg", None, "expected weights, got nothing"),
        ("local", Weights(arrays={}), "expected nothing, got weights"),
        ("dml", Weights(arrays={}), "expected predictions, got weights"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_left_out(
    tiny_settings, tiny_data, simulate, strategy, payload, reason
):
    settings, data = tiny_settings(strategy), tiny_data()

    class Confused(InlineGrid):
        def _execute(self, calls):
            for position, outcome in super()._execute(calls):
                replies = outcome.replies
                if calls[position].call.phase == "train":
                    replies = [
                        replace(reply, payload=payload) if client == 2 else reply
                        for client, reply in zip(calls[position].call.clients, replies, strict=True)
                    ]
                yield position, Outcome(replies)

    run = simulate(settings, data, Confused(settings, data))
    assert {(event["client"], event["reason"]) for event in run.events} == {(2, reason)}
    assert {row["replies"] for row in run.history.federation} == {3}


@pytest.mark.parametrize("missing", ["metrics", "payload", "payload-arrays"])
def test_an_unreadable_reply_is_left_out_and_the_run_goes_on(
    tiny_settings, tiny_data, simulate, missing
):
    settings, data = tiny_settings("dml"), tiny_data()

    class Careless(InlineGrid):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in super().send_and_receive(messages, timeout=timeout):
                of_client_2 = reply.metadata.src_node_id == FIRST_NODE_ID + 2
                if of_client_2 and reply.metadata.message_type == "train":
                    del reply.content[missing]
                yield reply

    run = simulate(settings, data, Careless(settings, data))
    assert {event["client"] for event in run.events} == {2}
    assert {row["replies"] for row in run.history.federation} == {3}
    assert len(run.history.federation) == settings.rounds


def test_a_client_that_was_not_asked_receives_no_bytes(tiny_settings, tiny_data, simulate):
    faults = [{"kind": "dropout", "clients": [2], "attempts": None}]
    run = simulate(tiny_settings("dml", faults=faults), tiny_data())
    assert sorted(run.history.bytes_down) == [0, 1, 3]


def test_a_commit_that_fails_leaves_nothing_that_could_be_saved_as_a_round(
    tiny_settings, tiny_data, simulate
):
    settings, data = tiny_settings("dml"), tiny_data()

    class Full(InlineGrid):
        def commit(self):
            super().commit()
            raise OSError("the object store is full")

    loop = RoundLoop(Full(settings, data), settings, data, [])
    loop.start()
    with pytest.raises(OSError, match="full"):
        loop.run()
    assert loop.boundary is None


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("odd_models:fixed", ["seed without effect"]),
        ("odd_models:zeros", ["seed without effect"]),
        ({"name": "odd_models:make", "options": {"kind": "Plain"}}, []),
    ],
)
def test_a_model_that_ignores_the_seed_is_told_once(
    model, told, tiny_settings, tiny_data, simulate
):
    run = simulate(tiny_settings("local", clients={"models": [model]}), tiny_data())
    assert [row["event"] for row in run.events] == told
    for row in run.events:
        assert row["round"] == 0
        assert row["reason"].endswith("the same first weights on every client and for every seed")


# -- stages that cannot take what clients answer -------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        ({"view": "sum"}, r"exchange\.view sum: a sum of class_table says nothing"),
        ({"up": {"kind": "top_k", "k": 1}}, r"exchange\.up top_k: .*class_table"),
    ],
)
def test_a_stage_that_cannot_take_what_is_asked_is_refused_before_the_first_round(
    tiny_settings, tiny_data, exchange, told
):
    settings, data = tiny_settings("fd", exchange=exchange), tiny_data()
    loop = RoundLoop(InlineGrid(settings, data), settings, data, [])
    with pytest.raises(SettingsError, match=told):
        loop.start()


def test_a_server_that_must_not_know_private_rows_has_none(tiny_settings, tiny_data):
    data = tiny_data()
    held = sum(map(len, data.client_rows))
    for privacy, rows in (({}, held), ({"mechanism": "gaussian", "noise": 1.0}, 0)):
        settings = tiny_settings("fedmd", privacy=privacy)
        strategy = build_strategy(settings, federation_of(settings, data))
        seen = server_tools(settings, strategy, data).data
        assert sum(map(len, seen.client_rows)) == rows
        assert bool(len(seen.train_inputs)) == bool(len(seen.train_labels)) == bool(rows)
        assert len(seen.public_inputs) == len(data.public_inputs)
