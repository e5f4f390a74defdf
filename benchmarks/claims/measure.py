"""Train one network and take the measurements of its claim."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims.trials import Trial
from vitrine.bundle.manifest import Task
from vitrine.bundle.predictors import Network, make_predictor
from vitrine.models.serving import served
from vitrine.models.training.checkpoint import METRICS_FILE, Checkpoint
from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.data.layouts import load_split, load_training_splits
from vitrine.models.training.errors import DivergedError
from vitrine.models.training.evaluation.metrics import DetectionPredictions, evaluate, measure, predict
from vitrine.models.training.evaluation.mistakes import detection_mistakes, iou
from vitrine.models.training.loop import train
from vitrine.models.training.network import TorchNetwork, checkpoint_predictor, default_device
from vitrine.models.training.registry import load_recipe

NMS_IOU = 0.5
Outcome = dict[str, Any]


def run(trial: Trial, data: Path, runs: Path) -> Outcome | None:
    """Run or resume a trial in `runs` and return its measurements; None if it was interrupted."""
    recipe = load_recipe(trial.recipe, trial.settings)
    folder = runs / trial.name
    try:
        checkpoint = train(recipe, data / trial.data, folder, resume=True, changes=trial.settings)
    except DivergedError as error:
        if trial.measure != "survival":
            raise
        return {"diverged": True, "top1": None, "why": str(error).split(";")[0]}
    progress = checkpoint.progress
    assert progress is not None
    if not checkpoint.is_finished:
        return None
    return {
        **MEASURES[trial.measure](checkpoint, data / trial.data, folder),
        "parameters": sum(p.numel() for p in checkpoint.build().parameters()),
        "training_seconds": round(progress.seconds, 1),
    }


def held_out(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """Accuracy on the held-out images after the last epoch."""
    assert checkpoint.progress is not None
    return {"top1": checkpoint.progress.metrics["top1"]}


def survival(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """That it did not diverge, and its accuracy on the held-out images."""
    return {"diverged": False, **held_out(checkpoint, data, folder)}


def accuracy(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """Accuracy on test."""
    return {
        "top1": evaluate(checkpoint_predictor(checkpoint)[0], load_split(data, Task.CLASSIFICATION, "test"))["top1"]
    }


def gap(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """Accuracy on test and on the training images without augmentation; losses of all epochs but the last.

    After the last epoch, the loop calibrates on the held-out images and measures the calibrated network.
    """
    assert checkpoint.progress is not None
    recipe = checkpoint.progress.read_recipe()
    trained_on, _ = load_training_splits(
        data, recipe.task, held_out=recipe.held_out, seed=recipe.seed, fraction=recipe.train_fraction
    )
    epochs = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()][:-1]
    return {
        **accuracy(checkpoint, data, folder),
        "train_top1": evaluate(checkpoint_predictor(checkpoint)[0], trained_on)["top1"],
        "train_loss": [epoch["loss"] for epoch in epochs],
        "held_out_loss": [epoch["NLL"] for epoch in epochs],
    }


def accuracy_without_order(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """Accuracy on test, with the patches of each image in order and in random order."""
    preprocessing = checkpoint.read_preprocessing()
    network = TorchNetwork(served(checkpoint.build(), preprocessing.mean, preprocessing.std), default_device())
    shuffled = ShuffledPatches(network, int(checkpoint.settings["patch_size"]))
    test = load_split(data, Task.CLASSIFICATION, "test")
    return {
        **accuracy(checkpoint, data, folder),
        "shuffled_top1": evaluate(make_predictor(shuffled, preprocessing, checkpoint.labels), test)["top1"],
    }


class ShuffledPatches:
    """A network whose input patches are shuffled, differently for each image."""

    def __init__(self, network: Network, patch_size: int) -> None:
        self.network, self.patch_size = network, patch_size
        self._generator = np.random.default_rng(0)

    def __call__(self, **inputs: NDArray[np.generic]) -> Any:
        return self.network(pixels=shuffle_patches(inputs["pixels"], self.patch_size, self._generator))


def shuffle_patches(pixels: NDArray[np.generic], size: int, generator: np.random.Generator) -> NDArray[np.generic]:
    """Shuffle the patches of `size` x `size` pixels in each image of [n, height, width, 3]."""
    n, height, width, channels = pixels.shape
    rows, columns = height // size, width // size
    patches = pixels.reshape(n, rows, size, columns, size, channels).swapaxes(2, 3)
    patches = patches.reshape(n, rows * columns, size, size, channels)
    order = generator.random((n, rows * columns)).argsort(axis=1)
    patches = np.take_along_axis(patches, order[:, :, None, None, None], axis=1)
    patches = patches.reshape(n, rows, columns, size, size, channels).swapaxes(2, 3)
    return patches.reshape(pixels.shape)


def detection(checkpoint: Checkpoint, data: Path, folder: Path) -> Outcome:
    """Average precision and duplicate boxes on `val`, of DETR's output and after NMS."""
    val = load_split(data, Task.DETECTION, "val")
    predictor, _ = checkpoint_predictor(checkpoint)
    predictions = predict(predictor, val)
    assert isinstance(val, DetectionData)
    assert isinstance(predictions, DetectionPredictions)
    metrics = _measure_detections(predictions, val)
    after_nms = _measure_detections(without_overlaps(predictions, NMS_IOU), val, metrics["threshold"])
    return {**metrics, "after_nms": after_nms}


def _measure_detections(
    predictions: DetectionPredictions, data: DetectionData, threshold: float | None = None
) -> Outcome:
    metrics = measure(predictions, data)
    mistakes = detection_mistakes(predictions, data, 0, threshold)
    return {
        "AP": metrics["AP"],
        "AP50": metrics["AP50"],
        "duplicates": mistakes.false.get("duplicate", 0),
        "right": mistakes.right,
        "missed": mistakes.missed,
        "threshold": mistakes.threshold,
    }


def without_overlaps(predictions: DetectionPredictions, max_iou: float) -> DetectionPredictions:
    """Greedy non-maximum suppression per image and label: drop boxes whose IoU with a better one is above `max_iou`."""
    kept = np.zeros(len(predictions.scores), bool)
    groups: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(-predictions.scores, kind="stable").tolist():
        better = groups.setdefault((int(predictions.image[i]), int(predictions.class_ids[i])), [])
        if not better or iou(predictions.boxes[i : i + 1], predictions.boxes[better]).max() <= max_iou:
            better.append(i)
            kept[i] = True
    columns = {name: getattr(predictions, name)[kept] for name in ("image", "scores", "class_ids", "boxes")}
    return replace(predictions, **columns)


MEASURES: dict[str, Callable[[Checkpoint, Path, Path], Outcome]] = {
    function.__name__: function for function in (held_out, survival, accuracy, gap, accuracy_without_order, detection)
}
