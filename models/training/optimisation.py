"""Optimisers, parameter groups, the learning rate schedule and the moving average of the weights."""

import math
import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitrine.models.efficientnet import EfficientNetBackbone
from vitrine.models.resnet import ResNet
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import Recipe

# Learned embeddings of positions, tokens and queries: weight decay would make them alike.
_EMBEDDINGS = ("cls_token", "pos_embed", "query_embed", "query_boxes.boxes", "label_embed")
_HEADS = ("head.", "class_embed.", "bbox_embed.", "proposals.class_embed.", "proposals.bbox_embed.")
_BACKBONE = "backbone."
_BLOCK = re.compile(r".*?(blocks|stages|encoder|decoder)\.\d+(\.\d+)?")


class _Muon(torch.optim.Muon):
    """PyTorch's Muon, whose Newton-Schulz iteration is in float32 where the CPU has no bfloat16 instructions.

    PyTorch's own is always in bfloat16, which such a CPU emulates: 20 times as slow.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights that have gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonalise(weight.grad.lerp(momentum, group["momentum"]), group)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def _orthogonalise(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near one (Jordan et al. 2024)."""
    a, b, c = group["ns_coefficients"]
    fast = matrix.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    wide = matrix.bfloat16() if fast else matrix.clone()
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T.contiguous() if tall else wide
    wide /= wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class MuonWithAdamW:
    """Muon for the weights of hidden layers and AdamW for all others, with the interface of one optimiser.

    Args:
        muon: parameter groups; convolution weights [out, in, h, w] are updated as a matrix [out, in * h * w].
        adamw: parameter groups.
        lr: learning rate of both.
    """

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], lr: float) -> None:
        self._hidden = [weight for group in muon for weight in group["params"]]
        views = [{**group, "params": [nn.Parameter(w.detach().flatten(1)) for w in group["params"]]} for group in muon]
        self._matrices = [matrix for group in views for matrix in group["params"]]
        self._muon = _Muon(views, lr=lr)
        self._adamw = torch.optim.AdamW(adamw, lr=lr, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        for weight in self._hidden:
            weight.grad = None
        self._adamw.zero_grad(set_to_none)

    def step(self) -> None:
        """Update the weights."""
        for weight, matrix in zip(self._hidden, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of both."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


Optimizer = torch.optim.AdamW | MuonWithAdamW


def make_optimizer(network: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimiser over the weights that it trains.

    AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
    networks") for the matrices and filters between the first layer and the heads (depthwise filters are no matrices),
    with AdamW for the rest, and for fine-tuned stages of a backbone (Muon suits weights that it trained; ibid.). Muon's
    updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4), so both use
    one learning rate. Weight decay applies to matrices, not to biases, norms and embeddings. The learning rate of a
    group is `lr_scale` times the schedule's: less in the backbone with `backbone_lr`, and towards the image with
    `layer_decay`.

    Raises:
        RecipeError: the backbone has no stage before those that are trained.
    """
    if recipe.backbone_stages:
        found = len(cast(ResNet | EfficientNetBackbone, network.backbone).strides)
        if found <= recipe.backbone_stages:
            needed = f"a backbone of more than {recipe.backbone_stages} stages"
            raise RecipeError(f"{recipe.name}: trainable={recipe.trainable} needs {needed}, found {found}")
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    layers = _layers(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_is_trained(name, network, recipe))
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.startswith(_EMBEDDINGS)
            is_filter = parameter.ndim == 4 and parameter.shape[1] in (1, 3)  # depthwise, or of the first layer
            is_tuned = recipe.backbone_stages > 0 and name.startswith(_BACKBONE)
            hidden = decays and not is_filter and not is_tuned and not name.startswith(_HEADS)
            scale = recipe.layer_decay ** (max(layers.values()) - layers[name])
            if recipe.backbone_lr is not None and name.startswith(_BACKBONE):
                scale *= recipe.backbone_lr / recipe.lr
            groups.setdefault((recipe.optimizer == "muon" and hidden, scale, decays), []).append(parameter)
    groups_by_muon: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (by_muon, scale, decays), parameters in groups.items():
        decay = recipe.weight_decay if decays else 0.0
        groups_by_muon[by_muon].append({"params": parameters, "weight_decay": decay, "lr_scale": scale})
    if groups_by_muon[True]:
        return MuonWithAdamW(groups_by_muon[True], groups_by_muon[False], recipe.lr)
    return torch.optim.AdamW(groups_by_muon[False], lr=recipe.lr, fused=True)


def _layers(network: nn.Module) -> dict[str, int]:
    """Return the layer of each weight, from 0 nearest to the image; heads and embeddings are in the last one."""
    layers: dict[str, int] = {}  # by the name of the block or, outside of one, of the part
    of_weights = {}
    for name, _ in network.named_parameters():
        if name.startswith((*_HEADS, *_EMBEDDINGS)):
            continue
        block = _BLOCK.match(name)
        of_weights[name] = layers.setdefault(block[0] if block else name.partition(".")[0], len(layers))
    return {name: of_weights.get(name, len(layers)) for name, _ in network.named_parameters()}


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up to the peak, then cosine decay to zero; `epoch` is the fractional number of epochs done."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (epoch + 0.01) / (recipe.warmup_epochs + 0.01)
    progress = (epoch - recipe.warmup_epochs) / max(1e-9, recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, scaled by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def training_mode(network: nn.Module, recipe: Recipe) -> None:
    """Set training mode (dropout, batch norm statistics) in the parts that the recipe trains."""
    for name, module in network.named_modules():
        keeps_statistics = recipe.trainable != "all" and name.startswith(_BACKBONE)
        # The network itself always trains: a DETR returns the predictions of all layers.
        module.training = not name or (_is_trained(f"{name}.", network, recipe) and not keeps_statistics)


def _is_trained(name: str, network: nn.Module, recipe: Recipe) -> bool:
    """Return whether the recipe trains a weight or a module, whose name ends in a dot."""
    if recipe.backbone_stages:
        last = cast(ResNet | EfficientNetBackbone, network.backbone).last_stages(recipe.backbone_stages)
        return not name.startswith(_BACKBONE) or name.removeprefix(_BACKBONE).startswith(last)
    if recipe.trainable == "all_but_backbone":
        return not name.startswith(_BACKBONE)
    return recipe.trainable == "all" or name.startswith(_HEADS)


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of the network for the moving average of its weights (Polyak & Juditsky 1992).

    The decay grows to `decay` as (1 + step) / (10 + step), so that the average soon forgets the first weights.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, steps: Tensor | int) -> None:
        done = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averaged, current, steps)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
