"""What a task trains on and minimises: the images in memory as uint8, and the loss of a random batch of them."""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from bundle.images import pad_and_stack, to_classification_pixels, to_detection_pixels
from bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from models.boxes import xyxy_to_cxcywh
from models.detr import Detr
from models.serving import Normalise
from models.training.augment import shift_and_flip, window_and_flip
from models.training.data import ClassificationData, Data, DetectionData
from models.training.errors import DataError
from models.training.losses import SetCriterion
from models.training.matcher import Target
from models.training.recipe import Recipe


class Objective(Protocol):
    """Images in memory, and what a network should learn from them."""

    def __len__(self) -> int: ...

    def loss(self, network: nn.Module, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        """Augment the images at `indices`, run the network and return scalars, "loss" among them."""
        ...


class ClassificationObjective:
    """Cross entropy with label smoothing, on shifted and mirrored images."""

    def __init__(self, recipe: Recipe, data: ClassificationData, device: torch.device) -> None:
        preprocessing = recipe.preprocessing
        assert isinstance(preprocessing, ClassificationPreprocessing)
        pixels = np.empty((len(data), *preprocessing.input_size, 3), dtype=np.uint8)
        for i in tqdm(range(len(data)), desc="decode", leave=False, disable=None):
            pixels[i] = to_classification_pixels(data.image(i), preprocessing)
        self.pixels = torch.from_numpy(pixels).to(device)
        self.class_ids = torch.from_numpy(data.class_ids).to(device)
        self.normalise = Normalise(preprocessing.mean, preprocessing.std).to(device)
        self.label_smoothing = recipe.label_smoothing

    def __len__(self) -> int:
        return len(self.pixels)

    def loss(self, network: nn.Module, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        pixels = shift_and_flip(self.pixels[indices], generator)
        logits = network(self.normalise(pixels))
        return {"loss": F.cross_entropy(logits, self.class_ids[indices], label_smoothing=self.label_smoothing)}


class DetectionObjective:
    """DETR's set loss, on random windows of the images."""

    def __init__(self, recipe: Recipe, data: DetectionData, device: torch.device) -> None:
        preprocessing = recipe.preprocessing
        assert isinstance(preprocessing, DetectionPreprocessing)
        images = []
        self.targets = []
        for i in tqdm(range(len(data)), desc="decode", leave=False, disable=None):
            image = data.image(i)
            images.append(to_detection_pixels(image, preprocessing))
            edges = np.array([image.width, image.height] * 2, dtype=np.float32)
            boxes = torch.from_numpy(data.boxes[i] / edges).clamp(0, 1)
            self.targets.append(
                Target(torch.from_numpy(data.class_ids[i]).to(device), xyxy_to_cxcywh(boxes).to(device))
            )
        pixels, sizes = pad_and_stack(images)
        self.pixels = torch.from_numpy(pixels).to(device)
        self.sizes = torch.from_numpy(sizes).to(device)
        self.normalise = Normalise(preprocessing.mean, preprocessing.std).to(device)
        self.criterion = SetCriterion()

    def __len__(self) -> int:
        return len(self.pixels)

    def loss(self, network: nn.Module, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        assert isinstance(network, Detr)
        targets = [self.targets[i] for i in indices.tolist()]
        sizes = self.sizes[indices]
        pixels, valid, targets = window_and_flip(self.pixels[indices], sizes, targets, generator)
        output = network(self.normalise(pixels) * valid, sizes)
        return self.criterion(output, targets, network.config.query_groups)


def make_objective(recipe: Recipe, data: Data, device: torch.device) -> Objective:
    """The objective of a recipe's task."""
    if isinstance(recipe.preprocessing, ClassificationPreprocessing) and isinstance(data, ClassificationData):
        return ClassificationObjective(recipe, data, device)
    if isinstance(recipe.preprocessing, DetectionPreprocessing) and isinstance(data, DetectionData):
        return DetectionObjective(recipe, data, device)
    raise DataError(f"{data.name}: expected data for {recipe.task}, found {type(data).__name__}")
