import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle.images import decode
from bundle.manifest import Task
from models.training.data import ClassificationData, DetectionData, has_split, load_split, load_training_splits
from models.training.errors import DataError


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = [(10 * i, 0, 0) for i in range(6)]
FILES = [png(colour) for colour in COLOURS]


def archive(**changes: object) -> bytes:
    """A packed split of six images in two classes."""
    arrays: dict[str, Any] = {
        "jpeg": np.frombuffer(b"".join(FILES), np.uint8),
        "offsets": np.cumsum([0, *map(len, FILES)]),
        "labels": np.array([0, 1, 0, 1, 0, 1], np.uint8),
        "classes": np.array(["cat", "dog"]),
        **changes,
    }
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in arrays.items() if value is not None})
    return buffer.getvalue()


COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}, {"id": 9, "file_name": "c.png"}],
    "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"image_id": 7, "category_id": 90, "bbox": [1, 1, 2, 3]},
        {"image_id": 7, "category_id": 5, "bbox": [0, 0, 6, 4]},
        {"image_id": 3, "category_id": 5, "bbox": [2.5, 1, 1, 1], "iscrowd": 0},
        {"image_id": 3, "category_id": 5, "bbox": [0, 0, 6, 4], "iscrowd": 1},
        {"image_id": 3, "category_id": 90, "bbox": [0, 0, 0, 4]},
    ],
}


def coco(path: Path, split: str = "train", content: str | None = None) -> None:
    (path / "images").mkdir(exist_ok=True)
    for name, file in zip("abc", FILES, strict=False):
        (path / "images" / f"{name}.png").write_bytes(file)
    (path / f"{split}.json").write_text(json.dumps(COCO) if content is None else content)


def test_packed(tmp_path: Path) -> None:
    (tmp_path / "train.npz").write_bytes(archive())
    data = load_split(tmp_path, Task.CLASSIFICATION, "train")
    assert isinstance(data, ClassificationData)
    assert (data.name, data.split, data.labels) == (tmp_path.name, "train", ("cat", "dog"))
    assert data.class_ids.tolist() == [0, 1, 0, 1, 0, 1]
    assert [data.encoded[i] for i in range(len(data))] == FILES
    assert data.encoded[1:3] == FILES[1:3]
    assert data.class_ids.dtype == np.int64


def test_folders(tmp_path: Path) -> None:
    for label, name, file in (("dog", "x.PNG", 0), ("cat", "sub/y.png", 1), ("cat", "a.png", 2)):
        path = tmp_path / "train" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[file])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_split(tmp_path, Task.CLASSIFICATION, "train")
    assert isinstance(data, ClassificationData)
    assert data.labels == ("cat", "dog")
    assert data.class_ids.tolist() == [0, 0, 1]
    assert data.encoded[:] == [FILES[2], FILES[1], FILES[0]]


def test_coco_with_holes_in_its_category_ids(tmp_path: Path) -> None:
    coco(tmp_path)
    data = load_split(tmp_path, Task.DETECTION, "train")
    assert isinstance(data, DetectionData)
    assert data.labels == ("cat", "dog")
    assert [ids.tolist() for ids in data.class_ids] == [[1, 0], [0], []]
    assert data.boxes[0].tolist() == [[1, 1, 3, 4], [0, 0, 6, 4]]
    assert data.boxes[1].tolist() == [[2.5, 1, 3.5, 2]]  # neither the crowd nor the empty box
    assert data.boxes[2].shape == (0, 4)
    assert data.encoded[0] == FILES[1]


@pytest.mark.parametrize("task", list(Task))
def test_subset_keeps_images_and_truth_together(tmp_path: Path, task: Task) -> None:
    (tmp_path / "train.npz").write_bytes(archive())
    coco(tmp_path)
    data = load_split(tmp_path, task, "train")
    subset = data.subset(np.array([2, 0]))
    assert list(subset.encoded) == [data.encoded[2], data.encoded[0]]
    assert [np.asarray(ids).tolist() for ids in subset.class_ids] == [
        np.asarray(data.class_ids[i]).tolist() for i in (2, 0)
    ]


def test_held_out_part_is_disjoint_and_follows_the_seed(tmp_path: Path) -> None:
    (tmp_path / "train.npz").write_bytes(archive())
    train, val = load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.34, seed=0)
    assert (len(train), len(val)) == (4, 2)
    assert sorted(map(decode_red, [*train.encoded, *val.encoded])) == [red for red, _, _ in COLOURS]
    again, _ = load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.34, seed=0)
    assert list(again.encoded) == list(train.encoded)
    orders = {
        tuple(load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.34, seed=seed)[0].encoded)
        for seed in range(5)
    }
    assert len(orders) > 1


def decode_red(data: bytes) -> int:
    return int(np.asarray(decode(data))[0, 0, 0])


def test_split_val_is_used_where_there_is_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.npz").write_bytes(archive())
    assert has_split(tmp_path, "val")
    assert not has_split(tmp_path, "test")
    train, val = load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.5, seed=0)
    assert (len(train), len(val), val.split) == (6, 6, "val")


def test_val_with_other_labels(tmp_path: Path) -> None:
    (tmp_path / "train.npz").write_bytes(archive())
    (tmp_path / "val.npz").write_bytes(archive(classes=np.array(["dog", "cat"])))
    with pytest.raises(DataError, match=r"labels of train are \('cat', 'dog'\), those of val \('dog', 'cat'\)"):
        load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.5, seed=0)


@pytest.mark.parametrize("held_out", [0.9, 0.99])
def test_nothing_left_to_train_on(tmp_path: Path, held_out: float) -> None:
    (tmp_path / "train.npz").write_bytes(archive(labels=np.zeros(1, np.uint8), offsets=np.array([0, len(FILES[0])])))
    with pytest.raises(DataError, match="train"):
        load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=held_out, seed=0)


@pytest.mark.parametrize("task", list(Task))
def test_nothing_there(tmp_path: Path, task: Task) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_split(tmp_path / "nowhere", task, "train")
    with pytest.raises(DataError, match=r"expected train.*found an empty folder"):
        load_split(tmp_path, task, "train")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(DataError, match=r"found readme\.txt"):
        load_split(tmp_path, task, "train")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="text"),
        pytest.param(b"PK\x03\x04garbage", id="no archive"),
        pytest.param(archive()[:500], id="truncated"),
        pytest.param(archive()[:200] + b"\xff" * 50 + archive()[250:], id="corrupt"),
        pytest.param(archive(classes=None), id="array missing"),
        pytest.param(archive(jpeg=np.array([object()])), id="pickled object"),
        pytest.param(archive(labels=np.array([0, 1], np.uint8)), id="too few labels"),
        pytest.param(archive(labels=np.array([0, 1, 2, 0, 1, 0], np.uint8)), id="label too high"),
        pytest.param(archive(labels=np.array([0, 1, -1, 0, 1, 0])), id="label below zero"),
        pytest.param(archive(labels=np.zeros(0, np.uint8), offsets=np.array([0])), id="no images"),
        pytest.param(archive(offsets=np.cumsum([0, *map(len, FILES)]) * 2), id="offsets past the end"),
    ],
)
def test_broken_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npz: expected"):
        load_split(tmp_path, Task.CLASSIFICATION, "train")


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="expected <label>/<image>, found no JPEG"):
        load_split(tmp_path, Task.CLASSIFICATION, "train")


def remove_category(document: dict[str, Any]) -> None:
    document["categories"].pop()


def remove_image(document: dict[str, Any]) -> None:
    document["images"].pop(0)


def shorten_box(document: dict[str, Any]) -> None:
    document["annotations"][0]["bbox"] = [1, 2, 3]


def remove_annotations(document: dict[str, Any]) -> None:
    del document["annotations"]


@pytest.mark.parametrize("change", [remove_category, remove_image, shorten_box, remove_annotations])
def test_coco_that_contradicts_itself(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(COCO)
    change(document)
    coco(tmp_path, content=json.dumps(document))
    with pytest.raises(DataError, match=r"train\.json: not in COCO's format: (Key|Value)Error"):
        load_split(tmp_path, Task.DETECTION, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}"])
def test_no_coco_at_all(tmp_path: Path, content: str) -> None:
    coco(tmp_path, content=content)
    with pytest.raises(DataError, match="not in COCO's format"):
        load_split(tmp_path, Task.DETECTION, "train")


def test_coco_images_that_are_missing(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not in images/: \['a.png'\]"):
        load_split(tmp_path, Task.DETECTION, "train")


def folders(path: Path, *names: str) -> ClassificationData:
    for name in names:
        (path / "val" / name).mkdir(parents=True)
        (path / "val" / name / "a.png").write_bytes(FILES[0])
    data = load_split(path, Task.CLASSIFICATION, "val")
    assert isinstance(data, ClassificationData)
    return data


def test_folders_named_by_imagenets_ids_get_its_labels(tmp_path: Path) -> None:
    assert folders(tmp_path, "n01440764", "n02123045", "n15075141").labels == ("tench", "tabby", "toilet tissue")


def test_other_folders_keep_their_names(tmp_path: Path) -> None:
    assert folders(tmp_path, "n01440764", "tabby").labels == ("n01440764", "tabby")
