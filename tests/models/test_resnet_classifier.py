from typing import Any

import pytest
import torch
from torch import nn

from vitrine.models.detr import Detr, DetrConfig
from vitrine.models.resnet_classifier import VARIANTS, ResNetClassifier, ResNetClassifierConfig

# torchvision's counts for 1000 classes.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
}


def make(**settings: Any) -> ResNetClassifier:
    torch.manual_seed(0)
    return ResNetClassifier(ResNetClassifierConfig(**{"num_classes": 3, "layers": (1, 1), "width": 8, **settings}))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = ResNetClassifier(ResNetClassifierConfig(num_classes=1000, **VARIANTS[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 57), (1, 9)])
def test_logits_are_the_head_of_averaged_features(block: Any, height: int, width: int) -> None:
    network, x = make(block=block).eval(), torch.randn(2, 3, height, width)
    features = network.backbone(x)[-1]
    expected = features.flatten(2).sum(dim=-1) / features[0, 0].numel() @ network.head.weight.T + network.head.bias
    assert expected.shape == (2, 3)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_backbone_is_that_of_a_detr(block: Any) -> None:
    """A classifier's backbone weights load into a detector by name and shape."""
    classifier = make(block=block)
    shape = {"backbone_layers": (1, 1), "backbone_width": 8, "backbone_block": block}
    detector = Detr(DetrConfig(num_classes=2, embed_dim=8, num_heads=2, **shape))
    ours, theirs = (
        {name: value.shape for name, value in network.state_dict().items() if name.startswith("backbone.")}
        for network in (classifier, detector)
    )
    assert ours == theirs
    detector.load_state_dict({**detector.state_dict(), **{name: classifier.state_dict()[name] for name in ours}})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(detector.eval().backbone(x)[-1], classifier.eval().backbone(x)[-1])


def test_dropout_acts_on_the_averaged_features_in_training_only() -> None:
    network, x = make(dropout=0.5, norm="frozen"), torch.randn(2, 3, 32, 32)
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_every_parameter_learns() -> None:
    network = make().train()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_frozen_norms_are_no_parameters() -> None:
    network = make(norm="frozen")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert {name for name, _ in network.named_parameters() if "bn" in name} == set()
