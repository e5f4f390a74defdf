"""Explained networks: the served outputs, attention that sums to one, and exact activation maps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrine.models.build import build_model
from vitrine.models.explaining import explained
from vitrine.models.serving import ServedClassifier, served

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT = {"image_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
DETR = {
    "num_queries": 5,
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "feedforward_dim": 16,
    "backbone_layers": (1, 1),
    "backbone_width": 8,
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT with a class token": ("vit", VIT),
    "ViT with an average": ("vit", {**VIT, "global_pool": "avg"}),
    "BiT": ("resnetv2", {"image_size": (16, 24), "layers": (1, 1), "width_factor": 0.5, "stem": "small"}),
    "EfficientNet": ("efficientnet", {"image_size": (16, 24), "width_factor": 0.25, "depth_factor": 0.5}),
    "ResNet": ("resnet", {"image_size": (16, 24), "layers": (1, 1), "width": 8}),
}
DETECTORS = {"learned": DETR, "boxes": {**DETR, "queries": "boxes"}}
SIZES = torch.tensor([[64, 96], [40, 33], [9, 96]])


def make_network(architecture: str, settings: dict[str, Any]) -> torch.nn.Module:
    """A network with random weights large enough for distinct outputs."""
    torch.manual_seed(0)
    network = build_model(architecture, settings, 3).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    return network


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def explain(module: torch.nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(module.output_names, module(*inputs), strict=True))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_explained_classifiers_return_the_served_probabilities(name: str) -> None:
    network, x = make_network(*CLASSIFIERS[name]), pixels(2, 16, 24, 3)
    expected = served(network, MEAN, STD, 1.7)(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(explain(explained(network, MEAN, STD, 1.7), x)["probabilities"], expected)


@pytest.mark.parametrize("queries", DETECTORS)
def test_explained_detectors_return_the_served_detections(queries: str) -> None:
    network, x = make_network("detr", DETECTORS[queries]), pixels(3, 64, 96, 3)
    found = explain(explained(network, MEAN, STD), x, SIZES)
    for name, expected in zip(("scores", "class_ids", "boxes"), served(network, MEAN, STD)(x, SIZES), strict=True):
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_attention_is_that_of_the_classified_state(global_pool: str) -> None:
    network, x = make_network("vit", {**VIT, "global_pool": global_pool}), pixels(2, 16, 24, 3)
    found = explain(explained(network, MEAN, STD), x)
    record: list[Tensor] = []
    network(served(network, MEAN, STD).normalise(x), record)
    attention = found["attention"]
    assert attention.shape == (2, 3, 2, 2, 3)
    if global_pool == "token":
        torch.testing.assert_close(attention[:, 1].flatten(2), record[1][:, :, 0, 1:])
        torch.testing.assert_close(attention.sum(dim=(3, 4)), 1 - torch.stack(record, dim=1)[..., 0, 0])
    else:
        torch.testing.assert_close(attention[:, 1].flatten(2), record[1].mean(dim=2))
        torch.testing.assert_close(attention.sum(dim=(3, 4)), torch.ones(2, 3, 2))
    assert (found["rollout"] >= 0).all()
    torch.testing.assert_close(found["rollout"].sum(dim=(1, 2)), torch.ones(2))


def test_the_rollout_of_one_layer_is_its_attention() -> None:
    network, x = make_network("vit", {**VIT, "depth": 1}), pixels(2, 16, 24, 3)
    found = explain(explained(network, MEAN, STD), x)
    attention = found["attention"][:, 0].mean(dim=1)  # the residual connection maps the token to itself only
    torch.testing.assert_close(found["rollout"], attention / attention.sum(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize("head", [{}, {"global_pool": "avg"}, {"representation_size": 8}, {"norm": "post"}])
def test_layers_are_the_answers_of_networks_that_end_earlier(head: dict[str, Any]) -> None:
    x = pixels(2, 16, 24, 3)
    whole = make_network("vit", {**VIT, **head})
    layers = explain(explained(whole, MEAN, STD, 1.5), x)["layers"]
    assert layers.shape == (2, 3, 3)
    for depth in (1, 2, 3):
        short = build_model("vit", {**VIT, **head, "depth": depth}, 3).eval()
        short.load_state_dict(whole.state_dict(), strict=False)
        torch.testing.assert_close(layers[:, depth - 1], served(short, MEAN, STD, 1.5)(x))


@pytest.mark.parametrize("name", ["BiT", "ResNet"])
def test_a_class_activation_map_sums_to_the_logit(name: str) -> None:
    network, x = make_network(*CLASSIFIERS[name]), pixels(2, 16, 24, 3)
    torch.nn.init.normal_(network.head.bias)
    module = served(network, MEAN, STD)
    assert isinstance(module, ServedClassifier)
    activation = explain(explained(network, MEAN, STD, 3.0), x)["activation"]
    assert activation.shape[:2] == (2, 3)
    assert activation.shape[2] * activation.shape[3] > 1
    logits = network(module.normalise(x))  # before the temperature
    torch.testing.assert_close(activation.sum(dim=(2, 3)) + network.head.bias, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", DETECTORS)
def test_detr_attends_to_valid_cells_only(queries: str) -> None:
    network = make_network("detr", DETECTORS[queries])
    found = explain(explained(network, MEAN, STD), pixels(3, 64, 96, 3), SIZES)
    rows, columns = found["cross_attention"].shape[2:]
    assert found["encoder_attention"].shape == (3, rows, columns, rows, columns)
    stride = network.backbone.strides[-1]
    for i, (height, width) in enumerate(SIZES.tolist()):
        h, w = -(-height // stride), -(-width // stride)
        cross, between = found["cross_attention"][i], found["encoder_attention"][i]
        torch.testing.assert_close(cross[:, :h, :w].sum(dim=(1, 2)), torch.ones(5))
        torch.testing.assert_close(between[..., :h, :w].sum(dim=(2, 3)), torch.ones(rows, columns))
        for part in (cross[:, h:], cross[..., w:], between[..., h:, :], between[..., w:]):
            assert (part == 0).all()
    assert h < rows  # of the last image: there was padding


def test_detr_shows_its_last_layers() -> None:
    network, x = make_network("detr", DETR), pixels(3, 64, 96, 3)
    found = explain(explained(network, MEAN, STD), x, SIZES)
    record: list[Tensor] = []
    network(explained(network, MEAN, STD).normalised(x, SIZES), SIZES, record)
    assert len(record) == 4  # two layers of the encoder, two of the decoder
    torch.testing.assert_close(found["encoder_attention"].flatten(3).flatten(1, 2), record[1].mean(dim=1))
    torch.testing.assert_close(found["cross_attention"].flatten(2), record[3].mean(dim=1))


def test_explaining_adds_nothing_to_the_weights() -> None:
    network = make_network("vit", VIT)
    assert explained(network, MEAN, STD).state_dict().keys() == served(network, MEAN, STD).state_dict().keys()


def test_mixer_has_no_explained_form() -> None:
    settings = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1}
    assert explained(build_model("mlp_mixer", settings, 3), MEAN, STD) is None
