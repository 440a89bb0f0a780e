"""What holds for every model in the table, and for models that a user brings along."""

import json
import sys
import types

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedkd.models import (
    ModelSettings,
    build_model,
    count_parameters,
    describe_models,
    known_models,
    uses_batch_norm,
)

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


def build(name, *, input_shape=DIGITS, num_classes=10, seed=0, **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=input_shape, num_classes=num_classes, seed=seed)


def images(rows, input_shape, seed=0):
    return torch.rand(rows, *input_shape, generator=torch.Generator().manual_seed(seed))


def same_bits(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_table_holds_every_family():
    assert known_models() == (
        "mlp",
        "cnn",
        "lenet",
        "resnet8",
        "resnet20",
        "gru",
        "lstm",
        "transformer",
        "tutorial_teacher",
        "tutorial_student",
    )


@pytest.mark.parametrize("input_shape", [DIGITS, MNIST, CIFAR, (2, 11, 9)])
@pytest.mark.parametrize("name", known_models())
def test_every_parameter_of_every_model_learns_on_every_shape(name, input_shape):
    model = build(name, input_shape=input_shape, num_classes=3)
    logits = model(images(4, input_shape))
    assert logits.shape == (4, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", known_models())
def test_weights_follow_the_seed_and_nothing_else(name):
    state = torch.get_rng_state()
    first = build(name, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same_bits(first, build(name, seed=7))
    assert not same_bits(first, build(name, seed=8))


@pytest.mark.parametrize("name", known_models())
def test_a_built_model_trains_on_the_cpu_and_shares_nothing_with_the_next(name):
    first, second = build(name), build(name)
    assert first.training
    assert {parameter.device.type for parameter in first.parameters()} == {"cpu"}
    pointers = {parameter.data_ptr() for parameter in first.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in second.parameters())


@pytest.mark.parametrize("name", known_models())
def test_examples_of_a_batch_do_not_see_each_other_in_eval_mode(name):
    model = build(name).eval()
    batch = images(5, DIGITS)
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(model(batch), one_by_one, rtol=1e-4, atol=1e-5)


def names_and_norms():
    return [
        *((name, {}) for name in known_models()),
        ("cnn", {"norm": "batch"}),
        ("resnet8", {"norm": "batch"}),
    ]


@pytest.mark.parametrize(("name", "options"), names_and_norms())
def test_stacked_models_compute_what_they_compute_alone(name, options):
    # Warnings are errors here, so a layer that vmap would run client by client fails this too.
    members = [build(name, seed=seed, **options) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    skeleton = build(name, **options)
    inputs = torch.stack([images(4, DIGITS, seed) for seed in range(3)])

    def predict(parameters, buffers, inputs):
        return functional_call(skeleton, (parameters, buffers), (inputs,))

    def loss(parameters, buffers, inputs):
        logits = predict(parameters, buffers, inputs)
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))

    gradients = vmap(grad(loss))(parameters, buffers, inputs)
    for index, (member, batch) in enumerate(zip(members, inputs, strict=True)):
        nn.functional.cross_entropy(member(batch), torch.tensor([0, 1, 2, 3])).backward()
        for key, parameter in member.named_parameters():
            torch.testing.assert_close(gradients[key][index], parameter.grad, rtol=1e-3, atol=1e-5)
        for key, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[key][index], buffer)

    skeleton.eval()
    with torch.no_grad():
        together = vmap(predict)(parameters, buffers, inputs)
        alone = [member.eval()(batch) for member, batch in zip(members, inputs, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_name", known_models())
def test_every_teacher_can_teach_every_student(teacher_name):
    batch = images(6, DIGITS)
    with torch.no_grad():
        target = (build(teacher_name, seed=1).eval()(batch) / 4).softmax(1)
    for student_name in known_models():
        student = build(student_name)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        loss = 16 * nn.functional.kl_div(
            (student(batch) / 4).log_softmax(1), target, reduction="batchmean"
        )
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), student_name
        assert all(parameter.isfinite().all() for parameter in student.parameters()), student_name


def test_only_the_tutorial_teacher_normalises_over_the_batch_unless_asked():
    assert [name for name in known_models() if uses_batch_norm(build(name))] == ["tutorial_teacher"]
    for name in ("cnn", "resnet8", "resnet20"):
        assert uses_batch_norm(build(name, norm="batch"))


def test_counting_parameters_skips_frozen_ones_and_counts_shared_ones_once():
    layer = nn.Linear(3, 2)
    assert count_parameters(nn.Sequential(layer, layer)) == 8
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6


def test_listing_names_the_source_and_the_defaults_of_every_model():
    listing = {line.name: line for line in describe_models()}
    assert tuple(listing) == known_models()
    assert listing["mlp"].options == {"hidden": [64], "dropout": 0.0, "embedding": 16}
    assert listing["mlp"].takes == ("pictures", "features", "text")
    assert all(line.source for line in listing.values())
    assert "He et al., 2016" in listing["resnet8"].source


# Settings


class _Clients(BaseModel):
    model: ModelSettings


def test_a_plain_string_is_a_name_with_default_options():
    settings = _Clients.model_validate({"model": "resnet8"}).model
    assert settings == ModelSettings(name="resnet8")
    assert settings.options == {"norm": "group", "width": 16, "groups": 8}


def test_saved_settings_read_back_equal_and_spell_every_option():
    settings = ModelSettings(name="mlp", options={"hidden": (32, 16)})
    saved = json.loads(json.dumps(settings.model_dump(mode="json")))
    options = {"hidden": [32, 16], "dropout": 0.0, "embedding": 16}
    assert saved == {"name": "mlp", "options": options}
    assert ModelSettings.model_validate(saved) == settings


def test_one_architecture_is_one_key_however_it_is_written():
    plain = ModelSettings(name="resnet8")
    spelled = ModelSettings(name="resnet8", options={"width": 16, "norm": "group"})
    other = ModelSettings(name="resnet8", options={"norm": "batch"})
    assert plain == spelled
    assert plain.key == spelled.key != other.key
    assert len({plain, spelled, other}) == 2


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("resnet8", {}, "resnet8"),
        ("resnet8", {"norm": "batch", "width": 16}, "resnet8(norm=batch)"),
        ("mlp", {"hidden": [64, 32], "dropout": 0.5}, "mlp(hidden=[64, 32], dropout=0.5)"),
        ("transformer", {"patch": 4}, "transformer(patch=4)"),
        ("my.models:make", {"depth": 2}, "my.models:make(depth=2)"),
    ],
)
def test_labels_say_what_differs_from_the_defaults(name, options, label):
    assert ModelSettings(name=name, options=options).label == label


def test_settings_are_frozen_and_take_no_unknown_keys():
    with pytest.raises(ValidationError, match="frozen"):
        ModelSettings(name="mlp").name = "cnn"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ModelSettings.model_validate({"name": "mlp", "optoins": {}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet9",
            {},
            r"unknown model 'resnet9'; known: mlp, cnn, .*; or package\.module:callable",
        ),
        ("resnet9", {}, r"did you mean 'resnet8'\?"),
        ("package/module.py:make", {}, "unknown model 'package/module.py:make'"),
        (
            "resnet8",
            {"nrom": "batch"},
            r"unknown option 'nrom' of model 'resnet8'; known: norm, width, groups; "
            r"did you mean 'norm'\?",
        ),
        ("lenet", {"norm": "batch"}, "unknown option 'norm' of model 'lenet'; known: none"),
        ("mlp", {"hidden": [64, 0]}, r"'mlp': hidden\.1: .* greater than or equal to 1, got 0"),
        ("mlp", {"hidden": 64}, r"'mlp': hidden: .* valid tuple, got 64"),
        ("mlp", {"dropout": 1.0}, r"dropout: .* less than 1, got 1\.0"),
        ("resnet20", {"norm": "layer"}, r"norm: Input should be 'group' or 'batch', got 'layer'"),
        ("resnet8", {"width": 12}, "groups must divide width, got groups=8 and width=12"),
        ("cnn", {"norm": "group", "groups": 5}, r"got groups=5 and channels=\[16, 32\]"),
        ("transformer", {"dim": 30}, "heads must divide dim, got heads=4 and dim=30"),
    ],
)
def test_wrong_settings_say_what_would_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(name=name, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"input_shape": (1, 8, 7)}, r"sides >= 8, got \(1, 8, 7\)"),
        ({"input_shape": (0, 8, 8)}, r"an input has the shape .*got \(0, 8, 8\)"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("cnn", **arguments)


def test_an_mlp_takes_features_of_any_shape():
    assert build("mlp", input_shape=(1, 1, 5))(torch.zeros(2, 1, 1, 5)).shape[0] == 2


# Models of one's own


def make_linear(input_shape, num_classes, bias=True):
    features = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes, bias=bias))


class Recorder(nn.Module):
    """Remembers the mode of every forward pass; its BatchNorm would remember the images."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(input_shape[0])
        self.linear = make_linear(input_shape, num_classes)
        self.modes = []

    def forward(self, images):
        self.modes.append(self.training)
        return self.linear(self.norm(images))


@pytest.fixture
def own_models(monkeypatch):
    module = types.ModuleType("own_models")
    module.make_linear = make_linear
    module.Recorder = Recorder
    module.not_a_model = lambda input_shape, num_classes: "resnet"
    module.transposed = lambda input_shape, num_classes: nn.Sequential(
        make_linear(input_shape, num_classes), nn.Flatten(0), nn.Unflatten(0, (num_classes, 2))
    )
    module.rounded = lambda input_shape, num_classes: _Rounded(
        make_linear(input_shape, num_classes)
    )
    module.pair = lambda input_shape, num_classes: _Pair()
    module.wrong_width = lambda input_shape, num_classes: nn.Sequential(
        nn.Flatten(), nn.Linear(3, num_classes)
    )
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_models", module)


class _Pair(nn.Module):
    def forward(self, images):
        return images, images


class _Rounded(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images).long()


@pytest.mark.usefixtures("own_models")
def test_a_callable_gets_shape_classes_and_options_and_is_seeded():
    first = build("own_models:make_linear", input_shape=(2, 3, 4), num_classes=5, bias=False)
    assert first[1].weight.shape == (5, 24)
    assert first[1].bias is None
    again = build("own_models:make_linear", input_shape=(2, 3, 4), num_classes=5, bias=False)
    assert same_bits(first, again)


@pytest.mark.usefixtures("own_models")
def test_trying_a_model_leaves_no_trace_in_it():
    model = build("own_models:Recorder")
    assert model.modes == [False]
    assert model.training
    assert model.norm.num_batches_tracked == 0
    assert not model.norm.running_mean.any()


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_package:make", {}, "cannot import 'no_such_package': No module named"),
        ("own_models:missing", {}, "'own_models:missing': .*no attribute 'missing'"),
        ("own_models:number", {}, "'own_models:number' must name a callable, got int"),
        ("own_models:not_a_model", {}, r"must return a torch\.nn\.Module, got str"),
        (
            "own_models:make_linear",
            {"depth": 2},
            r"'own_models:make_linear\(depth=2\)' failed to build for input_shape=\(1, 8, 8\), "
            r"num_classes=10: TypeError: .*'depth'",
        ),
        (
            "own_models:transposed",
            {},
            r"must map \[2, 1, 8, 8\] to floating-point logits \[2, 10\], got torch\.float32 of "
            r"shape \[10, 2\]",
        ),
        ("own_models:rounded", {}, r"got torch\.int64 of shape \[2, 10\]"),
        ("own_models:pair", {}, "must return a tensor of logits, got tuple"),
        ("own_models:wrong_width", {}, r"failed on inputs of shape \[2, 1, 8, 8\]: RuntimeError"),
    ],
)
def test_a_broken_callable_is_named_with_what_it_did(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


# Models of timm


@pytest.fixture
def stand_in_timm(monkeypatch):
    """Just enough of timm to see what it is asked for; the real one is tried where installed."""
    calls = []

    def create_model(name, **arguments):
        calls.append((name, arguments))
        features = arguments["in_chans"] * 8 * 8
        return nn.Sequential(nn.Flatten(), nn.Linear(features, arguments["num_classes"]))

    module = types.ModuleType("timm")
    module.__version__ = "0"
    module.is_model = lambda name: name.split(".")[0] == "resnet18"
    module.list_models = lambda: ["resnet18", "resnet34"]
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def test_timm_gets_channels_and_classes_and_never_fetches_weights(stand_in_timm):
    model = build("timm:resnet18.a1-in1k", input_shape=(2, 8, 8), num_classes=5, drop_rate=0.1)
    assert stand_in_timm == [
        (
            "resnet18.a1-in1k",
            {"pretrained": False, "in_chans": 2, "num_classes": 5, "drop_rate": 0.1},
        )
    ]
    assert model[1].weight.shape == (5, 128)
    assert same_bits(
        model, build("timm:resnet18.a1-in1k", input_shape=(2, 8, 8), num_classes=5, drop_rate=0.1)
    )


@pytest.mark.usefixtures("stand_in_timm")
def test_an_unknown_timm_model_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"timm 0 has no 'resnet35'; did you mean 'resnet34'\?"):
        build("timm:resnet35")


@pytest.mark.parametrize("option", ["pretrained", "checkpoint_path", "in_chans", "num_classes"])
def test_timm_options_that_fetch_unpickle_or_contradict_the_data_are_refused(option):
    with pytest.raises(ValueError, match=f"option '{option}' of model 'timm:resnet18' is not"):
        ModelSettings(name="timm:resnet18", options={option: 1})


@pytest.mark.parametrize("name", ["timm:", "timm:hf-hub:somebody/resnet", "timm:../resnet18"])
def test_a_timm_name_is_no_address(name):
    with pytest.raises(ValueError, match="unknown model 'timm:"):
        ModelSettings(name=name)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs the extra timm \(pip install 'fedkd\[timm\]'\)"):
        build("timm:resnet18")


def test_the_real_timm_builds_a_network():
    pytest.importorskip("timm", reason="the extra timm is not installed", exc_type=ImportError)
    model = build("timm:resnet18", input_shape=(1, 32, 32), num_classes=7)
    assert uses_batch_norm(model)
    # He et al., 2015: 11,689,512 with 1000 classes and 3 channels.
    assert count_parameters(model) == 11_689_512 - 513 * 993 - 64 * 2 * 49
    assert same_bits(model, build("timm:resnet18", input_shape=(1, 32, 32), num_classes=7))
