"""From loaded images to a batch, and from a network's output to its loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.detr import Detr, DetrConfig
from vitrine.models.training.augmentation.augment import NOISE
from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.data.loading import ImageBatch
from vitrine.models.training.errors import DataError
from vitrine.models.training.objectives.denoising import make_denoising
from vitrine.models.training.objectives.losses import SetCriterion
from vitrine.models.training.objectives.objectives import DetectionObjective, make_objective
from vitrine.models.training.recipe import Recipe
from vitrine.models.training.registry import load_recipe

CPU = torch.device("cpu")
PLAIN = "augmentation.flip=0"
VIT = "model.image_size=16", "preprocessing.input_size=[16,16]"
VIT_PLAIN = *VIT, PLAIN, "augmentation.crop=none", "augmentation.randaugment_ops=0"
DETR_PLAIN = (
    *(f"augmentation.{name}=0" for name in ("flip", "flip_vertical", "brightness", "contrast")),
    "augmentation.zoom=[1,1]",
)
PICTURES = ClassificationData("pictures", "train", ("a", "b", "c"), [""] * 4, [b""] * 4, np.array([2, 0, 1, 2]))
# Two images of 100 x 200 and 80 x 40 pixels (width x height), at half size.
OBJECTS = DetectionData(
    "objects",
    "train",
    ("cat", "dog"),
    ["", ""],
    [b"", b""],
    [np.array([1, 0]), np.array([1])],
    [np.array([[10, 20, 50, 100], [60, 150, 130, 230]], np.float32), np.array([[0, 0, 8, 40]], np.float32)],
)
ORIGINAL_SIZES = torch.tensor([[200, 100], [40, 80]])
CONFIG = DetrConfig(
    2, num_queries=4, queries="boxes", query_groups=2, denoising=3, embed_dim=16, num_heads=2, encoder_layers=1,
    decoder_layers=2, feedforward_dim=16, backbone_layers=(1, 1), backbone_width=8,
)  # fmt: skip


def loaded(height: int, width: int, sizes: Tensor, original: Tensor) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (len(sizes), height, width, 3)
    return ImageBatch(torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8), sizes, original)


def noise(images: int) -> Tensor:
    return torch.rand(images, NOISE, generator=torch.Generator().manual_seed(0))


class Recorder(nn.Module):
    """A network that returns its inputs."""

    def forward(self, images: Tensor, *inputs: object, **named: object) -> object:
        return (images, *inputs, named) if inputs or named else images


def normalised(pixels: Tensor, recipe: Recipe) -> Tensor:
    mean, std = (torch.tensor(values) for values in (recipe.preprocessing.mean, recipe.preprocessing.std))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def test_a_classification_batch_has_the_images_and_their_classes() -> None:
    recipe = load_recipe("vit_cifar10", VIT_PLAIN)
    objective = make_objective(recipe, PICTURES, Recorder(), CPU)
    sizes = torch.full((3, 2), 16)
    images = loaded(16, 16, sizes, sizes)
    batch = objective.prepare(images, torch.tensor([3, 1, 2]), noise(3))
    assert torch.equal(batch.inputs, images.pixels)
    assert batch.targets.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert batch.totals.tolist() == [3]
    torch.testing.assert_close(objective.forward(Recorder(), batch), normalised(images.pixels, recipe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_losses_are_shares_of_the_steps_total(dtype: torch.dtype) -> None:
    recipe = load_recipe("vit_cifar10", [*VIT_PLAIN, "label_smoothing=0.2"])
    objective = make_objective(recipe, PICTURES, Recorder(), CPU)
    sizes = torch.full((2, 2), 16)
    batch = objective.prepare(loaded(16, 16, sizes, sizes), torch.tensor([0, 1]), noise(2))
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = objective.loss(logits, batch, torch.tensor([8.0, 99.0]))
    expected = F.cross_entropy(logits.float(), torch.tensor([2, 0]), label_smoothing=0.2, reduction="sum") / 8
    assert found.keys() == {"loss"}
    torch.testing.assert_close(found["loss"], expected)


@pytest.mark.parametrize(("setting", "group"), [("mixup=0", 1), ("mixup=0.2", 2), ("cutmix=1", 2)])
def test_mixed_images_are_grouped(setting: str, group: int) -> None:
    recipe = load_recipe("vit_cifar10", [*VIT, f"augmentation.{setting}"])
    assert make_objective(recipe, PICTURES, Recorder(), CPU).group == group


@pytest.mark.parametrize(("mosaic", "group"), [(0, 1), (0.5, 4)])
def test_images_of_a_mosaic_are_grouped(mosaic: float, group: int) -> None:
    assert detection(f"augmentation.mosaic={mosaic}")[1].group == group


def detection(*changes: str) -> tuple[Recipe, DetectionObjective]:
    recipe = load_recipe("detr_bccd", [*DETR_PLAIN, *changes])
    objective = make_objective(recipe, OBJECTS, Detr(CONFIG), CPU)
    assert isinstance(objective, DetectionObjective)
    return recipe, objective


def test_a_detection_batch_has_the_objects_in_fractions_of_their_images() -> None:
    """A box that extends beyond its image ends at the edge."""
    _, objective = detection()
    images = loaded(100, 50, torch.tensor([[20, 40], [100, 50]]), ORIGINAL_SIZES.flip(0))
    batch = objective.prepare(images, torch.tensor([1, 0]), noise(2))
    assert torch.equal(batch.inputs, images.pixels)
    assert [target.class_ids.tolist() for target in batch.targets] == [[1], [1, 0]]
    torch.testing.assert_close(batch.targets[0].boxes_cxcywh, torch.tensor([[0.05, 0.5, 0.1, 1.0]]))
    torch.testing.assert_close(
        batch.targets[1].boxes_cxcywh, torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.8, 0.875, 0.4, 0.25]])
    )
    assert batch.totals.tolist() == pytest.approx(SetCriterion().totals(batch.targets, CONFIG).tolist())
    denoising = make_denoising(batch.targets, CONFIG, noise(2)[:, -1])
    assert denoising is not None
    assert batch.denoising is not None
    assert torch.equal(batch.denoising.boxes_cxcywh, denoising.boxes_cxcywh)


@pytest.mark.parametrize(
    "sizes", [[[100, 50], [100, 50]], [[100, 50], [20, 40]], [[100, 40], [100, 40]]], ids=["none", "both", "width"]
)
def test_padding_is_zero_to_the_network(sizes: list[list[int]]) -> None:
    """Where nothing is padded, the network gets no sizes."""
    recipe, objective = detection()
    images = loaded(100, 50, torch.tensor(sizes), ORIGINAL_SIZES)
    batch = objective.prepare(images, torch.tensor([0, 1]), noise(2))
    inputs, given_sizes, named = objective.forward(Recorder(), batch)
    for image, pixels, (height, width) in zip(inputs, normalised(images.pixels, recipe), sizes, strict=True):
        torch.testing.assert_close(image[:, :height, :width], pixels[:, :height, :width])
        assert image.count_nonzero() == image[:, :height, :width].count_nonzero()
    padded = any(size != [100, 50] for size in sizes)
    assert (None if given_sizes is None else given_sizes.tolist()) == (sizes if padded else None)
    assert named == {"denoising": batch.denoising}


def test_the_detection_loss_is_that_of_the_recipe_in_the_networks_groups() -> None:
    _, objective = detection("eos_coef=0.3")
    images = loaded(100, 50, torch.tensor([[100, 50], [20, 40]]), ORIGINAL_SIZES)
    batch = objective.prepare(images, torch.tensor([0, 1]), noise(2))
    torch.manual_seed(0)
    output = Detr(CONFIG)(torch.rand(2, 3, 64, 64), None, denoising=batch.denoising)
    totals = batch.totals * 2
    found = objective.loss(output, batch, totals)
    expected = SetCriterion(eos_coef=0.3)(output, batch.targets, totals, groups=2)
    assert found.keys() >= {"loss", "denoising"}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("recipe", "data", "network", "message"),
    [
        ("vit_cifar10", OBJECTS, Recorder(), "objects: expected data for image-classification, found DetectionData"),
        ("detr_bccd", PICTURES, Detr(CONFIG), "pictures: expected data for object-detection, found ClassificationData"),
        ("detr_bccd", OBJECTS, Recorder(), "objects: expected data for object-detection"),
    ],
)
def test_a_recipe_needs_data_and_a_network_of_its_task(
    recipe: str, data: ClassificationData | DetectionData, network: nn.Module, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_objective(load_recipe(recipe, []), data, network, CPU)
