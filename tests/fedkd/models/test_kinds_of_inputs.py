"""Models on features and on texts."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from fedkd.inputs import InputShape
from fedkd.models import ModelSettings, build_model, count_parameters

TEXT = InputShape((6,), 9)
ON_TEXT = ("mlp", "gru", "lstm", "transformer")


def build(name, shape=TEXT, seed=0, **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=shape, num_classes=3, seed=seed).eval()


def texts(rows, seed=0):
    tokens = torch.randint(0, 9, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return tokens.float()


def test_an_mlp_reads_features_as_they_are():
    model = build("mlp", InputShape((5,)), hidden=[4])
    assert count_parameters(model) == 5 * 4 + 4 + 4 * 3 + 3
    first = next(layer for layer in model if isinstance(layer, nn.Linear))
    inputs = torch.rand(2, 5)
    hidden = torch.relu(inputs @ first.weight.T + first.bias)
    assert torch.allclose(model(inputs), model[-1](hidden))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 9 * 4 + (6 * 4) * 64 + 64 + 64 * 3 + 3),
        ("gru", 9 * 4 + 3 * 8 * (4 + 8) + 2 * 3 * 8 + 8 * 3 + 3),
        ("lstm", 9 * 4 + 4 * 8 * (4 + 8) + 2 * 4 * 8 + 8 * 3 + 3),
    ],
)
def test_tokens_are_looked_up_in_a_table_of_the_width_asked_for(name, count):
    options = {} if name == "mlp" else {"hidden": 8}
    assert count_parameters(build(name, embedding=4, **options)) == count


@pytest.mark.parametrize("name", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("options", [{}, {"layers": 2}])
def test_what_fills_a_text_up_changes_nothing(name, options):
    if name == "transformer":
        options = {"depth": 1 + len(options)}
    short, long = InputShape((4,), 9), TEXT
    model = build(name, long, **options)
    smaller = build(name, short, **options)
    state = model.state_dict()
    if name == "transformer":
        state["positions"] = state["positions"][:4]
    smaller.load_state_dict(state)
    tokens = torch.tensor([[3.0, 1, 8, 2], [2, 2, 5, 4]])
    filled = torch.cat([tokens, torch.zeros(2, 2)], dim=1)
    assert torch.allclose(model(filled), smaller(tokens), atol=1e-6)


@pytest.mark.parametrize("name", ON_TEXT)
def test_a_text_without_a_single_token_gets_finite_scores(name):
    assert build(name)(torch.zeros(2, 6)).isfinite().all()


@pytest.mark.parametrize("name", ON_TEXT)
def test_stacked_models_put_out_and_learn_what_each_does_alone(name):
    models = [build(name, seed=seed) for seed in range(3)]
    tokens = torch.stack([texts(5, seed) for seed in range(3)])
    tensors, buffers = stack_module_state(models)

    def put_out(tensors, buffers, inputs):
        return functional_call(models[0], (tensors, buffers), (inputs,))

    stacked = torch.vmap(put_out)(tensors, buffers, tokens)
    gradients = torch.autograd.grad(stacked.square().sum(), list(tensors.values()))
    for member, model in enumerate(models):
        alone = model(tokens[member])
        assert torch.allclose(stacked[member], alone, atol=1e-6)
        own = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
        for together, each in zip(gradients, own, strict=True):
            assert torch.allclose(together[member], each, atol=1e-4, rtol=1e-4)


def test_the_same_seed_builds_the_same_table():
    assert torch.equal(build("gru").embedding.weight, build("gru").embedding.weight)
    assert not torch.equal(build("gru").embedding.weight, build("gru", seed=1).embedding.weight)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("cnn", (16,), r"'cnn' takes pictures, .* 16 features: .*clients\.models=\[mlp\]"),
        ("gru", (16,), r"'gru' takes pictures and text, .* 16 features: .*\[mlp\]"),
        ("resnet8", TEXT, r"'resnet8' takes pictures, .* 6 tokens.*\[mlp, gru, lstm, transformer"),
        ("timm:resnet18", (16,), r"'timm:resnet18' takes pictures"),
    ],
)
def test_inputs_that_a_model_is_not_for_are_refused_with_what_to_write(name, shape, told):
    with pytest.raises(ValueError, match=told):
        build(name, shape)


def test_texts_have_no_patches():
    with pytest.raises(ValueError, match="texts have no patches: leave patch out, got 2"):
        build("transformer", patch=2)


def test_a_model_of_ones_own_is_told_the_vocabulary_of_texts_and_of_nothing_else(
    tmp_path, monkeypatch
):
    (tmp_path / "own_reader.py").write_text(
        "from torch import nn\n"
        "class Read(nn.Module):\n"
        "    def __init__(self, width, classes, tokens):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(tokens, classes)\n"
        "        self.width = width\n"
        "    def forward(self, x):\n"
        "        assert x.shape[1] == self.width\n"
        "        return self.table(x.long()).mean(1)\n"
        "def net(input_shape, num_classes, vocabulary=None):\n"
        "    if vocabulary is None:\n"
        "        return nn.Linear(*input_shape, num_classes)\n"
        "    return Read(*input_shape, num_classes, vocabulary)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build("own_reader:net").table.num_embeddings == 9
    assert isinstance(build("own_reader:net", InputShape((4,))), nn.Linear)
