"""Features of a frozen part, computed once."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Task
from vitrine.models.boxes import cxcywh_to_xyxy
from vitrine.models.build import build_model
from vitrine.models.training.augmentation.augment import NOISE, ClassificationAugmentation, DetectionAugmentation
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.data.dataset import Data
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.data.loading import ImageCache
from vitrine.models.training.errors import TrainingError
from vitrine.models.training.features import FeatureCache, FrozenPart, TrainedPart
from vitrine.models.training.loop import train
from vitrine.models.training.optimisation import make_optimizer
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe

NORM: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 1e-3}
PHOTOS = ClassificationRecipe(
    name="photos",
    architecture="efficientnet",
    model={"image_size": 32, "width_factor": 0.25, "depth_factor": 0.3},
    preprocessing=ClassificationPreprocessing(input_size=(32, 32), **NORM),
    augmentation=ClassificationAugmentation(crop="resized", scale=(0.2, 0.5)),
    trainable="head",
    views=3,
    **SHORT,
)
OBJECTS = DetectionRecipe(
    name="objects",
    architecture="detr",
    model={
        "backbone": "efficientnet_lite0",
        "neck": "fusion",
        "queries": "selected",
        "scores": "sigmoid",
        "num_queries": 5,
        "embed_dim": 16,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "feedforward_dim": 16,
    },
    preprocessing=DetectionPreprocessing(shortest_edge=64, longest_edge=96, **NORM),
    augmentation=DetectionAugmentation(flip=0.5, zoom=(1.0, 1.5)),
    trainable="all_but_backbone",
    views=2,
    **SHORT,
)


@pytest.fixture
def photos(colours: Path) -> Data:
    return load_split(colours, Task.CLASSIFICATION, "test").subset(np.arange(0, 36, 2))


@pytest.fixture
def objects(squares: Path) -> Data:
    return load_split(squares, Task.DETECTION, "test")


def make(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(recipe.architecture, recipe.model, 3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: not the identity
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    make_optimizer(network, recipe)  # freezes
    return network.eval()


def noise(rows: int, view: float) -> torch.Tensor:
    values = torch.zeros(rows, NOISE)
    values[:, 0] = view
    return values


@pytest.mark.parametrize("task", ["photos", "objects"])
def test_first_view_is_the_image_as_in_evaluation(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe: Recipe = {"photos": PHOTOS, "objects": OBJECTS}[task]
    data, network = request.getfixturevalue(task), make(recipe)
    cache = FeatureCache(network, recipe, data, recipe.views, tmp_path / "features", show=False)
    plain = recipe.derive(augmentation=ClassificationAugmentation(crop="none", flip=0)) if task == "photos" else recipe
    images, frozen = ImageCache(data, plain, show=False), FrozenPart(network, recipe).eval()
    for i in range(len(data)):
        (loaded,) = images.batches([torch.tensor([i])])
        with torch.no_grad():
            expected = frozen(loaded.pixels, loaded.sizes)
        features, targets = cache.batch(torch.tensor([i]), noise(1, 0))
        assert torch.equal(features.sizes, loaded.sizes)
        for level, own in zip(features.maps, expected, strict=True):
            torch.testing.assert_close(level, own, atol=2e-2, rtol=2e-3)  # float16
        if targets is not None:
            height, width = loaded.image_sizes[0].tolist()
            boxes = cxcywh_to_xyxy(targets[0].boxes_cxcywh) * torch.tensor([width, height] * 2)
            np.testing.assert_allclose(boxes.numpy(), data.boxes[i], atol=0.01)


def test_other_views_differ_and_are_chosen_by_the_noise(photos: Data, tmp_path: Path) -> None:
    cache = FeatureCache(make(PHOTOS), PHOTOS, photos, 3, tmp_path / "features", show=False)
    views = [cache.batch(torch.arange(4), noise(4, view))[0].maps[0] for view in (0.0, 0.34, 0.99)]
    for i, view in enumerate(views):
        for other in views[:i]:
            assert not torch.allclose(view, other, atol=1e-2)
    mixed = noise(2, 0.0)
    mixed[1, 0] = 0.99
    both, _ = cache.batch(torch.tensor([1, 2]), mixed)
    assert torch.equal(both.maps[0][0], views[0][1])
    assert torch.equal(both.maps[0][1], views[2][2])


def test_images_of_several_sizes_are_padded_with_zeros(objects: Data, tmp_path: Path) -> None:
    network = make(OBJECTS)
    cache = FeatureCache(network, OBJECTS, objects, 2, tmp_path / "features", show=False)
    together, targets = cache.batch(torch.arange(4), noise(4, 0.6))
    assert targets is not None
    assert len(targets) == 4
    head = TrainedPart(network, OBJECTS)
    edges = [cells * 32 for cells in together.maps[-1].shape[-2:]]
    with torch.no_grad():
        output = head(together.maps, together.sizes, edges)
        for i in range(4):
            alone, _ = cache.batch(torch.tensor([i]), noise(1, 0.6))
            own = head(alone.maps, alone.sizes, [cells * 32 for cells in alone.maps[-1].shape[-2:]])
            torch.testing.assert_close(output["pred_boxes"][i], own["pred_boxes"][0], atol=1e-4, rtol=1e-4)


def test_files_are_used_again_and_those_of_others_refused(photos: Data, tmp_path: Path) -> None:
    network, folder = make(PHOTOS), tmp_path / "features"
    first = FeatureCache(network, PHOTOS, photos, 2, folder, show=False)
    written = (folder / "0.f16").stat().st_mtime_ns
    again = FeatureCache(network, PHOTOS, photos, 2, folder, show=False)
    assert (folder / "0.f16").stat().st_mtime_ns == written
    everything = torch.arange(len(photos)), noise(len(photos), 0.9)
    assert torch.equal(first.batch(*everything)[0].maps[0], again.batch(*everything)[0].maps[0])
    with torch.no_grad():
        network.backbone.stem.conv.weight.mul_(2)
    with pytest.raises(TrainingError, match="expected features of this network, recipe and data, found others"):
        FeatureCache(network, PHOTOS, photos, 2, folder, show=False)


@pytest.mark.parametrize("trainable", ["head", "last_stage"])
def test_features_are_those_of_the_frozen_weights(trainable: str, photos: Data, tmp_path: Path) -> None:
    recipe, folder = PHOTOS.derive(trainable=trainable), tmp_path / "features"
    network = make(recipe)
    FeatureCache(network, recipe, photos, 1, folder, show=False)
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += parameter.requires_grad  # it has learned: a run that is resumed
        FeatureCache(network, recipe, photos, 1, folder, show=False)
        frozen[-1] += 1
    with pytest.raises(TrainingError, match="found others"):
        FeatureCache(network, recipe, photos, 1, folder, show=False)


def test_an_unfinished_cache_is_computed_anew(photos: Data, tmp_path: Path) -> None:
    network, folder = make(PHOTOS), tmp_path / "features"
    complete = FeatureCache(network, PHOTOS, photos, 1, folder, show=False).batch(torch.arange(3), noise(3, 0))
    (folder / "cache.json").unlink()
    (folder / "0.f16").write_bytes(b"torn")
    again = FeatureCache(network, PHOTOS, photos, 1, folder, show=False).batch(torch.arange(3), noise(3, 0))
    assert torch.equal(complete[0].maps[0], again[0].maps[0])


def test_a_folder_that_cannot_be_written_is_named(photos: Data, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"file/features: the features cannot be kept there: "):
        FeatureCache(make(PHOTOS), PHOTOS, photos, 1, tmp_path / "file" / "features", show=False)


def test_batches_have_one_orientation(objects: Data, tmp_path: Path) -> None:
    cache = FeatureCache(make(OBJECTS), OBJECTS, objects, 1, tmp_path / "features", show=False)
    generator = torch.Generator().manual_seed(0)
    order = cache.order(torch.randperm(len(objects), generator=generator), 2, generator)
    assert sorted(order.tolist()) == list(range(len(objects)))


def test_ctrl_c_while_features_are_computed_saves(
    photos: Data, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = FeatureCache._compute

    def interrupted(self: FeatureCache, network: nn.Module, show: bool) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return compute(self, network, show)

    monkeypatch.setattr(FeatureCache, "_compute", interrupted)
    stopped = train(PHOTOS, colours, tmp_path / "run")
    assert not stopped.is_finished
    assert load_checkpoint(tmp_path / "run").progress.epoch == 0
    monkeypatch.setattr(FeatureCache, "_compute", compute)
    assert train(PHOTOS, colours, tmp_path / "run", resume=True).is_finished
