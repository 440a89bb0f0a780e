"""What is exported says what the model says, for batches of any size, or is no file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.data.features import FeatureColumn
from fedkd.data.reading import Reading
from fedkd.models import known_models
from fedkd.trained import exporting
from fedkd.trained.exporting import ABOUT, ExportError, check_format, export_model
from fedkd.trained.files import LoadedModel, ModelInfo

Make = Callable[..., LoadedModel]

SLOW = [
    pytest.param(name, format, marks=pytest.mark.slow)
    for name in known_models()
    for format in ("torch", "onnx")
    if (name, format) not in {("mlp", "onnx"), ("gru", "torch"), ("transformer", "torch")}
]


@pytest.mark.parametrize(
    ("name", "format"), [("mlp", "onnx"), ("gru", "torch"), ("transformer", "torch"), *SLOW]
)
def test_a_file_takes_pixels_and_agrees(make: Make, tmp_path: Path, name: str, format: Any) -> None:
    shape = (1, 16, 16) if name.startswith("tutorial") else (1, 8, 8)
    loaded = make(name, input_shape=shape)
    pixels = np.random.default_rng(0).random((5, *shape), dtype=np.float32)
    made = export_model(loaded, tmp_path / "model.out", format=format, rows=pixels)
    assert made.largest_difference < 1e-5
    assert made.rows == 1 + 7 + 64 + 5
    # What a stranger gets out of the file, without us.
    if format == "torch":
        answers = torch.export.load(made.path).module()(torch.from_numpy(pixels)).detach().numpy()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
        (answers,) = session.run(None, {"inputs": pixels})
    assert np.allclose(answers, loaded.logits(pixels), atol=1e-5)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_a_file_says_its_classes_and_the_order_of_its_features(
    make: Make, tmp_path: Path, format: Any
) -> None:
    columns = (
        FeatureColumn("age", 1),
        FeatureColumn("pet", 2, ("cat", "dog")),
        FeatureColumn("at", 2),
    )
    loaded = make(
        input_shape=(5,),
        channel_mean=(0.0,) * 5,
        channel_std=(1.0,) * 5,
        reading=Reading(columns=columns),
    )
    made = export_model(loaded, tmp_path / "model.out", format=format)
    if format == "torch":
        told = {f"{name}.json": "" for name in ABOUT}
        torch.export.load(made.path, extra_files=told)
        told = {name.removesuffix(".json"): text for name, text in told.items()}
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == ["cat", "dog", "owl"]
    assert json.loads(told["feature_names"]) == ["age", "pet=cat", "pet=dog", "at[0]", "at[1]"]
    assert json.loads(told["inputs"]) == "as read"
    assert ModelInfo.model_validate_json(told["fedkd"]) == loaded.info


def test_texts_are_exported_as_tokens(make: Make, tmp_path: Path) -> None:
    loaded = make("gru", input_shape=(5,), vocabulary=7, channel_mean=(0.0,), channel_std=(1.0,))
    made = export_model(loaded, tmp_path / "model.pt2", format="torch")
    tokens = torch.tensor([[2.0, 3, 4, 0, 0], [6, 6, 6, 6, 6]])
    answers = torch.export.load(made.path).module()(tokens).detach().numpy()
    assert np.allclose(answers, loaded.logits(tokens.numpy()), atol=1e-5)


def test_without_the_standardisation_it_takes_what_the_module_takes(
    make: Make, tmp_path: Path
) -> None:
    loaded = make()
    made = export_model(loaded, tmp_path / "m.pt2", format="torch", standardise=False)
    inputs = torch.rand(3, 1, 8, 8)
    assert torch.allclose(torch.export.load(made.path).module()(inputs), loaded.module(inputs))


def test_a_file_that_says_something_else_is_refused_and_not_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exporting._read_torch

    def shifted(path: Path) -> Any:
        answers = read(path)
        return lambda batch: answers(batch) + 0.01 * (len(batch) == 7)

    monkeypatch.setattr(exporting, "_read_torch", shifted)
    with pytest.raises(ExportError, match=r"does not agree .* differ by up to 0\.01"):
        export_model(make(), tmp_path / "m.pt2", format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_format_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="format must be torch or onnx, got 'h5'"):
        check_format("h5")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda _: None)
    assert check_format("torch") == "torch"
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        check_format("onnx")
