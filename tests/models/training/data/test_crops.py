"""Cropping the objects of a detection set."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.crops import write_crops
from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.errors import DataError


@pytest.fixture(scope="module")
def objects(squares: Path) -> DetectionData:
    data = load_split(squares, Task.DETECTION, "train")
    assert isinstance(data, DetectionData)
    return data


def read(folder: Path) -> ClassificationData:
    data = load_split(folder, Task.CLASSIFICATION, "train")
    assert isinstance(data, ClassificationData)
    return data


def test_every_object_becomes_an_image_of_its_label(objects: DetectionData, tmp_path: Path) -> None:
    count = write_crops(objects, tmp_path / "new" / "train.npz", margin=0, smallest=1)
    crops = read(tmp_path / "new")
    assert len(crops) == count == sum(map(len, objects.class_ids))
    assert crops.labels == objects.labels
    assert crops.class_ids.tolist() == np.concatenate(list(objects.class_ids)).tolist()
    boxes = np.concatenate(list(objects.boxes))
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert crops.image(i).size == (right - left, bottom - top)


def test_a_margin_ends_at_the_images_edge(objects: DetectionData, tmp_path: Path) -> None:
    write_crops(objects, tmp_path / "train.npz", margin=10, smallest=1)
    crops, sizes = read(tmp_path), [objects.image(i).size for i in range(len(objects))]
    whole = [size for size, boxes in zip(sizes, objects.boxes, strict=True) for _ in boxes]
    assert [crops.image(i).size for i in range(len(crops))] == whole


def test_small_objects_are_left_out(objects: DetectionData, tmp_path: Path) -> None:
    boxes = np.concatenate(list(objects.boxes))
    edges = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    assert write_crops(objects, tmp_path / "train.npz", margin=0, smallest=20) == (edges >= 20).sum() < len(edges)
    with pytest.raises(DataError, match="squares: expected an object of 500 x 500 pixels or more, found none"):
        write_crops(objects, tmp_path / "none" / "train.npz", margin=0, smallest=500)
    assert not (tmp_path / "none").exists()


def test_crops_are_clipped_to_the_image(objects: DetectionData, tmp_path: Path) -> None:
    image = objects.image(0)
    boxes = np.array([[-5, -5, 20, 30], [image.width - 3, 0, image.width + 40, 50], [500, 500, 600, 600]], np.float32)
    one = objects.subset(np.array([0]))
    outside = replace(one, class_ids=[np.array([2, 0, 1])], boxes=[boxes])
    assert write_crops(outside, tmp_path / "train.npz", margin=0.5, smallest=10) == 1
    assert read(tmp_path).image(0).size == (30, 45)
    assert read(tmp_path).class_ids.tolist() == [2]


def test_a_file_is_not_overwritten(objects: DetectionData, tmp_path: Path) -> None:
    file = tmp_path / "train.npz"
    file.write_bytes(b"precious")
    with pytest.raises(DataError, match=r"train\.npz: is there already; choose another folder"):
        write_crops(objects, file, margin=0, smallest=1)
    assert file.read_bytes() == b"precious"
    with pytest.raises(DataError, match="cannot be written: "):
        write_crops(objects, file / "train.npz", margin=0, smallest=1)
    assert list(tmp_path.iterdir()) == [file]


def test_a_backbone_is_trained_on_objects_before_the_detector(
    squares: Path, tiny_detr: tuple[str, ...], run_vitrine: Callable[..., str], tmp_path: Path
) -> None:
    printed = run_vitrine("data", "crops", squares, "--out", tmp_path / "objects", "--smallest", "8")
    assert printed.splitlines()[-1] == f"{len(read(tmp_path / 'objects'))} objects of 24 images: {tmp_path / 'objects'}"
    backbone = [setting.replace("backbone_", "") for setting in tiny_detr if setting.startswith("model.backbone_")]
    size = ("model.image_size=16", "preprocessing.input_size=[16,16]")
    short = ("epochs=1", "batch_size=8", "warmup_epochs=0")
    run_vitrine(
        *("train", "resnet_imagenette", "--data", tmp_path / "objects", "--out", tmp_path / "backbone"),
        *backbone,
        *size,
        *short,
    )
    run_vitrine(
        *("train", "detr_bccd", "--data", squares, "--from", tmp_path / "backbone", "--out", tmp_path / "run"),
        *(*tiny_detr, "epochs=1"),
    )
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
