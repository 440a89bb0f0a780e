"""``strategy.as_published`` commits a fault of published code, and nothing else changes a bit."""

from dataclasses import replace

import numpy as np
import pytest

from sim.contract import sections_of
from sim.contract.claims import Case
from sim.contract.toy import ROWS, simulate, toy_data
from sim.server.privacy import check_privacy
from strategies import STRATEGIES
from strategies.contract import Fault
from strategies.shared import as_published

FAULTS = [(name, fault) for name, kind in STRATEGIES.items() for fault in kind.faults]

TOY = {
    # Half of a round went into the singular values of a wide model's weights.
    "fedkd": ("strategy.mentee={name: mlp, options: {hidden: [16]}}",),
    # Labels are reused for two rounds, and the ramp has more than one.
    "scarlet": ("rounds=6",),
    "pcl": ("rounds=9",),
    # With a few rows only a wide kernel tells the estimates apart.
    "selective_fd": ("strategy.width=16",),
}
"""What the toy federation needs beside `Fault.shows_with`, for the fault to show."""


def missing_classes(**options):
    """Return toy data whose clients have two of three classes each."""
    data = toy_data(**options)
    everything = np.arange(sum(ROWS))
    dealt = [everything[data.train_labels != client % 3] for client in range(len(ROWS))]
    kept = [rows[client :: len(ROWS)] for client, rows in enumerate(dealt)]
    return replace(data, client_rows=tuple(kept))


def digest_of(name, fault, *, committed):
    kind = STRATEGIES[name]
    words = [*kind.card.needs, *kind.faults[fault].shows_with, *TOY.get(name, ())]
    words = [word for word in words if not word.startswith("data.partition")]
    sections = dict(sections_of(words))
    options = dict(sections.pop("strategy", {}))
    if committed:
        options["as_published"] = [fault]
    case = Case(name, options, sections)
    if "absent" in fault:
        return simulate(case.settings(), missing_classes()).digest
    rows = (12, 13, 9, 17, 11, 12, 10, 9, 8, 14)[: case.settings().clients.count]
    return simulate(case.settings(), case.data(rows)).digest


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_each_fault_gives_other_weights(name, fault, monkeypatch):
    if fault == "zero_start":
        # Rounding, which differs between processors, may find the right direction by luck.
        monkeypatch.setattr(as_published, "scores_from_ones", lambda values: values.sum(-1) * 0)
    right, wrong = (digest_of(name, fault, committed=committed) for committed in (False, True))
    assert right != wrong


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_that_a_setting_commits_has_that_settings_bits(name, fault):
    kind = STRATEGIES[name]
    word = kind.faults[fault].stands_for
    if not word:
        return
    needs = [*kind.card.needs, *kind.faults[fault].shows_with, *TOY.get(name, ())]
    sections = dict(sections_of(needs))
    options = dict(sections.pop("strategy", {}))
    setting = dict(sections_of([word])["strategy"])
    runs = [
        Case(name, {**options, **told}, sections).run().digest
        for told in ({"as_published": [fault]}, setting)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_each_fault_says_what_it_does_where_it_was_read_and_what_is_right(name, fault):
    record = STRATEGIES[name].faults[fault]
    assert isinstance(record, Fault)
    assert record.does
    assert record.read_in
    assert record.right
    for word in (*record.shows_with, record.stands_for):
        assert not word or "=" in word


@pytest.fixture
def check(parts, tiny_settings, tiny_data):
    def run(name, options):
        parts(tiny_settings(name, options=options), tiny_data())[0].check((1, 8, 8))

    return run


def test_an_unknown_fault_is_refused_with_those_that_there_are(check):
    told = r"strategy.as_published of fml must be some of kl_mean, no_detach, .*got.*kl_sum"
    with pytest.raises(ValueError, match=told):
        check("fml", {"as_published": ["kl_mean", "kl_sum"]})


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if not kind.faults])
def test_an_algorithm_without_faults_takes_none(check, name):
    told = rf"strategy.as_published of {name} must be empty, got.*kl_mean"
    with pytest.raises(ValueError, match=told):
        check(name, {"as_published": ["kl_mean"]})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("cronus", {"as_published": ["zero_start"], "aggregation": "median"}, "got median"),
        ("fedgkd", {"as_published": ["no_gradient"]}, "teacher: vote, got mean"),
        ("pcl", {"as_published": ["ramp_by_lambda"], "kd_weight": 1.0}, "kind ramp_up, got const"),
        (
            "fml",
            {"as_published": ["no_detach"], "objective": {"ce": 1, "kd": 1, "rkd_distance": 1}},
            "terms ce and kd, got strategy.objective with rkd_distance",
        ),
    ],
)
def test_faults_of_a_setting_are_refused_without_it(check, name, options, told):
    with pytest.raises(ValueError, match=told):
        check(name, options)


def test_a_fault_goes_with_no_promise():
    privacy = {"mechanism": {"kind": "dp_sgd", "noise": 1.0}}
    case = Case("local", {}, {"privacy": privacy})
    settings, data = case.settings(), case.data()
    strategy, _ = case.parts(settings)
    check_privacy(settings, strategy, data, nodes=False)
    faulty = settings.strategy.model_copy(update={"as_published": ("kl_mean",)})
    settings = settings.model_copy(update={"strategy": faulty})
    with pytest.raises(ValueError, match=r"dp_sgd with strategy.as_published \['kl_mean'\]"):
        check_privacy(settings, strategy, data, nodes=False)


def test_it_is_an_error_of_ours_to_ask_for_a_fault_that_is_not_declared(
    parts, tiny_settings, tiny_data
):
    strategy = parts(tiny_settings("fml"), tiny_data())[0]
    with pytest.raises(KeyError, match=r"FML\.faults has no 'kl_sum'"):
        strategy.commits("kl_sum")
