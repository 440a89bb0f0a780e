"""A model in a file is what it was, or is refused by the name of what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from fedkd.compression import QuantisationSettings, quantise, quantised_header
from fedkd.inputs import InputShape
from fedkd.models import ModelSettings, build_model, known_models
from fedkd.trained.files import (
    HEADER,
    ModelFileError,
    ModelInfo,
    fill,
    load_model,
    model_content,
    read_info,
)

SHAPE = (1, 8, 8)


def info_of(name: str = "mlp", **changed: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "model": ModelSettings(name=name),
        "input_shape": SHAPE,
        "class_names": ("cat", "dog", "owl"),
        "channel_mean": (0.25,),
        "channel_std": (0.5,),
    }
    return ModelInfo(**(fields | changed))


def module_of(info: ModelInfo, seed: int = 3) -> torch.nn.Module:
    return build_model(
        info.model, input_shape=info.input_shape, num_classes=len(info.class_names), seed=seed
    ).eval()


def written(folder: Path, info: ModelInfo) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(model_content(module_of(info).state_dict(), info))
    return path


@pytest.mark.parametrize("name", known_models())
def test_every_family_comes_back_and_gets_standardised_inputs(tmp_path: Path, name: str) -> None:
    info = info_of(name)
    loaded = load_model(written(tmp_path, info))
    assert loaded.info == info
    assert not loaded.module.training
    assert not any(each.requires_grad for each in loaded.module.parameters())
    pixels = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    # Standardised with mean 1/4 and deviation 1/2.
    expected = torch.softmax(module_of(info)((pixels - 0.25) / 0.5), -1).detach()
    assert torch.allclose(torch.from_numpy(loaded.predict(pixels)), expected, atol=1e-6)
    assert loaded.predict(pixels[:0]).shape == (0, 3)


def test_an_int8_model_comes_back(tmp_path: Path) -> None:
    info = info_of(activations="int8")
    small = quantise(module_of(info), QuantisationSettings(activations="int8"))
    path = tmp_path / "int8.safetensors"
    path.write_bytes(model_content(small.state_dict(), info, quantised_header(small)))
    pixels = torch.rand(4, *SHAPE)
    expected = small((pixels - 0.25) / 0.5).detach().numpy()
    assert np.allclose(load_model(path).logits(pixels), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (np.zeros((2, 8, 8), np.float32), r"\[rows, 1, 8, 8\], got \[2, 8, 8\]"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"floats in \[0, 1\], got uint8"),
    ],
)
def test_inputs_of_another_kind_are_refused(tmp_path: Path, inputs: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_model(written(tmp_path, info_of())).predict(inputs)


def test_tensors_that_do_not_fit_are_named() -> None:
    module = module_of(info_of())
    state = module.state_dict()
    name = next(iter(state))
    shape = list(state[name].shape)
    spoilt = {
        rf"it has no {name}": {key: value for key, value in state.items() if key != name},
        r"it has extra, the model has none": {**state, "extra": torch.zeros(1)},
        rf"{name} is \[2, 2\], the model's \[{shape[0]}": {**state, name: torch.zeros(2, 2)},
        rf"{name} holds float64, the model's float32": {**state, name: state[name].double()},
        rf"{name} holds NaN or infinity": {**state, name: state[name] * torch.nan},
    }
    for told, tensors in spoilt.items():
        with pytest.raises(ModelFileError, match=f"x.safetensors does not fit the model: {told}"):
            fill(module, tensors, "x.safetensors")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.pkl"])
def test_files_that_may_hold_code_are_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ModelFileError, match=r"may run code .* safetensors\.torch\.save_file"):
        load_model(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        load_model(tmp_path / "nowhere.safetensors")
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelFileError, match="cannot read"):
        load_model(noise)
    silent = tmp_path / "silent.safetensors"
    save_file(module_of(info_of()).state_dict(), silent)
    assert read_info(silent) is None
    with pytest.raises(ModelFileError, match="does not say what its model is"):
        load_model(silent)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("input_shape", [1, 8, 10**9], "input_shape.2: Input should be less than"),
        ("channel_std", [0.0], "channel_std.0: Input should be greater than 0"),
        ("channel_mean", [0.1, 0.2], "one number for each of 1 channels"),
        ("model", {"name": "mlq"}, "unknown model 'mlq'"),
        ("model", {"name": "os:system"}, "os:system"),
        ("surplus", 1, "surplus: Extra inputs"),
    ],
)
def test_a_header_that_no_file_of_ours_has_is_refused(
    tmp_path: Path, key: str, value: Any, told: str
) -> None:
    table = json.loads(info_of().to_json()) | {key: value}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(save(module_of(info_of()).state_dict(), {HEADER: json.dumps(table)}))
    with pytest.raises(ModelFileError, match=told):
        load_model(path)


def test_code_that_only_the_file_names_does_not_run(tmp_path: Path) -> None:
    info = info_of(model=ModelSettings(name="odd_models:make", options={"kind": "InPlace"}))
    path = written(tmp_path, info)
    with pytest.raises(ValueError, match="does not run unasked"):
        load_model(path)
    loaded = load_model(path, permit=lambda name: name == "odd_models:make")
    assert loaded.predict(np.zeros((1, *SHAPE), np.float32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("shape", "vocabulary", "mean"), [((5,), None, [2.0] * 5), ((6,), 9, [0.0])]
)
def test_models_of_features_and_of_texts_say_what_they_take(tmp_path, shape, vocabulary, mean):
    settings = ModelSettings(name="mlp")
    module = build_model(
        settings, input_shape=InputShape(shape, vocabulary), num_classes=2, seed=0
    ).eval()
    info = ModelInfo(
        model=settings,
        input_shape=shape,
        vocabulary=vocabulary,
        class_names=("a", "b"),
        channel_mean=tuple(mean),
        channel_std=(1.0,) * len(mean),
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_content(module.state_dict(), info))
    inputs = torch.arange(2 * shape[0]).reshape(2, -1) % 9
    wanted = module(inputs.float() - mean[0])
    assert np.allclose(load_model(path).logits(inputs), wanted.detach(), atol=1e-6)
