"""A kind of payload and an algorithm of one's own, in one file (``tests/own/own_ballots.py``).

No module of ours knows of them, and they go everywhere that ours go.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from own_ballots import Ballot

import sim
from fedkd.exchange.values import digest
from sim.adversity.bad_replies import BAD_REPLIES
from sim.commands import running
from sim.commands.running import run
from sim.engine.session import RaySession
from sim.keeping.records import read_rows
from sim.server.observers import Observer
from sim.server.validation import (
    Expected,
    RejectedReplyError,
    bad_reply,
    read_valid_reply,
)
from sim.settings import EngineSettings
from sim.wire.messages import ClientReply, read_reply, reply_content
from sim.wire.records import read_payload, write_payload

NAME = "own_ballots:Ballots"
ROWS = np.array([1, 4, 5, 9])
ASKED = Ballot.asked(ROWS, 3)


def ballot(**changes):
    some = {
        "rows": np.array([4, 9]),
        "classes": np.array([2, 0]),
        "sureness": np.array([0.5, 0.75], np.float32),
        "planned": 4,
    }
    return Ballot(**{**some, **changes})


def none_sure():
    return ballot(rows=ROWS[:0], classes=ROWS[:0], sureness=np.zeros(0, np.float32))


# -- alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [ballot(), none_sure()], ids=["two rows", "none"])
def test_it_survives_the_wire_and_is_a_good_answer(sent):
    records = RecordDict()
    write_payload(records, "payload", sent)
    arrived = read_payload(records, "payload")
    assert type(arrived) is Ballot
    assert digest(arrived) == digest(sent)
    content = reply_content(ClientReply(sent, {}, None, 1))
    assert bad_reply(read_reply(content), Expected(round=1, asked=ASKED)) is None
    # As records that came over a network, too.
    over = RecordDict(dict(reply_content(ClientReply(sent, {}, None, 1)).items()))
    read = read_valid_reply(over, Expected(round=1, asked=ASKED))
    assert digest(read.payload) == digest(sent)


def test_its_bytes_are_what_it_says():
    # A byte a class, four a sureness; which of four rows they are is a bit a row: a byte.
    assert ballot().payload_bytes == 2 + 8 + 1
    assert none_sure().payload_bytes == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": np.array([4, 8])}, "votes on rows that are not the round's, or not in order"),
        ({"rows": np.array([9, 4])}, "votes on rows that are not the round's, or not in order"),
        ({"classes": np.array([2, 3])}, "a class of size 3, expected at most 2"),
        ({"classes": np.array([2, -1])}, "a class is negative"),
        ({"classes": np.array([2])}, "'classes' has shape (1,), expected (<= 4)"),
        ({"classes": np.array([2.0, 0.0])}, "'classes' has dtype float64, expected int64"),
        ({"sureness": np.array([0.5, np.nan], np.float32)}, "NaN or infinity among the values"),
        ({"sureness": np.array([0.5, 1.5], np.float32)}, "a sureness of size 1.5, expected"),
        ({"sureness": np.zeros((2, 1), np.float32)}, "'sureness' has shape (2, 1), expected"),
        ({"planned": 3}, "a ballot on 3 rows, expected one on 4"),
    ],
)
def test_what_is_wrong_with_it_is_named(changes, named):
    content = RecordDict(dict(reply_content(ClientReply(ballot(**changes), {}, None, 1)).items()))
    with pytest.raises(RejectedReplyError) as raised:
        read_valid_reply(content, Expected(round=1, asked=ASKED))
    assert str(raised.value).startswith(named)


def test_a_plain_value_of_another_type_is_named():
    content = RecordDict(dict(reply_content(ClientReply(ballot(), {}, None, 1)).items()))
    told = content["payload"]
    told["plain"] = told["plain"].replace('"planned": 4', '"planned": "four"')
    with pytest.raises(RejectedReplyError, match=r"Ballot\.planned is 'four'"):
        read_valid_reply(content, Expected(round=1, asked=ASKED))


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_every_bad_reply_exists_for_it_and_is_named(name):
    expected = Expected(round=1, asked=ASKED)
    for seed in range(3):
        bad = BAD_REPLIES[name](
            ClientReply(ballot(), {"loss/ce": 0.5}, None, 1), np.random.default_rng(seed)
        )
        assert bad_reply(bad, expected)


# -- in a federation ---------------------------------------------------------------------------


def test_a_federation_learns_by_it_and_counts_its_bytes(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings(NAME), tiny_data())
    assert run.events == []
    assert run.history.federation[-1]["accuracy"] > 0.6
    assert {row["kind"] for row in run.exchange} == {"ballot"}
    assert all(0 <= row["peer_disagreement"] <= 1 for row in run.history.federation)
    state = run.loop.boundary.state
    assert state.counted.shape == (20, 3)
    assert not state.counted.flags.writeable


def test_ensemble_metrics_are_over_those_who_voted(
    tiny_settings, tiny_data, simulate, listening_grid
):
    settings, data = tiny_settings(NAME, options={"sure": 0.5}, rounds=2), tiny_data()
    grid = listening_grid(settings, data)
    run = simulate(settings, data, grid)
    for number, row in enumerate(run.history.federation):
        sent = [read_reply(m.content).payload for m in grid.replies["train"][number].values()]
        said = [dict(zip(b.rows.tolist(), b.classes.tolist(), strict=True)) for b in sent]
        assert len({len(own) for own in said}) > 1
        differences = []
        for public in range(20):
            votes = [own[public] for own in said if public in own]
            pairs = [a != b for i, a in enumerate(votes) for b in votes[:i]]
            if pairs:
                differences.append(np.mean(pairs))
        assert row["peer_disagreement"] == pytest.approx(np.mean(differences))


def test_clients_that_vote_on_rows_of_different_number_are_stacked(
    tiny_settings, tiny_data, simulate
):
    clients = {
        "models": [{"name": "mlp", "options": {"hidden": [8]}}],
        "optimizer": {"name": "sgd", "lr": 0.05},
    }
    data, runs = tiny_data(), {}
    for how in ("loop", "vmap"):
        engine = {"backend": "inline", "vectorize": how}
        runs[how] = simulate(tiny_settings(NAME, clients=clients, engine=engine), data)
        assert runs[how].events == []
        assert set(runs[how].grid.backends().popitem()[1]) == {how}
    for one, other in zip(runs["loop"].states, runs["vmap"].states, strict=True):
        for name, array in one.to_arrays().items():
            np.testing.assert_allclose(array, other.to_arrays()[name], atol=1e-5, rtol=1e-4)


def test_injected_bad_replies_are_left_out(tiny_settings, tiny_data, simulate):
    faults = [
        {"kind": "bad_reply", "reply": reply, "clients": [client], "rounds": [number]}
        for number, client, reply in (
            (1, 0, "nan"),
            (1, 1, "other_rows"),
            (2, 2, "wrong_kind"),
            (2, 3, "nothing"),
            (3, 0, "stale_round"),
            (3, 1, "oversized"),
        )
    ]
    run = simulate(tiny_settings(NAME, faults=faults), tiny_data())
    rejected = [(e["round"], e["client"]) for e in run.events if e["event"] == "rejected"]
    assert rejected == [(1, 0), (1, 1), (2, 2), (2, 3), (3, 0), (3, 1)]
    assert [row["replies"] for row in run.history.federation] == [2, 2, 2]
    assert "expected ballot, got" in run.events[2]["reason"]


@pytest.mark.parametrize("codec", ["float16"])
def test_a_codec_takes_its_numbers(codec, tiny_settings, tiny_data, simulate):
    settings = tiny_settings(NAME, exchange={"up": codec}, rounds=2)
    run = simulate(settings, tiny_data())
    assert run.events == []
    plain = simulate(tiny_settings(NAME, rounds=2), tiny_data())
    up, whole = (
        sum(row["bytes"] for row in each.exchange if row["direction"] == "up")
        for each in (run, plain)
    )
    assert 0 < up < whole
    assert {row["kind"] for row in run.exchange} == {f"ballot ({codec})", "ballot"}


class _Stop(Observer):
    def metrics(self, rows):
        if rows[0]["round"] == 3:
            raise KeyboardInterrupt


def test_it_goes_through_checkpoint_and_resume(tiny_settings, tiny_data, tmp_path, monkeypatch):
    data = tiny_data()
    monkeypatch.setattr(running, "load_data", lambda _: data)
    settings = tiny_settings(NAME, rounds=4, checkpoints={"every": 1}, output=tmp_path)
    whole = run(settings)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(settings, observers=[_Stop()])
    folder = stop.value.folder
    assert (folder / "checkpoints" / "round-000002").is_dir()
    resumed = run(settings, resume=folder)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.status == "finished"
    events = [row["event"] for row in read_rows(folder / "events.jsonl")]
    assert "checkpoint unusable" not in events


def test_a_forged_state_of_it_is_passed_over(tiny_settings, tiny_data):
    from sim.engine.inline import InlineGrid
    from sim.server.rounds import RoundLoop
    from strategies.contract import Nothing

    settings, data = tiny_settings(NAME), tiny_data()
    loop = RoundLoop(InlineGrid(settings, data), settings, data, [])
    loop.start()
    loop.check_boundary(loop.boundary.state, loop.boundary.exchange)
    with pytest.raises(TypeError, match="a checkpoint gave a Nothing, expected its State, Votes"):
        loop.check_boundary(Nothing(), loop.boundary.exchange)


@pytest.mark.xdist_group("ray")
def test_workers_of_ray_end_with_the_same_bits(tmp_path, monkeypatch):
    from sim.settings import load_settings

    root = Path(sim.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "tests" / "own")]))
    words = [
        "rounds=3",
        "clients={count: 4, models: [mlp, cnn], local: {epochs: 1}}",
        "data={private_rows: 200, test_rows: 100, public: {size: 60}}",
        "data.partition.min_rows=2",
        f"strategy.name={NAME}",
        f"output={tmp_path}",
    ]
    spoilt = "{kind: bad_reply, clients: [2], rounds: [1]}"
    killed = f"[{{kind: kill, clients: [1], rounds: [2]}}, {spoilt}]"
    inline = run(load_settings(None, [*words, f"faults=[{spoilt}]", "engine.backend=inline"]))
    with RaySession(EngineSettings()) as session:
        by_ray = run(
            load_settings(None, [*words, f"faults={killed}", "engine.backend=ray"]), session=session
        )
    assert by_ray.weights_sha256 == inline.weights_sha256
    assert by_ray.history.bytes_up == inline.history.bytes_up
