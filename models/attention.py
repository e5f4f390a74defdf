"""Scaled dot-product attention and its multi-head form (Vaswani et al. 2017, "Attention Is All You Need", eq. 1).

A fused kernel computes attention without materialising the weights. With a list `record`, the weights are computed
explicitly as in eq. 1 and appended to it.

Shapes: B batch, H heads, N queries, M keys, D embedding, d = D / H per head.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d) + bias); sqrt(d) is the temperature that keeps the logits' variance near one.

    Args:
        query: [B, H, N, d].
        key: [B, H, M, d].
        bias: float, broadcastable to [B, H, N, M]; minus infinity masks a key for a query.

    Returns:
        [B, H, N, M]; rows are non-negative and sum to one.
    """
    logits = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, record: list[Tensor] | None = None
) -> Tensor:
    """`attention_weights(query, key, bias)` times V.

    Args:
        query: [B, H, N, d].
        key, value: [B, H, M, d].
        bias: float, broadcastable to [B, H, N, M]; minus infinity masks a key for a query.
        record: list that the attention weights [B, H, N, M] are appended to; None selects the fused kernel.

    Returns:
        [B, H, N, d].
    """
    if record is None and not torch.compiler.is_exporting():  # ONNX has no fused kernel at `export.graph.OPSET`
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    weights = attention_weights(query, key, bias)
    if record is not None:
        record.append(weights)
    return weights @ value


def attention_rollout(layers: Sequence[Tensor]) -> Tensor:
    """Contribution of each input token to each token of the last layer.

    Average the attention over the heads and with the identity of the residual connection, then multiply over the layers
    (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", sec. 3).

    Args:
        layers: attention weights [B, H, N, N] of each block, first to last.

    Returns:
        [B, N, N]; rows are non-negative and sum to one.
    """
    rollout = torch.eye(layers[0].shape[-1], device=layers[0].device)[None]
    for weights in layers:
        rollout = (weights.mean(dim=1) @ rollout + rollout) / 2
    return rollout


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, D]."""
    # Fused attention kernels return different memory layouts: without the copy, an export traced with one kernel fails
    # with another.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, found {num_heads}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values (ViT's form)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; the attention weights [B, H, N, N] are appended to `record`."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out: Tensor = self.proj(merge_heads(scaled_dot_product_attention(query, key, value, record=record)))
        return out


class MultiHeadAttention(nn.Module):
    """Multi-head attention whose queries, keys and values may come from different sequences (DETR's form)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from `query` [B, N, D] to `key` and `value` [B, M, D].

        Args:
            bias: float, broadcastable to [B, H, N, M], added to the logits before the softmax.
            record: list that the attention weights [B, H, N, M] are appended to.

        Returns:
            [B, N, D].
        """
        return self.attend(query, self.project(key, value), bias, record)

    def project(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heads of `key` and `value`, [B, M, D] each, that `attend` attends to, [B, H, M, d] each."""
        return split_heads(self.k_proj(key), self.num_heads), split_heads(self.v_proj(value), self.num_heads)

    def attend(
        self,
        query: Tensor,
        projected: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, to the keys and values of `project`."""
        heads = split_heads(self.q_proj(query), self.num_heads)
        attended = scaled_dot_product_attention(heads, *projected, bias, record)
        out: Tensor = self.out_proj(merge_heads(attended))
        return out
