"""Trained models as files: what they hold, reading them again, what they predict, exporting them.

A file is safetensors, so nothing in it is code. Its header says what the tensors are: architecture
and options, shape of an input, classes, and how an input is prepared. `fedkd.trained.files` writes
and reads it; federations, ``fedkd distill``, ``fedkd predict`` and ``fedkd export`` share it.
"""

from fedkd.trained.files import (
    LoadedModel,
    ModelInfo,
    load_model,
    model_content,
    read_info,
    read_tensors,
)

__all__ = [
    "LoadedModel",
    "ModelInfo",
    "load_model",
    "model_content",
    "read_info",
    "read_tensors",
]
