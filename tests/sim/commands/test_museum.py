"""The museum: pairs of arms, one for each fault, and what each costs."""

import json

import pytest
from typer.testing import CliRunner

from sim.commands.cli import app
from sim.commands.museum import exhibits, load_museum, museum
from sim.reports.museum import museum_table, museum_words
from sim.settings import SettingsError
from strategies import STRATEGIES

TINY = (
    "rounds=2",
    "evaluation.every=2",
    "clients.count=3",
    "clients.local.epochs=1",
    "data.public.size=40",
    "data.partition.alpha=1",
)


@pytest.fixture
def tiny(tmp_path):
    return (*TINY, f"output={tmp_path}")


def test_every_declared_fault_is_an_exhibit_and_no_other():
    shown = {(show.algorithm, show.name) for show in exhibits()}
    declared = {(name, fault) for name, kind in STRATEGIES.items() for fault in kind.faults}
    assert shown == declared
    assert len(shown) == len(exhibits())


def test_the_arms_of_an_exhibit_differ_in_the_fault_alone():
    study = load_museum()
    for show in exhibits():
        right, published = (study.arms[arm].to_table() for arm in (show.right, show.published))
        assert published["strategy"].pop("as_published") == [show.name]
        assert "as_published" not in right["strategy"]
        assert right == published


def test_faults_that_show_in_one_setting_share_the_run_that_is_right():
    rights = {show.name: show.right for show in exhibits(["fml"])}
    assert rights["kl_mean"] == rights["no_detach"] == "fml"
    assert rights["buffers_accumulate"] == "fml-for-buffers_accumulate"
    # Also where only one of them is asked for: a museum goes on with what another has done.
    (alone,) = exhibits(["fml-buffers_accumulate"])
    assert alone.right == rights["buffers_accumulate"]


def test_the_setting_can_be_changed_for_all():
    study = load_museum(words=["clients.count=4", "rounds=3"], only=["fd"])
    assert {of.clients.count for of in study.arms.values()} == {4}
    assert study.settings.study.seeds == 6


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"got 'svd_rank_nil'.*did you mean|svd_rank_zero"):
        exhibits(["svd_rank_nil"])
    with pytest.raises(SettingsError, match="rounds"):
        load_museum(words=["rounds=0"])


def test_costs_are_right_minus_published_over_pairs(tiny):
    found = museum(
        load_museum(words=tiny, only=["fd", "nothing_exchanged"]),
        only=["fd", "nothing_exchanged"],
        seeds=2,
    )
    assert [each.show.name for each in found.findings] == [
        "raw_logit_target",
        "own_answer_kept",
        "absent_classes_count",
        "nothing_exchanged",
    ]
    runs = found.study.runs
    for each in found.findings:
        right, published = (
            [run.last["accuracy"] for run in runs[arm]]
            for arm in (each.show.right, each.show.published)
        )
        assert each.cost is not None
        assert each.cost.pairs == pytest.approx(
            [one - other for one, other in zip(right, published, strict=True)]
        )
    by_name = {each.show.name: each for each in found.findings}
    assert by_name["nothing_exchanged"].bytes_ratio == 0
    assert by_name["own_answer_kept"].bytes_ratio == 1
    assert by_name["nothing_exchanged"].server_cost is not None
    known = [each.cost.p_value for each in found.findings if each.cost.p_value is not None]
    corrected = [each.p_holm for each in found.findings if each.p_holm is not None]
    assert min(corrected) == pytest.approx(min(1.0, len(known) * min(known)))
    assert len(museum_table(found.findings).labels) == 4
    assert museum_words(found.findings)


def test_a_museum_goes_on_where_it_stopped_and_names_faults_without_effect(tiny):
    words = [*tiny, "strategy.kd_weight=0"]
    first = museum(
        load_museum(words=words, only=["own_answer_kept"]), only=["own_answer_kept"], seeds=1
    )
    (found,) = first.findings
    assert found.same_bits
    assert "change no bit" in " ".join(museum_words(first.findings))
    begun = []
    again = museum(
        load_museum(words=words, only=["own_answer_kept"]),
        only=["own_answer_kept"],
        seeds=2,
        observer_of=lambda arm, seed: begun.append((arm, seed)) or (),
    )
    # The first seed was run already.
    assert {seed for _, seed in begun} == {1}
    assert again.findings[0].cost.n == 2


def test_the_command_prints_table_rows_and_a_list(tiny):
    runner = CliRunner()
    listed = runner.invoke(app, ["museum", "--list", "--only", "fml"])
    assert listed.exit_code == 0
    assert "no_detach (fml)" in listed.stdout
    assert "kl_mean (ktpfl)" not in listed.stdout
    rows = json.loads(runner.invoke(app, ["museum", "--list", "--json"]).stdout)
    assert len(rows) == len(exhibits())
    ran = runner.invoke(
        app, ["museum", "--only", "no_kl", "--seeds", "2", "--json", *tiny], catch_exceptions=False
    )
    (row,) = json.loads(ran.stdout)["faults"]
    assert row["fault"] == "no_kl"
    assert len(row["cost_by_seed"]) == 2
    shown = runner.invoke(app, ["museum", "--only", "no_kl", "--seeds", "2", "--wide", *tiny])
    assert "fml no_kl" in shown.stdout
