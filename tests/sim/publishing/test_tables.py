import csv
import io
import json
import shutil
import subprocess

import pytest

from sim.publishing.frames import tidy_rows
from sim.publishing.studies import open_study
from sim.publishing.tables import best_arm, table, table_texts, to_latex, to_markdown
from sim.reports.tables import summary_rows
from sim.settings import SettingsError


def test_a_table_says_what_it_shows_and_lines_numbers_up(with_accuracies):
    study = with_accuracies({"local": [0.5, 0.6, 0.7], "my_dml": [0.9, 0.91, 0.92]})
    # t(0.975, 2) = 4.3027: 0.1 / sqrt(3) * 4.3027 = 0.2484; a tenth of it is 0.0248.
    text = to_latex(table_texts(study, ["accuracy", "difference", "p_holm"])[0])
    assert r"local & 60.0 +- 24.8 & {--} & {--} \\" in text
    assert r"my\_dml & \bfseries 91.0 +- 2.5 & +31.0 +- 22.4 & 0.027 \\" in text
    assert "S[table-format=2.1(3)]S[table-format=+2.1(3)]S[table-format=1.3]" in text
    assert r"\label{tab:small-study}" in text
    for word in ("3 seeds", "2 clients", "2 rounds", "concentration 1", "mlp", "t-interval"):
        assert word in text
    assert "few seeds" in text


def test_an_interval_that_is_cut_off_keeps_its_two_ends(with_accuracies):
    study = with_accuracies({"local": [0.8, 0.99], "dml": [0.5, 0.5]})
    text = to_latex(table_texts(study, ["accuracy"])[0])
    assert "{89.5 [0, 100]}" in text
    assert "50.0 +- 0.0" in text


def test_bold_is_who_is_ahead_of_every_other_beyond_chance(with_accuracies):
    ahead = with_accuracies(
        {"a": [0.1, 0.2, 0.15], "b": [0.2, 0.31, 0.24], "best": [0.8, 0.92, 0.84]}
    )
    assert best_arm(ahead.runs, "accuracy", "last") == "best"
    [shown] = table_texts(ahead, ["accuracy", "bytes_up"])
    assert [[cell.bold for cell in cells] for _, cells in shown.rows] == [
        [False, False],
        [False, False],
        [True, False],
    ]
    assert "Bold: ahead of every other arm" in shown.caption
    assert r"\bfseries 85.3" in to_latex(shown)
    assert "**85.3" in to_markdown(shown)
    near = with_accuracies({"a": [0.1, 0.2, 0.15], "b": [0.2, 0.19, 0.24], "c": [0.9, 0.1, 0.8]})
    assert best_arm(near.runs, "accuracy", "last") is None
    assert "none is in bold" in table_texts(near, ["accuracy"])[0].caption
    one = with_accuracies({"a": [0.1], "b": [0.9]})
    assert best_arm(one.runs, "accuracy", "last") is None


def test_lead_over_one_rival_is_not_enough(with_accuracies):
    study = with_accuracies(
        {"a": [0.1, 0.2, 0.15], "b": [0.79, 0.93, 0.83], "c": [0.8, 0.92, 0.84]}
    )
    assert best_arm(study.runs, "accuracy", "last") is None


def test_a_sweep_is_a_grid_of_its_values(swept):
    text = table(swept, "markdown")
    head, _, *rows = text.splitlines()
    assert head == "| temperature | alpha 0.5 | alpha 1 |"
    assert [row.split("|")[1].strip() for row in rows[:2]] == ["1", "4"]
    study = open_study(swept)
    by_arm = {row["arm"]: row["accuracy"] for row in summary_rows(study.runs)}
    plane = study.grid.planes[0]
    assert rows[1].split("|")[3].strip() == f"{100 * by_arm[plane.arms[1][1]]:.1f}"
    # What is no accuracy has a line for each arm.
    assert table(swept, "markdown", measures=["accuracy", "bytes_up"]).count("\n| ") == 4


def test_tidy_rows_have_the_settings_that_tell_arms_apart(swept):
    rows = tidy_rows(open_study(swept), "runs")
    assert [(row["strategy.temperature"], row["data.partition.alpha"]) for row in rows] == [
        (1.0, 0.5),
        (1.0, 1),
        (4.0, 0.5),
        (4.0, 1),
    ]


def test_tidy_rows_are_what_the_runs_measured(study):
    runs = tidy_rows(study, "runs")
    assert [(row["arm"], row["seed"]) for row in runs] == [
        ("local", 0),
        ("local", 1),
        ("dml", 0),
        ("dml", 1),
    ]
    of_dml = study.runs["dml"][0]
    assert runs[2]["accuracy"] == of_dml.last["accuracy"]
    assert (
        runs[2]["bytes_up_per_client"] == of_dml.bytes_up[0] > 0 == runs[0]["bytes_up_per_client"]
    )
    rounds = tidy_rows(study, "rounds")
    lines = (of_dml.folder / "metrics.jsonl").read_text().splitlines()
    kept = [row for row in map(json.loads, lines) if row["scope"] == "federation"]
    of_run = [row for row in rounds if (row["arm"], row["seed"]) == ("dml", 0)]
    assert [row["accuracy"] for row in of_run] == [row["accuracy"] for row in kept]
    assert len({tuple(row) for row in rounds}) == 1
    assert len(tidy_rows(study, "clients")) == 2 * 2 * 2 * 2
    arms = tidy_rows(study, "arms")
    assert [row["seeds"] for row in arms] == [2, 2]
    assert arms[1]["difference"] == pytest.approx(arms[1]["accuracy"] - arms[0]["accuracy"])


def test_csv_and_parquet_hold_the_same_rows(finished, tmp_path):
    import pandas as pd

    text = table(finished, "csv", rows="rounds")
    assert table(finished, "parquet", rows="rounds", output=tmp_path / "a.parquet") == ""
    frame = pd.read_parquet(tmp_path / "a.parquet")
    read = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["accuracy"]) for row in read] == frame["accuracy"].tolist()
    assert frame["seed"].tolist() == [int(row["seed"]) for row in read]


def test_the_table_of_a_run_has_one_line(study):
    folder = study.runs["dml"][1].folder
    assert table(folder, "markdown").count("\n| ") == 1
    assert "seed" in table(folder, "csv").splitlines()[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "latx"}, "--format must be one of latex, .*got 'latx'; did you mean 'latex'"),
        ({"format": "md"}, "--format must be .*got 'md'; did you mean 'markdown'"),
        ({"at": "best"}, "--at must be one of last, selected, got 'best'"),
        ({"measures": ["acuracy"]}, "measures must be one of accuracy.*got 'acuracy'.*accuracy"),
        ({"format": "csv", "measures": ["accuracy"]}, "csv has every measure"),
        ({"format": "csv", "rows": "seeds"}, "--rows must be one of arms, runs, rounds, clients"),
        ({"rows": "runs"}, "--rows is for .*got --format latex"),
        ({"format": "parquet"}, "--output runs.parquet"),
    ],
)
def test_a_slip_is_named(finished, options, said):
    with pytest.raises(SettingsError, match=said):
        table(finished, **options)


def test_what_is_no_study_and_what_cannot_be_written_are_named(finished, tmp_path):
    with pytest.raises(SettingsError, match="neither a study folder"):
        table(tmp_path)
    with pytest.raises(SettingsError, match="--output: cannot write"):
        table(finished, output=tmp_path / "no" / "a.tex")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_every_table_compiles_whatever_arms_are_called(finished, swept, with_accuracies, tmp_path):
    odd = with_accuracies({"a_b&c%$#{}~^\\": [0.9, 0.99, 1.0], "x|y<z>": [0.1, 0.2, 0.1]})
    every = to_latex(table_texts(odd, ["accuracy"])[0])
    body = "\n".join([table(finished), table(swept), every])
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,siunitx}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "paper.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
