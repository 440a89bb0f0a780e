import json
import re
from html.parser import HTMLParser

import pytest

from sim.reports import load_run, report, write_report
from sim.reports.grids import Axis, Grid
from sim.reports.html.grouping import group_by_arm
from sim.reports.html.settings import split_settings
from sim.settings import SettingsError


@pytest.fixture
def drawn():
    """Ask for figures, which take most of the time of a report."""


@pytest.fixture(autouse=True)
def _figures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("sim.reports.html.writing._drawn", lambda *_, **__: ({}, {}))


VOID = {"meta", "img", "br", "link", "input", "source"}


class Page(HTMLParser):
    """Checks that tags are closed in order and collects text, tags and attributes."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def study(make_run):
    return {
        "local": [
            make_run(seed=s, accuracies=(0.4, 0.5 + s / 100), silent=True, strategy="local")
            for s in range(3)
        ],
        "dml": [
            make_run(seed=s, accuracies=(0.4, 0.6 + s / 50), federation={"peer_disagreement": 0.5})
            for s in range(3)
        ],
    }


def test_the_report_says_what_was_measured(make_run, tmp_path):
    path = write_report(study(make_run), tmp_path / "new" / "place", title="digits")
    page = page_of(path)
    assert path == tmp_path / "new" / "place" / "report.html"
    for text in (
        "6 runs: 2 arms, 3 seeds (0, 1, 2)",
        "51.0 ±2.5",
        "Differences to local",
        "+11.0 +8.5 to +13.5* 0.003* 0.003* 0.250 3 of 3",
        "strategy.name local dml",
        "strategy.temperature.start – 4.0",  # noqa: RUF001
        "clients.count 2",
        "The test split never selects anything",
        "torch",
        "abababababab",
    ):
        assert text in page.text


def test_the_report_has_columns_of_bits_where_a_run_had_a_budget(make_run, tmp_path):
    # Rounds of 2 and 4 bits up, 4 and 8 down.
    runs = {"budget": [make_run(bits={"up": 2, "down": 4})], "without": [make_run(seed=1)]}
    text = page_of(write_report(runs, tmp_path / "both", title="budget")).text
    assert "kB up kB down bits up bits down seconds" in text
    assert "2.0 6.0 3.0 6.0 7.5" in text
    assert "2.0 6.0 – – 7.5" in text  # noqa: RUF001
    del runs["budget"]
    assert "bits" not in page_of(write_report(runs, tmp_path / "one", title="none")).text


def test_the_report_is_one_file_that_asks_nothing_of_a_network(make_run, tmp_path, drawn):
    path = write_report(study(make_run), tmp_path, title="t")
    page = page_of(path)
    assert "script" not in page.tags
    assert "link" not in page.tags
    sources = [value for name, value in page.attributes if name in ("src", "srcset")]
    assert len(sources) == 2 * len([*(tmp_path / "figures").glob("*.svg")]) > 8
    assert all(source.startswith("data:image/svg+xml,") for source in sources)
    # Addresses stand only where somebody may go who wants to.
    links = [value for name, value in page.attributes if name == "href"]
    assert all(link.startswith(("#", "https://")) for link in links)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"data:image/svg[^\"]*|http-equiv|<a .*?</a>", "", text)
    assert "http" not in text
    assert "url(" not in text


def test_names_cannot_smuggle_html(make_run, tmp_path):
    evil = '<script>alert("x")</script>&'
    runs = {evil: [make_run()], "b": [make_run()]}
    path = write_report(runs, tmp_path, title=evil)
    page = page_of(path)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 4
    assert "&lt;script&gt;" in path.read_text(encoding="utf-8")


def test_names_of_files_move_no_cursor_of_who_reads_the_page(make_run, tmp_path):
    run = make_run(settings={"data": {"source": "a\u202eb"}})
    path = write_report({"dml": [run]}, tmp_path, title="x\x07")
    text = path.read_text(encoding="utf-8")
    assert r"a\u202eb" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_every_pair_is_compared_and_the_baseline_answered(make_run, tmp_path):
    runs = {**study(make_run), "local-again": [make_run(seed=s) for s in range(3)]}
    page = page_of(write_report(runs, tmp_path, title="t", baseline="dml"))
    assert "Differences to dml" in page.text
    # 0.51 - 0.62, and p 0.003 doubled.
    assert "local -11.0 -13.5 to -8.5* 0.003* 0.005* 0.250 0 of 3" in page.text
    assert "local falls behind dml by 11.0 points" in page.text
    assert "Every pair Every pair of arms" in page.text
    assert "dml local +11.0" in page.text
    assert "local-again local +9.0" in page.text
    assert "local-again dml -2.0" in page.text
    page = page_of(write_report(study(make_run), tmp_path, title="t"))
    assert "Every pair" not in page.text


def test_a_study_s_report_is_written_again_with_its_baseline(tmp_path, run_folder):
    folder = make_study(tmp_path / "study", run_folder)
    study_file = folder / "study.json"
    table = json.loads(study_file.read_text())
    study_file.write_text(json.dumps({**table, "baseline": "treated"}))
    assert "Differences to treated" in page_of(report([folder])).text
    assert "Differences to control" in page_of(report([folder], baseline="control")).text
    with pytest.raises(SettingsError, match="must be one of the arms"):
        report([folder], baseline="contro")


def test_one_run_is_reported_without_comparison(make_run, tmp_path):
    page = page_of(write_report({"dml": [make_run()]}, tmp_path, title="t"))
    assert "Differences" not in page.text
    assert "±" not in page.text
    assert "1 run: 1 arm, 1 seed (0)" in page.text
    assert "All settings" in page.text
    assert "open" in [name for name, _ in page.attributes]
    assert "mlp 0 0 50.0" in page.text
    assert "gru 0 1 70.0" in page.text


def test_a_server_model_and_an_ensemble_appear_only_where_they_exist(make_run, tmp_path):
    with_both = make_run(federation={"server_accuracy": 0.125, "ensemble_accuracy": 0.875})
    page = page_of(write_report({"dml": [with_both]}, tmp_path / "a", title="t"))
    assert "server model (%) ensemble (%)" in page.text
    assert "12.5 87.5" in page.text
    page = page_of(write_report({"dml": [make_run()]}, tmp_path / "b", title="t"))
    assert "server model (%)" not in page.text


def test_runs_that_measured_nothing_still_have_a_report(make_run, tmp_path, drawn):
    nothing = make_run(accuracies=(), status=None)
    broken = make_run(seed=1, accuracies=(float("nan"),), status="failed")
    path = write_report({"dml": [nothing, broken]}, tmp_path, title="t")
    page = page_of(path)
    assert "dml (interrupted)" in page.text
    assert "failed" in page.text
    assert "nan" not in page.text.lower().split()
    assert "img" not in page.tags


def test_an_interrupted_run_is_listed_but_does_not_count(make_run, tmp_path):
    runs = {"dml": [make_run(accuracies=(0.5, 0.9)), make_run(seed=1, status="interrupted")]}
    page = page_of(write_report(runs, tmp_path, title="t"))
    assert "1 (+1 interrupted)" in page.text
    assert "90.0" in page.text


def test_seeds_that_only_one_arm_has_are_not_paired(make_run, tmp_path):
    runs = {
        "a": [make_run(seed=s, accuracies=(0.5,)) for s in (0, 1, 2)],
        "b": [make_run(seed=s, accuracies=(0.5 + s / 10,)) for s in (1, 2, 3)],
        "c": [make_run(seed=9)],
    }
    page = page_of(write_report(runs, tmp_path, title="t"))
    # Seeds 1 and 2: +10 and +20 points.
    assert "mean client, last round b +15.0 -48.5 to +78.5* 0.205* 0.205* 0.500 2 of 2" in page.text
    assert "mean client, last round c – – – – – 0 of 0" in page.text  # noqa: RUF001


def test_a_new_report_replaces_an_older_one_whole(make_run, tmp_path, drawn):
    write_report(study(make_run), tmp_path, title="old")
    assert (tmp_path / "figures" / "targets_by_round.svg").exists()
    write_report({"local": [make_run(silent=True)]}, tmp_path, title="new")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "accuracy_by_client.svg",
        "accuracy_by_round.svg",
        "clients_by_round.svg",
    ]
    assert [path.name for path in tmp_path.glob(".*partial")] == []


def test_no_runs_make_no_report(tmp_path):
    with pytest.raises(SettingsError, match="at least one run"):
        write_report({"a": []}, tmp_path, title="t")
    with pytest.raises(SettingsError, match="at least one run"):
        report([])
    assert list(tmp_path.iterdir()) == []


def test_settings_are_split_into_common_and_differing(make_run):
    runs = {
        "a": [make_run(settings={"rounds": 4}), make_run(settings={"rounds": 5})],
        "b": [make_run(settings={"rounds": 4}, strategy="fedmd")],
    }
    differing, common = split_settings(runs)
    assert ("rounds", ["4 | 5", "4"]) in differing
    assert ("strategy.name", ["dml", "fedmd"]) in differing
    assert ("clients.models", "mlp, gru") in common
    keys = {key for key, _ in [*differing, *common]}
    assert not keys & {"seed", "output", "name", "study.seeds"}


def test_runs_that_may_not_be_averaged_become_arms_of_their_own(make_run):
    plain = [make_run(seed=seed) for seed in (0, 1)]
    longer = make_run(settings={"rounds": 7})
    other = make_run(strategy="local")
    again = make_run(seed=1)
    assert group_by_arm([*plain, other]) == {"dml": plain, "local": [other]}
    assert group_by_arm([*plain, longer]) == {"dml (rounds=2)": plain, "dml (rounds=7)": [longer]}
    assert group_by_arm([*plain, again]) == {"dml": plain, "dml #2": [again]}


def test_arms_are_named_after_the_shortest_ends_of_keys_that_are_unique(make_run):
    clients = {"count": 2, "models": ["mlp"]}
    runs = [
        make_run(settings={"clients": {**clients, "optimizer": {"lr": rate, "name": name}}})
        for rate, name in ((0.1, "adam"), (0.2, "sgd"))
    ]
    assert list(group_by_arm(runs)) == [
        "dml (optimizer.name=adam, lr=0.1)",
        "dml (optimizer.name=sgd, lr=0.2)",
    ]


def test_a_finished_run_comes_before_an_unfinished_one_of_its_seed(make_run):
    killed, finished = make_run(status=None), make_run()
    assert group_by_arm([killed, finished]) == {"dml": [finished], "dml #2": [killed]}


def test_engines_do_not_split_an_arm(make_run):
    runs = [make_run(), make_run(seed=1, settings={"engine": {"backend": "inline"}})]
    assert list(group_by_arm(runs)) == ["dml"]


def make_study(folder, run_folder):
    arms = {
        arm: [f"{arm}/seed-{seed}-{'0' * 8}" for seed in (0, 1)] for arm in ("control", "treated")
    }
    for paths in arms.values():
        for seed, path in enumerate(paths):
            run_folder(folder / path, seed=seed)
    (folder / "study.json").write_text(json.dumps({"name": "s", "arms": arms}))
    return folder


def test_a_single_path_gets_its_report_inside(tmp_path, run_folder):
    study_folder = make_study(tmp_path / "study", run_folder)
    path = report([study_folder])
    assert path == study_folder / "report.html"
    assert "Differences to control" in page_of(path).text
    single = run_folder(tmp_path / "single")
    assert report([single, single]) == single / "report.html"


def test_several_paths_get_a_report_beside_them(tmp_path, run_folder):
    study_folder = make_study(tmp_path / "study", run_folder)
    run = run_folder(tmp_path / "runs" / "x" / "one", strategy="fedmd")
    path = report([study_folder, run])
    assert path == tmp_path / "report" / "report.html"
    page = page_of(path)
    assert "5 runs: 3 arms" in page.text
    assert "Differences to control" in page.text
    assert report([run, study_folder], tmp_path / "here") == tmp_path / "here" / "report.html"
    assert "Differences to fedmd" in page_of(tmp_path / "here" / "report.html").text


def test_a_run_given_with_its_study_counts_once(tmp_path, run_folder):
    study_folder = make_study(tmp_path / "study", run_folder)
    run = study_folder / "treated" / f"seed-1-{'0' * 8}"
    page = page_of(report([study_folder, run], tmp_path / "out"))
    assert "4 runs: 2 arms" in page.text
    assert load_run(run).arm == "treated"


def test_a_path_that_is_neither_run_nor_study_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"neither a run folder.*settings\.yaml.*study\.json"):
        report([tmp_path])


def test_a_folder_that_cannot_be_written_is_named(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot write to"):
        write_report({"dml": [make_run()]}, tmp_path / "file", title="t")


PROMISED = {"mechanism": "dp_sgd", "epsilon": 8, "clip": 1.0}


def test_a_run_says_what_it_promises_to_whom(make_run, tmp_path, drawn):
    page = page_of(write_report({"dp": [make_run(privacy=PROMISED)]}, tmp_path, title="dp"))
    head = "arm mechanism where unit epsilon Renyi bound delta budget"
    assert f"{head} dp dp_sgd client example 8 8.8 1e-05 8" in page.text
    assert "DP-SGD at each client: its models are protected while they learn" in page.text
    assert "same, at selected round" not in page.text
    assert (tmp_path / "figures" / "accuracy_by_epsilon.svg").is_file()


def test_arms_with_and_without_a_promise_stand_side_by_side(make_run, tmp_path):
    runs = {
        "none": [make_run(seed=seed) for seed in range(3)],
        "dp": [make_run(seed=seed, privacy=PROMISED) for seed in range(3)],
    }
    page = page_of(write_report(runs, tmp_path, title="dp"))
    assert "none – – – – – – – dp dp_sgd client example 8" in page.text  # noqa: RUF001
    assert "same, at selected round" in page.text
    # Nothing to compare at a selected round, so no line of it.
    assert "mean client, selected round" not in page.text
    assert "worst client, last round" in page.text


def test_a_report_without_a_promise_says_nothing_of_privacy(make_run, tmp_path):
    page = page_of(write_report({"none": [make_run()]}, tmp_path, title="none"))
    assert "Renyi" not in page.text
    assert "epsilon" not in page.text
    assert "same, at selected round" in page.text


def swept(make_run, rules):
    axes = Axis("rule", tuple(f"r{place}" for place in range(rules))), Axis("share", (0, 0.2))
    runs = {
        f"r{rule}-{share}": [make_run(accuracies=(0.4 + rule / 100,))]
        for rule in range(rules)
        for share in axes[1].values
    }
    return runs, Grid(axes, tuple(runs))


def test_a_sweep_has_a_table_and_figures_for_screens_and_phones(make_run, tmp_path, drawn):
    runs, grid = swept(make_run, 2)
    refused = {"r1-0.2": "a <reason>"}
    runs["r1-0.2"] = []
    path = write_report(runs, tmp_path, title="t", refused=refused, grid=grid)
    page = page_of(path)
    assert "Over the values of the sweep" in page.text
    assert "rule share 0 share 0.2 r0 40.0 40.0 r1 41.0 refused" in page.text
    assert "r1-0.2 (refused) –" in page.text  # noqa: RUF001
    assert "arm reason r1-0.2 a <reason>" in page.text
    assert "Every pair" in page.text
    assert page.tags.count("source") == page.tags.count("img") >= 4
    names = {figure.stem for figure in (tmp_path / "figures").glob("*.svg")}
    assert {"accuracy_in_grid", "accuracy_by_value", "accuracy_by_round"} <= names
    # A report on other runs takes its figures away.
    write_report(study(make_run), tmp_path, title="t")
    assert not (tmp_path / "figures" / "accuracy_in_grid.svg").exists()


def test_a_large_sweep_has_no_lines_for_every_arm_and_no_pairs(make_run, tmp_path, drawn):
    runs, grid = swept(make_run, 13)
    page = page_of(write_report(runs, tmp_path, title="t", grid=grid))
    assert "With more than 24 arms" in page.text
    assert "Every pair" not in page.text
    names = {figure.stem for figure in (tmp_path / "figures").glob("*.svg")}
    assert names == {"accuracy_in_grid", "accuracy_by_value"}


def test_what_a_reader_has_to_know_stands_with_the_answer(make_run, tmp_path):
    runs = {"dml": [make_run(strategy="dml", arm="dml", seed=0)]}
    page = write_report(runs, tmp_path, title="x", notes=("matched by steps to dml",)).read_text()
    answer = page[page.index('id="answer"') : page.index('id="arms"')]
    assert "matched by steps to dml" in answer


def test_what_an_accuracy_costs_stands_with_the_costs(make_run, tmp_path):
    runs = {
        "local": [make_run(seed=s, accuracies=(0.4, 0.605), silent=True) for s in range(2)],
        "dml": [make_run(seed=s, accuracies=(0.625, 0.7)) for s in range(2)],
    }
    text = write_report(runs, tmp_path, title="t").read_text()
    assert "cost to 60 % (mean client): the first judged round that had it" in text
    assert 'href="#costs"' in text
    # The second round of local, and the first of dml.
    row = re.search(r"cost to 60 %.*?</table>", text, re.S)[0]
    assert re.findall(r'data-label="rounds">([^<]*)<', row) == ["2 ±0*", "1 ±0*"]
    alone = write_report({"dml": runs["dml"]}, tmp_path, title="t").read_text()
    assert "the first judged round that had it" not in alone
