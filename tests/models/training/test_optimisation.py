"""Parameter groups, the learning-rate schedule and the moving average of the weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitrine.models.build import build_model
from vitrine.models.training.optimisation import (
    MuonWithAdamW,
    average_weights,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    training_mode,
)
from vitrine.models.training.recipe import Recipe
from vitrine.models.training.registry import load_recipe

TINY = ("model.embed_dim=16", "model.num_heads=2", "model.dropout=0.1", "model.backbone_width=8")


def named_groups(network: nn.Module, recipe: Recipe) -> dict[tuple[float, float], set[str]]:
    """Names of the parameters by weight decay and learning rate."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = make_optimizer(network, recipe)
    set_learning_rate(optimizer, 1.0)
    return {
        (group["weight_decay"], round(group["lr"], 6)): {names[parameter] for parameter in group["params"]}
        for group in optimizer.param_groups
    }


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = load_recipe("vit_cifar10", ["epochs=11", "lr=0.5", "warmup_epochs=1"])
    rates = [learning_rate(recipe, epoch) for epoch in np.linspace(0, 11, 111)]
    assert rates[0] == pytest.approx(0.005, rel=0.02)
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()


def test_only_matrices_decay() -> None:
    recipe = load_recipe("vit_cifar10", ["optimizer=adamw", "weight_decay=0.3", "model.global_pool=token"])
    groups = named_groups(build_model(recipe.architecture, recipe.model, 3), recipe)
    assert groups.keys() == {(0.3, 1.0), (0.0, 1.0)}
    assert {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= groups[0.3, 1.0]
    assert {"cls_token", "pos_embed.embedding", "head.bias", "norm.weight", "norm.bias"} <= groups[0.0, 1.0]


def test_backbone_has_its_own_rate() -> None:
    recipe = load_recipe("detr_bccd", [*TINY, "lr=1e-3", "backbone_lr=1e-4", "weight_decay=0.1"])
    groups = named_groups(build_model(recipe.architecture, recipe.model, 3), recipe)
    assert groups.keys() == {(0.1, 1.0), (0.0, 1.0), (0.1, 0.1), (0.0, 0.1)}
    for (_, rate), names in groups.items():
        assert {name.startswith("backbone.") for name in names} == {rate == 0.1}
    assert {"query_embed.weight", "query_boxes.boxes"} <= groups[0.0, 1.0]


def shapes(groups: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return sorted(tuple(weight.shape) for group in groups for weight in group["params"])


def test_muon_updates_the_layers_between_the_pixels_and_the_head() -> None:
    recipe = load_recipe("vit_cifar10", ["optimizer=muon", "model.depth=1", "model.embed_dim=16"])
    network = build_model(recipe.architecture, recipe.model, 3)
    optimizer = make_optimizer(network, recipe)
    assert isinstance(optimizer, MuonWithAdamW)
    by_muon = [group for group in optimizer.param_groups if "ns_steps" in group]
    assert shapes(by_muon) == sorted([(16, 8 * 9), (16, 16), (48, 16), (16, 16), (32, 16), (16, 32)])
    by_adamw = [group for group in optimizer.param_groups if "betas" in group]
    assert {(3, 16), (8, 3, 3, 3)} <= set(shapes(by_adamw))
    assert len(shapes(by_muon) + shapes(by_adamw)) == len(list(network.parameters()))


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw() -> None:
    recipe = load_recipe("claim_bit", ["optimizer=muon", "lr=0.5", "weight_decay=0"])
    network = build_model(recipe.architecture, recipe.model, 3)
    optimizer = make_optimizer(network, recipe)
    weight = network.stages[0][0].conv2.weight  # [16, 16, 3, 3]
    before = weight.detach().clone()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    weight.grad = torch.randn(weight.shape)
    optimizer.step()
    moved = (before - weight).detach().flatten(1)
    values = torch.linalg.svdvals(moved) / 0.5
    scale = 0.2 * math.sqrt(max(moved.shape))
    assert ((values > 0.6 * scale) & (values < 1.3 * scale)).all()
    assert (moved / 0.5).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)  # AdamW's, as measured by Liu
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_linear_probe_updates_only_the_head() -> None:
    recipe = load_recipe("vit_cifar10", ["trainable=head", "model.drop_path=0.5"])
    network = build_model(recipe.architecture, recipe.model, 3)
    names = set.union(*named_groups(network, recipe).values())
    assert names == {"head.weight", "head.bias"}
    training_mode(network, recipe)
    assert network.head.training
    assert not any(module.training for module in (*network.blocks, network.patch_embed.conv[1]))


def test_whole_network_is_in_training_mode() -> None:
    recipe = load_recipe("detr_bccd", TINY)
    network = build_model(recipe.architecture, recipe.model, 3)
    training_mode(network, recipe)
    assert all(module.training for module in network.modules())


def test_average_follows() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = average_weights(network, 0.75)
    average.update_parameters(network)  # the first is a copy
    before = average.module[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
        network[1].running_mean += 1
    average.update_parameters(network)
    torch.testing.assert_close(average.module[0].weight, before + 0.25)
    torch.testing.assert_close(average.module[1].running_mean, torch.full((2,), 0.25))
