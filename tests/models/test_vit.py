import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.vit import VARIANTS, ConvStem, PatchEmbed, ViT, ViTConfig, patch_grid

TINY: dict[str, Any] = {
    "num_classes": 5,
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}

# timm's counts for 1000 classes; the two for 32 x 32 pixels are this project's.
PARAMETERS = {
    "vit_tiny_patch16": 5_717_416,
    "vit_small_patch8": 22_055_272,
    "vit_small_patch16": 22_050_664,
    "vit_small_patch32": 22_878_952,
    "vit_base_patch8": 86_576_872,
    "vit_base_patch16": 86_567_656,
    "vit_base_patch32": 88_224_232,
    "vit_large_patch14": 304_203_752,
    "vit_large_patch16": 304_326_632,
    "vit_large_patch32": 306_535_400,
    "vit_huge_patch14": 632_045_800,
    "vit_micro_patch4_32": 1_333_608,
    "vit_tiny_patch4_32": 5_553_832,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def count(**settings: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ViT(ViTConfig(**settings)).parameters())


def count_by_formula(dim: int, depth: int, patch: int, image: int = 224, classes: int = 1000) -> int:
    tokens = 1 + (image // patch) ** 2
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    mlp = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    norm = 2 * dim
    embedding = 3 * patch**2 * dim + dim + dim + tokens * dim  # patches, class token, positions
    return embedding + depth * (2 * norm + attention + mlp) + norm + dim * classes + classes


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    assert count(num_classes=1000, **VARIANTS[name]) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_number_of_parameters_is_the_formula(name: str) -> None:
    shape = VARIANTS[name]
    found = count_by_formula(shape["embed_dim"], shape["depth"], shape["patch_size"], shape.get("image_size", 224))
    assert found == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


def test_a_larger_image_costs_positions_only() -> None:
    base = VARIANTS["vit_base_patch16"]
    assert count(num_classes=1000, image_size=384, **base) == 86_859_496  # timm's vit_base_patch16_384


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("representation_size", [None, 6])
def test_every_parameter_learns(stem: Any, global_pool: Any, norm: Any, representation_size: int | None) -> None:
    network = ViT(
        ViTConfig(**TINY, stem=stem, global_pool=global_pool, norm=norm, representation_size=representation_size)
    )
    logits = network(torch.randn(3, 3, 16, 16))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("stem", "global_pool", "norm", "representation_size"),
    list(itertools.product(["patch", "conv"], ["token", "avg"], ["pre", "post"], [None, 6])),
)
def test_network_is_the_composition_of_its_parts(
    stem: Any, global_pool: Any, norm: Any, representation_size: int | None
) -> None:
    network = ViT(
        ViTConfig(**TINY, stem=stem, global_pool=global_pool, norm=norm, representation_size=representation_size)
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 16, 16)
    x = network.patch_embed(images)
    if global_pool == "token":
        x = torch.cat((network.cls_token.repeat(2, 1, 1), x), dim=1)
    x = x + network.pos_embed.embedding
    for block in network.blocks:
        x = block(x)
    if norm == "pre":
        x = F.layer_norm(x, (16,), network.norm.weight, network.norm.bias, 1e-6)
    x = x[:, 0] if global_pool == "token" else x.mean(dim=1)
    if representation_size is not None:
        x = torch.tanh(F.linear(x, network.pre_logits[0].weight, network.pre_logits[0].bias))
        assert x.shape == (2, 6)
    torch.testing.assert_close(network(images), F.linear(x, network.head.weight, network.head.bias))


def test_post_norm_network_has_no_norm_behind_its_blocks() -> None:
    pre, post = (ViT(ViTConfig(**TINY, norm=norm)).state_dict().keys() for norm in ("pre", "post"))
    assert pre - post == {"norm.weight", "norm.bias"}
    assert post - pre == set()


def test_epsilon_and_gelu_reach_every_block() -> None:
    network = ViT(ViTConfig(**TINY, norm_eps=0.1, gelu="tanh"))
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.1] * 5
    assert [block.mlp.act.approximate for block in network.blocks] == ["tanh"] * 2


@pytest.mark.parametrize(("global_pool", "tokens"), [("token", 17), ("avg", 16)])
def test_one_position_per_token(global_pool: Any, tokens: int) -> None:
    assert ViT(ViTConfig(**TINY, global_pool=global_pool)).pos_embed.embedding.shape == (1, tokens, 16)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 6), width=st.integers(1, 6), patch=st.integers(1, 16))
def test_grid_counts_rows_then_columns(height: int, width: int, patch: int) -> None:
    assert patch_grid((height * patch, width * patch), patch) == (height, width)
    assert patch_grid(height * patch, patch) == (height, height)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_image_need_not_be_square(stem: Any, global_pool: Any) -> None:
    config = ViTConfig(**{**TINY, "image_size": (8, 20)}, stem=stem, global_pool=global_pool)
    assert config.grid == (2, 5)
    assert ViT(config)(torch.randn(3, 3, 8, 20)).shape == (3, 5)


def test_patch_embedding_is_a_linear_layer_on_patches() -> None:
    embed, x = PatchEmbed(4, 8), torch.randn(2, 3, 8, 12)
    patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [B, N, 3 * 4 * 4]
    expected = F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", [PatchEmbed, ConvStem])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 2), (1, 1)])
def test_tokens_are_the_patches_row_by_row(stem: type[PatchEmbed | ConvStem], row: int, column: int) -> None:
    embed, blank = stem(4, 8).eval(), torch.zeros(1, 3, 8, 12)
    marked = blank.clone()
    marked[..., 4 * row, 4 * column] = 100  # outside the receptive field of a conv stem's other cells
    changed = (embed(marked) - embed(blank)).abs().amax(dim=-1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[3 * row + column]]


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_conv_stem_has_one_cell_per_patch(patch_size: int) -> None:
    assert ConvStem(patch_size, 16)(torch.randn(2, 3, 16, 16)).shape == (2, (16 // patch_size) ** 2, 16)


@pytest.mark.parametrize("patch_size", [1, 3, 6])
def test_conv_stem_needs_a_power_of_two(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two above 1, found {patch_size}"):
        ConvStem(patch_size, 16)


@pytest.mark.parametrize(
    ("image_size", "found"), [(18, "18"), ((16, 18), r"\(16, 18\)"), ((18, 16), r"\(18, 16\)"), (2, "2")]
)
def test_patches_must_tile_the_image(image_size: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"image_size {found} is not divisible by patch_size 4"):
        ViT(ViTConfig(**{**TINY, "image_size": image_size}))


def test_without_positions_the_order_of_patches_is_invisible() -> None:
    x = torch.randn(1, 3, 16, 16)
    swapped = torch.cat((x[..., 8:], x[..., :8]), dim=-1)  # swaps whole patches
    for pos_embed in ("sine_1d", "sine_2d", "learned"):
        network = ViT(ViTConfig(**TINY, pos_embed=pos_embed)).eval()
        assert not torch.allclose(network(x), network(swapped), atol=1e-4)
    torch.nn.init.zeros_(network.pos_embed.embedding)
    torch.testing.assert_close(network(x), network(swapped), atol=1e-5, rtol=1e-4)
    network = ViT(ViTConfig(**TINY, pos_embed="none")).eval()
    torch.testing.assert_close(network(x), network(swapped), atol=1e-5, rtol=1e-4)


def test_images_of_a_batch_are_independent() -> None:
    network = ViT(ViTConfig(**TINY)).eval()
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-4)


def test_drop_path_rises_with_depth() -> None:
    network = ViT(ViTConfig(**{**TINY, "depth": 3}, drop_path=0.2))
    assert [block.drop_path.probability for block in network.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("global_pool", "tokens"), [("token", 17), ("avg", 16)])
def test_recording_covers_every_block_and_does_not_change_the_logits(norm: Any, global_pool: Any, tokens: int) -> None:
    network = ViT(ViTConfig(**{**TINY, "depth": 3}, norm=norm, global_pool=global_pool)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, record = torch.randn(2, 3, 16, 16), list[Tensor]()
    torch.testing.assert_close(network(x, record), network(x), atol=1e-4, rtol=1e-4)
    assert [weights.shape for weights in record] == [(2, 2, tokens, tokens)] * 3
    for weights in record:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, tokens))


def test_recorded_weights_are_those_of_the_blocks_in_their_order() -> None:
    network = ViT(ViTConfig(**TINY)).eval()
    torch.nn.init.normal_(network.blocks[0].attn.qkv.weight)
    for parameter in network.blocks[1].attn.qkv.parameters():
        torch.nn.init.zeros_(parameter)  # the second block attends to all tokens equally
    record: list[Tensor] = []
    network(torch.randn(1, 3, 16, 16), record)
    assert record[0].std() > 0.01
    torch.testing.assert_close(record[1], torch.full((1, 2, 17, 17), 1 / 17))
