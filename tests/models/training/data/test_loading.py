"""Image loading, cached in memory and by worker processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrine.bundle.images import to_classification_pixels, to_detection_pixels
from vitrine.bundle.manifest import Task
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.data.loading import ImageCache, image_transform
from vitrine.models.training.errors import DataError
from vitrine.models.training.recipe import Recipe
from vitrine.models.training.registry import load_recipe

DETR = ("preprocessing.shortest_edge=64", "preprocessing.longest_edge=96")
INDICES = [torch.tensor([3, 1, 2]), torch.tensor([7]), torch.tensor([0, 3])]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_detection_batches(squares: Path, cache: str) -> None:
    recipe = load_recipe("detr_bccd", [*DETR, f"cache={cache}", "workers=2"])
    data = load_split(squares, Task.DETECTION, "train")
    cache = ImageCache(data, recipe, show=False)
    assert len(cache) == len(data)
    batches = list(cache.batches(INDICES))
    assert len(batches) == 3
    for indices, batch in zip(INDICES, batches, strict=True):
        assert batch.pixels.shape[1:3] == tuple(batch.sizes.amax(dim=0).tolist())
        for i, pixels, (height, width), image_size in zip(indices, *batch, strict=True):
            image = data.image(int(i))
            expected = to_detection_pixels(image, recipe.preprocessing)
            assert (height, width) == expected.shape[:2]
            assert tuple(image_size) == (image.height, image.width)
            assert np.array_equal(pixels[:height, :width], expected)
            assert not pixels[height:].any()
            assert not pixels[:, width:].any()


def test_training_edges_are_those_of_training_only(squares: Path) -> None:
    recipe = load_recipe("detr_bccd", [*DETR, "training_edges=[32, 48]"])
    data = load_split(squares, Task.DETECTION, "train")
    (batch,) = ImageCache(data, recipe, show=False).batches([torch.tensor([0])])
    smaller = recipe.preprocessing.model_copy(update={"shortest_edge": 32, "longest_edge": 48})
    expected = to_detection_pixels(data.image(0), smaller)
    assert np.array_equal(batch.pixels[0].numpy(), expected)
    assert expected.shape != to_detection_pixels(data.image(0), recipe.preprocessing).shape


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_image_is_named(tmp_path: Path, cache: str) -> None:
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(3):
        noise(40, 40).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    recipe = load_recipe("vit_cifar10", [f"cache={cache}", "workers=1"])
    data = load_split(tmp_path, Task.CLASSIFICATION, "train")
    with pytest.raises(DataError, match=r"^[^\n]*1\.png: [^\n]*$"):
        list(ImageCache(data, recipe, show=False).batches([torch.tensor([0, 1, 2])]))


def test_images_for_crops_are_larger_than_the_input() -> None:
    make = image_transform(load_recipe("vit_cifar10", ["augmentation.crop=resized"]))
    assert make(noise(300, 150)).shape == (40, 80, 3)
    assert make(noise(30, 150)).shape == (150, 30, 3)  # never enlarged


@pytest.mark.parametrize("crop", ["shift", "none"])
def test_without_crops_images_are_preprocessed_as_in_evaluation(crop: str) -> None:
    recipe: Recipe = load_recipe("vit_cifar10", [f"augmentation.crop={crop}"])
    image = noise(50, 70)
    make = pickle.loads(pickle.dumps(image_transform(recipe)))  # it travels to worker processes
    assert np.array_equal(make(image), to_classification_pixels(image, recipe.preprocessing))
