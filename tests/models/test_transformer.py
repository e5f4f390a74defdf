import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrine.models.attention import MultiHeadAttention
from vitrine.models.transformer import Block, DetrDecoderBlock, DetrEncoderBlock, DropPath, Mlp, SpatialPrior


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    """Randomise all parameters: initial norms and biases would hide where they are applied."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def padding_bias(hidden: list[int], keys: int) -> tuple[Tensor, Tensor]:
    """bool [B, keys], True at the last `hidden` keys of each sample, and the same as bias [B, 1, 1, keys]."""
    mask = torch.arange(keys) >= keys - torch.tensor(hidden)[:, None]
    return mask, torch.zeros(mask.shape).masked_fill(mask, -math.inf)[:, None, None]


def torchs_attention(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """torch's own multi-head attention with the same weights."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    reference = nn.MultiheadAttention(attention.out_proj.in_features, attention.num_heads, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([projection.weight for projection in projections]),
            "in_proj_bias": torch.cat([projection.bias for projection in projections]),
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    return reference


def copy_detr_block(block: DetrEncoderBlock | DetrDecoderBlock, reference: nn.Module) -> nn.Module:
    """A torch layer with the block's weights; only the attentions' projections are named differently."""
    state = {name: value for name, value in block.state_dict().items() if "attn" not in name}
    for name, attention in block.named_children():
        if isinstance(attention, MultiHeadAttention):
            state |= {f"{name}.{key}": value for key, value in torchs_attention(attention).state_dict().items()}
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_drop_path_keeps_the_expectation(probability: float) -> None:
    dropped = DropPath(probability)(torch.ones(40_000, 2, 1))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    kept = 1 / (1 - probability)
    assert ((dropped == 0) | torch.isclose(dropped, torch.tensor(kept))).all()
    assert (dropped[:, 0] == dropped[:, 1]).all()  # samples are dropped as a whole


def test_drop_path_is_identity_outside_training() -> None:
    x = torch.randn(8, 3)
    assert DropPath(0.0)(x) is x
    assert DropPath(0.9).eval()(x) is x


def test_mlp_works_on_the_last_axis() -> None:
    mlp, x = Mlp(4, 16), torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(x)[1, 2], mlp(x[1, 2]))


@pytest.mark.parametrize(("gelu", "approximate"), [("exact", "none"), ("tanh", "tanh")])
def test_mlp_is_two_linear_layers_around_torchs_gelu(gelu: Any, approximate: str) -> None:
    mlp, x = Mlp(4, 16, gelu), torch.randn(5, 4)
    hidden = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias, approximate=approximate)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_exact_gelu_and_its_approximation_are_not_the_same() -> None:
    x = torch.linspace(-4, 4, 101)
    exact, tanh = Mlp(1, 1, "exact").act(x), Mlp(1, 1, "tanh").act(x)
    torch.testing.assert_close(exact, x * torch.distributions.Normal(0, 1).cdf(x), atol=1e-6, rtol=1e-5)
    assert 1e-4 < (exact - tanh).abs().max() < 1e-3


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_pre_norm_block_is_residual_around_normed_branches(gelu: Any) -> None:
    block, x = randomise(Block(8, 2, 32, gelu=gelu)), torch.randn(2, 5, 8)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_post_norm_block_norms_the_residual_sums(gelu: Any) -> None:
    block, x = randomise(Block(8, 2, 32, norm="post", gelu=gelu)), torch.randn(2, 5, 8)
    middle = block.norm1(x + block.attn(x))
    torch.testing.assert_close(block(x), block.norm2(middle + block.mlp(middle)))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_block_is_torchs_encoder_layer(norm: Any, eps: float) -> None:
    block, x = randomise(Block(8, 2, 24, norm=norm, norm_eps=eps)), torch.randn(2, 5, 8)
    reference = nn.TransformerEncoderLayer(
        8, 2, 24, 0.0, F.gelu, layer_norm_eps=eps, batch_first=True, norm_first=norm == "pre"
    )
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    state = block.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    reference.load_state_dict(state)
    torch.testing.assert_close(block(x), reference(x), atol=1e-5, rtol=1e-5)


def test_post_norm_block_returns_normalised_tokens() -> None:
    tokens = Block(16, 2, 32, norm="post")(100 * torch.randn(2, 5, 16) + 7)
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(dim=-1, correction=0), torch.ones(2, 5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_hands_the_record_to_its_attention(norm: Any) -> None:
    block, x, record = Block(8, 2, 16, norm=norm), torch.randn(3, 5, 8), []
    torch.testing.assert_close(block(x, record), block(x), atol=1e-5, rtol=1e-5)
    (weights,) = record
    assert weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 5))


def test_block_whose_branches_are_dropped_is_the_identity() -> None:
    block, x = Block(8, 2, 32, drop_path=0.999999), torch.randn(2, 5, 8)
    torch.testing.assert_close(block.train()(x), x)


def test_post_norm_block_whose_branches_are_dropped_only_norms() -> None:
    block, x = randomise(Block(8, 2, 32, drop_path=0.999999, norm="post")), torch.randn(2, 5, 8)
    torch.testing.assert_close(block.train()(x), block.norm2(block.norm1(x)))


@settings(deadline=None, max_examples=20)
@given(hidden=st.lists(st.integers(0, 5), min_size=1, max_size=3), heads=st.sampled_from([1, 2, 4]))
def test_encoder_block_without_positions_is_torchs_encoder_layer(hidden: list[int], heads: int) -> None:
    block = randomise(DetrEncoderBlock(8, heads, 12, 0.0))
    reference = copy_detr_block(block, nn.TransformerEncoderLayer(8, heads, 12, 0.0, batch_first=True))
    x = torch.randn(len(hidden), 6, 8)
    mask, bias = padding_bias(hidden, 6)
    expected = reference(x, src_key_padding_mask=mask)
    torch.testing.assert_close(block(x, torch.zeros_like(x), bias), expected, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(hidden=st.lists(st.integers(0, 5), min_size=1, max_size=3), heads=st.sampled_from([1, 2, 4]))
def test_decoder_block_without_positions_is_torchs_decoder_layer(hidden: list[int], heads: int) -> None:
    block = randomise(DetrDecoderBlock(8, heads, 12, 0.0))
    reference = copy_detr_block(block, nn.TransformerDecoderLayer(8, heads, 12, 0.0, batch_first=True))
    x, memory = torch.randn(len(hidden), 4, 8), torch.randn(len(hidden), 6, 8)
    mask, bias = padding_bias(hidden, 6)
    expected = reference(x, memory, memory_key_padding_mask=mask)
    found = block(x, torch.zeros_like(x), block.project_memory(memory, torch.zeros_like(memory)), bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_encoder_adds_positions_to_queries_and_keys_but_not_to_values() -> None:
    block = randomise(DetrEncoderBlock(8, 2, 12, 0.0))
    x, positions = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    mask, bias = padding_bias([0, 2], 6)
    attended, _ = torchs_attention(block.self_attn)(x + positions, x + positions, x, key_padding_mask=mask)
    middle = block.norm1(x + attended)
    expected = block.norm2(middle + block.linear2(F.relu(block.linear1(middle))))
    torch.testing.assert_close(block(x, positions, bias), expected, atol=1e-5, rtol=1e-4)


def test_decoder_adds_positions_to_queries_and_keys_but_not_to_values() -> None:
    block = randomise(DetrDecoderBlock(8, 2, 12, 0.0))
    x, query_positions = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    memory, positions = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    mask, bias = padding_bias([0, 2], 6)
    seen, _ = torchs_attention(block.self_attn)(x + query_positions, x + query_positions, x)
    first = block.norm1(x + seen)
    attend = torchs_attention(block.multihead_attn)
    attended, _ = attend(first + query_positions, memory + positions, memory, key_padding_mask=mask)
    second = block.norm2(first + attended)
    expected = block.norm3(second + block.linear2(F.relu(block.linear1(second))))
    found = block(x, query_positions, block.project_memory(memory, positions), bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_encoder_dropout_lies_behind_attention_behind_relu_and_behind_the_perceptron() -> None:
    block, x = randomise(DetrEncoderBlock(8, 2, 12, 0.3)).train(), torch.randn(2, 6, 8)
    _, bias = padding_bias([0, 2], 6)
    torch.manual_seed(1)
    found = block(x, torch.zeros_like(x), bias)
    torch.manual_seed(1)
    middle = block.norm1(x + F.dropout(block.self_attn(x, x, x, bias), 0.3))
    hidden = F.dropout(F.relu(block.linear1(middle)), 0.3)
    torch.testing.assert_close(found, block.norm2(middle + F.dropout(block.linear2(hidden), 0.3)))


def test_encoder_block_hands_the_record_to_its_attention() -> None:
    block, x, positions, record = DetrEncoderBlock(8, 2, 16, 0.0), torch.randn(3, 6, 8), torch.randn(3, 6, 8), []
    _, bias = padding_bias([0, 1, 5], 6)
    torch.testing.assert_close(block(x, positions, bias, record), block(x, positions, bias), atol=1e-5, rtol=1e-5)
    (weights,) = record
    assert weights.shape == (3, 2, 6, 6)
    assert (weights[2, :, :, 0] == 1).all()  # the only unmasked cell


def test_encoder_block_does_not_see_padding() -> None:
    block = DetrEncoderBlock(8, 2, 16, 0.0)
    x, positions = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    bias = torch.zeros(1, 1, 1, 6)
    bias[..., 4:] = -math.inf
    alone = block(x[:, :4], positions[:, :4], torch.zeros(1, 1, 1, 4))
    torch.testing.assert_close(block(x, positions, bias)[:, :4], alone)


def test_spatial_prior_is_the_formula() -> None:
    prior = SpatialPrior(3)
    torch.nn.init.normal_(prior.offset)
    boxes, columns, rows = torch.rand(2, 4, 4) + 0.1, torch.rand(2, 3), torch.rand(2, 2)
    grid = torch.stack((columns[:, None].expand(2, 2, 3), rows[:, :, None].expand(2, 2, 3)), dim=-1)
    bias, cells = prior(boxes, grid), grid.flatten(1, 2)
    assert bias.shape == (2, 3, 4, 6)
    for image, head, query, cell in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        cx, cy, w, h = boxes[image, query].tolist()
        x, y = cells[image, cell].tolist()
        shift_x, shift_y = prior.offset[head].tolist()
        factor = prior.log_factor[head].exp().item()
        dx, dy = (x - cx - shift_x * w) / (w * factor), (y - cy - shift_y * h) / (h * factor)
        assert bias[image, head, query, cell].item() == pytest.approx(-(dx * dx + dy * dy) / 2, rel=1e-4, abs=1e-5)


def test_spatial_prior_is_largest_at_the_centre_of_the_box() -> None:
    cells = torch.tensor([[[0.5, 0.5], [0.6, 0.5], [0.9, 0.9]]])
    bias = SpatialPrior(4)(torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), cells[:, None])[0, :, 0]  # [H, 3]
    assert (bias[:, 0] == 0).all()
    assert (bias.diff(dim=-1) < 0).all()


def decode(block: DetrDecoderBlock, queries: Tensor, groups: int, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "memory": torch.randn(2, 5, 8, generator=generator),
        "positions": torch.randn(2, 5, 8, generator=generator),
        "bias": torch.zeros(2, 1, 1, 5),
        "query_positions": torch.randn(queries.shape, generator=generator),
    }
    inputs |= changes
    memory = block.project_memory(inputs.pop("memory"), inputs.pop("positions"))
    return block(queries, memory=memory, **inputs, groups=groups)


@pytest.mark.parametrize("groups", [2, 3])
def test_query_groups_do_not_see_each_other(groups: int) -> None:
    block = DetrDecoderBlock(8, 2, 16, 0.0)
    queries = torch.randn(2, 6, 8)
    own = 6 // groups
    other = queries.clone()
    other[:, own:] = torch.randn(2, 6 - own, 8)
    torch.testing.assert_close(decode(block, other, groups)[:, :own], decode(block, queries, groups)[:, :own])
    assert not torch.allclose(decode(block, other, 1)[:, :own], decode(block, queries, 1)[:, :own])


@pytest.mark.parametrize("group", [0, 1, 2])
def test_groups_are_independent(group: int) -> None:
    block, own = DetrDecoderBlock(8, 2, 16, 0.0), slice(2 * group, 2 * group + 2)
    queries, positions, bias = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 2, 6, 5)
    together = decode(block, queries, 3, query_positions=positions, bias=bias)[:, own]
    alone = decode(block, queries[:, own], 1, query_positions=positions[:, own], bias=bias[:, :, own])
    torch.testing.assert_close(together, alone)


def test_decoder_block_does_not_see_padding() -> None:
    block, queries = DetrDecoderBlock(8, 2, 16, 0.0), torch.randn(2, 4, 8)
    bias = torch.zeros(2, 1, 1, 5)
    bias[..., 3:] = -math.inf
    memory = torch.randn(2, 5, 8)
    other = memory.clone()
    other[:, 3:] = 100
    torch.testing.assert_close(
        decode(block, queries, 1, memory=other, bias=bias), decode(block, queries, 1, memory=memory, bias=bias)
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_decoder_block_records_its_cross_attention_only(groups: int) -> None:
    block, queries, record = DetrDecoderBlock(8, 2, 16, 0.0), torch.randn(2, 4, 8), []
    bias = torch.randn(2, 2, 4, 5)
    recorded = decode(block, queries, groups, bias=bias, record=record)
    torch.testing.assert_close(recorded, decode(block, queries, groups, bias=bias), atol=1e-5, rtol=1e-5)
    (weights,) = record
    assert weights.shape == (2, 2, 4, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 4))


def test_masked_queries_are_not_attended_to_in_their_group() -> None:
    """In each image, the last of the first group of three is masked, and all of the second group."""
    block, queries = DetrDecoderBlock(8, 2, 16, 0.0), torch.randn(2, 6, 8)
    query_bias = torch.zeros(2, 6)
    query_bias[0, 2:] = -1e4
    other = queries.clone()
    other[:, 2] = torch.randn(2, 8)
    expected, found = (decode(block, given, 2, query_bias=query_bias) for given in (queries, other))
    torch.testing.assert_close(found[0, :2], expected[0, :2])
    assert not torch.allclose(found[1, :2], expected[1, :2])
    assert found.isfinite().all()
    torch.testing.assert_close(decode(block, queries, 2, query_bias=query_bias)[1], decode(block, queries, 2)[1])
