"""What a cohort puts out for rows: in evaluation, in training, and while it learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.models import ModelSettings, build_model
from fedkd.training import OptimizerSettings, Passes, supervised

MLP = ModelSettings(name="mlp", options={"hidden": [16]})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.4})
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
every_model = pytest.mark.parametrize(
    "model", [MLP, DROPOUT, BATCH_NORM], ids=["plain", "dropout", "norm"]
)
LAYERS = {"mlp": ["penultimate", "1"], "cnn": ["penultimate", "last_map", "1"]}
SOME = np.array([3, 19, 0])


def network(model, weights):
    """A plain module of these weights."""
    built = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
    built.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return built


def asked(cohort):
    """Everything that rows can be asked of."""
    draw = torch.Generator().manual_seed(5)
    dtype = torch.get_default_dtype()
    return {
        "private": "private",
        "public": SOME,
        "public of each": [SOME, np.array([7]), np.zeros(0, np.int64)],
        "inputs": torch.randn(4, 1, 8, 8, generator=draw, dtype=dtype),
    }


@every_model
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_both_kinds_put_out_the_same(float64, both_kinds, largest_difference, model, mode):
    loop, vmap = both_kinds(model=model)
    for cohort in (loop, vmap):
        cohort.fit(supervised, private=Passes(batch_size=8))
    for name, on in asked(loop).items():
        if mode == "train" and name == "public of each":
            continue  # BatchNorm has no statistics of one row
        options = {"on": on, "mode": mode, "layers": LAYERS[model.name]}
        one, other = loop.outputs(**options), vmap.outputs(**options)
        assert largest_difference(one, other) < 1e-5, name
        assert set(one[0].features) == set(options["layers"])


@every_model
@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_evaluation_is_that_of_a_plain_module(both_kinds, model, kind):
    cohort = both_kinds(model=model)[kind]
    cohort.fit(supervised, private=Passes(batch_size=8))
    for own, weights, member in zip(
        cohort.outputs(on="private", layers=["penultimate"], batch_rows=4),
        cohort.weights(),
        cohort._given,
        strict=True,
    ):
        plain = network(model, weights).eval()
        inputs = cohort._data.train_inputs[torch.from_numpy(member.rows)]
        with torch.no_grad():
            embedding = plain[:-1](inputs)
            expected = plain(inputs)
        np.testing.assert_allclose(own.logits, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(own.features["penultimate"], embedding.numpy(), atol=1e-5)
        assert np.array_equal(own.rows, member.rows)
        assert np.array_equal(own.labels, cohort._data.train_labels[member.rows])


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_training_mode_takes_the_statistics_of_the_batch(both_kinds, kind):
    cohort = both_kinds(model=BATCH_NORM)[kind]
    cohort.fit(supervised, private=Passes(batch_size=8))
    for own, weights in zip(
        cohort.outputs(on=SOME, mode="train", layers=["last_map"]), cohort.weights(), strict=True
    ):
        inputs = cohort._data.public_inputs[SOME]
        maps = F.conv2d(inputs, torch.from_numpy(weights["0.weight"]), padding=1)
        mean = maps.mean((0, 2, 3), keepdim=True)
        spread = (maps.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        scale, shift = (
            torch.from_numpy(weights[f"1.{name}"]).reshape(1, 4, 1, 1)
            for name in ("weight", "bias")
        )
        pooled = F.max_pool2d(F.relu((maps - mean) / spread * scale + shift), 2)
        np.testing.assert_allclose(own.features["last_map"], pooled.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_training_mode_drops_units_and_scales_up_the_others(both_kinds, kind):
    cohort = both_kinds(model=DROPOUT)[kind]
    (one, *_), (other, *_) = (
        cohort.outputs(on=np.arange(20), mode="train", layers=["2", "3"]) for _ in range(2)
    )
    before, after = one.features["2"], one.features["3"]
    dropped = (after == 0) & (before > 0)
    assert 0.25 < dropped.sum() / (before > 0).sum() < 0.55
    np.testing.assert_allclose(after[~dropped], before[~dropped] / 0.6, rtol=1e-5)
    # A stream of its own for each call; evaluation drops nothing.
    assert not np.array_equal(one.logits, other.logits)
    calm = cohort.outputs(on=np.arange(20), layers=["2", "3"])[0]
    assert np.array_equal(calm.features["2"], calm.features["3"])


@every_model
@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_asking_changes_no_bit(both_kinds, same_bits, model, kind, mode):
    asking, silent = (both_kinds(model=model)[kind] for _ in range(2))
    for cohort in (asking, silent):
        cohort.fit(supervised, private=Passes(batch_size=8))
        if cohort is asking:
            cohort.outputs(on="private", mode=mode, layers=["penultimate"])
        # What it trains and predicts afterwards is what it would have been.
        cohort.fit(supervised, private=Passes(batch_size=8))
    generator = torch.get_rng_state()
    predicted = asking.predict_public(SOME)
    asking.outputs(on=SOME, mode=mode)
    assert np.array_equal(predicted, asking.predict_public(SOME))
    assert torch.equal(torch.get_rng_state(), generator)
    for one, other in zip(asking.states(), silent.states(), strict=True):
        assert same_bits(one.to_arrays(), other.to_arrays())


@every_model
def test_outputs_are_kept_as_they_were_put_out_while_training(
    float64, both_kinds, largest_difference, model
):
    loop, vmap = both_kinds(model=model)
    kept = [
        cohort.fit(
            supervised,
            private=Passes(batch_size=8, epochs=2),
            layers=["penultimate"],
            keep_outputs=True,
        )
        for cohort in (loop, vmap)
    ]
    assert largest_difference(*kept) < 1e-5
    assert [len(own.rows) for own in kept[0]] == [26, 42, 10]
    for own, member in zip(kept[1], loop._given, strict=True):
        for epoch in (own.rows[: len(member.rows)], own.rows[len(member.rows) :]):
            assert np.array_equal(np.sort(epoch), member.rows)
        assert np.array_equal(own.labels, loop._data.train_labels[own.rows])


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_kept_outputs_are_those_before_each_step(float64, both_kinds, kind):
    cohort = both_kinds(optimizer=OptimizerSettings(name="sgd", lr=0.1))[kind]
    weights = cohort.weights()
    kept = cohort.fit(supervised, private=Passes(batch_size=100, epochs=2), keep_outputs=True)
    for own, first, member in zip(kept, weights, cohort._given, strict=True):
        plain, count = network(MLP, first), len(member.rows)
        for step in range(2):
            rows = torch.from_numpy(own.rows[step * count : (step + 1) * count])
            logits = plain(cohort._data.train_inputs[rows])
            found = own.logits[step * count : (step + 1) * count]
            np.testing.assert_allclose(found, logits.detach().numpy(), atol=1e-5)
            plain.zero_grad()
            F.cross_entropy(logits, cohort._data.train_labels[rows]).backward()
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= 0.1 * parameter.grad


def test_outputs_beside_public_rows_are_of_private_rows_only(
    float64, both_kinds, largest_difference, public_lesson
):
    def both(outputs, batch):
        return {"ce": F.cross_entropy(outputs.private, batch.labels)}

    kept = [
        cohort.fit(both, private=Passes(batch_size=100), public=public_lesson(), keep_outputs=True)
        for cohort in both_kinds((8, 8, 8))
    ]
    assert [len(own.logits) for own in kept[0]] == [8, 8, 8]
    assert largest_difference(*kept) < 1e-5


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_what_cannot_be_put_out_is_refused(both_kinds, public_lesson, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match=r"no layer 'seventh'; it has 0 \[64\], 1 \[16\]"):
        cohort.outputs(on=SOME, layers=["seventh"])
    with pytest.raises(ValueError, match="one for each of 3 members, got 2"):
        cohort.outputs(on=[SOME, SOME])
    with pytest.raises(ValueError, match="no frozen model 'nobody'"):
        cohort.outputs(on=SOME, model="nobody")
    with pytest.raises(ValueError, match="keep_outputs keeps outputs for private rows"):
        cohort.fit(supervised, public=public_lesson(), keep_outputs=True)
    with pytest.raises(ValueError, match="layers of 'other', which is not in this fit"):
        cohort.fit(supervised, private=Passes(batch_size=8), layers={"other": ["1"]})


def test_rows_are_cut_without_a_lone_last_one_in_training(both_kinds):
    # 13 rows by 4 would leave one alone, of which BatchNorm has no statistics.
    loop, vmap = both_kinds(model=BATCH_NORM)
    for cohort in (loop, vmap):
        assert len(cohort.outputs(on="private", mode="train", batch_rows=4)[0].logits) == 13


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
def test_rows_are_handed_out_as_they_are(both_kinds, kind):
    cohort = both_kinds(model=MLP)[kind]
    data = cohort._data
    before = data.train_inputs.clone(), data.public_inputs.clone()
    own = cohort.examples(on="private")
    for member, found in zip(cohort._given, own, strict=True):
        places = torch.from_numpy(member.rows)
        np.testing.assert_array_equal(found.rows, member.rows)
        np.testing.assert_array_equal(found.inputs, data.train_inputs[places])
        np.testing.assert_array_equal(found.labels, data.train_labels[places])
    everything = np.arange(len(data.public_inputs))
    public = cohort.examples(on=everything)
    np.testing.assert_array_equal(public[0].inputs, data.public_inputs)
    # Who changes what he was given changes nobody's data.
    for found in [*own, *public]:
        found.inputs[:] = 0
    assert torch.equal(data.train_inputs, before[0])
    assert torch.equal(data.public_inputs, before[1])
