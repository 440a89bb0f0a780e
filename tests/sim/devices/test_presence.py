"""Who is there when: traces, read or refused by line, chains, late joiners, empty rounds."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from sim.commands import running
from sim.commands.running import run
from sim.devices.presence import HOUR_S, Presence, PresenceSettings, read_trace
from sim.keeping.provenance import provenance_of
from sim.keeping.records import read_rows
from sim.server.observers import Observer
from sim.settings import SettingsError, load_settings


def presence(clients=4, seed=0, **settings):
    return Presence(PresenceSettings.model_validate(settings), clients=clients, seed=seed)


def written(tmp_path, text, name="trace.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


# -- by the round ------------------------------------------------------------------------------


def test_late_joiners_are_dealt_out_in_turn():
    late = presence(5, join_rounds=[1, 3])
    assert [late.there(round, 0.0) for round in (1, 2, 3)] == [
        (0, 2, 4),
        (0, 2, 4),
        (0, 1, 2, 3, 4),
    ]


def test_clients_come_and_go_as_often_as_a_chain_does():
    clients, rounds = 400, 50
    chain = presence(clients, leave=0.2, come_back=0.4)
    there = np.zeros((rounds, clients), bool)
    for round in range(rounds):
        there[round, list(chain.there(round + 1, 0.0))] = True
    # In the long run, and from the first round on: 0.4 / (0.2 + 0.4).
    assert there.mean() == pytest.approx(2 / 3, abs=0.01)
    assert there[0].mean() == pytest.approx(2 / 3, abs=0.1)
    before, after = there[:-1], there[1:]
    assert (~after[before]).mean() == pytest.approx(0.2, abs=0.01)
    assert after[~before].mean() == pytest.approx(0.4, abs=0.01)


def test_a_chain_is_the_same_from_wherever_it_is_asked():
    whole, later = presence(30, leave=0.3), presence(30, leave=0.3)
    each = [whole.there(round, 0.0) for round in range(1, 9)]
    assert later.there(6, 0.0) == each[5]
    assert later.there(2, 0.0) == each[1]
    assert presence(30, seed=1, leave=0.3).there(6, 0.0) != each[5]


# -- traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "json"])
def test_an_interval_holds_its_start_and_not_its_end(tmp_path, form):
    rows = [(0, 0, 10), (0, 20, 30), (2, 5.5, 25)]
    text = "client,from,to\n" + "\n".join(",".join(map(str, row)) for row in rows)
    if form == "json":
        text = json.dumps([dict(zip(("client", "from", "to"), row, strict=True)) for row in rows])
    trace = written(tmp_path, text, f"trace.{form}")
    who = presence(trace=trace)
    found = {time: who.there(1, time) for time in (0.0, 5.5, 9.9, 10.0, 20.0, 25.0, 30.0)}
    assert found == {
        0.0: (0,),
        5.5: (0, 2),
        9.9: (0, 2),
        10.0: (2,),
        20.0: (0, 2),
        25.0: (0,),
        30.0: (),
    }
    daily = presence(trace=trace, repeat_s=40.0)
    assert daily.there(1, 80.0 + 5.5) == (0, 2)


def test_others_are_those_whom_no_line_names(tmp_path):
    trace = written(tmp_path, "client,from,to\n*,0,5\n1,3,9\n")
    who = presence(trace=trace)
    assert [who.there(1, time) for time in (0.0, 4.0, 6.0)] == [(0, 2, 3), (0, 1, 2, 3), (1,)]


def test_hours_are_probabilities_drawn_for_each_round(tmp_path):
    night = ["1" if hour < 8 else "0" for hour in range(24)]
    half = ["0.5"] * 24
    header = ",".join(["client", *map(str, range(24))])
    trace = written(tmp_path, "\n".join([header, ",".join(["*", *half]), ",".join(["1", *night])]))
    who = presence(2, trace=trace)
    assert who.there(3, 7.9 * HOUR_S)[-1] == 1
    assert 1 not in who.there(3, 8.0 * HOUR_S)
    assert 1 in who.there(3, 24.5 * HOUR_S)
    counts = Counter(0 in who.there(round, 0.0) for round in range(1, 401))
    assert counts[True] == pytest.approx(200, abs=4 * math.sqrt(100))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"line 1 must be client,from,to or client,0,1,\.\.\.,23, got ''"),
        ("who,from,to\n0,1,2", r"line 1 must be .* got 'who,from,to'"),
        ("client,from,to\n", "nobody is ever there: it has no interval"),
        ("client,from,to\n0,1,2\n\n4,1,2", r"line 4: client must be 0 to 3 or \*, got '4'"),
        ("client,from,to\n-1,1,2", r"line 2: client must be"),
        ("client,from,to\n0,1", "line 2 must have 3 cells, got 2"),
        ("client,from,to\n0,2,2", "line 2: from must be before to, got 2 and 2"),
        (
            "client,from,to\n0,nan,2",
            r"line 2: from must be a number from 0 to 3\.2e\+09, got 'nan'",
        ),
        ("client,from,to\n0,1,1e99", "line 2: to must be a number"),
        ('client,from,to\n0,1,"2', "line 2 is no CSV"),
        (",".join(["client", *map(str, range(24))]) + "\n0" + ",0" * 24, "every probability is 0"),
        (
            ",".join(["client", *map(str, range(24))]) + "\n0" + ",1.5" * 24,
            "line 2: hour 0 must be",
        ),
        (
            ",".join(["client", *map(str, range(24))]) + ("\n0" + ",1" * 24) * 2,
            "line 3: a second line of client 0",
        ),
    ],
)
def test_a_trace_that_is_none_is_refused_by_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        read_trace(written(tmp_path, text), clients=4, seed=0, repeat_s=None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ("{}", "must be a list"),
        ('[{"client": 0, "from": 1}]', "line 1 .* must be a table with client, from and to"),
        ('[{"client": true, "from": 1, "to": 2}]', "line 1: client must be"),
        ('[{"client": 0, "from": [1], "to": 2}]', r"line 1: from must be a number .* got \[1\]"),
    ],
)
def test_a_json_trace_that_is_none_is_refused(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        read_trace(written(tmp_path, text, "t.json"), clients=4, seed=0, repeat_s=None)


def test_a_trace_that_is_not_there_ends_in_one_line_before_anything_is_made(tmp_path):
    settings = load_settings(
        None, [f"presence.trace={tmp_path / 'none.csv'}", f"output={tmp_path / 'runs'}"]
    )
    with pytest.raises(
        SettingsError, match=r"presence\.trace .*none\.csv.* cannot be read: No such"
    ):
        run(settings)
    assert not (tmp_path / "runs").exists()


def test_a_trace_is_part_of_what_a_run_is_made_of(tmp_path):
    trace = written(tmp_path, "client,from,to\n*,0,5\n")
    settings = load_settings(None, [f"presence.trace={trace}", f"output={tmp_path}"])
    first = provenance_of(settings).data
    trace.write_text("client,from,to\n*,0,6\n")
    assert provenance_of(settings).data != first
    assert [name for name in first if name.endswith("trace.csv")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["presence.leave=0.1", "presence.come_back=0"], r"presence\.come_back must be > 0"),
        (["presence.repeat_s=5"], r"presence\.repeat_s needs presence\.trace"),
        (["presence.join_rounds=[]"], "needs at least one round"),
        (["presence.join_rounds=[0]"], r"presence\.join_rounds"),
        (["presence.leave=2"], r"presence\.leave"),
    ],
)
def test_a_presence_that_cannot_be_is_refused(words, told):
    with pytest.raises(SettingsError, match=told):
        load_settings(None, words)


# -- rounds ------------------------------------------------------------------------------------


def asked(done):
    """Who took part in each round, by what they sent."""
    found = {}
    for row in done.exchange:
        if row["direction"] == "up":
            found.setdefault(row["round"], set()).add(row["client"])
    return found


def test_only_those_who_are_there_are_asked(tiny_settings, tiny_data, simulate):
    done = simulate(tiny_settings(presence={"join_rounds": [1, 2, 3, 1]}), tiny_data())
    assert asked(done) == {1: {0, 3}, 2: {0, 1, 3}, 3: {0, 1, 2, 3}}
    assert [row["present"] for row in done.history.federation] == [2, 3, 4]
    assert done.events == []


def test_clients_are_drawn_among_those_who_are_there(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(
        rounds=6, clients={"participants": 2}, presence={"join_rounds": [1, 5, 1, 1]}
    )
    found = asked(simulate(settings, tiny_data()))
    assert all(len(clients) == 2 for clients in found.values())
    assert not any(1 in found[round] for round in range(1, 5))
    assert len({frozenset(clients) for clients in found.values()}) > 1


def test_everybody_there_is_as_if_nothing_was_said(tiny_settings, tiny_data, simulate):
    plain = tiny_settings(clients={"participants": 2})
    present = tiny_settings(clients={"participants": 2}, presence={"join_rounds": [1]})
    assert simulate(present, tiny_data()).digest == simulate(plain, tiny_data()).digest


def test_a_round_without_anybody_is_left_out_and_takes_its_time(
    tiny_settings, tiny_data, simulate, tmp_path
):
    trace = written(tmp_path, "client,from,to\n*,0,1\n*,150,1e6\n")
    settings = tiny_settings(
        rounds=4,
        clock={"speed": 1e7, "latency_s": 1.0},
        presence={"trace": str(trace), "round_s": 100.0},
    )
    done = simulate(settings, tiny_data())
    rows = done.history.federation
    assert [row["participants"] for row in rows] == [4, 0, 0, 4]
    assert [row.get("skipped", False) for row in rows] == [False, True, True, False]
    times = [row["simulated_s"] for row in rows]
    assert 2 < times[0] < 3
    assert times[1:3] == pytest.approx([times[0] + 100, times[0] + 200])
    assert [event["event"] for event in done.events] == ["round skipped", "round skipped"]
    assert done.events[0]["reason"] == "nobody is there (presence)"
    # Models are what they were after the first round.
    assert rows[1]["accuracy"] == rows[2]["accuracy"] == rows[0]["accuracy"]


def test_without_a_clock_a_round_lasts_what_is_said(tiny_settings, tiny_data, simulate, tmp_path):
    trace = written(tmp_path, "client,from,to\n0,0,100\n1,100,150\n2,200,201\n")
    settings = tiny_settings(
        rounds=4,
        presence={"trace": str(trace), "round_s": 100.0, "repeat_s": 300.0},
    )
    assert asked(simulate(settings, tiny_data())) == {1: {0}, 2: {1}, 3: {2}, 4: {0}}


class Stop(Observer):
    def metrics(self, rows):
        if rows[0]["round"] == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_clients_at_the_same_times(
    tiny_settings, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "load_data", lambda _: tiny_data())
    trace = written(tmp_path, "client,from,to\n0,0,4\n1,0,1e6\n2,3,1e6\n3,5,1e6\n")
    settings = tiny_settings(
        rounds=5,
        output=tmp_path / "runs",
        clock={"speed": 1e8, "latency_s": 0.6},
        presence={"trace": str(trace), "leave": 0.2},
        checkpoints={"every": 1},
    )
    whole = run(settings)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(settings, observers=[Stop()])
    resumed = run(resume=stop.value.folder)
    assert resumed.weights_sha256 == whole.weights_sha256
    exchange = [read_rows(place.folder / "exchange.jsonl") for place in (whole, resumed)]
    assert exchange[0] == exchange[1]


def test_a_run_does_not_go_on_with_another_trace(tiny_settings, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_data", lambda _: tiny_data())
    trace = written(tmp_path, "client,from,to\n*,0,1e6\n")
    settings = tiny_settings(
        output=tmp_path / "runs", presence={"trace": str(trace)}, checkpoints={"every": 1}
    )
    with pytest.raises(KeyboardInterrupt) as stop:
        run(settings, observers=[Stop()])
    trace.write_text("client,from,to\n*,0,1e7\n")
    with pytest.raises(SettingsError, match=r"trace\.csv changed"):
        run(settings, resume=stop.value.folder)


def test_a_byte_budget_holds_where_clients_are_absent(tiny_settings, tiny_data, simulate, tmp_path):
    trace = written(tmp_path, "client,from,to\n0,0,90\n1,0,250\n*,150,1e6\n")
    settings = tiny_settings(
        rounds=4,
        exchange={"budget_kb": 6.0},
        presence={"trace": str(trace), "round_s": 100.0},
    )
    done = simulate(settings, tiny_data())
    assert [row["participants"] for row in done.history.federation] == [2, 1, 3, 2]
    night = written(tmp_path, "client,from,to\n*,0,190\n", "night.csv")
    settings = tiny_settings(
        rounds=3,
        exchange={"budget_kb": 6.0},
        presence={"trace": str(night), "round_s": 100.0},
    )
    ended = simulate(settings, tiny_data())
    assert [row["participants"] for row in ended.history.federation] == [4, 4, 0]
    for each in (done, ended):
        assert 0 < sum(row["bytes"] for row in each.exchange) <= 6000
