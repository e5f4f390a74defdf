import shutil
from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.dataset import ClassificationData
from vitrine.models.training.data.layouts import find_task, has_split, load_split, load_training_splits
from vitrine.models.training.errors import DataError


def test_held_out_part_is_disjoint_and_follows_the_seed(colours: Path) -> None:
    def load(seed: int, held_out: float = 0.1) -> tuple[list[str], list[str]]:
        train, val = load_training_splits(colours, Task.CLASSIFICATION, held_out=held_out, seed=seed)
        return list(train.names), list(val.names)

    train, val = load(0)
    assert (len(train), len(val)) == (108, 12)
    assert sorted(train + val) == list(load_split(colours, Task.CLASSIFICATION, "train").names)
    assert load(0) == (train, val)
    assert load(1) != (train, val)
    assert len(load(0, held_out=0.0001)[1]) == 1


def test_part_of_the_training_images_is_that_part_of_every_class(colours: Path) -> None:
    def load(fraction: float, seed: int = 0) -> tuple[ClassificationData, ClassificationData]:
        train, val = load_training_splits(colours, Task.CLASSIFICATION, held_out=0.1, seed=seed, fraction=fraction)
        assert isinstance(train, ClassificationData)
        assert isinstance(val, ClassificationData)
        return train, val

    whole, held_out = load(1.0)
    counts = np.bincount(whole.class_ids)
    for fraction in (0.001, 0.1, 0.5):
        part, val = load(fraction)
        assert list(val.names) == list(held_out.names)
        assert set(part.names) < set(whole.names)
        assert np.bincount(part.class_ids).tolist() == [max(1, round(fraction * count)) for count in counts]
    assert list(load(0.5)[0].names) == list(load(0.5)[0].names)
    assert set(load(0.1)[0].names) < set(load(0.5)[0].names)
    assert set(load(0.5)[0].names) != set(load(0.5, seed=1)[0].names)


@pytest.mark.parametrize("held_out", [0.999, 1.5])
def test_nothing_left_to_train_on(colours: Path, held_out: float) -> None:
    with pytest.raises(DataError, match=r"expected more images in train than the .* held out, found 120"):
        load_training_splits(colours, Task.CLASSIFICATION, held_out=held_out, seed=0)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_split_val_is_used_where_there_is_one(colours: Path, tmp_path: Path, name: str) -> None:
    assert not has_split(colours, "val")
    (tmp_path / "train").symlink_to(colours / "train")
    (tmp_path / name).symlink_to(colours / "test")
    assert has_split(tmp_path, "val")
    train, val = load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=None, seed=0)
    assert (len(train), len(val), val.split) == (120, 36, "val")
    train, val = load_training_splits(tmp_path, Task.CLASSIFICATION, held_out=0.1, seed=0)  # `val` is kept for the end
    assert (len(train), len(val), val.split) == (108, 12, "train")


def test_splits_of_another_task_are_not_found(squares: Path, tmp_path: Path) -> None:
    for name in ("train.json", "images"):
        (tmp_path / name).symlink_to(squares / name)
    (tmp_path / "val" / "unlabelled").mkdir(parents=True)
    assert (find_task(tmp_path, "train"), find_task(tmp_path, "val")) == (Task.DETECTION, Task.CLASSIFICATION)
    assert find_task(tmp_path, "test") is None
    assert has_split(tmp_path, "val")
    assert not has_split(tmp_path, "val", Task.DETECTION)
    train, val = load_training_splits(tmp_path, Task.DETECTION, held_out=0.25, seed=0)
    assert (len(train), len(val)) == (18, 6)


def test_train_and_val_of_different_labels(tmp_path: Path) -> None:
    for split, label in (("train", "cat"), ("val", "dog")):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / f"{split}2017" / "a.jpg").touch()
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(
            f'{{"images": [{{"id": 1, "file_name": "a.jpg"}}], "annotations": [], '
            f'"categories": [{{"id": 1, "name": "{label}"}}]}}'
        )
    with pytest.raises(DataError, match=r"labels of train are \('cat',\), those of val \('dog',\)"):
        load_training_splits(tmp_path, Task.DETECTION, held_out=None, seed=0)


@pytest.mark.parametrize("task", list(Task))
def test_nothing_there(tmp_path: Path, task: Task) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_split(tmp_path / "nowhere", task, "train")
    with pytest.raises(DataError, match=r"expected train.*found an empty folder"):
        load_split(tmp_path, task, "train")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(DataError, match=r"found readme\.txt"):
        load_split(tmp_path, task, "train")


def test_images_of_a_split_are_read_by_index(colours: Path) -> None:
    data = load_split(colours, Task.CLASSIFICATION, "test")
    assert isinstance(data, ClassificationData)
    assert data.labels == ("blue", "green", "red")
    reds = np.asarray(data.image(-1), float).mean(axis=(0, 1))
    assert reds.argmax() == 0


def test_folders_without_splits_are_training_images(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours / "train", tmp_path / "mine")
    (tmp_path / "mine" / ".hidden").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    data = load_split(tmp_path / "mine", Task.CLASSIFICATION, "train")
    assert data.labels == ("blue", "green", "red")
    assert len(data) == 120
    assert not has_split(tmp_path / "mine", "val")
    train, val = load_training_splits(tmp_path / "mine", Task.CLASSIFICATION, held_out=None, seed=0)
    assert (len(train), len(val)) == (96, 24)  # a fifth
    assert not set(train.names) & set(val.names)


@pytest.mark.parametrize("extra", ["test", "images", "empty"])
def test_folders_that_are_no_labels(extra: str, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours / "train", tmp_path / "mine")
    (tmp_path / "mine" / extra).mkdir()
    assert not has_split(tmp_path / "mine", "train")
