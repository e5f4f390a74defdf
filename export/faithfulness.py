"""Faithfulness of explanations: whether an answer depends on what a heat map marks.

Deletion and insertion curves (Petsiuk et al. 2018, "RISE: Randomized Input Sampling for Explanation of Black-box
Models", sec. 4.2): the hottest pixels of the network's input are hidden under the mean colour of the data, or shown on
a blurred copy, a fifth more in each step, and the score of the answer is followed. The area under the first curve is
small if the map is faithful, that under the second large. Baselines are maps that have not seen the network: random
cells, and a blob in the middle; for a detection also one in the middle of its box.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vitrine.bundle.explaining import (
    Explainer,
    HeatMap,
    Method,
    Question,
    default_question,
    likeness,
    methods_of,
)
from vitrine.bundle.loading import load_bundle, load_explain_network, read_manifest
from vitrine.bundle.machine import available_cores
from vitrine.bundle.manifest import BASELINES, FaithfulMap, Faithfulness, Manifest, Precision
from vitrine.bundle.predictors import Box, Classifier, Detection, Predictor, PreparedImage
from vitrine.export.errors import ExportError
from vitrine.export.model_card import BOX, write_manifest
from vitrine.models.training.data.layouts import has_split, load_split

STEPS = 5
RANDOM, CENTRE = BASELINES
_CELLS = 8  # of a random map, along each edge
_BLUR = 1 / 16  # standard deviation, of the longer edge

Pixels = NDArray[np.uint8]
Curves = dict[str, tuple[float, float]]  # by map: areas under the deletion and the insertion curve


def measure_faithfulness(
    path: Path, data_path: Path, *, images: int = 200, progress: Callable[[], object] = lambda: None
) -> Faithfulness:
    """Measure a bundle's methods on evenly spaced images of the data's split `test`, or `val` without it.

    The answer is the best class, or the best detection; images without a detection of 50 % are passed over.

    Args:
        progress: called after each image.

    Raises:
        BundleError, DataError: the bundle or the data cannot be read.
        ExportError: nothing is detected in any image.
    """
    bundle = load_bundle(path, variant=Precision.FP32, threads=available_cores())
    data = load_split(data_path, bundle.manifest.task, "test" if has_split(data_path, "test") else "val")
    network = load_explain_network(path, threads=available_cores())
    explainer = Explainer(bundle.manifest, bundle.predictor, network)
    random = np.random.default_rng(0)
    measured: list[Curves] = []
    for index in np.linspace(0, len(data) - 1, min(images, len(data))).round().astype(int):
        curves = _measure_image(explainer, cast(Manifest, bundle.manifest), data.image(int(index)), random)
        measured += [] if curves is None else [curves]
        progress()
    if not measured:
        raise ExportError(f"{data.name}: nothing is detected in any image: faithfulness is that of an answer")
    means = {name: np.mean([curves[name] for curves in measured], axis=0) for name in measured[0]}
    maps = tuple(
        FaithfulMap(name=name, deletion=float(low), insertion=float(high)) for name, (low, high) in means.items()
    )
    return Faithfulness(data=data.name, split=data.split, images=len(measured), maps=maps)


def write_faithfulness(path: Path, faithfulness: Faithfulness) -> Manifest:
    """Write the figures to a bundle's manifest, which decides by them which method is its default, and to its card."""
    manifest = read_manifest(path)
    if manifest.explanation is None:
        raise ExportError(f"{path}: explanation: expected one in the manifest, found none")
    explanation = manifest.explanation.model_copy(update={"faithfulness": faithfulness})
    manifest = manifest.model_copy(update={"explanation": explanation})
    write_manifest(path, manifest)
    return manifest


def _measure_image(explainer: Explainer, manifest: Manifest, image: Any, random: np.random.Generator) -> Curves | None:
    predictor = explainer.predictor
    network: Any = predictor  # its inputs are those of its task
    prepared: Any = predictor.prepare(image)
    pixels: Pixels = prepared.pixels if isinstance(prepared, PreparedImage) else prepared
    (row,) = predictor.infer([prepared])
    found = Question(Method.OCCLUSION, max_targets=1).targets(predictor, prepared, row)
    if not found:
        return None
    index, target = found[0]
    if isinstance(target, Detection):
        corners = row[2][index]

        def scores(batch: list[Pixels]) -> list[float]:
            rows = network.infer([PreparedImage(copy, image.width, image.height) for copy in batch])
            return [likeness(outputs, target.class_id, corners) for outputs in rows]
    else:

        def scores(batch: list[Pixels]) -> list[float]:
            return [float(outputs[0][index]) for outputs in network.infer(batch)]

    height, width = pixels.shape[:2]
    maps = {RANDOM: _resized(random.random((_CELLS, _CELLS), np.float32), width, height), CENTRE: _blob(pixels)}
    if isinstance(target, Detection):
        x, y = width / image.width, height / image.height
        box = target.box
        maps[BOX] = _blob(pixels, Box(box.x_min * x, box.y_min * y, box.x_max * x, box.y_max * y))
    for method in methods_of(manifest):
        if method is not Method.ENCODER_ATTENTION:  # of a point, not of an answer
            question = default_question(manifest, method=method, max_targets=1)
            (explained,) = explainer.explain(image, question)
            maps[method] = spread(explained.heatmap, predictor, (image.width, image.height), (width, height))
    return areas(maps, pixels, predictor, scores)


def areas(
    maps: dict[str, NDArray[np.float32]],
    pixels: Pixels,
    predictor: Predictor,
    scores: Callable[[list[Pixels]], list[float]],
) -> Curves:
    """Return the areas under the deletion and the insertion curve of each map [h, w] of an input [h, w, 3]."""
    hidden = np.broadcast_to(np.round(255 * np.array(predictor.preprocessing.mean)).astype(np.uint8), pixels.shape)
    radius = max(pixels.shape[:2]) * _BLUR
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    whole, all_hidden, all_blurred = scores([pixels, hidden.copy(), blurred])
    curves = {}
    for name, heat in maps.items():
        shown = list(_hottest(heat))
        deleted = scores([np.where(hot[..., None], hidden, pixels) for hot in shown])
        inserted = scores([np.where(hot[..., None], pixels, blurred) for hot in shown])
        deletion, insertion = [whole, *deleted, all_hidden], [all_blurred, *inserted, whole]
        curves[name] = float(np.trapezoid(deletion)) / STEPS, float(np.trapezoid(insertion)) / STEPS
    return curves


def _hottest(heat: NDArray[np.float32]) -> Iterator[NDArray[np.bool_]]:
    """Yield masks of a fifth, two fifths, ... of the pixels, the hottest first."""
    ranks = np.empty(heat.size, np.int64)
    ranks[np.argsort(-heat, axis=None, kind="stable")] = np.arange(heat.size)
    for step in range(1, STEPS):
        yield (ranks < heat.size * step / STEPS).reshape(heat.shape)


def spread(
    heatmap: HeatMap, predictor: Predictor, size: tuple[int, int], input_size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return a map in pixels of the network's input, [h, w]. Sizes are the width and height of image and input."""
    (width, height), box = input_size, heatmap.box
    if isinstance(predictor, Classifier):
        return _resized(heatmap.values, width, height)  # its map has the place of the input
    right, bottom = round(box.x_max * width / size[0]), round(box.y_max * height / size[1])
    return _resized(heatmap.values, max(width, right), max(height, bottom))[:height, :width]


def _resized(values: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def _blob(pixels: Pixels, box: Box | None = None) -> NDArray[np.float32]:
    """Return a Gaussian in the middle of a box, by default of the whole input, as wide and as high as it."""
    height, width = pixels.shape[:2]
    box = box or Box(0, 0, width, height)
    x = (np.arange(width) + 0.5 - (box.x_min + box.x_max) / 2) / max(1.0, box.x_max - box.x_min)
    y = (np.arange(height) + 0.5 - (box.y_min + box.y_max) / 2) / max(1.0, box.y_max - box.y_min)
    return np.exp(-(x[None] ** 2 + y[:, None] ** 2)).astype(np.float32)
