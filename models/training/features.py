"""Features of a network's frozen part, computed once for some augmented views of each image, in memory-mapped files.

While the part of a network that is nearest to the image does not change, neither do its outputs: an epoch that reads
them from a file costs only the rest of the network. Each epoch uses a random view of each image.

    FOLDER/cache.json     what the features are of; written last
    FOLDER/LEVEL.f16      float16 [views, all values]: each image's [C, h, w] (or [D]), end to end
    FOLDER/targets.pt     the targets of each view, for detection

On a CPU, ONNX Runtime computes them, two to four times as fast as PyTorch (decision 24).

Shapes: B batch, H x W pixels, C channels, h x w cells.
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from tqdm import tqdm

from vitrine.bundle.machine import available_cores
from vitrine.models.detr import Detr
from vitrine.models.position import valid_cells
from vitrine.models.serving import Normalise
from vitrine.models.training.augmentation.augment import NOISE, ClassificationAugmentation, DetectionAugmentation
from vitrine.models.training.data.dataset import Data
from vitrine.models.training.data.loading import ImageCache
from vitrine.models.training.errors import TrainingError
from vitrine.models.training.objectives.feature_batch import FeatureBatch
from vitrine.models.training.objectives.objectives import DetectionBatch, make_objective
from vitrine.models.training.recipe import ClassificationRecipe, Recipe
from vitrine.models.training.targets import Target

_BATCH = 16  # images per call of the frozen part
_MULTIPLE = 32  # pixels, of the edges of batches for detection
_KEY_FILE, _TARGETS_FILE = "cache.json", "targets.pt"
_Shape = tuple[int, ...]


class FrozenPart(nn.Module):
    """The part of a network that is nearest to the image: pixels to what its `forward_head` needs."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.stages = recipe.backbone_stages
        self.normalise = Normalise(recipe.preprocessing.mean, recipe.preprocessing.std)

    def forward(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        """Compute the features of a padded batch.

        Args:
            pixels: uint8 [B, H, W, 3].
            sizes: int64 [B, 2], height and width of each valid region.

        Returns:
            Maps [B, C, h, w] or vectors [B, D].
        """
        images = self.normalise(pixels)
        if not isinstance(self.network, Detr):
            return [self.network.forward_features(images, **_options(self.stages))]  # type: ignore[operator]
        valid = valid_cells(sizes, pixels.shape[1:3])[:, None]
        return self.network.forward_features(images * valid, sizes, stages=self.stages)


class TrainedPart(nn.Module):
    """The rest of a network, as a module that can be wrapped for several processes."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.stages = recipe.backbone_stages

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the network's `forward_head`."""
        return self.network.forward_head(*arguments, **options, **_options(self.stages))  # type: ignore[operator]


def _options(stages: int) -> dict[str, int]:
    """Return the option of `forward_features` and `forward_head`, which networks without a backbone do not have."""
    return {"stages": stages} if stages else {}


class FeatureCache:
    """The features of each image of a data set, for `views` views, of which the first is the image as in evaluation.

    Args:
        network: has `forward_features`, whose weights must not change.
        recipe: its augmentation makes the other views.
        data: the images.
        views: number of views.
        folder: where the files are, or will be.
        show: whether to show progress.

    Raises:
        TrainingError: the folder has features of something else, or cannot be written.
        DataError: an image is broken.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, data: Data, views: int, folder: Path, *, show: bool) -> None:
        self.recipe, self.data, self.folder, self.views = recipe, data, folder, views
        key = _key(network, recipe, data, views)
        try:
            found = json.loads((folder / _KEY_FILE).read_text()) if (folder / _KEY_FILE).exists() else None
            if found is None:
                found = self._compute(network, show) | {"key": key}
                (folder / _KEY_FILE).write_text(json.dumps(found))
            self._targets: list[list[Target]] | None = None
            if (folder / _TARGETS_FILE).exists():
                stored = torch.load(folder / _TARGETS_FILE, weights_only=True)
                self._targets = [[Target(*objects) for objects in view] for view in stored]
        except (OSError, ValueError) as error:
            raise TrainingError(f"{folder}: the features cannot be kept there: {error}") from error
        if found["key"] != key:
            raise TrainingError(
                f"{folder}: expected features of this network, recipe and data, found others; remove it"
            )
        self._sizes = torch.tensor(found["sizes"])  # [n, 2], height and width of each image as the network sees it
        self._shapes: list[list[_Shape]] = [[tuple(shape) for shape in level] for level in found["shapes"]]
        self._offsets = [np.cumsum([0, *map(math.prod, level)]) for level in self._shapes]
        self._levels: list[NDArray[np.float16]] = [
            np.memmap(folder / f"{level}.f16", np.float16, "r").reshape(views, -1) for level in range(len(self._shapes))
        ]

    def __len__(self) -> int:
        return len(self.data)

    def order(self, permutation: Tensor, batch_size: int, generator: Generator) -> Tensor:
        """Reorder a permutation so that a batch has images of one orientation, which need little padding."""
        tall = self._sizes[permutation, 0] > self._sizes[permutation, 1]
        if self._targets is None or not tall.any():
            return permutation
        grouped = torch.cat((permutation[~tall], permutation[tall]))
        whole = len(grouped) // batch_size * batch_size
        batches = grouped[:whole].view(-1, batch_size)
        return torch.cat((batches[torch.randperm(len(batches), generator=generator)].flatten(), grouped[whole:]))

    def batch(self, indices: Tensor, noise: Tensor) -> tuple[FeatureBatch, list[Target] | None]:
        """Return the features and, for detection, the targets of a random view of each image.

        Args:
            indices: int64 [B].
            noise: float [B, NOISE], uniform in [0, 1).
        """
        chosen = (noise[:, 0] * self.views).long().tolist()
        images = indices.tolist()
        maps = []
        for values, offsets, shapes in zip(self._levels, self._offsets, self._shapes, strict=True):
            largest = tuple(map(max, zip(*(shapes[image] for image in images), strict=True)))
            out = np.zeros((len(images), *largest), np.float32)
            for row, (image, view) in enumerate(zip(images, chosen, strict=True)):
                part = values[view, offsets[image] : offsets[image + 1]].reshape(shapes[image])
                own = tuple(map(slice, part.shape))
                out[row][own] = part
            level = torch.from_numpy(out)  # convolutions are faster with the channels last
            maps.append(level.contiguous(memory_format=torch.channels_last) if level.ndim == 4 else level)
        targets = None if self._targets is None else [self._targets[v][i] for i, v in zip(images, chosen, strict=True)]
        return FeatureBatch(maps, self._sizes[indices]), targets

    def _compute(self, network: nn.Module, show: bool) -> dict[str, Any]:
        """Write all features; return the images' sizes and the features' shapes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        targets: list[list[tuple[Tensor, Tensor]]] = []
        files: list[NDArray[np.float16]] = []
        functions: dict[tuple[int, int], Callable[[Tensor, Tensor], list[NDArray[np.float32]]]] = {}
        bar = tqdm(total=self.views * len(self), desc="features", unit=" images", disable=None if show else True)
        with bar:
            for view in range(self.views):
                if view < 2:  # the others are loaded like the second
                    recipe = self.recipe if view else _unaugmented(self.recipe)
                    objective = make_objective(recipe, self.data, network, torch.device("cpu"))
                    images = ImageCache(self.data, recipe, show=False)
                # A run that trains more of the network after another has views of its own.
                seed = np.random.SeedSequence((recipe.seed, view, recipe.backbone_stages)).generate_state(1)[0]
                noise = torch.rand(len(self), NOISE, generator=Generator().manual_seed(int(seed)))
                if view == 0:
                    sizes, batches = self._plan(images)
                found: dict[int, tuple[Tensor, Tensor]] = {}
                for (indices, canvas), loaded in zip(batches, images.batches([b for b, _ in batches]), strict=True):
                    batch = objective.prepare(loaded, indices, noise[indices])
                    if isinstance(batch, DetectionBatch):
                        objects = [(target.class_ids, target.boxes_cxcywh) for target in batch.targets]
                        found |= dict(zip(indices.tolist(), objects, strict=True))
                    pixels = _padded(batch.inputs, canvas)
                    if canvas not in functions:
                        functions[canvas] = _frozen_function(network, self.recipe, pixels, sizes[indices])
                    outputs = functions[canvas](pixels, sizes[indices])
                    if not files:
                        shapes = [_shapes(output.shape[1:], canvas, sizes) for output in outputs]
                        offsets = [np.cumsum([0, *map(math.prod, level)]) for level in shapes]
                        files = [
                            np.memmap(self.folder / f"{i}.f16", np.float16, "w+", shape=(self.views, int(ends[-1])))
                            for i, ends in enumerate(offsets)
                        ]
                    for file, level, ends, output in zip(files, shapes, offsets, outputs, strict=True):
                        for image, values in zip(indices.tolist(), output, strict=True):
                            own = values[tuple(map(slice, level[image]))]
                            file[view, ends[image] : ends[image + 1]] = own.ravel()
                    bar.update(len(indices))
                targets.append([found[image] for image in range(len(self))] if found else [])
        if any(targets):
            torch.save(targets, self.folder / _TARGETS_FILE)
        return {"sizes": sizes.tolist(), "shapes": shapes}

    def _plan(self, images: ImageCache) -> tuple[Tensor, list[tuple[Tensor, tuple[int, int]]]]:
        """Return the images' sizes [n, 2], and batches of one orientation with the size that each is padded to."""
        everything = torch.arange(len(self))
        if isinstance(self.recipe, ClassificationRecipe):
            height, width = self.recipe.preprocessing.input_size
            return torch.tensor([[height, width]] * len(self)), [
                (part, (height, width)) for part in everything.split(_BATCH)
            ]
        sizes = torch.cat([loaded.sizes for loaded in images.batches(everything.split(_BATCH))])
        batches = []
        for group in (everything[sizes[:, 0] <= sizes[:, 1]], everything[sizes[:, 0] > sizes[:, 1]]):
            if len(group):
                height, width = (math.ceil(edge / _MULTIPLE) * _MULTIPLE for edge in sizes[group].amax(dim=0).tolist())
                batches += [(part, (height, width)) for part in group.split(_BATCH)]
        return sizes, batches


def _padded(pixels: Tensor, canvas: tuple[int, int]) -> Tensor:
    height, width = pixels.shape[1:3]
    return F.pad(pixels, (0, 0, 0, canvas[1] - width, 0, canvas[0] - height))


def _shapes(output: _Shape, canvas: tuple[int, int], sizes: Tensor) -> list[_Shape]:
    """Return the shape of each image's features: the cells that a batch of this image alone would have."""
    if len(output) == 1:
        return [output] * len(sizes)
    channels, *grid = output
    strides = [edge // cells for edge, cells in zip(canvas, grid, strict=True)]
    multiple = max(_MULTIPLE, *strides)
    return [
        (
            channels,
            *(math.ceil(edge / multiple) * multiple // stride for edge, stride in zip(size, strides, strict=True)),
        )
        for size in sizes.tolist()
    ]


def _unaugmented(recipe: Recipe) -> Recipe:
    """Return the recipe with images as in evaluation."""
    if isinstance(recipe, ClassificationRecipe):
        return recipe.derive(augmentation=ClassificationAugmentation(crop="none", flip=0))
    return recipe.derive(augmentation=DetectionAugmentation(flip=0, zoom=(1, 1), brightness=0, contrast=0))


def _key(network: nn.Module, recipe: Recipe, data: Data, views: int) -> str:
    """Hash all that the features depend on."""
    digest = hashlib.sha256()
    document = recipe.model_dump(mode="json", include={"model", "augmentation", "seed", "trainable"})
    document["preprocessing"] = recipe.training_preprocessing.model_dump(mode="json")
    digest.update(json.dumps([document, views, data.name, data.split, len(data)], sort_keys=True).encode())
    for name in data.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in network.named_buffers() if not name.startswith("backbone.")}  # change, too
    for name, value in network.state_dict().items():
        if name not in trained | statistics:
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _frozen_function(
    network: nn.Module, recipe: Recipe, pixels: Tensor, sizes: Tensor
) -> Callable[[Tensor, Tensor], list[NDArray[np.float32]]]:
    """Return a function that computes the frozen part: on a GPU in PyTorch, on a CPU in ONNX Runtime."""
    training = {module: module.training for module in network.modules()}
    module = FrozenPart(network, recipe).eval()
    device = next(network.parameters()).device
    try:
        if device.type == "cuda":

            @torch.inference_mode()
            def on_gpu(pixels: Tensor, sizes: Tensor) -> list[NDArray[np.float32]]:
                return [level.cpu().numpy() for level in module.to(device)(pixels.to(device), sizes.to(device))]

            return on_gpu
        return _onnx_function(module, pixels, sizes)
    finally:
        for part, mode in training.items():
            part.training = mode


def _onnx_function(
    module: FrozenPart, pixels: Tensor, sizes: Tensor
) -> Callable[[Tensor, Tensor], list[NDArray[np.float32]]]:
    """Export the module for the shapes of `pixels` and `sizes`, whose number of images is the largest.

    Fixed shapes are exported several times as fast as variable ones; smaller batches are padded.
    """
    import onnxruntime  # training without features needs none

    count, names = len(pixels), ["pixels", "sizes"]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (pixels, sizes),
            dynamo=True,
            input_names=names,
            verbose=False,
        )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    used = [value.name for value in session.get_inputs()]

    def run(pixels: Tensor, sizes: Tensor) -> list[NDArray[np.float32]]:
        missing = count - len(pixels)
        padded = {
            name: np.concatenate((values, values[:1].repeat(missing, axis=0)))
            for name, values in zip(names, (pixels.numpy(), sizes.numpy()), strict=True)
        }
        outputs = session.run(None, {name: padded[name] for name in used})
        return [output[: len(pixels)] for output in outputs]

    return run
