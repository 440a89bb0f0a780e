"""Features: what models' last linear layers read, comparable between different architectures."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedkd.exchange.payloads import Prototypes
from fedkd.inputs import Shape
from fedkd.models import ModelSettings, build_model
from fedkd.objectives.taps import PENULTIMATE, layer_shapes, vector_width, vectors
from fedkd.training import RowOutputs, as_tensor
from strategies.contract import Federation


def feature_widths(federation: Federation, input_shape: Shape) -> dict[str, int]:
    """Return how many features the clients' models have, by what the models are called.

    Raises:
        ValueError: for a model without a linear layer to read any.
    """
    widths = {}
    for client in federation.first_clients.values():
        model = federation.models[client]
        widths[model.label] = feature_width(
            "clients.models", model, input_shape, federation.num_classes
        )
    return widths


def feature_width(setting: str, model: ModelSettings, input_shape: Shape, num_classes: int) -> int:
    """Return how many features a model has.

    Args:
        setting: that names the model, for the message.
        model: the model.
        input_shape: of one row.
        num_classes: logits a row.

    Raises:
        ValueError: for a model without a linear layer to read any.
    """
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    shape = layer_shapes(module, torch.zeros(2, *input_shape)).get(PENULTIMATE)
    if shape is None:
        raise ValueError(
            f"{setting}: {model.label} has no linear layer, so nothing that could be "
            "taken for features: use a model that ends in one"
        )
    return vector_width(shape)


def pooled(features: Float[Tensor, "rows ..."], width: int) -> Float[Tensor, "rows width"]:
    """Average neighbours so that so many numbers are left; features of that width stay as they are.

    Args:
        features: of each row; maps are averaged over space first.
        width: at most as many as there are.
    """
    flat = vectors(features)
    return flat if flat.shape[1] == width else F.adaptive_avg_pool1d(flat, width)


def features_of(outputs: RowOutputs, width: int) -> Float[Tensor, "rows width"]:
    """Return what a model's last linear layer read for some rows, pooled to so many numbers."""
    return pooled(as_tensor(outputs.features[PENULTIMATE]), width)


def nearness(outputs: RowOutputs, prototypes: Prototypes) -> np.ndarray:
    """Score each class by how near its prototype is to a row's features.

    Returns:
        Float32 ``[rows, classes]``: the negated mean square of what lies between them, -inf for a
        class without a prototype.
    """
    features = features_of(outputs, prototypes.values.shape[1])
    scores = np.full((len(features), prototypes.num_classes), -np.inf, np.float32)
    # One after the other: all at once would be rows x classes x features numbers.
    for label, prototype in zip(prototypes.classes, as_tensor(prototypes.values), strict=True):
        scores[:, label] = -(features - prototype).square().mean(-1).numpy()
    return scores
