"""Training objectives: from loaded images to an augmented batch, and from a network's output to its loss.

Shapes: B batch, H x W pixels, K classes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.boxes import xyxy_to_cxcywh
from vitrine.models.detr import Denoising, Detr
from vitrine.models.serving import Normalise
from vitrine.models.training.data.dataset import (
    ClassificationData,
    Data,
    DetectionData,
    balanced_weights,
    is_unbalanced,
)
from vitrine.models.training.data.loading import ImageBatch
from vitrine.models.training.errors import DataError
from vitrine.models.training.objectives.denoising import make_denoising
from vitrine.models.training.objectives.feature_batch import FeatureBatch, paste_columns
from vitrine.models.training.objectives.losses import ClassificationLoss, SetCriterion
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe
from vitrine.models.training.targets import Target


@dataclass(frozen=True)
class Batch:
    """Augmented images, or their features, and their targets on the device."""

    inputs: Tensor | FeatureBatch  # pixels uint8 [B, H, W, 3], or their features
    totals: Tensor  # float [k], divisors of the losses, to be summed over all batches of a step


@dataclass(frozen=True)
class ClassificationBatch(Batch):
    """Images with soft labels."""

    targets: Tensor  # float [B, K]
    weights: Tensor  # float [B], of the images' losses


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """Padded images with objects."""

    sizes: Tensor | None  # int64 [B, 2]; None where nothing is padded
    valid: Tensor | None  # bool [B, 1, H, W]; None if there are features
    targets: list[Target]
    denoising: Denoising | None


class Objective(Protocol):
    """Prepares batches and computes the loss of a task."""

    group: int  # number of neighbouring images of a batch that augmentation mixes

    def prepare(self, loaded: ImageBatch, indices: Tensor, noise: Tensor) -> Any:
        """Augment the loaded images at `indices`, each with its own row of `noise`."""
        ...

    def prepare_features(
        self, features: FeatureBatch, indices: Tensor, targets: list[Target] | None, noise: Tensor
    ) -> Any:
        """Return the batch for the features of a view of the images at `indices`, and for detection its targets."""
        ...

    def forward(self, network: nn.Module, batch: Any) -> Any:
        """Run the network on the batch, or the rest of the network (`features.TrainedPart`) on features."""
        ...

    def loss(self, output: Any, batch: Any, totals: Tensor) -> dict[str, Tensor]:
        """Return scalars, "loss" among them: sums over the batch, divided by the `totals` of the step."""
        ...


class ClassificationObjective:
    """Cross entropy with soft labels."""

    def __init__(self, recipe: ClassificationRecipe, data: ClassificationData, device: torch.device) -> None:
        self.augmentation = recipe.augmentation
        self.group = recipe.augmentation.group
        self.size = recipe.preprocessing.input_size
        self.device = device
        self.class_ids = torch.from_numpy(data.class_ids)
        self.num_classes = len(data.labels)
        self.normalise = Normalise(recipe.preprocessing.mean, recipe.preprocessing.std).to(device)
        self.criterion = ClassificationLoss(recipe.loss, recipe.label_smoothing)
        weighted = recipe.class_weights == "balanced" or (
            recipe.class_weights == "auto" and is_unbalanced(data.class_ids)
        )
        ones = np.ones(self.num_classes, np.float32)
        weights = balanced_weights(data.class_ids, self.num_classes) if weighted else ones
        self.class_weights = torch.from_numpy(weights).to(device)

    def prepare(self, loaded: ImageBatch, indices: Tensor, noise: Tensor) -> ClassificationBatch:
        inputs = loaded.pixels, loaded.sizes, self.class_ids[indices]
        pixels, sizes, class_ids = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
        pixels, targets = self.augmentation(pixels, sizes, class_ids, self.num_classes, noise, self.size)
        return self._batch(pixels, targets)

    def prepare_features(
        self, features: FeatureBatch, indices: Tensor, targets: list[Target] | None, noise: Tensor
    ) -> ClassificationBatch:
        one_hot = F.one_hot(self.class_ids[indices], self.num_classes).float().to(self.device)
        return self._batch(features.to(self.device), one_hot)

    def _batch(self, inputs: Tensor | FeatureBatch, targets: Tensor) -> ClassificationBatch:
        weights = targets @ self.class_weights
        return ClassificationBatch(inputs, weights.sum()[None], targets, weights)

    def forward(self, network: nn.Module, batch: ClassificationBatch) -> Tensor:
        inputs = batch.inputs
        logits: Tensor = network(inputs.maps[0] if isinstance(inputs, FeatureBatch) else self.normalise(inputs))
        return logits

    def loss(self, output: Tensor, batch: ClassificationBatch, totals: Tensor) -> dict[str, Tensor]:
        return {"loss": self.criterion(output.float(), batch.targets, totals[0], batch.weights)}


class DetectionObjective:
    """DETR's set loss."""

    def __init__(self, recipe: DetectionRecipe, data: DetectionData, network: Detr, device: torch.device) -> None:
        config = network.config
        self.stride = network.backbone.strides[-1]
        self.augmentation = recipe.augmentation
        self.group = recipe.augmentation.group
        self.device = device
        self.data = data
        self.config = config
        self.normalise = Normalise(recipe.preprocessing.mean, recipe.preprocessing.std).to(device)
        self.criterion = SetCriterion.of(config, eos_coef=recipe.eos_coef)

    def prepare(self, loaded: ImageBatch, indices: Tensor, noise: Tensor) -> DetectionBatch:
        pixels, sizes = (tensor.to(self.device, non_blocking=True) for tensor in (loaded.pixels, loaded.sizes))
        edges = loaded.image_sizes.flip(-1).repeat(1, 2)  # [B, 4]: width, height, width, height
        targets = [self._target(i, image_edges) for i, image_edges in zip(indices.tolist(), edges, strict=True)]
        pixels, sizes, valid, targets = self.augmentation(pixels, sizes, targets, noise)
        padded = bool((loaded.sizes != torch.tensor(loaded.pixels.shape[1:3])).any())
        return DetectionBatch(
            pixels,
            totals=self.criterion.totals(targets, self.config).to(self.device),
            sizes=sizes if padded else None,
            valid=valid,
            targets=targets,
            denoising=make_denoising(targets, self.config, noise[:, -1]),
        )

    def prepare_features(
        self, features: FeatureBatch, indices: Tensor, targets: list[Target] | None, noise: Tensor
    ) -> DetectionBatch:
        assert targets is not None
        probability, min_visible = self.augmentation.feature_paste, self.augmentation.min_visible
        if probability:
            features, targets = paste_columns(features, targets, noise, self.stride, probability, min_visible)
        targets = [Target(t.class_ids.to(self.device), t.boxes_cxcywh.to(self.device)) for t in targets]
        return DetectionBatch(
            features.to(self.device),
            totals=self.criterion.totals(targets, self.config).to(self.device),
            sizes=features.sizes.to(self.device),
            valid=None,
            targets=targets,
            denoising=make_denoising(targets, self.config, noise[:, -1]),
        )

    def forward(self, network: nn.Module, batch: DetectionBatch) -> Any:
        inputs = batch.inputs
        if isinstance(inputs, FeatureBatch):
            return network(inputs.maps, batch.sizes, inputs.edges(self.stride), denoising=batch.denoising)
        images = self.normalise(inputs)
        if batch.sizes is not None:
            assert batch.valid is not None
            images = images * batch.valid
        return network(images, batch.sizes, denoising=batch.denoising)

    def loss(self, output: Any, batch: DetectionBatch, totals: Tensor) -> dict[str, Tensor]:
        return self.criterion(output, batch.targets, totals, self.config.query_groups)

    def _target(self, index: int, edges: Tensor) -> Target:
        boxes_xyxy = (torch.from_numpy(self.data.boxes[index]) / edges).clamp(0, 1)
        class_ids = torch.from_numpy(self.data.class_ids[index])
        return Target(class_ids.to(self.device), xyxy_to_cxcywh(boxes_xyxy).to(self.device))


def make_objective(recipe: Recipe, data: Data, network: nn.Module, device: torch.device) -> Objective:
    """Return the objective for a recipe's task."""
    if isinstance(recipe, ClassificationRecipe) and isinstance(data, ClassificationData):
        return ClassificationObjective(recipe, data, device)
    if isinstance(recipe, DetectionRecipe) and isinstance(data, DetectionData) and isinstance(network, Detr):
        return DetectionObjective(recipe, data, network, device)
    raise DataError(f"{data.name}: expected data for {recipe.task}, found {type(data).__name__}")
