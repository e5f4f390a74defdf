"""How weights move: AdamW's parameter groups, the learning rate over time, the moving average of the weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.training.recipe import Recipe

# Learned vectors that stand for a place, a token or a query: pulling them to zero would make them alike.
_EMBEDDINGS = ("cls_token", "pos_embed", "query_embed", "query_boxes.boxes", "label_embed")
_HEADS = ("head.", "class_embed.", "bbox_embed.")


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the weights that the recipe trains.

    Weight decay acts on matrices, not on biases, norms and embeddings. The backbone's groups have their own learning
    rate; each group's is `lr_scale` times the schedule's.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(recipe.trainable == "all" or name.startswith(_HEADS))
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.startswith(_EMBEDDINGS)
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    scale = 1.0 if recipe.backbone_lr is None else recipe.backbone_lr / recipe.lr
    described: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "lr_scale": scale if in_backbone else 1.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=recipe.lr, fused=True)


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up to the peak, then half a cosine to zero; `epoch` counts epochs done, with fractions."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (epoch + 0.01) / (recipe.warmup_epochs + 0.01)
    progress = (epoch - recipe.warmup_epochs) / max(1e-9, recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def training_mode(network: nn.Module, recipe: Recipe) -> None:
    """Dropout on and batch norm learning, but only in what the recipe trains."""
    network.train(recipe.trainable == "all")
    network.training = True  # a DETR answers with every layer's prediction
    for name, module in network.named_modules():
        if f"{name}.".startswith(_HEADS):
            module.train()


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network whose weights follow as an exponential moving average (Polyak & Juditsky 1992)."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
