"""Small models that are loaded from files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkd.models import ModelSettings, build_model
from fedkd.trained.files import LoadedModel, ModelInfo, load_model, model_content

Make = Callable[..., LoadedModel]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a model of random weights and load it."""

    def loaded(name: str = "mlp", *, options: Any = None, **changed: Any) -> LoadedModel:
        fields: dict[str, Any] = {
            "model": ModelSettings(name=name, options=options or {}),
            "input_shape": (1, 8, 8),
            "class_names": ("cat", "dog", "owl"),
            "channel_mean": (0.25,),
            "channel_std": (0.5,),
        }
        info = ModelInfo(**(fields | changed))
        module = build_model(
            info.model, input_shape=info.shape, num_classes=len(info.class_names), seed=3
        )
        path = tmp_path / "model.safetensors"
        path.write_bytes(model_content(module.state_dict(), info))
        return load_model(path, permit=lambda _: True)

    return loaded
