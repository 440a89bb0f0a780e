"""The museum: pairs of arms, one for each fault, and what each costs."""

import json

import pytest
from typer.testing import CliRunner

from sim.commands.cli import app
from sim.commands.museum import exhibits, load_museum, museum
from sim.reports.museum import Finding, museum_table, museum_words
from sim.reports.statistics import paired_difference
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


ONLY = ("own_answer_kept", "nothing_exchanged")


def _noted(begun, arm, seed):
    begun.append((arm, seed))
    return ()


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """Two faults over two seeds, the first of which was run before: (result, who was begun)."""
    words = [*TINY, f"output={tmp_path_factory.mktemp('museum')}"]
    museum(load_museum(words=words, only=ONLY), only=ONLY, seeds=1)
    begun = []
    found = museum(
        load_museum(words=words, only=ONLY),
        only=ONLY,
        seeds=2,
        observer_of=lambda arm, seed: _noted(begun, arm, seed),
    )
    return words, found, begun


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
    with pytest.raises(SettingsError, match=r"got 'svd_rank_nil'.*svd_rank_zero"):
        exhibits(["svd_rank_nil"])
    with pytest.raises(SettingsError, match="rounds"):
        load_museum(words=["rounds=0"])


@pytest.mark.slow
def test_costs_are_right_minus_published_over_pairs(visited):
    _, found, _ = visited
    assert [each.show.name for each in found.findings] == [*ONLY]
    runs = found.study.runs
    for each in found.findings:
        right, published = (
            [run.last["accuracy"] for run in runs[arm]]
            for arm in (each.show.right, each.show.published)
        )
        differences = [one - other for one, other in zip(right, published, strict=True)]
        assert each.cost.pairs == pytest.approx(differences)
    known = [each.cost.p_value for each in found.findings if each.cost.p_value is not None]
    corrected = [each.p_holm for each in found.findings if each.p_holm is not None]
    assert min(corrected) == pytest.approx(min(1.0, len(known) * min(known)))


@pytest.mark.slow
def test_it_says_whether_bytes_change_and_what_the_server_loses(visited):
    kept, nothing = visited[1].findings
    assert (kept.bytes_ratio, nothing.bytes_ratio) == (1, 0)
    assert kept.server_cost is None
    assert nothing.server_cost is not None
    assert {kept.same_bits, nothing.same_bits} == {False}


@pytest.mark.slow
def test_a_museum_goes_on_where_it_stopped(visited):
    _, found, begun = visited
    assert {seed for _, seed in begun} == {1}
    assert {each.cost.n for each in found.findings} == {2}


def _finding(cost, p_holm, *, same_bits=False):
    difference = paired_difference([0.5, 0.5, 0.5], [0.5 + each for each in cost])
    return Finding(
        show=exhibits(["no_kl"])[0],
        right=None,
        published=None,
        cost=difference,
        server_cost=None,
        p_holm=p_holm,
        bytes_ratio=1.0,
        same_bits=same_bits,
    )


def test_words_tell_what_costs_what_helps_and_what_does_not_show():
    told = museum_words(
        [
            _finding([0.1, 0.11, 0.12], 0.01),
            _finding([-0.1, -0.11, -0.12], 0.01),
            _finding([0.0, 0.0, 0.0], 1.0, same_bits=True),
            _finding([0.1, -0.1, 0.12], 0.9),
        ]
    )
    assert told == [
        "1 of 4 cost accuracy: no_kl (fml)",
        "1 of 4 score better than what is right: no_kl (fml)",
        "1 of 4 change no bit of any client here: no_kl (fml)",
        "1 of 4 cannot be told from what is right by these seeds",
    ]


@pytest.mark.slow
def test_the_command_prints_table_rows_and_a_list(visited):
    runner = CliRunner()
    listed = runner.invoke(app, ["museum", "--list", "--only", "fml"])
    assert listed.exit_code == 0
    assert "no_detach (fml)" in listed.stdout
    assert "kl_mean (ktpfl)" not in listed.stdout
    rows = json.loads(runner.invoke(app, ["museum", "--list", "--json"]).stdout)["faults"]
    assert len(rows) == len(exhibits())
    words, found, _ = visited
    asked = ["museum", "--only", ",".join(ONLY), "--seeds", "2", *words]
    told = runner.invoke(app, [*asked, "--json"], catch_exceptions=False).stdout
    row = json.loads(told)["faults"][1]
    assert row["fault"] == "nothing_exchanged"
    assert row["cost_by_seed"] == pytest.approx(list(found.findings[1].cost.pairs))


@pytest.mark.slow
def test_the_table_has_a_line_for_each_fault(visited):
    table = museum_table(visited[1].findings)
    assert table.labels == ["fd own_answer_kept", "fml nothing_exchanged"]
    assert [column.title for column in table.columns][:3] == [
        "right %",
        "as published %",
        "costs points",
    ]
