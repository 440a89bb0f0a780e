"""What is found wrong with a run's models before any worker starts."""

import pytest

from fedkd.models import ModelSettings, memory
from fedkd.models.memory import check_memory, weight_bytes
from fedkd.training import OptimizerSettings
from strategies.contract.trying import check_models

SGD = OptimizerSettings(name="sgd", lr=0.1)
BATCH_NORM = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}
OWN_NORM = {"name": "odd_models:make", "options": {"kind": "Batched"}}


@pytest.fixture
def check(tiny_settings, tiny_data, parts):
    """Check the models of an algorithm on the tiny problem."""

    def run(name, *, rows=(12, 13, 9, 17), labelled=False, public=20, stacked=False, **settings):
        data = tiny_data(rows=rows, public=public, labelled=labelled)
        strategy, _ = parts(tiny_settings(name, public=public, **settings), data)
        check_models(strategy, data, optimizer=SGD, stacked=stacked, keeps_states=True)

    return run


@pytest.mark.parametrize("model", [BATCH_NORM, OWN_NORM], ids=["BatchNorm", "own"])
@pytest.mark.parametrize(
    ("name", "options", "settings", "message"),
    [
        ("local", {}, {"clients": {"batch_size": 1}}, "client 0 would; .*clients.batch_size"),
        ("local", {}, {"rows": (12, 1, 9, 17)}, "client 1 would; .*data.partition.min_rows"),
        ("pooled", {}, {"clients": {"batch_size": 1}}, "the pool would"),
        ("fedmd", {}, {"public": 1}, "a step on public rows would; .*data.public.size"),
        (
            "fedmd",
            {"digest_epochs": 0},
            {"public": 1, "labelled": True},
            "a step on public rows would",
        ),
        (
            "dml",
            {"public_forward": "apart"},
            {"exchange": {"rows_per_round": 1}},
            "a step on public rows would; .*exchange.rows_per_round",
        ),
    ],
)
def test_a_model_that_mixes_rows_is_refused_where_a_step_has_one(
    name, options, settings, message, model, check
):
    clients = {"models": [model], **settings.get("clients", {})}
    settings = {key: value for key, value in settings.items() if key != "clients"}
    with pytest.raises(ValueError, match=rf"clients\.models: .*single row.*, but {message}"):
        check(name, options=options, clients=clients, **settings)
    # One row more, and it works.
    settings = {
        key: value for key, value in settings.items() if key not in ("rows", "public", "exchange")
    }
    clients["batch_size"] = 8
    check(name, options=options, clients=clients, **settings)


@pytest.mark.parametrize(
    ("name", "options", "settings", "where"),
    [
        ("fml", {"meme": BATCH_NORM}, {"clients": {"batch_size": 1}}, "strategy.meme"),
        ("one_way", {"model": BATCH_NORM}, {"clients": {"batch_size": 1}}, "strategy.model"),
        (
            "one_way",
            {"model": BATCH_NORM, "direction": "server_to_clients"},
            {"exchange": {"rows_per_round": 1}},
            "strategy.model",
        ),
        ("one_way", {"model": BATCH_NORM}, {"labelled": True, "public": 1}, "strategy.model"),
    ],
)
def test_models_of_the_server_are_looked_at_too(name, options, settings, where, check):
    with pytest.raises(ValueError, match=rf"{where}: cnn.* has BatchNorm, .*single row, but"):
        check(name, options=options, **settings)
    check(name, options=options)


@pytest.mark.parametrize(
    ("name", "options", "clients", "message"),
    [
        ("fml", {"meme": "no_such_package:Model"}, {}, r"strategy\.meme: model 'no_such_package"),
        (
            "one_way",
            {"model": {"name": "odd_models:make", "options": {"kind": "Auxiliary"}}},
            {},
            r"strategy\.model: model .*got tuple in training mode",
        ),
        (
            "fedavg",
            {},
            {"models": [{"name": "odd_models:make", "options": {"kind": "HiddenMean"}}]},
            r"clients\.models: model .*keeps something outside its state_dict",
        ),
        # Nobody trains, but everybody is judged.
        (
            "local",
            {},
            {
                "models": [{"name": "odd_models:make", "options": {"kind": "Softmax"}}],
                "local": {"epochs": 0},
            },
            r"clients\.models: model .*returns probabilities",
        ),
    ],
)
def test_models_of_ones_own_are_tried_by_the_setting_that_names_them(
    name, options, clients, message, check
):
    with pytest.raises(ValueError, match=message):
        check(name, options=options, clients=clients)


def test_a_stack_is_tried_where_the_settings_ask_for_one(check):
    clients = {"models": [{"name": "odd_models:make", "options": {"kind": "Branching"}}]}
    check("local", clients=clients)
    with pytest.raises(ValueError, match=r"clients\.models: model .*engine\.vectorize: loop"):
        check("local", clients=clients, stacked=True)


# -- memory ------------------------------------------------------------------------------------


def weigh(name, **options):
    return weight_bytes(ModelSettings(name=name, options=options), (1, 8, 8), 10)


def test_weights_are_weighed_without_being_made():
    # 64 inputs, 2^16 units twice, 10 classes, a bias for each; four bytes a number: 17 GB.
    wide = 2**16
    numbers = (64 + 1) * wide + (wide + 1) * wide + (wide + 1) * 10
    assert weigh("mlp", hidden=[wide, wide]) == 4 * numbers
    assert weigh("odd_models:make", kind="Plain") == 4 * (64 * 8 + 8 + 8 * 10 + 10)
    # What cannot be built without numbers is not known.
    assert weigh("odd_models:make", kind="FixedBatch") >= 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Terabytes, both.
        ("mlp", {"hidden": [2**16] * 90}),
        ("lstm", {"hidden": 2**16, "layers": 90}),
    ],
)
def test_a_model_too_large_for_the_machine_is_refused_before_it_is_made(name, options, check):
    clients = {"models": [{"name": name, "options": options}]}
    with pytest.raises(ValueError, match=rf"clients\.models: model '{name}\(.* of memory"):
        check("local", clients=clients)


def test_what_all_clients_keep_counts_as_well(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**6)
    model = ModelSettings(name="mlp", options={"hidden": [128]})  # 38,440 bytes
    about = {"input_shape": (1, 8, 8), "num_classes": 10, "slots": 2}
    check_memory(model, **about, states=7)
    with pytest.raises(ValueError, match=r"which 8 clients keep .*fewer clients"):
        check_memory(model, **about, states=8)
    with pytest.raises(ValueError, match=r"has 0\.00134 GB of weights and needs 0\.00535 GB"):
        check_memory(ModelSettings(name="mlp", options={"hidden": [4460]}), **about)


def test_a_server_model_is_tried_on_rows_of_the_shape_that_it_will_see(check):
    clients = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}
    # Eight features count as an image of one line: too small for convolutions, not for an MLP.
    check("fedgkt", clients=clients)
    with pytest.raises(ValueError, match=r"strategy\.model: .*sides >= 8, got \(1, 1, 8\)"):
        check("fedgkt", clients=clients, options={"model": "cnn"})
