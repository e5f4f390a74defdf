"""Cost of a ViT and an MLP-Mixer by image size: parameters, compute, and memory for training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrine.models.build import build_model
from vitrine.models.training.registry import load_recipe

IMAGE_SIZES = (32, 64, 96, 128, 192)
NETWORKS: dict[str, tuple[str, dict[str, str]]] = {
    "ViT, sine positions": ("claim_vit", {"pos_embed": "sine_2d"}),
    "ViT, learned positions": ("claim_vit", {"pos_embed": "learned"}),
    "MLP-Mixer": ("claim_mixer", {}),
}


@dataclass(frozen=True)
class Cost:
    """Cost for one image."""

    parameters: int
    flops: int  # forward pass; a multiplication and an addition count as two
    saved: int  # bytes saved for the backward pass, without parameters, in float32
    saved_fused: int  # the same with FlashAttention, which never stores the whole matrix


def costs() -> dict[str, list[Cost]]:
    """Return the costs of each network at each of `IMAGE_SIZES`."""
    return {
        name: [cost(recipe, size, **changes) for size in IMAGE_SIZES] for name, (recipe, changes) in NETWORKS.items()
    }


def cost(recipe: str, image_size: int, **changes: str) -> Cost:
    """Return the cost of a recipe's network for images of `image_size` x `image_size` pixels."""
    config = load_recipe(recipe)
    network = build_model(config.architecture, {**config.model, "image_size": image_size, **changes}, 10)
    image = torch.zeros(1, 3, image_size, image_size)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
        saved = saved_bytes(network, image)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = saved_bytes(network, image)
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops(), saved, fused)


def saved_bytes(network: nn.Module, image: Tensor) -> int:
    """Return the bytes saved for the backward pass, without parameters; shared storage counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        network(image).sum()
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in parameters)
