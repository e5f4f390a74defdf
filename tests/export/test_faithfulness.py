"""Deletion and insertion curves, and what follows from them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitrine.bundle.explaining import HeatMap, Method, methods_of
from vitrine.bundle.loading import load_bundle, load_explain_network, read_manifest
from vitrine.bundle.manifest import (
    ClassificationPreprocessing,
    DetectionPreprocessing,
    FaithfulMap,
    Faithfulness,
)
from vitrine.bundle.predictors import Box, Classifier, Detector
from vitrine.export.errors import ExportError
from vitrine.export.faithfulness import areas, measure_faithfulness, spread
from vitrine.export.model_card import model_card

HALF = (0.5, 0.5, 0.5)
PIXELS = ClassificationPreprocessing(input_size=(16, 24), mean=HALF, std=HALF)
BOXES = DetectionPreprocessing(shortest_edge=32, longest_edge=64, mean=HALF, std=HALF)


def corner(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
    """A network whose second probability is the brightness of the lower right corner, a sixth of the pixels."""
    bright = inputs["pixels"][:, 8:, 16:].mean(axis=(1, 2, 3)) / 255
    return [np.stack((1 - bright, bright), axis=1).astype(np.float32)]


def marking(place: tuple[slice, slice]) -> NDArray[np.float32]:
    heat = np.zeros((16, 24), np.float32)
    heat[place] = 1
    return heat


def test_the_areas_of_maps_that_mark_the_evidence_and_its_opposite() -> None:
    predictor = Classifier(corner, PIXELS, ("dark", "bright"))
    pixels = np.full((16, 24, 3), 255, np.uint8)
    maps = {
        "evidence": marking((slice(8, None), slice(16, None))),
        "opposite": -marking((slice(8, None), slice(16, None))),
    }
    found = areas(maps, pixels, predictor, lambda batch: [float(row[0][1]) for row in predictor.infer(batch)])
    grey = 128 / 255  # the mean colour, that hides
    # A white image is white when it is blurred: every inserted copy has the whole score.
    assert found["evidence"] == pytest.approx(((0.5 + 4.5 * grey) / 5, 1.0))
    assert found["opposite"] == pytest.approx(((4.5 + 0.5 * grey) / 5, 1.0))
    pixels[:8] = pixels[:, :16] = 0  # now the corner alone is bright: blurred, it is darker
    found = areas(maps, pixels, predictor, lambda batch: [float(row[0][1]) for row in predictor.infer(batch)])
    assert found["evidence"][1] > found["opposite"][1] + 0.1


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    width=st.integers(16, 200),
    height=st.integers(16, 200),
    seed=st.integers(0, 9),
)
def test_a_map_is_spread_over_the_input_that_it_covers(
    rows: int, columns: int, width: int, height: int, seed: int
) -> None:
    values = np.random.default_rng(seed).random((rows, columns), np.float32)
    detector = Detector(corner, BOXES, ("dark", "bright"))
    exact = spread(
        HeatMap(values, Box(0, 0, 2 * width, 2 * height)), detector, (2 * width, 2 * height), (width, height)
    )
    assert exact.shape == (height, width)
    # A map that reaches beyond the image is cut: its left half covers all of it.
    cut = spread(HeatMap(values, Box(0, 0, 4 * width, 2 * height)), detector, (2 * width, 2 * height), (width, height))
    assert cut.shape == (height, width)
    wide = spread(HeatMap(values, Box(0, 0, width, height)), detector, (width, height), (2 * width, height))
    np.testing.assert_allclose(cut, wide[:, :width], atol=1e-6)
    classifier = Classifier(corner, PIXELS, ("dark", "bright"))
    assert spread(HeatMap(values, Box(3, 4, 9, 9)), classifier, (20, 20), (24, 16)).shape == (16, 24)


def test_a_method_that_is_no_better_than_a_baseline_is_not_the_default(tiny_bundles: Path) -> None:
    def order(name: str, **gains: float) -> tuple[str, ...]:
        manifest = read_manifest(tiny_bundles / name / "1")
        maps = [FaithfulMap(name=key.replace("_", "-"), deletion=0.1, insertion=0.1 + gains[key]) for key in gains]
        faithfulness = Faithfulness(data="d", split="test", images=1, maps=tuple(maps))
        assert manifest.explanation is not None
        explanation = manifest.explanation.model_copy(update={"faithfulness": faithfulness})
        return methods_of(manifest.model_copy(update={"explanation": explanation}))

    vit = {"attention_rollout": 0.3, "class_attention": 0.4, "occlusion": 0.5}
    assert order("colours", **vit, random=0.0, centre=0.2) == ("attention-rollout", "class-attention", "occlusion")
    assert order("colours", **vit, random=0.0, centre=0.3) == ("class-attention", "occlusion", "attention-rollout")
    assert order("colours", **vit, random=0.6, centre=0.0) == ("attention-rollout", "class-attention", "occlusion")
    detr = {"cross_attention": 0.1, "occlusion": 0.5}
    # The middle of the box is shown for comparison: the answer itself has told where that is.
    assert order("squares", **detr, random=0, centre=0.2, box=0.9)[0] == "occlusion"
    assert order("squares", **detr, random=0, centre=0.2)[-1] == "encoder-attention"


def test_the_figures_are_in_the_manifest_and_the_card(
    tiny_bundles: Path, colours: Path, run_vitrine: Callable[..., str], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundles / "colours", tmp_path / "colours")) / "1"
    printed = run_vitrine("faithfulness", bundle, "--data", colours, "--images", 6)
    manifest = read_manifest(bundle)
    assert manifest.explanation is not None
    measured = manifest.explanation.faithfulness
    assert measured is not None
    assert (measured.data, measured.split, measured.images) == ("colours", "test", 6)
    names = [entry.name for entry in measured.maps]
    assert names == ["random", "centre", "attention-rollout", "class-attention", "occlusion"]
    assert all(0 <= value <= 1 for entry in measured.maps for value in (entry.deletion, entry.insertion))
    assert f"the default method is {methods_of(manifest)[0]}" in printed
    assert methods_of(manifest)[0] not in measured.unfaithful or set(Method) & set(names) <= set(measured.unfaithful)
    card = (bundle / "README.md").read_text()
    assert card == model_card(manifest)
    for entry in measured.maps:
        assert f"| {entry.name} | {entry.deletion:.3f} | {entry.insertion:.3f} | {entry.gain:.3f} |" in card
    assert load_explain_network(bundle) is not None  # nothing else has changed
    assert load_bundle(bundle).manifest == manifest


def test_a_detection_is_followed_too(root: Path, tmp_path: Path) -> None:
    """With a shipped detector and a real photograph; the figures of all are in the cards."""
    (tmp_path / "images").mkdir()
    shutil.copy(root / "examples" / "blood.jpg", tmp_path / "images" / "blood.jpg")
    bundle = root / "bundles" / "detr-bccd" / "1"
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    categories = [{"id": i + 1, "name": label} for i, label in enumerate(read_manifest(bundle).labels)]
    images = [{"id": 1, "file_name": "blood.jpg", "width": 640, "height": 480}]
    for split in ("train", "val"):
        document = {"images": images, "annotations": [box], "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
    measured = measure_faithfulness(bundle, tmp_path)
    assert (measured.split, measured.images) == ("val", 1)
    gains = {entry.name: entry.gain for entry in measured.maps}
    assert list(gains) == ["random", "centre", "box", *methods_of(read_manifest(bundle))[:2]]
    assert gains["occlusion"] > gains["random"]


def test_without_a_detection_there_is_no_answer_to_explain(tiny_bundles: Path, squares: Path) -> None:
    with pytest.raises(ExportError, match=r"^squares: nothing is detected in any image"):
        measure_faithfulness(tiny_bundles / "squares" / "1", squares, images=3)
