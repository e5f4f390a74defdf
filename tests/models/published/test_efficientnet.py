"""Imported EfficientNet-Lites compute the same as the published networks: compared with efficientnet_lite_pytorch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet as Published
from torch import Tensor, nn

from vitrine.models.published.catalogue import find_weights
from vitrine.models.published.errors import UnsupportedNetworkError, WeightsError
from vitrine.models.published.importing import import_weights
from vitrine.models.training.checkpoint import Checkpoint, load_checkpoint

pytestmark = [pytest.mark.usefixtures("forward_only"), pytest.mark.slow]

Import, Agree, Randomise = Callable[..., Checkpoint], Callable[..., None], Callable[..., nn.Module]
SIZES = (64, 64), (97, 130)


def published(number: int, classes: int = 5) -> nn.Module:
    # Without an image size it pads as TensorFlow does, for images of any size.
    network: nn.Module = Published.from_name(f"efficientnet-lite{number}", num_classes=classes, image_size=None)
    return network.eval()


def images(size: tuple[int, int], count: int = 3) -> Tensor:
    return torch.randn(count, 3, *size) + 2 * torch.randn(count, 3, 1, 1)


@pytest.mark.parametrize("number", range(5))
def test_every_network_agrees(number: int, import_file: Import, agree: Agree, randomise: Randomise) -> None:
    reference = randomise(published(number), 1.4)
    checkpoint = import_file(reference.state_dict(), 5, "pth")
    assert checkpoint.architecture == "efficientnet"
    network = checkpoint.build().eval()
    for size in SIZES:
        x = images(size)
        agree(f"lite{number}, {size}", network(x), reference(x))
    preprocessing = checkpoint.read_preprocessing()
    edge = (224, 240, 260, 280, 300)[number]
    assert preprocessing.input_size == (edge, edge)
    assert preprocessing.crop_pct == pytest.approx(edge / (edge + 32))
    assert [255 * mean for mean in preprocessing.mean] == pytest.approx([127] * 3)
    assert [255 * std for std in preprocessing.std] == pytest.approx([128] * 3)


@pytest.mark.parametrize("number", range(3))
def test_the_real_weights_agree(number: int, agree: Agree, tmp_path: Path) -> None:
    found = find_weights(f"efficientnet-lite{number}")
    imported = import_weights(found.path, tmp_path / "run")
    assert "labels are those of ImageNet-1k, because the head has 1,000 classes" in imported.notes
    reference = published(number, 1000)
    reference.load_state_dict(torch.load(found.path, weights_only=True))
    network, x = load_checkpoint(tmp_path / "run").build().eval(), images((160, 131))
    agree(f"lite{number}, real weights", network(x), reference(x))


def test_another_size_is_a_setting(import_file: Import, randomise: Randomise) -> None:
    checkpoint = import_file(randomise(published(0)).state_dict(), 5, "pth", changes=["image_size=160"])
    assert checkpoint.read_preprocessing().input_size == (160, 160)
    assert checkpoint.settings["image_size"] == 160


def test_a_narrower_network_is_refused(import_file: Import) -> None:
    other = Published.from_name("efficientnet-lite0", num_classes=5, image_size=None, width_coefficient=0.5)
    with pytest.raises(WeightsError, match=r"expected the blocks of EfficientNet-Lite0 to Lite4, found channels \[8,"):
        import_file(other.state_dict(), 5, "pth")


def test_networks_with_squeeze_and_excitation_are_refused_by_name(import_file: Import) -> None:
    other = Published.from_name("efficientnet-b0", num_classes=5, image_size=None)
    with pytest.raises(UnsupportedNetworkError, match=r"an EfficientNet with squeeze-and-excitation \(B0 to B8\)"):
        import_file(other.state_dict(), 5, "pth")
