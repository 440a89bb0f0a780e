import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from sim.reports import pair_rows, plane_tables, summary_rows, summary_table
from sim.reports.grids import Axis, Grid
from sim.reports.statistics import Difference, Estimate, Measure
from sim.reports.tables import kilobytes, p_text, percent


def printed(runs, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(summary_table(runs))
    return console.file.getvalue()


def study(make_run):
    extra = {"server_accuracy": 0.5, "ensemble_accuracy": 0.75}
    return {
        "local": [make_run(seed=s, accuracies=(0.5 + s / 100,), silent=True) for s in range(3)],
        "dml-with-a-cold-start": [
            make_run(seed=s, accuracies=(0.6 + s / 50,), federation=extra) for s in range(3)
        ],
    }


@pytest.mark.parametrize("width", [100, 120])
def test_the_full_table_fits_a_terminal(make_run, width):
    text = printed(study(make_run), width)
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith("local"))
    # 0.50, 0.51, 0.52: t(0.975, 2) * 0.01 / sqrt(3) = 0.0248
    for cell in ("51.0 ±2.5", "51.0", "41.0", "56.0", "0.0", "7.5"):
        assert cell in line
    for cell in ("62.0 ±5.0", "50.0", "75.0", "1.0", "3.0", "+11.0 ±2.5", "0.003"):
        assert cell in text


def test_the_baseline_is_what_others_are_compared_with(make_run):
    runs = {**study(make_run), "third": [make_run(seed=s, accuracies=(0.9,)) for s in range(3)]}
    first, other, third = summary_rows(runs, "dml-with-a-cold-start")
    assert first["difference"] == pytest.approx(-0.11)
    assert other["difference"] is None
    smaller, larger = third["difference_p_value"], first["difference_p_value"]
    assert smaller < larger < 2 * smaller
    assert third["difference_p_holm"] == first["difference_p_holm"] == pytest.approx(2 * smaller)
    assert (third["difference_ahead"], third["difference_p_sign_flip"]) == (3, 0.25)
    pairs = pair_rows(runs)
    assert [(pair["first"], pair["other"]) for pair in pairs] == [
        ("local", "dml-with-a-cold-start"),
        ("local", "third"),
        ("dml-with-a-cold-start", "third"),
    ]
    assert pairs[0]["difference"] == pytest.approx(0.11)
    # Differences 10, 11, 12 points: of standard deviation 1.
    assert pairs[0]["difference_sd"] == pytest.approx(0.01)
    assert pairs[0]["difference_detectable"] == pytest.approx(0.0326, abs=5e-5)
    assert (pairs[0]["difference_p_smallest"], pairs[0]["difference_decided"]) == (0.25, True)
    assert pairs[0]["difference_seeds_needed"] == 7
    assert pair_rows(runs, 0.02)[0]["difference_seeds_needed"] == 4
    assert json.loads(json.dumps(pairs, allow_nan=False)) == pairs


def test_mean_bits_of_a_number_stand_beside_the_bytes_of_runs_under_a_budget(make_run):
    # Two rounds of 2 and 4, 4 and 8 bits; a seed more of 4 and 8, 8 and 16: 3 and 6, 6 and 12.
    budgeted = [
        make_run(seed=0, bits={"up": 2, "down": 4}),
        make_run(seed=1, bits={"up": 4, "down": 8}),
    ]
    runs = {"without": [make_run(seed=0), make_run(seed=1)], "budget": budgeted}
    first, second, without, budget = printed(runs, 200).splitlines()[1:5]
    assert "kB   kB bits bits" in first
    assert "up down   up down" in second
    assert " ".join(without.split()[7:11]) == "2.0 6.0 – –"  # noqa: RUF001
    assert " ".join(budget.split()[7:11]) == "2.0 6.0 4.5 9.0"
    assert "bits" not in printed({"without": [make_run(seed=2)]}, 200)


def test_few_seeds_are_marked_and_many_are_not(make_run):
    def runs(count):
        return {
            name: [make_run(seed=s, accuracies=(base + s * s * step,)) for s in range(count)]
            for name, base, step in (("a", 0.3, 0.001), ("b", 0.6, 0.002))
        }

    few, enough = printed(runs(2), 140), printed(runs(6), 140)
    assert few.count("*") == 3 + 1 + 1  # two means, a difference; a p; and what it means
    assert "*" not in enough
    assert "6 seeds" in enough


def test_one_run_has_no_comparison_and_no_interval(make_run):
    text = printed({"dml": [make_run()]}, 100)
    assert "60.0" in text
    assert "±" not in text.splitlines()[4]
    for column in ("minus", "server", "ensemble"):
        assert column not in text


def test_names_are_not_markup(make_run):
    assert "[bold]x" in printed({"[bold]x": [make_run()]}, 120)


def test_interrupted_runs_are_marked(make_run):
    killed = make_run(seed=1, status=None)
    assert "(interrupted)" in printed({"dml": [killed]}, 120)
    assert "1 interrupted run(s) left out" in " ".join(
        printed({"dml": [make_run(), killed]}, 120).split()
    )


def test_no_runs_make_an_empty_table():
    assert summary_table({}).labels == []
    assert summary_rows({"dml": []}) == []


def test_rows_are_plain_values_with_none_for_what_is_missing(make_run):
    first, other = summary_rows(study(make_run))
    assert json.loads(json.dumps([first, other], allow_nan=False)) == [first, other]
    assert first["accuracy"] == pytest.approx(0.51)
    assert first["accuracy_high"] == pytest.approx(0.51 + 0.0248414, abs=1e-6)
    assert first["server_accuracy"] is None
    assert first["difference"] is None
    assert other["accuracy_selected"] == pytest.approx(0.62)
    assert other["difference"] == pytest.approx(0.11)
    assert other["difference_pairs"] == 3
    assert 0 < other["difference_p_value"] < 0.01
    assert other["bytes_down_per_client"] == 3000
    assert first.keys() == other.keys()


def test_texts_of_numbers():
    assert percent(Estimate(0.9126, None, None, 1)) == "91.3"
    assert percent(Estimate(0.9126, 0.9026, 0.9226, 3)) == "91.3 ±1.0*"
    assert percent(Estimate(0.9126, 0.9026, 0.9226, 6)) == "91.3 ±1.0"
    assert percent(Estimate(0.9126, 0.7526, 1.0, 2, clipped=True)) == "91.3 [75.3, 100]*"
    gap = Difference(-0.25, -1.0, 0.5, 0.2, 6, clipped=True)
    assert percent(gap, signed=True) == "-25.0 [-100, +50]"
    assert percent(Difference(-1e-5, None, None, None, 1), signed=True) == "+0.0"
    assert p_text(0.0004) == "<0.001"
    assert p_text(0.0123, few=True) == "0.012*"
    assert p_text(None, few=True) == "–"  # noqa: RUF001
    assert [kilobytes(value) for value in (0.0, 6.0, 99.9, 100.0, 12345.6)] == [
        *("0.0", "0.006", "0.1", "0.1", "12.3")
    ]
    assert kilobytes(Estimate(45.0, None, None, 1)) == "0.045"


# -- the simulated clock -----------------------------------------------------------------------


def clocked(make_run, accuracies, *, seed=0, pace=1.0):
    """A run whose rounds take ``pace`` simulated seconds each, with a target of 80 %."""
    run = make_run(
        seed=seed,
        accuracies=accuracies,
        settings={"clock": {"speed": 1.0, "target_accuracy": 0.8}},
    )
    rows = tuple({**row, "simulated_s": pace * row["round"]} for row in run.federation)
    return replace(run, federation=rows)


def test_the_time_to_a_target_is_that_of_the_first_round_that_has_it(make_run):
    runs = {
        "slow": [clocked(make_run, (0.7, 0.85, 0.79), pace=10.0)],
        "some": [
            clocked(make_run, (0.81, 0.7), seed=0),
            clocked(make_run, (0.5, 0.7), seed=1),
            clocked(make_run, (0.5, 0.6, 0.8), seed=2),
        ],
        "none": [clocked(make_run, (0.79, 0.79), pace=0.25)],
    }
    rows = summary_rows(runs)
    assert [row["simulated_s_to_target"] for row in rows] == [20.0, 2.0, None]
    assert [row["reached_target"] for row in rows] == [1, 2, 0]
    assert [row["simulated_s"] for row in rows] == [30.0, pytest.approx(7 / 3), 0.5]
    text = printed(runs, 100)
    assert "s to 80 %" in " ".join(text.split())
    for cells in ("20.0", "2 (2 of 3)", "never", "30.0", "0.5"):
        assert cells in text


def test_time_to_target_fits_80_columns_and_is_not_there_without_a_clock(make_run):
    runs = {
        arm: [clocked(make_run, (0.7, 0.85), seed=seed, pace=1234.5) for seed in range(3)]
        for arm in ("local", "dml", "fedmd")
    }
    text = printed(runs, 80)
    assert "2,469.0" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "s to" not in printed({"plain": [make_run(seed=0)]}, 200)
    assert "sim. s" not in printed({"plain": [make_run(seed=0)]}, 200)


def tradeoff(make_run):
    """Two seeds of an arm without a promise, and of two with."""
    return {
        "none": [make_run(seed=s, accuracies=(0.9, 0.8 + s / 50)) for s in range(2)],
        "weak": [
            make_run(
                seed=s,
                accuracies=(0.7, 0.6 + s / 50),
                privacy={"mechanism": "gaussian", "epsilon": 16, "where": "server"},
            )
            for s in range(2)
        ],
        "strong": [
            make_run(
                seed=s, accuracies=(0.4, 0.3), privacy={"mechanism": "dp_sgd", "epsilon": 0.125}
            )
            for s in range(2)
        ],
    }


def test_epsilon_stands_beside_arms_that_promise_it_and_validation_does_not(make_run):
    runs = tradeoff(make_run)
    text = printed(runs, 200)
    none, weak, strong = (
        next(line for line in text.splitlines() if line.startswith(arm)).split() for arm in runs
    )
    # Arm, mean client with its interval, and the same at the best round by validation.
    assert none[3] == "90.0"
    assert weak[3] == strong[3] == "–"  # noqa: RUF001
    assert "16" in weak
    assert "0.125" in strong
    assert "epsilon: the largest of any client" in " ".join(text.split())
    assert [row["epsilon"] for row in summary_rows(runs)] == [None, 16, 0.125]
    assert [row["accuracy_selected"] for row in summary_rows(runs)] == [0.9, None, None]


def test_without_a_promise_there_is_no_column_and_with_one_alone_none_of_validation(make_run):
    runs = tradeoff(make_run)
    assert "epsilon" not in printed({"none": runs["none"]}, 200)
    assert "at best" in printed({"none": runs["none"]}, 200)
    promised = printed({"weak": runs["weak"], "strong": runs["strong"]}, 200)
    assert "epsilon" in promised
    assert "at best" not in promised


def test_arms_that_could_not_run_have_a_line_in_their_place(make_run):
    runs = {"a": [make_run()], "b": [], "c": [make_run(seed=0)]}
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(summary_table(runs, "a", {"b": "for a reason"}))
    lines = console.file.getvalue().splitlines()[3:6]
    assert [line.split()[0] for line in lines] == ["a", "b", "c"]
    assert lines[1].split()[1:4] == ["(refused)", "–", "–"]  # noqa: RUF001
    assert [row["arm"] for row in summary_rows(runs, "a")] == ["a", "c"]


def test_a_sweep_is_a_table_of_rows_and_columns_that_a_terminal_holds(make_run):
    rules, shares = Axis("strategy.aggregation", ("mean", "median")), Axis("f", (0, 0.2, 0.4))
    runs = {
        str(place): [make_run(seed=s, accuracies=(0.5 + place / 10 + s / 50,)) for s in range(3)]
        for place in range(4)
    }
    grid = Grid((rules, shares), ("0", "1", "2", "0", "bad", "3"))
    (table,) = plane_tables({**runs, "bad": []}, grid, {"bad": "for a reason"})
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table)
    assert [" ".join(line.split()) for line in console.file.getvalue().splitlines()] == [
        "Mean client accuracy, last round, %",
        "aggregation f 0 f 0.2 f 0.4",
        "mean 52.0 ±5.0* 62.0 ±5.0* 72.0 ±5.0*",
        "median 52.0 ±5.0* refused 82.0 ±5.0*",
    ]


def test_a_measure_is_a_column_wherever_one_of_the_arms_has_it(make_run, monkeypatch):
    leak = Measure("leak", 1, lambda run: run.seed / 10 if run.seed else None, share=True)
    monkeypatch.setattr("sim.reports.statistics.MEASURES", {"leak": leak})
    monkeypatch.setattr("sim.reports.tables.MEASURES", {"leak": leak})
    runs = {"a": [make_run(seed=1), make_run(seed=2)], "b": [make_run(seed=0)]}
    first, second = summary_rows(runs, "a")
    assert (first["leak"], second["leak"]) == (pytest.approx(0.15), None)
    # 12.71 * 0.0707 / sqrt(2) = 0.64 beyond both ends of a share
    assert (first["leak_low"], first["leak_high"]) == (0.0, pytest.approx(0.785, abs=1e-3))
    assert "15.0 [0, 78.5]*" in printed(runs, 200)
    assert "leak" not in printed({"b": runs["b"]}, 200)
