import math

import pytest
import torch
from torch import Tensor

from models.attention import (
    MultiHeadAttention,
    SelfAttention,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_hand(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    return weights @ value


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 1), (3, 5, 4), (7, 2, 16)])
def test_is_the_formula(queries: int, keys: int, dim: int) -> None:
    query, key, value = torch.randn(2, 3, queries, dim), torch.randn(2, 3, keys, dim), torch.randn(2, 3, keys, dim)
    bias = torch.randn(2, 3, queries, keys)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value).double(), by_hand(query, key, value), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, bias).double(),
        by_hand(query, key, value, bias),
        atol=1e-5,
        rtol=1e-5,
    )


def test_minus_infinity_hides_a_key() -> None:
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    bias = torch.zeros(1, 1, 1, 6)
    bias[..., 4:] = -math.inf
    hidden = scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(hidden, scaled_dot_product_attention(query, key[:, :, :4], value[:, :, :4]))


def test_heads_are_split_and_merged_without_loss() -> None:
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    torch.testing.assert_close(heads[:, 1], x[..., 4:8])
    torch.testing.assert_close(merge_heads(heads), x)


def test_self_attention_is_the_formula_per_head() -> None:
    attention = SelfAttention(8, 2)
    x = torch.randn(2, 5, 8)
    query, key, value = attention.qkv(x).split(8, dim=-1)
    heads = [
        by_hand(query[..., s], key[..., s], value[..., s]).float() for s in (slice(0, 4), slice(4, 8))
    ]  # one head after the other
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)), atol=1e-6, rtol=1e-5)


def test_self_attention_is_permutation_equivariant() -> None:
    attention, x, order = SelfAttention(16, 4), torch.randn(2, 9, 16), torch.randperm(9)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_multi_head_attention_is_the_formula_per_head() -> None:
    attention = MultiHeadAttention(8, 2)
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    bias = torch.randn(2, 2, 3, 5)
    q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
    parts = [slice(0, 4), slice(4, 8)]
    heads = [by_hand(q[..., s], k[..., s], v[..., s], bias[:, i]).float() for i, s in enumerate(parts)]
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(query, key, value, bias), expected, atol=1e-6, rtol=1e-5)


def test_multi_head_attention_does_not_see_the_order_of_the_keys() -> None:
    attention, order = MultiHeadAttention(8, 2), torch.randperm(6)
    query, key, value = torch.randn(1, 3, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    torch.testing.assert_close(attention(query, key[:, order], value[:, order]), attention(query, key, value))


@pytest.mark.parametrize("attention", [SelfAttention, MultiHeadAttention])
def test_heads_must_divide_the_embedding(attention: type[SelfAttention | MultiHeadAttention]) -> None:
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        attention(10, 3)
