"""Features of different models, and the prototypes that they are near to."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Prototypes
from fedkd.training import RowOutputs
from strategies.shared.features import feature_widths, nearness, pooled


def test_features_of_the_right_width_stay_as_they_are():
    features = torch.randn(3, 6)
    assert torch.equal(pooled(features, 6), features)


def test_neighbours_are_averaged_and_maps_are_averaged_over_space():
    features = torch.tensor([[1.0, 3.0, 5.0, 5.0]])
    assert pooled(features, 2).tolist() == [[2.0, 5.0]]
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert pooled(maps, 2).tolist() == [[1.5, 5.5]]


def test_widths_are_what_the_last_linear_layer_reads(tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fedproto"), tiny_data())
    widths = feature_widths(strategy.federation, (1, 8, 8))
    # The CNN pools 8 x 8 pixels to 4 x 4 in its one block of 4 channels.
    assert sorted(widths.values()) == [8, 4 * 4 * 4]


def test_the_nearest_prototype_wins_and_a_class_without_one_never_does():
    prototypes = Prototypes(
        classes=np.array([0, 2]),
        values=np.array([[0.9, 0.2], [-0.8, -0.2]], np.float32),
        num_classes=3,
    )
    rows = np.array([[0.5, 0.5], [-0.5, 0.5]], np.float32)
    outputs = RowOutputs(
        rows=np.arange(2),
        labels=None,
        logits=np.zeros((2, 3), np.float32),
        features={"penultimate": rows},
    )
    scores = nearness(outputs, prototypes)
    # (.4^2 + .3^2) / 2, (1.3^2 + .7^2) / 2; (1.4^2 + .3^2) / 2, (.3^2 + .7^2) / 2
    assert scores[:, [0, 2]] == pytest.approx(
        np.array([[-0.125, -1.09], [-1.025, -0.29]], np.float32), abs=1e-6
    )
    assert np.isneginf(scores[:, 1]).all()
