import pytest
import torch
import torch.nn.functional as F

from models.vit import ConvStem, PatchEmbed, ViT, ViTConfig

TINY = {"num_classes": 5, "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_logits_and_gradients(stem: str, global_pool: str) -> None:
    network = ViT(ViTConfig(**TINY, stem=stem, global_pool=global_pool))
    logits = network(torch.randn(3, 3, 16, 16))
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("global_pool", "tokens"), [("token", 17), ("avg", 16)])
def test_one_position_per_token(global_pool: str, tokens: int) -> None:
    assert ViT(ViTConfig(**TINY, global_pool=global_pool)).pos_embed.embedding.shape == (1, tokens, 16)


def test_patch_embedding_is_a_linear_layer_on_patches() -> None:
    embed, x = PatchEmbed(4, 8), torch.randn(2, 3, 8, 12)
    patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [B, N, 3 * 4 * 4]
    expected = F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_conv_stem_has_one_cell_per_patch(patch_size: int) -> None:
    assert ConvStem(patch_size, 16)(torch.randn(2, 3, 16, 16)).shape == (2, (16 // patch_size) ** 2, 16)


@pytest.mark.parametrize("patch_size", [1, 3, 6])
def test_conv_stem_needs_a_power_of_two(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two above 1, found {patch_size}"):
        ConvStem(patch_size, 16)


def test_patches_must_tile_the_image() -> None:
    with pytest.raises(ValueError, match="image_size 18 is not divisible by patch_size 4"):
        ViT(ViTConfig(**{**TINY, "image_size": 18}))


def test_without_positions_the_order_of_patches_is_invisible() -> None:
    network = ViT(ViTConfig(**TINY)).eval()
    x = torch.randn(1, 3, 16, 16)
    swapped = torch.cat((x[..., 8:], x[..., :8]), dim=-1)  # whole patches change places
    assert not torch.allclose(network(x), network(swapped), atol=1e-4)
    torch.nn.init.zeros_(network.pos_embed.embedding)
    torch.testing.assert_close(network(x), network(swapped), atol=1e-5, rtol=1e-4)


def test_images_of_a_batch_are_independent() -> None:
    network = ViT(ViTConfig(**TINY)).eval()
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-4)


def test_drop_path_rises_with_depth() -> None:
    network = ViT(ViTConfig(**{**TINY, "depth": 3}, drop_path=0.2))
    assert [block.drop_path.probability for block in network.blocks] == pytest.approx([0, 0.1, 0.2])
