"""Studies and values of a sweep as data sets: tables, rows, the figure and both commands."""

import json

import numpy as np
import pytest

from sim.reports.grids import Axis, Grid
from sim.reports.rank_figures import critical_difference_diagram
from sim.reports.rankings import pairs_table, ranks, ranks_row, ranks_table, ranks_words
from sim.reports.ranks import Ranking
from sim.settings import SettingsError

RISES = {"one": {"a": 0.0, "b": 0.1, "c": 0.2}, "two": {"b": 0.1, "a": 0.15, "only": 0.3}}


def write_study(folder, arms, run_folder, grid=None, seeds=2, source=None):
    for arm, accuracy in arms.items():
        for seed in range(seeds):
            run_folder(
                folder / arm / f"seed-{seed}",
                seed=seed,
                accuracies=[0.5 + accuracy + seed / 100],
                silent=True,
                settings={"data": {"source": source or folder.name}},
            )
    table = {
        "name": folder.name,
        "baseline": next(iter(arms)),
        "arms": {arm: [f"{arm}/seed-{seed}" for seed in range(seeds)] for arm in arms},
        **({"grid": grid.to_row()} if grid else {}),
    }
    (folder / "study.json").write_text(json.dumps(table))
    return folder


@pytest.fixture
def studies(tmp_path, run_folder):
    return [write_study(tmp_path / name, arms, run_folder) for name, arms in RISES.items()]


def test_studies_are_data_sets_and_arms_those_that_all_have(studies):
    found = ranks(studies)
    assert (found.sets, found.arms, found.left_out) == (("one", "two"), ("a", "b"), ("c", "only"))
    assert found.scores == pytest.approx(np.array([[0.505, 0.605], [0.655, 0.605]]))
    assert found.mean_ranks == {"a": 1.5, "b": 1.5}
    assert found.seeds == (2, 2)
    row = ranks_row(found)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["verdicts"][0].startswith("Over two data sets the 2 arms cannot be said to differ")
    assert "Two data sets are few: no pair can have a corrected p below 0.5." in row["verdicts"]
    table = ranks_table(found)
    assert table.columns[1].cells == ["50.5 (2)", "60.5 (1)"]
    assert "left out, since a data set lacks them: c, only" in table.caption
    assert pairs_table(found).columns[0].cells == ["1 of 2"]


def test_values_of_the_data_in_a_sweep_are_data_sets(tmp_path, run_folder):
    arms = {"a-1": 0.0, "a-2": 0.1, "b-1": 0.2, "b-2": 0.3}
    grid = Grid(
        (
            Axis("arm", ("a", "b")),
            Axis("data.partition.alpha", (1, 2)),
            Axis("rounds", (5,)),
        ),
        tuple(arms),
    )
    study = write_study(tmp_path / "sweep", arms, run_folder, grid)
    found = ranks([study])
    assert (found.sets, found.arms) == (("alpha 1", "alpha 2"), ("a", "b"))
    # The other way round the arms of the study are what is ranked over.
    turned = ranks([study], over=["arm"])
    assert (turned.sets, turned.arms) == (("arm a", "arm b"), ("1", "2"))
    assert turned.scores == pytest.approx(found.scores.T)
    with pytest.raises(SettingsError, match=r"'data\.alpha' is not swept over in 'sweep'"):
        ranks([study], over=["data.alpha"])


def test_what_cannot_be_ranked_is_said(studies):
    with pytest.raises(SettingsError, match=r"at least two data sets .* got 1"):
        ranks(studies[:1])
    with pytest.raises(SettingsError, match="did you mean 'accuracy'"):
        ranks(studies, measure="acuracy")
    with pytest.raises(SettingsError, match="with 0"):
        ranks(studies, measure="server_accuracy")


def test_two_studies_of_the_same_data_are_no_two_data_sets(tmp_path, run_folder):
    same = [
        write_study(tmp_path / name, {"a": 0.0, "b": 0.1}, run_folder, source="digits")
        for name in ("first", "again")
    ]
    with pytest.raises(SettingsError, match=r"'.*first' and '.*again' deal the same data"):
        ranks(same)
    # A sweep over something else than the data is one data set, too.
    grid = Grid((Axis("strategy.temperature", (1, 4)),), ("a", "b"))
    swept = [
        write_study(tmp_path / name, {"a": 0.0, "b": 0.1}, run_folder, grid, source="digits")
        for name in ("swept", "swept-again")
    ]
    with pytest.raises(SettingsError, match=r"'.*swept' and '.*swept-again' deal the same data"):
        ranks(swept)


def test_the_diagram_names_every_arm_and_joins_those_alike():
    scores = np.tile([0.9, 0.8, 0.7, 0.6], (12, 1))
    scores[::2, 0], scores[::2, 1] = 0.8, 0.9
    ranking = Ranking(("w", "_x", "y", "z"), tuple("abcdefghijkl"), scores, (3,) * 12)
    # 2.569 * sqrt(4 * 5 / 72) = 1.354: w and x at 1.5, y at 3 and z at 4.
    assert ranking.cliques == [("w", "_x"), ("y", "z")]
    figure = critical_difference_diagram(ranking)
    (axes,) = figure.axes
    texts = " ".join(text.get_text() for text in axes.texts)
    for told in ("w  1.50", "x  1.50", "3.00  y", "4.00  z", "critical difference 1.35"):
        assert told in texts
    bars = [line for line in axes.lines if line.get_linewidth() == 4]
    assert len(bars) == 2
    said = ranks_words(ranking)
    assert said[0].startswith("Over 12 data sets the 4 arms differ (Friedman's test: F(3, 33) = ")
    assert said[1].endswith("not told apart: w, _x; y, z.")
    assert len(said) == 2
