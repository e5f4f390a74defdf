import pytest
import torch

from models.mlp_mixer import MixerBlock, MlpMixer, MlpMixerConfig

TINY = MlpMixerConfig(
    num_classes=5, image_size=16, patch_size=4, embed_dim=8, depth=2, tokens_mlp_dim=12, channels_mlp_dim=20
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_logits_and_gradients() -> None:
    network = MlpMixer(TINY)
    logits = network(torch.randn(3, 3, 16, 16))
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_block_is_the_papers_equation() -> None:
    block, x = MixerBlock(16, TINY, 0.0), torch.randn(2, 16, 8)
    middle = x + block.mlp_tokens(block.norm1(x).mT).mT
    torch.testing.assert_close(block(x), middle + block.mlp_channels(block.norm2(middle)))


def test_tokens_mix_across_patches_and_channels_within_one() -> None:
    block, x = MixerBlock(16, TINY, 0.0), torch.randn(1, 16, 8)
    other = x.clone()
    other[:, 3] += torch.randn(8)
    assert ((block(other) - block(x))[0].abs().amax(dim=-1) > 0).all()  # token mixing reaches all patches
    torch.nn.init.zeros_(block.mlp_tokens.fc2.weight)
    torch.nn.init.zeros_(block.mlp_tokens.fc2.bias)
    changed = (block(other) - block(x))[0].abs().amax(dim=-1) > 0
    assert changed.nonzero().tolist() == [[3]]


def test_patches_must_tile_the_image() -> None:
    with pytest.raises(ValueError, match="image_size 224 is not divisible by patch_size 15"):
        MlpMixer(MlpMixerConfig(num_classes=2, patch_size=15))
