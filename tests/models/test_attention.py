import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.attention import (
    MultiHeadAttention,
    SelfAttention,
    attention_rollout,
    attention_weights,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)

EDGES = st.integers(1, 6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_hand(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    return weights @ value


def padding_bias(keys: int, hidden: int) -> Tensor:
    """[1, 1, 1, keys], minus infinity at the last `hidden` keys."""
    bias = torch.zeros(1, 1, 1, keys)
    bias[..., keys - hidden :] = -math.inf
    return bias


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


@pytest.mark.parametrize("dim", [1, 2, 9, 64])
def test_temperature_is_the_root_of_the_heads_dimension(dim: int) -> None:
    random = np.random.default_rng(dim)
    query, key = random.normal(size=(4, dim)), random.normal(size=(5, dim))
    expected = np.empty((4, 5))
    for i in range(4):
        exponentials = [np.exp(np.dot(query[i], key[j]) / np.sqrt(dim)) for j in range(5)]
        expected[i] = np.array(exponentials) / np.sum(exponentials)
    weights = attention_weights(torch.from_numpy(query)[None, None], torch.from_numpy(key)[None, None])
    np.testing.assert_allclose(weights[0, 0].numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(queries=EDGES, keys=EDGES, dim=EDGES, data=st.data())
def test_weights_are_a_distribution_over_the_keys_that_are_not_hidden(
    queries: int, keys: int, dim: int, data: st.DataObject
) -> None:
    visible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys).filter(any)))
    bias = torch.zeros(keys).masked_fill(~visible, -math.inf)
    scale = data.draw(st.sampled_from([1.0, 30.0]))
    weights = attention_weights(scale * torch.randn(2, 3, queries, dim), torch.randn(2, 3, keys, dim), bias)
    assert weights.shape == (2, 3, queries, keys)
    assert (weights >= 0).all()
    assert (weights[..., ~visible] == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, queries))


@settings(deadline=None, max_examples=40)
@given(queries=EDGES, keys=EDGES, dim=EDGES, bias=st.sampled_from(["none", "padding", "full"]), data=st.data())
def test_fused_and_recorded_attention_agree(queries: int, keys: int, dim: int, bias: str, data: st.DataObject) -> None:
    query, key, value = torch.randn(2, 3, queries, dim), torch.randn(2, 3, keys, dim), torch.randn(2, 3, keys, dim)
    biases = {
        "none": None,
        "padding": padding_bias(keys, data.draw(st.integers(0, keys - 1))),
        "full": torch.randn(2, 3, queries, keys),
    }
    record: list[Tensor] = []
    recorded = scaled_dot_product_attention(query, key, value, biases[bias], record)
    fused = scaled_dot_product_attention(query, key, value, biases[bias])
    torch.testing.assert_close(fused, recorded, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(record[0] @ value, recorded)


def test_minus_infinity_hides_a_key() -> None:
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    hidden = scaled_dot_product_attention(query, key, value, padding_bias(6, 2))
    torch.testing.assert_close(hidden, scaled_dot_product_attention(query, key[:, :, :4], value[:, :, :4]))


def test_heads_are_split_and_merged_without_loss() -> None:
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    torch.testing.assert_close(heads[:, 1], x[..., 4:8])
    torch.testing.assert_close(merge_heads(heads), x)


@pytest.mark.parametrize("memory", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 3, 2)])
def test_merged_heads_lie_in_memory_the_same_whatever_the_kernels_layout(memory: tuple[int, ...]) -> None:
    heads = torch.randn(2, 3, 5, 4)
    inverse = [memory.index(axis) for axis in range(4)]
    merged = merge_heads(heads.permute(memory).contiguous().permute(inverse))
    assert merged.stride() == (60, 12, 1)
    assert torch.equal(merged, merge_heads(heads))


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


def test_recording_does_not_change_self_attention() -> None:
    attention, x = SelfAttention(16, 4), torch.randn(2, 9, 16)
    record: list[Tensor] = []
    torch.testing.assert_close(attention(x, record), attention(x), atol=1e-6, rtol=1e-5)
    assert [weights.shape for weights in record] == [(2, 4, 9, 9)]


def test_self_attention_learns_the_same_when_its_weights_are_recorded() -> None:
    attention, x = SelfAttention(16, 4), torch.randn(2, 9, 16)
    gradients = []
    for record in (None, []):
        attention.zero_grad()
        attention(x, record).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in attention.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("hidden", [0, 1, 4])
def test_recording_does_not_change_cross_attention(hidden: int) -> None:
    attention, query, memory = MultiHeadAttention(16, 4), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    bias, record = padding_bias(5, hidden), []
    recorded = attention(query, memory, memory, bias, record)
    torch.testing.assert_close(recorded, attention(query, memory, memory, bias), atol=1e-6, rtol=1e-5)
    (weights,) = record
    assert weights.shape == (2, 4, 3, 5)
    assert (weights[..., 5 - hidden :] == 0).all()


def test_a_record_keeps_the_order_of_the_calls() -> None:
    attention, record = SelfAttention(8, 2), []
    first, second = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    attention(first, record)
    attention(second, record)
    assert [weights.shape[-1] for weights in record] == [3, 4]


@pytest.mark.parametrize("attention", [SelfAttention, MultiHeadAttention])
def test_heads_must_divide_the_embedding(attention: type[SelfAttention | MultiHeadAttention]) -> None:
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        attention(10, 3)


@pytest.mark.parametrize("attention", [SelfAttention, MultiHeadAttention])
def test_at_least_one_head_is_needed(attention: type[SelfAttention | MultiHeadAttention]) -> None:
    with pytest.raises(ValueError, match="num_heads: expected at least 1, found 0"):
        attention(10, 0)


def test_rollout_of_two_layers_by_hand() -> None:
    # Two heads each, whose means are [[1, 0], [0.5, 0.5]] and [[0, 1], [0, 1]].
    first = torch.tensor([[[[1.0, 0.0], [0.2, 0.8]], [[1.0, 0.0], [0.8, 0.2]]]])
    second = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    # With half the residual: [[1, 0], [0.25, 0.75]], then [[0.5, 0.5], [0, 1]] times it.
    torch.testing.assert_close(attention_rollout([first]), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
    torch.testing.assert_close(attention_rollout([first, second]), torch.tensor([[[0.625, 0.375], [0.25, 0.75]]]))


def test_rollout_is_a_distribution_over_the_input() -> None:
    layers = [attention_weights(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)) for _ in range(4)]
    rollout = attention_rollout(layers)
    assert (rollout >= 0).all()
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(2, 5))
