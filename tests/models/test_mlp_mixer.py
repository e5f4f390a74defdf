from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitrine.models.mlp_mixer import VARIANTS, MixerBlock, MlpMixer, MlpMixerConfig

TINY = MlpMixerConfig(
    num_classes=5, image_size=16, patch_size=4, embed_dim=8, depth=2, tokens_mlp_dim=12, channels_mlp_dim=20
)

# timm's counts for 1000 classes; the huge one by the formula below, the one for 32 x 32 pixels is this project's.
PARAMETERS = {
    "mixer_s16": 18_528_264,
    "mixer_s32": 19_104_624,
    "mixer_b16": 59_880_472,
    "mixer_b32": 60_293_428,
    "mixer_l16": 208_196_168,
    "mixer_l32": 206_939_264,
    "mixer_h14": 432_350_952,
    "mixer_micro4_32": 1_259_880,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def count_by_formula(settings: dict[str, Any], classes: int = 1000) -> int:
    dim, patch, image = settings["embed_dim"], settings["patch_size"], settings.get("image_size", 224)
    tokens, norm = (image // patch) ** 2, 2 * dim
    mixing = 0
    for width, hidden in ((tokens, settings["tokens_mlp_dim"]), (dim, settings["channels_mlp_dim"])):
        mixing += norm + width * hidden + hidden + hidden * width + width
    return 3 * patch**2 * dim + dim + settings["depth"] * mixing + norm + dim * classes + classes


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = MlpMixer(MlpMixerConfig(num_classes=1000, **VARIANTS[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_number_of_parameters_is_the_formula(name: str) -> None:
    assert count_by_formula(VARIANTS[name]) == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


def test_every_parameter_learns() -> None:
    network = MlpMixer(TINY)
    logits = network(torch.randn(3, 3, 16, 16))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_block_is_the_papers_equation(gelu: Any) -> None:
    block, x = MixerBlock(16, replace(TINY, gelu=gelu), 0.0), torch.randn(2, 16, 8)
    approximate = "none" if gelu == "exact" else gelu

    def mlp(part: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return part.fc2(F.gelu(part.fc1(x), approximate=approximate))

    middle = x + mlp(block.mlp_tokens, block.norm1(x).mT).mT
    torch.testing.assert_close(block(x), middle + mlp(block.mlp_channels, block.norm2(middle)))


def test_gelu_reaches_every_perceptron() -> None:
    network = MlpMixer(replace(TINY, gelu="tanh"))
    activations = [module for module in network.modules() if isinstance(module, torch.nn.GELU)]
    assert [activation.approximate for activation in activations] == ["tanh"] * 4


def test_network_classifies_the_mean_of_its_normed_tokens() -> None:
    network, images = MlpMixer(TINY), torch.randn(2, 3, 16, 16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = network.stem(images)
    for block in network.blocks:
        x = block(x)
    x = F.layer_norm(x, (8,), network.norm.weight, network.norm.bias, 1e-6).mean(dim=1)
    torch.testing.assert_close(network(images), F.linear(x, network.head.weight, network.head.bias))


def test_tokens_mix_across_patches_and_channels_within_one() -> None:
    block, x = MixerBlock(16, TINY, 0.0), torch.randn(1, 16, 8)
    other = x.clone()
    other[:, 3] += torch.randn(8)
    assert ((block(other) - block(x))[0].abs().amax(dim=-1) > 0).all()  # token mixing reaches all patches
    torch.nn.init.zeros_(block.mlp_tokens.fc2.weight)
    torch.nn.init.zeros_(block.mlp_tokens.fc2.bias)
    changed = (block(other) - block(x))[0].abs().amax(dim=-1) > 0
    assert changed.nonzero().tolist() == [[3]]


def test_images_of_a_batch_are_independent() -> None:
    network, x = MlpMixer(TINY), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-4)


def test_image_need_not_be_square() -> None:
    config = replace(TINY, image_size=(8, 20))
    assert config.num_patches == 10
    assert MlpMixer(config)(torch.randn(3, 3, 8, 20)).shape == (3, 5)


def test_token_mixing_refuses_another_number_of_patches() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        MlpMixer(TINY)(torch.randn(1, 3, 16, 20))


def test_drop_path_rises_with_depth() -> None:
    network = MlpMixer(replace(TINY, depth=3, drop_path=0.2))
    assert [block.drop_path.probability for block in network.blocks] == pytest.approx([0, 0.1, 0.2])


def test_block_whose_branches_are_dropped_is_the_identity() -> None:
    block, x = MixerBlock(16, TINY, 0.999999).train(), torch.randn(2, 16, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(("image_size", "found"), [(224, "224"), ((225, 224), r"\(225, 224\)")])
def test_patches_must_tile_the_image(image_size: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"image_size {found} is not divisible by patch_size 15"):
        MlpMixer(MlpMixerConfig(num_classes=2, patch_size=15, image_size=image_size))
