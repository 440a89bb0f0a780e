"""What clients learn from received predictions, above all where the objective is made of terms."""

import pytest

from fedkd.objectives import Objective
from strategies.mutual.dml import DMLSettings
from strategies.server_models.one_way import OneWaySettings
from strategies.shared.taught import knowledge_of

CE_KD = {"ce": 0.7, "kd": {"weight": 0.4, "temperature": 2.0}}
PLAIN = {"ce_weight": 0.7, "kd_weight": 0.4, "temperature": 2.0}


FALLING = {"kind": "linear", "start": 5.0, "end": 1.0}
LATE = {"kind": "step", "values": [0.0, 1.0], "milestones": [0.4]}

SHORT_FORMS = {
    "temperature": ({"temperature": 2.0}, {"ce": 1.0, "kd": {"temperature": 2.0}}),
    "weights": (PLAIN, CE_KD),
    "schedules": (
        {"temperature": FALLING, "ce_weight": 0.5, "kd_weight": LATE},
        {"ce": 0.5, "kd": {"weight": LATE, "temperature": FALLING}},
    ),
    "no square": (
        {"temperature": 3.0, "scale_by_t2": False},
        {"ce": 1.0, "kd": {"temperature": 3.0, "scale_by_t2": False}},
    ),
    "no teacher": (
        {"temperature": 2.0, "kd_weight": 0.0},
        {"ce": 1.0, "kd": {"weight": 0.0, "temperature": 2.0}},
    ),
    "no labels": (
        {"temperature": 2.0, "ce_weight": 0.0},
        {"ce": 0.0, "kd": {"temperature": 2.0}},
    ),
}


@pytest.mark.parametrize(("short", "terms"), SHORT_FORMS.values(), ids=SHORT_FORMS.keys())
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dml", {}),
        ("one_way", {"direction": "server_to_clients", "confidence_threshold": 0.4}),
    ],
    ids=["dml", "one_way"],
)
def test_the_short_form_and_the_terms_written_out_give_one_digest(
    name, options, short, terms, tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    one, other = (
        simulate(tiny_settings(name, options={**options, **way}), data)
        for way in (short, {"objective": terms})
    )
    assert one.digest == other.digest
    assert one.history.server == other.history.server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dml", {"average": "logit", "confidence_threshold": 0.4}),
        ("one_way", {"confidence_threshold": 0.4}),
        ("one_way", {"direction": "clients_to_server"}),
    ],
    ids=["dml of logits", "teacher", "to the server"],
)
@pytest.mark.parametrize(("short", "terms"), SHORT_FORMS.values(), ids=SHORT_FORMS.keys())
def test_the_short_form_is_the_terms_in_every_variant(
    name, options, short, terms, tiny_settings, tiny_data, simulate
):
    test_the_short_form_and_the_terms_written_out_give_one_digest(
        name, options, short, terms, tiny_settings, tiny_data, simulate
    )


def test_what_is_written_out_differently_is_learnt_differently(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    digests = {
        simulate(tiny_settings("dml", options=options), data).digest
        for options in (
            {"temperature": 2.0},
            {"temperature": 3.0},
            {"objective": {"ce": 1.0, "kd": {"temperature": 2.0, "scale_by_t2": False}}},
            {"objective": {"ce": 1.0, "kd": {"temperature": 2.0, "weight": 0.5}}},
        )
    }
    assert len(digests) == 4


def test_without_a_teachers_weight_clients_learn_alone_bit_for_bit(
    tiny_settings, tiny_data, simulate
):
    # BatchNorm would see public rows even where no term does.
    data, clients = tiny_data(), {"models": [{"name": "cnn", "options": {"norm": "batch"}}]}
    alone = simulate(tiny_settings("local", clients=clients), data)
    options = {"objective": {"ce": 1.0, "kd": 0.0}}
    beside = simulate(tiny_settings("dml", options=options, clients=clients), data)
    assert alone.digest == beside.digest


def test_a_teachers_weight_may_begin_late(tiny_settings, tiny_data, simulate):
    late = {"kind": "step", "values": [0.0, 1.0], "milestones": [0.9]}
    data = tiny_data()
    runs = [
        simulate(tiny_settings("dml", options={"objective": {"ce": 1.0, **more}}), data)
        for more in ({"kd": {"weight": late}}, {"kd": {"weight": late, "learned": True}})
    ]
    for run in runs:
        terms = [
            {key for key in row if key.startswith("loss/")}
            for row in run.metrics
            if row["scope"] == "client"
        ]
        assert terms == [{"loss/ce"}] * 8 + [{"loss/ce", "loss/kd"}] * 4


def test_a_client_without_a_term_on_labels_waits_for_a_teacher(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("dml", options={"objective": {"kd": 1.0}}), tiny_data())
    losses = [
        {key for key in row if key.startswith("loss/")}
        for row in run.metrics
        if row["scope"] == "client"
    ]
    assert losses == [set()] * 4 + [{"loss/kd"}] * 8


def test_what_travels_is_softened_with_the_first_temperature():
    falling = {"kind": "linear", "start": 5.0, "end": 1.0}
    settings = DMLSettings.model_validate(
        {"objective": {"ce": 1, "l1": 1, "kd": {"temperature": falling}, "soft_ce": 1}}
    )
    assert [settings.softening(progress) for progress in (0.0, 0.5, 1.0)] == [5.0, 3.0, 1.0]
    without = DMLSettings.model_validate({"objective": {"ce": 1, "l1": 1}})
    assert without.softening(0.5) == 1.0
    assert DMLSettings.model_validate({"temperature": falling}).softening(0.5) == 3.0


def test_knowledge_is_what_a_teacher_has_a_part_in():
    late = {"kind": "linear", "start": 0.0, "end": 1.0}
    objective = Objective.model_validate({"ce": 1, "kd": {"weight": late}, "ntd": 1})
    assert list(knowledge_of(objective, 0.0).terms) == ["ntd"]
    assert list(knowledge_of(objective, 0.1).terms) == ["kd", "ntd"]
    assert knowledge_of(Objective.model_validate({"ce": 1, "kd": 0}), 0.5) is None


# -- the server --------------------------------------------------------------------------------


def test_the_server_learns_by_the_terms_that_a_teacher_has_a_part_in(
    tiny_settings, tiny_data, simulate
):
    def server_weights(objective, rounds=2):
        options = {"direction": "clients_to_server", "objective": objective}
        run = simulate(tiny_settings("one_way", options=options, rounds=rounds), tiny_data())
        weights = run.loop.boundary.state.model.weights
        return b"".join(array.tobytes() for array in weights.values())

    assert server_weights({"ce": 1.0, "kd": 1.0}) == server_weights({"ce": 1.0, "kd": 1.0})
    assert server_weights({"ce": 1.0, "kd": 1.0}) != server_weights({"ce": 1.0, "mse": 1.0})


def test_a_server_that_learnt_nothing_teaches_nothing(tiny_settings, tiny_data, simulate):
    late = {"kind": "step", "values": [0.0, 1.0], "milestones": [0.4]}
    options = {
        "direction": "server_to_clients",
        "objective": {"ce": 1.0, "kd": {"weight": late}},
    }
    run = simulate(tiny_settings("one_way", options=options), tiny_data())
    down = {row["round"] for row in run.exchange if row["direction"] == "down"}
    assert down == {3}


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DMLSettings, OneWaySettings])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": {"ce": 1, "hint": 1}},
            r"strategy\.objective\.hint compares layers, but only predictions travel: use a term "
            r"on logits such as kd, or strategy\.name: fml",
        ),
        ({"objective": {"ce": 1}}, r"strategy\.objective must have a term .*such as kd, got ce"),
        (
            {"objective": CE_KD, "temperature": 2.0},
            r"strategy\.temperature has no say beside strategy\.objective, got 2\.0",
        ),
        ({"objective": CE_KD, "kd_weight": 0.5}, r"strategy\.kd_weight has no say"),
        ({"objective": CE_KD, "scale_by_t2": False}, r"strategy\.scale_by_t2 has no say"),
    ],
    ids=["layers", "labels only", "temperature", "weight", "square"],
)
def test_objectives_that_cannot_work_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind.model_validate(options)


@pytest.mark.parametrize("name", ["dml", "one_way"])
def test_labels_of_public_rows_have_to_be_there(name, tiny_settings, tiny_data, parts, simulate):
    settings = tiny_settings(name, options={"objective": {"ce": 1.0, "ntd": 1.0}}, rounds=2)
    with pytest.raises(ValueError, match=r"objective\.ntd needs .*data\.public\.labelled: true"):
        parts(settings, tiny_data())
    run = simulate(settings, tiny_data(labelled=True))
    assert run.events == []
    assert any("loss/ntd" in row for row in run.metrics)
