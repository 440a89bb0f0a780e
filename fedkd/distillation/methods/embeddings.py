"""Peers whose embeddings a method looks at."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fedkd.distillation.fit.group import (
    Group,
    GroupOutputs,
    SettingsT,
)
from fedkd.objectives import PENULTIMATE, layer_shapes, tapped, vectors


class EmbeddingGroup(Group[SettingsT]):
    """Peers whose embeddings, what their last linear layers read, are put out too."""

    def widths(self) -> list[int]:
        """Return how many numbers each model's embedding has."""
        inputs = self.workshop.rows.inputs[:2]
        return [
            vectors(torch.zeros(1, *layer_shapes(model, inputs)[PENULTIMATE])).shape[1]
            for model in self.models
        ]

    @contextmanager
    def tapping(self) -> Iterator[None]:
        """Watch what every model's last linear layer reads."""
        with ExitStack() as stack:
            self._features = [
                stack.enter_context(tapped(model, [PENULTIMATE])) for model in self.models
            ]
            yield

    def run(self, inputs: Sequence[Tensor]) -> GroupOutputs:
        """Run every model once; beside its logits is its embedding."""
        logits = super().run(inputs).logits
        return GroupOutputs(
            logits,
            {
                f"embedding {number}": vectors(features[PENULTIMATE])
                for number, features in enumerate(self._features)
            },
        )
