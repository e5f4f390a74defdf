import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrine.models.training.data.dataset import (
    Chosen,
    ClassificationData,
    Data,
    DetectionData,
    Files,
    Names,
    Packed,
    Ragged,
    check_labels,
)
from vitrine.models.training.errors import DataError


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def classification(folder: Path, labels: tuple[str, ...] = ("cat", "dog")) -> ClassificationData:
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png((50 * i, 0, 0)))
    names = Names(f"{folder}/", [f"{i}.png" for i in range(4)])
    return ClassificationData("pets", "train", labels, names, Files(names), np.array([0, 1, 1, 0]))


def detection(folder: Path) -> DetectionData:
    data = classification(folder)
    ids = Ragged.of(np.array([1, 0, 1]), [2, 0, 1, 0])
    boxes = Ragged.of(np.arange(12, dtype=np.float32).reshape(3, 4), [2, 0, 1, 0])
    return DetectionData(data.name, data.split, data.labels, data.names, data.encoded, ids, boxes)


@given(st.lists(st.lists(st.integers(0, 255))))
def test_ragged_round_trip(parts: list[list[int]]) -> None:
    ragged = Ragged.of(np.array([value for part in parts for value in part], np.uint8), list(map(len, parts)))
    assert [part.tolist() for part in ragged] == parts
    assert [list(file) for file in Packed(ragged)] == parts


@given(st.text(), st.lists(st.text()))
def test_names_round_trip(prefix: str, rest: list[str]) -> None:
    names = Names(prefix, rest)
    assert list(names) == [prefix + text for text in rest]
    assert names[1:] == [prefix + text for text in rest[1:]]


def test_a_name_that_is_not_unicode() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert list(Names("/", [name])) == [f"/{name}"]


@pytest.mark.parametrize("index", [4, -5])
def test_indices_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=f"below 4, found {index}"):
        Names("", "abcd")[index]
    assert Names("", "abcd")[-1] == "d"


def test_a_subset_reads_no_image(tmp_path: Path) -> None:
    data = classification(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    subset = data.subset(np.array([2, 0]))
    assert (len(subset), subset.names[0], subset.class_ids.tolist()) == (2, f"{tmp_path}/2.png", [1, 0])
    with pytest.raises(DataError, match=r"2\.png: cannot be read: No such file"):
        subset.image(0)


def test_a_subset_keeps_images_and_boxes_together(tmp_path: Path) -> None:
    subset = detection(tmp_path).subset(np.array([3, 2, 0])).subset(np.array([2, 1]))
    assert [ids.tolist() for ids in subset.class_ids] == [[1, 0], [1]]
    assert [boxes.tolist() for boxes in subset.boxes] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert list(subset.encoded) == [png((0, 0, 0)), png((100, 0, 0))]


@pytest.mark.parametrize("make", [classification, detection])
def test_data_goes_to_other_processes_without_its_images(tmp_path: Path, make: type) -> None:
    data: Data = make(tmp_path).subset(np.array([1, 3]))
    content = pickle.dumps(data)
    assert png((50, 0, 0)) not in content
    assert pickle.loads(content).image(1).getpixel((0, 0)) == (150, 0, 0)


def test_a_million_images_are_a_few_arrays() -> None:
    names = Names("/data/train/", (f"n01440764/n01440764_{i}.JPEG" for i in range(100_000)))
    assert len(pickle.dumps(Chosen(names, np.arange(100_000)))) < 100_000 * 48
    assert names[99_999] == "/data/train/n01440764/n01440764_99999.JPEG"


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    data = classification(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no picture")
    assert data.image(1).size == (6, 4)
    with pytest.raises(DataError, match=r"2\.png: .*JPEG"):
        data.image(2)


def test_labels_of_a_network(tmp_path: Path) -> None:
    data = classification(tmp_path)
    check_labels(data, ["cat", "dog"])
    with pytest.raises(DataError, match=r"expected 3, found 2.*number 2: expected 'cow', found None"):
        check_labels(data, ["cat", "dog", "cow"])
    with pytest.raises(DataError, match=r"number 0: expected 'cow', found 'cat'$"):
        check_labels(data, ["cow", "dog"])


def test_labels_with_synonyms_are_explained(tmp_path: Path) -> None:
    data = replace(classification(tmp_path), labels=("tench", "goldfish"))
    with pytest.raises(DataError, match="--labels imagenet-1k"):
        check_labels(data, ["tench, Tinca tinca", "goldfish, Carassius auratus"])
