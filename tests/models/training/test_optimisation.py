"""Parameter groups, the learning-rate schedule and the moving average of the weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitrine.models.build import build_model
from vitrine.models.training.errors import RecipeError
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
    average.n_averaged.fill_(50)  # after the first steps, in which the decay grows
    before = average.module[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
        network[1].running_mean += 1
    average.update_parameters(network)
    torch.testing.assert_close(average.module[0].weight, before + 0.25)
    torch.testing.assert_close(average.module[1].running_mean, torch.full((2,), 0.25))


DETECTOR = (
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.feedforward_dim=16",
)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("trainable", ["all_but_backbone", "last_stage", "last_two_stages"])
def test_frozen_part_neither_learns_nor_updates_its_statistics(trainable: str, backbone: str) -> None:
    changes = [*DETECTOR, f"model.backbone={backbone}", f"trainable={trainable}", "views=0", "pretrained=null"]
    recipe = load_recipe("objects", [*changes, "augmentation.feature_paste=0"])
    network = build_model(recipe.architecture, recipe.model, 3)
    optimizer = make_optimizer(network, recipe)
    training_mode(network, recipe)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64]] * 2)
    output = network(images, sizes)
    (output["pred_logits"].square().sum() + output["pred_boxes"].sum()).backward()
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    in_backbone = {name for name in changed if name.startswith("backbone.")}
    last = tuple(f"backbone.{prefix}" for prefix in network.backbone.last_stages(recipe.backbone_stages))
    assert changed - in_backbone
    assert bool(in_backbone) == (trainable != "all_but_backbone")
    assert all(name.startswith(last) and "running" not in name for name in in_backbone)


def test_a_backbone_needs_a_frozen_stage_before_those_that_are_trained() -> None:
    changes = [*DETECTOR, "model.backbone=resnet", "model.backbone_layers=[1, 1]", "model.neck=none"]
    recipe = load_recipe("objects", [*changes, "trainable=last_two_stages", "pretrained=null"])
    network = build_model(recipe.architecture, recipe.model, 3)
    with pytest.raises(RecipeError, match="trainable=last_two_stages needs a backbone of more than 2 stages"):
        make_optimizer(network, recipe)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("neck", ["none", "fusion"])
@pytest.mark.parametrize("stages", [1, 2])
def test_features_before_the_last_stages_lead_to_the_same_answers(stages: int, neck: str, backbone: str) -> None:
    changes = [*DETECTOR, f"model.backbone={backbone}", f"model.neck={neck}", "pretrained=null"]
    recipe = load_recipe("objects", changes)
    network = build_model(recipe.architecture, recipe.model, 3).eval()
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], [33, 70]])
    images[1, :, 33:] = 0
    images[1, :, :, 70:] = 0
    early = network.forward_features(images, sizes, stages=stages)
    found = network.forward_head(early, sizes, images.shape[-2:], stages=stages)
    assert torch.equal(found["pred_boxes"], network(images, sizes)["pred_boxes"])


def test_layers_nearer_to_the_image_learn_more_slowly() -> None:
    recipe = load_recipe("vit_cifar10", ["optimizer=adamw", "layer_decay=0.5", "weight_decay=0.1", "model.depth=3"])
    groups = named_groups(build_model(recipe.architecture, recipe.model, 3), recipe)
    rates = {name: rate for (_, rate), names in groups.items() for name in names}
    assert rates["head.weight"] == 1
    assert rates["norm.weight"] == 0.5
    blocks = [rates[f"blocks.{i}.attn.qkv.weight"] for i in range(3)]
    assert blocks == [0.0625, 0.125, 0.25]
    assert rates["patch_embed.proj.weight"] == 0.03125


def test_muon_follows_pytorchs() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(8, 24))]
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = MuonWithAdamW(
        [{"params": weights, "weight_decay": 0.1, "lr_scale": 1.0}], [{"params": [nn.Parameter(torch.zeros(1))]}], 0.1
    )
    theirs = torch.optim.Muon(copies, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, atol=0.02, rtol=0.02)  # theirs is in bfloat16


def test_average_forgets_its_start() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = average_weights(network, 0.999)
    nn.init.constant_(network.weight, 100.0)
    average.update_parameters(network)
    nn.init.constant_(network.weight, 1.0)
    for _ in range(100):
        average.update_parameters(network)
    assert average.module.weight.item() == pytest.approx(1, abs=0.01)
