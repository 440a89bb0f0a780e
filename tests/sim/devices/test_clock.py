"""A simulated clock: seconds worked out by hand, deadlines, and the same seconds everywhere."""

import re
from collections import Counter

import numpy as np
import pytest

from fedkd.models import ModelSettings
from fedkd.training import Network, RowFlops, Work
from sim.commands import running
from sim.commands.running import run
from sim.devices.clock import PROFILES, Clock, ClockSettings, RowCosts
from sim.keeping.records import read_rows
from sim.server.observers import Observer
from sim.server.replies import TooLateError
from sim.settings import SettingsError, load_settings

MLP = Network(ModelSettings(name="mlp", options={"hidden": [8]}), (1, 8, 8))
# 64 pixels, 8 units, 5 classes: forwards 2 (64 x 8 + 8 x 5); backwards once more for the weights,
# and for the second layer's inputs.
ROW = RowFlops(trained=2 * 2 * (64 * 8 + 8 * 5) + 2 * 8 * 5, predicted=2 * (64 * 8 + 8 * 5))


QUICK_SERVER = {"server_steps": 20, "patience": 20, "validate_every": 10}


def clock(clients=4, seed=0, **settings):
    return Clock(ClockSettings.model_validate(settings), clients=clients, seed=seed, num_classes=5)


def rows_of(run, scope):
    return [row for row in run.metrics if row["scope"] == scope]


# -- seconds -----------------------------------------------------------------------------------


def test_a_client_takes_its_operations_and_its_bytes():
    work = Work(trained=Counter({MLP: 10}), predicted=Counter({MLP: 3}))
    flops = 10 * ROW.trained + 3 * ROW.predicted
    slow = clock(speed=[1000, 500], up=20, down=[100, 50], latency_s=0.25)
    spent = slow.spent(1, work, bytes_down=200, bytes_up=60, delay_s=7.0)
    assert spent.flops == flops
    # 200 bytes at 50 a second, 60 at 20, and two ways.
    assert spent.seconds == pytest.approx(7 + 4 + 3 + 0.5 + flops / 500)


def test_what_is_not_said_takes_no_time():
    work = Work(trained=Counter({MLP: 10}))
    assert clock(up=10).spent(0, work, bytes_down=99, bytes_up=20).seconds == 2
    assert clock(speed=10).server_seconds(work) == 0
    assert clock(speed=10, server_speed=ROW.trained).server_seconds(work) == 10


def test_rates_are_dealt_out_in_turn_over_those_of_the_profiles():
    devices = clock(profiles=["phone", "server"], up=[1, 2, 3])
    assert [devices.device(client).up for client in range(4)] == [1, 2, 3, 1]
    assert [devices.device(client).speed for client in range(3)] == [
        PROFILES[name].speed for name in ("phone", "server", "phone")
    ]


def test_a_distribution_has_its_median_and_its_spread_and_comes_from_the_seed():
    drawn = clock(20_000, speed={"median": 100.0, "sigma": 0.5})
    logs = np.log([drawn.device(client).speed for client in range(20_000)])
    assert logs.mean() == pytest.approx(np.log(100), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)
    same = clock(20_000, speed={"median": 100.0, "sigma": 0.5})
    other = clock(20_000, seed=1, speed={"median": 100.0, "sigma": 0.5})
    assert same.device(7) == drawn.device(7) != other.device(7)
    # Each kind of rate is drawn for itself.
    both = clock(speed={"median": 100.0}, up={"median": 100.0})
    assert both.device(0).speed != both.device(0).up


# -- rounds ------------------------------------------------------------------------------------


def test_a_round_lasts_as_long_as_its_slowest_client(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(
        "dml",
        clients={"models": [MLP.model], "local": {"epochs": 2}},
        clock={"speed": [1e6, 5e5, 1e6, 1e6], "up": 1000, "down": 2000, "latency_s": 0.1},
    )
    data = tiny_data()
    done = simulate(settings, data)
    public, total = len(data.public_inputs), 0.0
    costs = RowCosts(data.num_classes)[Network(MLP.model, data.input_shape)]
    for round in (1, 2, 3):
        expected = []
        for client, private in enumerate(data.client_rows):
            # From the second round on each step takes public rows too, every one once a round or
            # more: two for each step at least.
            steps = 2 * -(-len(private) // 8) - 2 * (len(private) % 8 == 1)
            passes = max(1, -(-2 * steps // public)) if round > 1 else 0
            flops = (2 * len(private) + passes * public) * costs.trained
            flops += public * costs.predicted
            sizes = {
                row["direction"]: row["bytes"]
                for row in done.exchange
                if (row["round"], row["client"]) == (round, client)
            }
            seconds = flops / [1e6, 5e5, 1e6, 1e6][client] + 0.2
            expected.append(seconds + sizes["up"] / 1000 + sizes.get("down", 0) / 2000)
        total += max(expected)
        found = [row["simulated_s"] for row in rows_of(done, "client") if row["round"] == round]
        assert found == pytest.approx(expected)
        assert rows_of(done, "federation")[round - 1]["simulated_s"] == pytest.approx(total)


def test_a_clock_changes_no_bit_and_without_one_no_row_knows_of_it(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    without = simulate(tiny_settings("fedmd", rounds=2), data)
    timed = simulate(tiny_settings("fedmd", rounds=2, clock={"profiles": ["phone"]}), data)
    assert timed.digest == without.digest
    assert not any({"simulated_s", "gflops"} & row.keys() for row in without.metrics)


@pytest.mark.parametrize("strategy", ["dml", "fedgkd", "okddip"])
def test_loop_and_stack_take_the_same_time(tiny_settings, tiny_data, simulate, strategy):
    found = []
    for vectorize in ("loop", "vmap"):
        settings = tiny_settings(
            strategy,
            rounds=2,
            clock={"speed": 1e6},
            engine={"backend": "inline", "vectorize": vectorize},
        )
        done = simulate(settings, tiny_data())
        found.append([row["simulated_s"] for row in done.metrics])
    assert found[0] == found[1]


def test_a_server_that_trains_takes_time(tiny_settings, tiny_data, simulate):
    clocks = {"speed": 1e9}, {"speed": 1e9, "server_speed": 1e6}
    quick, slow = (
        simulate(tiny_settings("feddf", rounds=2, clock=each, options=QUICK_SERVER), tiny_data())
        for each in clocks
    )
    assert quick.digest == slow.digest
    assert (
        slow.history.federation[-1]["simulated_s"]
        > 10 * (quick.history.federation[-1]["simulated_s"])
    )


def test_a_delay_passes_by_the_clock_and_nobody_waits(tiny_settings, tiny_data, simulate):
    faults = [{"kind": "delay", "seconds": 1000.0, "clients": [1], "rounds": [2]}]
    done = simulate(tiny_settings(clock={"speed": 1e12}, faults=faults), tiny_data())
    shown = [row["simulated_s"] for row in done.history.federation]
    assert shown[0] < 1 < 1000 < shown[1] < shown[2] < 1001


# -- deadlines ---------------------------------------------------------------------------------


SLOW_2 = {"speed": [1e9, 1e9, 1.0, 1e9], "deadline_s": 5.0}
"""Client 2 takes far longer than the deadline."""


@pytest.mark.parametrize("strategy", ["dml", "fedavg"])
@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_who_is_late_is_left_out_and_stops(tiny_settings, tiny_data, simulate, strategy, vectorize):
    settings = tiny_settings(
        strategy,
        clients={"models": [MLP.model]},
        clock=SLOW_2,
        engine={"backend": "inline", "vectorize": vectorize},
    )
    done = simulate(settings, tiny_data())
    assert [row["replies"] for row in done.history.federation] == [3, 3, 3]
    assert [row["simulated_s"] for row in done.history.federation] == [5.0, 10.0, 15.0]
    assert {(row["event"], row["client"]) for row in done.events} == {("rejected", 2)}
    assert "late: done after" in done.events[0]["reason"]
    assert "clock.deadline_s = 5" in done.events[0]["reason"]
    # Its model is what the seed made it: it has no state.
    assert done.grid.trained_clients() == [0, 1, 3]
    sent = {row["client"] for row in done.exchange if row["direction"] == "up"}
    assert sent == {0, 1, 3}


def test_who_is_late_counts_as_little_as_who_drops_out(tiny_settings, tiny_data, simulate):
    dropped = tiny_settings(faults=[{"kind": "dropout", "clients": [2], "attempts": None}])
    late = tiny_settings(clock=SLOW_2)
    assert simulate(late, tiny_data()).digest == simulate(dropped, tiny_data()).digest


def test_too_many_late_clients_end_the_run_by_name(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(clock={"speed": 1.0, "deadline_s": 5.0})
    told = r"round 1: 0 of 4 clients .*: they take .*deadline_s=(\S+) is enough .*, (\S+) for all"
    with pytest.raises(TooLateError, match=told) as late:
        simulate(settings, tiny_data())
    # What is said to be enough is, and a little less is not.
    enough, for_all = map(float, re.search(told, str(late.value)).groups())
    for deadline_s, replies in ((enough, 2), (for_all, 4)):
        clock = {"speed": 1.0, "deadline_s": deadline_s}
        done = simulate(tiny_settings(clock=clock, rounds=1), tiny_data())
        assert done.history.federation[0]["replies"] >= replies
    with pytest.raises(TooLateError):
        simulate(tiny_settings(clock={"speed": 1.0, "deadline_s": 0.99 * enough}), tiny_data())
    engine = {"backend": "inline", "below_quorum": "skip"}
    done = simulate(
        tiny_settings(clock={"speed": 1.0, "deadline_s": 5.0}, engine=engine), tiny_data()
    )
    # One line each in the place of four, and nobody is asked again: it would take as long.
    assert [row["event"] for row in done.events] == ["all rejected", "round skipped"] * 3
    # The rounds that nobody ended in time passed nevertheless.
    assert [row["simulated_s"] for row in done.history.federation] == [5.0, 10.0, 15.0]


def test_who_is_gone_is_waited_for_and_who_was_not_there_is_not(tiny_settings, tiny_data, simulate):
    def shown(kind):
        settings = tiny_settings(
            rounds=1,
            clock={"speed": 1e12, "deadline_s": 5.0},
            faults=[{"kind": kind, "clients": [0]}],
        )
        return simulate(settings, tiny_data()).history.federation[0]["simulated_s"]

    assert shown("crash") == 5.0
    assert shown("dropout") < 1e-3


# -- everywhere the same -----------------------------------------------------------------------


class Stop(Observer):
    def metrics(self, rows):
        if rows[0]["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_shows_the_same_time(tiny_settings, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_data", lambda _: tiny_data())
    settings = tiny_settings(
        output=tmp_path, clock={"speed": {"median": 1e6}}, checkpoints={"every": 1}
    )
    whole = run(settings)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(settings, observers=[Stop()])
    resumed = run(resume=stop.value.folder)
    shown = [
        [row["simulated_s"] for row in read_rows(place / "metrics.jsonl")]
        for place in (whole.folder, resumed.folder)
    ]
    assert shown[0] == shown[1]


def test_what_judging_takes_does_not_count(tiny_settings, tiny_data, simulate):
    clock = {"speed": 1e6, "server_speed": 1e6}
    often, once = (
        simulate(
            tiny_settings(
                "feddf",
                rounds=2,
                clock=clock,
                evaluation={"every": every},
                options=QUICK_SERVER,
            ),
            tiny_data(),
        ).history.federation[-1]["simulated_s"]
        for every in (1, 2)
    )
    assert often == once


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["clock.speed=0"], r"clock\.speed: must be a number from 1 to 1e\+18.*got 0"),
        (["clock.up=[1,fast]"], r"clock\.up: must be .* got \[1, 'fast'\]"),
        (["clock.down=[]"], r"clock\.down: must be"),
        (["clock.speed={sigma: 1}"], r"clock\.speed: median: Field required"),
        (["clock.profiles=[phone,fridge]"], r"clock\.profiles.*'board', 'phone'"),
        (["clock.profiles=[]"], "need at least one of board, phone"),
        (["clock.deadline_s=3"], r"clock\.deadline_s needs a clock"),
        (["clock.latency_s=3"], r"clock\.latency_s needs a clock"),
        (["clock.target_accuracy=0.5"], r"clock\.target_accuracy needs a clock"),
        (["clock.speed=1", "clock.target_accuracy=50"], r"clock\.target_accuracy"),
    ],
)
def test_a_clock_that_cannot_be_is_refused(words, told):
    with pytest.raises(SettingsError, match=told):
        load_settings(None, words)


def test_settings_of_a_clock_are_read_back():
    settings = load_settings(
        None, ["clock.profiles=phone", "clock.speed={median: 1e9, sigma: 0.5}", "clock.up=[1,2]"]
    )
    assert type(settings).model_validate(settings.to_table()) == settings
    assert settings.clock.on
    assert not load_settings(None, []).clock.on


def test_who_would_be_in_time_when_asked_again_is_asked_again(tiny_settings, tiny_data, simulate):
    faults = [{"kind": "delay", "seconds": 100.0}]  # in the first attempt alone
    settings = tiny_settings(clock={"speed": 1e18, "deadline_s": 5.0}, faults=faults, rounds=1)
    done = simulate(settings, tiny_data())
    assert [row["event"] for row in done.events] == ["all rejected", "round retried"]
    assert done.history.federation[0]["replies"] == 4


def test_a_run_that_no_clock_lets_go_on_does_not_advise_to_resume(small):
    words = ("clock.speed=1e6", "clock.deadline_s=1e-6", "rounds=1")
    with pytest.raises(TooLateError) as late:
        run(small(*words))
    assert not getattr(late.value, "__notes__", [])
