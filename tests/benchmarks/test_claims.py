"""The measurements behind `docs/claims.md`."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.claims.cost import cost
from benchmarks.claims.measure import NMS_IOU, run, shuffle_patches, without_overlaps
from benchmarks.claims.report import CLAIMS, DOCS, interval, read_results
from benchmarks.claims.trials import Trial, trials
from vitrine.bundle.manifest import Task
from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.evaluation.metrics import DetectionPredictions
from vitrine.models.training.evaluation.mistakes import iou
from vitrine.models.training.registry import load_recipe

pytestmark = pytest.mark.slow


def test_every_trial_has_a_unique_name_and_a_recipe() -> None:
    everything = trials()
    assert len({trial.name for trial in everything}) == len(everything)
    for trial in everything:
        load_recipe(trial.recipe, trial.settings)


def test_the_page_has_a_table_and_a_plot_for_every_claim() -> None:
    page = (DOCS / "claims.md").read_text()
    assert {trial.claim for trial in trials()} <= set(CLAIMS)
    for claim, (draw, _) in CLAIMS.items():
        assert page.count(f"<!-- {claim} -->\n") == 1
        if draw is not None:
            assert (DOCS / "claims" / f"{claim}.svg").is_file()
            assert f"(claims/{claim}.svg)" in page


def test_every_trial_has_a_result() -> None:
    assert set(read_results()) == set(trials())


def test_a_classifier_is_trained_and_measured(colours: Path, tiny_vit: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*tiny_vit, "model.stem=patch", "model.pos_embed=none")
    for measure, metrics in (
        ("held_out", {"top1"}),
        ("survival", {"top1", "diverged"}),
        ("gap", {"top1", "train_top1", "train_loss", "held_out_loss"}),
        ("accuracy_without_order", {"top1", "shuffled_top1"}),
    ):
        trial = Trial("tiny", measure, (("seed", 1),), "vit_cifar10", colours.name, settings)
        outcome = run(trial, colours.parent, tmp_path)
        assert outcome is not None
        assert set(outcome) == metrics | {"parameters", "training_seconds"}
    assert outcome["shuffled_top1"] == outcome["top1"] > 0.9  # without positions the order does not matter


def test_divergence_is_an_outcome(colours: Path, tiny_vit: tuple[str, ...], tmp_path: Path) -> None:
    trial = Trial("tiny", "survival", (), "vit_cifar10", colours.name, (*tiny_vit, "lr=1e30", "clip_grad=1e9"))
    outcome = run(trial, colours.parent, tmp_path)
    assert outcome is not None
    assert outcome["diverged"]


def test_a_detector_is_trained_and_measured(squares: Path, tiny_detr: tuple[str, ...], tmp_path: Path) -> None:
    trial = Trial("tiny", "detection", (), "detr_bccd", squares.name, tiny_detr)
    outcome = run(trial, squares.parent, tmp_path)
    assert outcome is not None
    assert outcome["after_nms"]["duplicates"] <= outcome["duplicates"]
    assert outcome["right"] + outcome["missed"] == sum(map(len, _objects(squares)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32))
def test_shuffling_moves_whole_patches(rows: int, columns: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (3, rows * size, columns * size, 3), np.uint8)
    shuffled = shuffle_patches(images, size, random)
    assert shuffled.shape == images.shape
    for before, after in zip(images, shuffled, strict=True):
        assert _patches(before, size) == _patches(after, size)


def test_each_image_is_shuffled_differently() -> None:
    image = np.arange(16 * 16, dtype=np.uint8).reshape(1, 16, 16, 1)
    first, second = shuffle_patches(np.concatenate([image, image]), 4, np.random.default_rng(0))
    assert not np.array_equal(first, second)


@given(st.integers(0, 2**32), st.integers(0, 12))
def test_after_suppression_no_box_overlaps_a_better_one(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 10, (count, 2)).astype(np.float32)
    found = DetectionPredictions(
        indices=np.arange(2),
        image=random.integers(0, 2, count),
        scores=random.random(count, np.float32),
        class_ids=random.integers(0, 2, count),
        boxes=np.concatenate([corners, corners + random.uniform(3, 10, (count, 2)).astype(np.float32)], axis=1),
        seconds=0.0,
    )
    left = without_overlaps(found, NMS_IOU)
    kept = np.isin(found.scores, left.scores)
    for i in range(count):
        rivals = (found.image == found.image[i]) & (found.class_ids == found.class_ids[i]) & kept
        rivals &= found.scores > found.scores[i]
        covered = bool(rivals.any()) and iou(found.boxes[i : i + 1], found.boxes[rivals]).max() > NMS_IOU
        assert kept[i] != covered


def test_intervals_are_over_seeds_or_images() -> None:
    assert interval([0.5, 0.6, 0.7]) == pytest.approx((0.6, 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    assert interval([0.8], images=1600) == pytest.approx((0.8, 0.0196))


def test_cost_by_image_size() -> None:
    vit = [cost("claim_vit", size, pos_embed="sine_2d") for size in (32, 64)]
    mixer = [cost("claim_mixer", size) for size in (32, 64)]
    assert vit[0].parameters == vit[1].parameters
    assert mixer[1].parameters - mixer[0].parameters == 5 * (256 - 64) * (2 * 64 + 1)  # of the token mixing alone
    beside_matrices = [  # layers, heads, bytes
        found.saved - found.saved_fused - 4 * 2 * 4 * tokens**2 for found, tokens in zip(vit, (64, 256), strict=True)
    ]
    assert beside_matrices[1] == 4 * beside_matrices[0]  # all else that fused attention saves is linear in the tokens


def _patches(image: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", size: int) -> list[bytes]:
    height, width, _ = image.shape
    starts = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
    return sorted(image[y : y + size, x : x + size].tobytes() for y, x in starts)


def _objects(squares: Path) -> list[list[int]]:
    val = load_split(squares, Task.DETECTION, "val")
    assert isinstance(val, DetectionData)
    return [ids.tolist() for ids in val.class_ids]
