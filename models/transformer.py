"""Transformer blocks: ViT's encoder block (pre-norm or post-norm), DETR's encoder and decoder blocks, and their parts.

Shapes: B batch, N queries, M tokens of the memory, D embedding.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vitrine.models.attention import MultiHeadAttention, SelfAttention

# "exact" is x times the normal distribution function; "tanh" is its approximation (Hendrycks & Gimpel 2016, sec. 2),
# Flax's default and therefore what Google's weights were trained with.
Gelu = Literal["exact", "tanh"]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to the last axis."""

    def __init__(self, in_features: int, hidden_features: int, gelu: Gelu = "exact") -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate={"exact": "none", "tanh": "tanh"}[gelu])
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., in_features]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth: during training, drop a residual branch for random samples (Huang et al. 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"drop_path {probability} is not a probability below 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...] with the same expectation."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        mask = x.new_empty(x.shape[0], *([1] * (x.ndim - 1))).bernoulli_(keep)
        return x * mask / keep


class Block(nn.Module):
    """Encoder block: pre-norm (Dosovitskiy et al. 2021, eq. 2 and 3) or post-norm (Vaswani et al. 2017, sec. 3.1)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        drop_path: float = 0.0,
        norm: Literal["pre", "post"] = "pre",
        norm_eps: float = 1e-6,
        gelu: Gelu = "exact",
    ) -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = SelfAttention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; the attention weights [B, H, N, N] are appended to `record`."""
        if self.pre_norm:
            x = x + self.drop_path(self.attn(self.norm1(x), record))
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        else:
            x = self.norm1(x + self.drop_path(self.attn(x, record)))
            x = self.norm2(x + self.drop_path(self.mlp(x)))
        return x


class DetrEncoderBlock(nn.Module):
    """Post-norm encoder block with positions added to queries and keys (Carion et al. 2020, fig. 10)."""

    def __init__(self, embed_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(embed_dim, num_heads)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, padding_bias: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """Encode the memory.

        Args:
            x, positions: [B, M, D].
            padding_bias: float [B, 1, 1, M], minus infinity at padding.
            record: list that the attention weights [B, H, M, M] are appended to.

        Returns:
            [B, M, D].
        """
        query = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(query, query, x, padding_bias, record)))
        x = self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))
        return x


class SpatialPrior(nn.Module):
    """Cross-attention bias: a Gaussian around a query's reference box, as wide as the box times a learned factor.

    Each head has its own (Gao et al. 2021, "Fast Convergence of DETR with Spatially Modulated Co-Attention", eq. 3 and
    4).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        factors = torch.logspace(math.log10(0.3), math.log10(2.5), num_heads)  # standard deviation / edge of the box
        self.log_factor = nn.Parameter(factors.log())
        self.offset = nn.Parameter(torch.zeros(num_heads, 2))  # of the centre, in edges of the box

    def forward(self, boxes_cxcywh: Tensor, cells: Tensor) -> Tensor:
        """Logarithm of the Gaussian.

        Args:
            boxes_cxcywh: reference boxes of the queries, [B, N, 4], fractions of the image.
            cells: (x, y) of the memory's cells, [B, h, w, 2], fractions of the image; those of a column share their x,
                those of a row their y.

        Returns:
            [B, H, N, h w], at most 0.
        """
        centre, size = boxes_cxcywh[:, None].split(2, dim=-1)  # [B, 1, N, 2] each
        centre = centre + self.offset[:, None] * size  # [B, H, N, 2]
        deviation = size * self.log_factor.exp()[:, None, None]  # [B, H, N, 2]
        x = (cells[:, None, None, 0, :, 0] - centre[..., :1]) / deviation[..., :1]  # [B, H, N, w]
        y = (cells[:, None, None, :, 0, 1] - centre[..., 1:]) / deviation[..., 1:]  # [B, H, N, h]
        return ((-y * y / 2)[..., None] + (-x * x / 2)[..., None, :]).flatten(-2)


class DetrDecoderBlock(nn.Module):
    """Post-norm decoder block: self-attention among the queries, cross-attention to the memory (fig. 10)."""

    def __init__(self, embed_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(embed_dim, num_heads)
        self.multihead_attn = MultiHeadAttention(embed_dim, num_heads)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def project_memory(self, memory: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the encoder's output and its position encoding, [B, M, D] each."""
        return self.multihead_attn.project(memory + positions, memory)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        memory: tuple[Tensor, Tensor],
        bias: Tensor,
        groups: int = 1,
        query_bias: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Decode the queries' state.

        Args:
            x, query_positions: [B, N, D].
            memory: keys and values of the encoder's output, [B, H, M, d] each, by `project_memory`.
            bias: of the cross-attention, broadcastable to [B, H, N, M], minus infinity at padding.
            groups: number of equal groups of the N queries that do not attend to each other.
            query_bias: [B, N], added to the self-attention logits of each key: very negative masks a query.
            record: list that the cross-attention weights [B, H, N, M] are appended to.

        Returns:
            [B, N, D].
        """
        batch = x.shape[0]
        query = (x + query_positions).unflatten(1, (groups, -1)).flatten(0, 1)  # [B * groups, N / groups, D]
        value = x.unflatten(1, (groups, -1)).flatten(0, 1)
        if query_bias is not None:
            query_bias = query_bias.reshape(batch * groups, 1, 1, -1)
        attended = self.self_attn(query, query, value, query_bias)
        attended = attended.unflatten(0, (batch, groups)).flatten(1, 2)  # [B, N, D]
        x = self.norm1(x + self.dropout(attended))
        attended = self.multihead_attn.attend(x + query_positions, memory, bias, record)
        x = self.norm2(x + self.dropout(attended))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))
        return x
