"""Small transformer encoder over picture rows, square patches, or the tokens of a text.

Source: Dosovitskiy et al., 2021, section 3.1. https://arxiv.org/abs/2010.11929
Differs from the paper: image rows are the default tokens, and the mean over tokens feeds the
classifier instead of a class token. Dropout is 0 by default.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedkd.bounds import Layers, ShareBelowOne, Whole, Width
from fedkd.inputs import InputShape, Kind
from fedkd.models.options import ModelOptions
from fedkd.models.tokens import TokenNumbers, is_filling


class TransformerOptions(ModelOptions):
    """Options of ``transformer``."""

    source: ClassVar[str] = "Dosovitskiy et al., 2021, pre-norm encoder of rows, patches, tokens"
    takes: ClassVar[tuple[Kind, ...]] = ("pictures", "text")

    patch: Width | None = Field(
        default=None,
        description="side of a square patch in pixels, divides height and width; null: image rows; "
        "texts have none",
    )
    dim: Width = Field(default=32, description="width of a token")
    depth: Layers = Field(default=2, description="encoder blocks")
    heads: Width = Field(default=4, description="attention heads, divides dim")
    mlp_ratio: Whole = Field(
        default=2, ge=1, le=100, description="hidden width of a block's MLP over dim"
    )
    dropout: ShareBelowOne = Field(default=0.0, description="share of block outputs dropped")

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> "TransformerOptions":
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads} and dim={self.dim}")
        return self

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Cut the image into tokens, encode them, map their mean to class scores.

        The tokens of a text are embedded; those that only fill it up are attended by none and have
        no part in the mean.

        Raises:
            ValueError: if ``patch`` does not divide the image's height and width, or for texts.
        """
        if input_shape.vocabulary is not None:
            if self.patch is not None:
                raise ValueError(f"texts have no patches: leave patch out, got {self.patch}")
            (length,) = input_shape
            return TokenTransformer(
                num_classes,
                vocabulary=input_shape.vocabulary,
                length=length,
                dim=self.dim,
                depth=self.depth,
                heads=self.heads,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
            )
        channels, height, width = input_shape
        patch_height, patch_width = (1, width) if self.patch is None else (self.patch, self.patch)
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"patch must divide the image's height and width ({height}x{width}), "
                f"got {self.patch}"
            )
        return ImageTransformer(
            num_classes,
            token_shape=(channels, patch_height, patch_width),
            tokens=(height // patch_height) * (width // patch_width),
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
        )


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer MLP, each on normalised tokens and added to its input."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.queries_keys_values = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, mlp_ratio * dim)
        self.mlp_out = nn.Linear(mlp_ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        ignored: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return the tokens after one block; nobody attends to tokens that are ``ignored``."""
        projected = self.queries_keys_values(self.attention_norm(tokens))
        batch, count, dim = tokens.shape
        by_head = projected.reshape(batch, count, 3 * self.heads, dim // self.heads).transpose(1, 2)
        queries, keys, values = by_head.chunk(3, dim=1)
        # Written out because F.scaled_dot_product_attention has no batching rule on the CPU: vmap
        # would warn and run it client by client. On this few tokens it is as quick.
        scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(-2, -1)
        if ignored is not None:
            # No infinity: a text without a single token would become NaN.
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(ignored[:, None, None, :], lowest)
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        tokens = tokens + self.dropout(self.attention_out(attended))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(tokens)))
        encoded: Tensor = tokens + self.dropout(self.mlp_out(hidden))
        return encoded


class ImageTransformer(nn.Module):
    """Linear embedding of image pieces, learned positions, encoder blocks, mean, linear layer."""

    def __init__(
        self,
        num_classes: int,
        *,
        token_shape: tuple[int, int, int],
        tokens: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, self.patch_height, self.patch_width = token_shape
        self.embedding = nn.Linear(channels * self.patch_height * self.patch_width, dim)
        self.positions = nn.Parameter(torch.empty(tokens, dim))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(dim, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def cut(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Return the image pieces from left to right, top to bottom, each flattened."""
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch_height, width // self.patch_width
        pieces = images.reshape(batch, channels, rows, self.patch_height, columns, self.patch_width)
        return pieces.permute(0, 2, 4, 1, 3, 5).reshape(
            batch, rows * columns, self.embedding.in_features
        )

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return class logits."""
        tokens = self.embedding(self.cut(images)) + self.positions
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class TokenTransformer(nn.Module):
    """Token embedding, learned positions, encoder blocks, mean over the text, linear layer."""

    def __init__(
        self,
        num_classes: int,
        *,
        vocabulary: int,
        length: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.numbers = TokenNumbers()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.empty(length, dim))
        for table in (self.embedding.weight, self.positions):
            nn.init.normal_(table, std=0.02)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, tokens: Float[Tensor, "batch length"]) -> Float[Tensor, "batch classes"]:
        """Return class logits."""
        numbers = self.numbers(tokens)
        encoded, ignored = self.embedding(numbers) + self.positions, is_filling(numbers)
        for block in self.blocks:
            encoded = block(encoded, ignored)
        counted = (~ignored).to(encoded.dtype)
        total = (self.norm(encoded) * counted[:, :, None]).sum(dim=1)
        logits: Tensor = self.classifier(total / counted.sum(dim=1, keepdim=True).clamp(min=1))
        return logits
