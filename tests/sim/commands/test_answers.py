"""``fedkd cost`` and ``fedkd ranks`` on a study that really ran."""

import json

import pytest


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two arms on two mixes of labels: four arms of a sweep."""
    from sim.commands.arms import load_study
    from sim.commands.study import compare

    output = tmp_path_factory.mktemp("answers")
    words = [
        "rounds=1",
        "clients.count=2",
        "clients.models=[mlp]",
        "data.private_rows=120",
        "data.public.size=20",
        "engine.backend=inline",
        "study.sweep={strategy: {name: [local, dml]}, data.partition.alpha: [0.1, 1]}",
        "study.precision=2",
        f"output={output}",
        "name=sweep",
    ]
    return compare(load_study(None, words), seeds=1)


def test_precision_is_kept_with_the_study(study):
    table = json.loads((study.folder / "study.json").read_text())
    assert table["precision"] == study.precision == 0.02
    row = study.to_row()["pairs"][0]
    assert row["difference_precision"] == 0.02


def test_costs_are_told_for_every_arm(fedkd, study):
    code, out, _ = fedkd("cost", study.folder, "--to", "1%", "--at", "rounds=1,bytes=1kB", "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["arm"] for row in found["to"]] == [*study.runs]
    assert {row["reached"] for row in found["to"]} == {1}
    assert {row["rounds"] for row in found["to"]} == {1}
    assert all(row["gflop"] > 0 and row["steps"] > 0 for row in found["to"])
    at_bytes = {row["arm"]: row for row in found["at"] if row["cost"] == "bytes"}
    assert {at_bytes[arm]["budget_left"] for arm in at_bytes if arm.startswith("local")} == {1}
    code, out, _ = fedkd("cost", study.folder)
    assert code == 0
    assert "the first judged round that had it" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "most"], "--to takes accuracies in percent, such as 60,80, got 'most'"),
        (["--at", "kb=3"], "a budget is one of rounds, steps, bytes, time, gflop"),
        (["--baseline", "dmm"], "the baseline must be one of the arms"),
    ],
)
def test_what_cannot_be_asked_is_refused(fedkd, study, words, said):
    code, _, err = fedkd("cost", study.folder, *words)
    assert code == 2
    assert said in err


def test_a_share_is_not_taken_for_a_percentage(fedkd, study):
    code, _, err = fedkd("cost", study.folder, "--to", "0.8")
    assert code == 2
    assert "--to takes accuracies in percent: write 80, or 0.8% if you mean it" in err


def test_a_sweep_over_the_data_is_ranked_and_drawn(fedkd, study, tmp_path):
    picture = tmp_path / "ranks.svg"
    code, out, _ = fedkd("ranks", study.folder, "--figure", picture)
    assert code == 0
    assert "rank on each data set" in out
    assert "Over two data sets the 2 arms" in out
    assert "critical difference" in picture.read_text()
    code, out, _ = fedkd("ranks", study.folder, "--json")
    assert [each["arm"] for each in json.loads(out)["arms"]]
    assert json.loads(out)["sets"] == ["alpha 0.1", "alpha 1"]
    code, _, err = fedkd("ranks", study.folder, "--figure", "ranks.txt")
    assert code == 2
    assert "--figure must end in .svg, .pdf, .png, got 'ranks.txt'" in err
