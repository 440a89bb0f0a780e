"""Recurrent networks that read a picture from top to bottom, one row per step, or a text.

The cells are written out in plain tensor operations because ``torch.nn.GRU``, ``torch.nn.LSTM``
and their cells have no batching rule: ``torch.func.vmap`` fails on them outside of ``grad``.
Weights, biases, gate order and results are those of torch's layers.
"""

from math import sqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Layers, Width
from fedkd.inputs import InputShape, Kind
from fedkd.models.options import ModelOptions
from fedkd.models.tokens import TokenNumbers, is_filling


class _RecurrentOptions(ModelOptions):
    takes: ClassVar[tuple[Kind, ...]] = ("pictures", "text")
    cell: ClassVar[Literal["gru", "lstm"]]

    hidden: Width = Field(default=64, description="width of the state")
    layers: Layers = Field(default=1, description="recurrent layers on top of each other")
    embedding: Width = Field(default=16, description="of texts: numbers that stand for a token")

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Read the rows, or the tokens, then map the last state to class scores."""
        if input_shape.vocabulary is not None:
            return TokenReader(
                input_shape.vocabulary,
                num_classes,
                embedding=self.embedding,
                cell=self.cell,
                hidden=self.hidden,
                layers=self.layers,
            )
        channels, _, width = input_shape
        return RowReader(
            channels * width, num_classes, cell=self.cell, hidden=self.hidden, layers=self.layers
        )


class GRUOptions(_RecurrentOptions):
    """Options of ``gru``."""

    source: ClassVar[str] = "Cho et al., 2014, gated recurrent unit over picture rows or tokens"
    cell: ClassVar[Literal["gru", "lstm"]] = "gru"


class LSTMOptions(_RecurrentOptions):
    """Options of ``lstm``."""

    source: ClassVar[str] = "Hochreiter and Schmidhuber, 1997, LSTM over picture rows or tokens"
    cell: ClassVar[Literal["gru", "lstm"]] = "lstm"


class _RecurrentLayer(nn.Module):
    """Weights of one layer: ``gates`` blocks of ``hidden`` rows, as torch stacks them."""

    gates: ClassVar[int]

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(features, self.gates * hidden)
        self.from_state = nn.Linear(hidden, self.gates * hidden)
        bound = 1 / sqrt(hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class GRULayer(_RecurrentLayer):
    """Gated recurrent unit; gates are stacked as reset, update, candidate.

    Source:
        Cho et al., 2014, section 2.3. https://arxiv.org/abs/1406.1078
        As in torch and cuDNN, the reset gate acts on the state's projection, not on the state.
    """

    gates: ClassVar[int] = 3

    def forward(
        self,
        steps: Float[Tensor, "batch steps features"],
        skipped: Bool[Tensor, "batch steps"] | None = None,
    ) -> Float[Tensor, "batch steps hidden"]:
        """Return the state after each step, from zero; ``skipped`` steps change nothing."""
        inputs = self.from_input(steps)
        state = steps.new_zeros(steps.shape[0], self.hidden)  # len() would fix it in an export
        states = []
        split = 2 * self.hidden
        for number, step_input in enumerate(inputs.unbind(1)):
            recurrent = self.from_state(state)
            reset, update = (step_input[:, :split] + recurrent[:, :split]).sigmoid().chunk(2, 1)
            candidate = (step_input[:, split:] + reset * recurrent[:, split:]).tanh()
            after = torch.lerp(candidate, state, update)
            state = _unless(skipped, number, state, after)
            states.append(state)
        return torch.stack(states, dim=1)


class LSTMLayer(_RecurrentLayer):
    """Long short-term memory; gates are stacked as input, forget, candidate, output.

    Source:
        Hochreiter and Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735, with the
        forget gate of Gers, Schmidhuber, Cummins, 2000.
    """

    gates: ClassVar[int] = 4

    def forward(
        self,
        steps: Float[Tensor, "batch steps features"],
        skipped: Bool[Tensor, "batch steps"] | None = None,
    ) -> Float[Tensor, "batch steps hidden"]:
        """Return the output after each step, starting from zero output and zero memory.

        Steps that are ``skipped`` change neither.
        """
        inputs = self.from_input(steps)
        state = memory = steps.new_zeros(steps.shape[0], self.hidden)
        states = []
        for number, step_input in enumerate(inputs.unbind(1)):
            admit, forget, candidate, emit = (step_input + self.from_state(state)).chunk(4, 1)
            kept = forget.sigmoid() * memory + admit.sigmoid() * candidate.tanh()
            after = emit.sigmoid() * kept.tanh()
            memory = _unless(skipped, number, memory, kept)
            state = _unless(skipped, number, state, after)
            states.append(state)
        return torch.stack(states, dim=1)


def _unless(
    skipped: Bool[Tensor, "batch steps"] | None,
    step: int,
    before: Float[Tensor, "batch hidden"],
    after: Float[Tensor, "batch hidden"],
) -> Float[Tensor, "batch hidden"]:
    return after if skipped is None else torch.where(skipped[:, step, None], before, after)


class RowReader(nn.Module):
    """Recurrent classifier: ``height`` steps of ``channels * width`` features each."""

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cell: Literal["gru", "lstm"],
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        layer_type = GRULayer if cell == "gru" else LSTMLayer
        self.recurrent = nn.Sequential(
            *(layer_type(hidden if depth else features, hidden) for depth in range(layers))
        )
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return class logits from the state after the last row."""
        rows = images.transpose(1, 2).flatten(2)
        logits: Tensor = self.classifier(self.recurrent(rows)[:, -1])
        return logits


class TokenReader(nn.Module):
    """Recurrent classifier of texts: one embedded token a step; what fills a text up is skipped."""

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        *,
        embedding: int,
        cell: Literal["gru", "lstm"],
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        layer_type = GRULayer if cell == "gru" else LSTMLayer
        self.numbers = TokenNumbers()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = nn.ModuleList(
            layer_type(hidden if depth else embedding, hidden) for depth in range(layers)
        )
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Float[Tensor, "batch length"]) -> Float[Tensor, "batch classes"]:
        """Return class logits from the state after the last token."""
        numbers = self.numbers(tokens)
        states, skipped = self.embedding(numbers), is_filling(numbers)
        for layer in self.recurrent:
            states = layer(states, skipped)
        logits: Tensor = self.classifier(states[:, -1])
        return logits
