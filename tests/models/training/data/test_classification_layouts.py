import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.classification_layouts import read, sort_labels
from vitrine.models.training.data.dataset import ClassificationData
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.errors import DataError


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [png((10 * i, 0, 0)) for i in range(6)]


def archive(**changes: object) -> bytes:
    """A packed split of six images of two classes."""
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


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load(path: Path, split: str = "train") -> ClassificationData:
    data = load_split(path, Task.CLASSIFICATION, split)
    assert isinstance(data, ClassificationData)
    return data


def truth(data: ClassificationData) -> list[tuple[str, str]]:
    """Name and label of each image."""
    return [(Path(name).name, data.labels[i]) for name, i in zip(data.names, data.class_ids, strict=True)]


def test_packed(tmp_path: Path) -> None:
    write(tmp_path / "train.npz", archive())
    data = load(tmp_path)
    assert (data.name, data.split, data.labels) == (tmp_path.name, "train", ("cat", "dog"))
    assert data.class_ids.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.class_ids.dtype == np.int64
    assert list(data.encoded) == FILES
    assert data.encoded[1:3] == FILES[1:3]
    assert data.names[3] == f"{tmp_path}/train.npz[3]"


def test_folders(tmp_path: Path) -> None:
    for label, name, file in (("dog", "x.PNG", 0), ("cat", "sub/y.png", 1), ("cat", "a.png", 2)):
        write(tmp_path / "train" / label / name, FILES[file])
    for stray in ("cat/notes.txt", "cat/.hidden/a.png", "cat/._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
        write(tmp_path / "train" / stray, "not an image of the data set")
    data = load(tmp_path)
    assert truth(data) == [("a.png", "cat"), ("y.png", "cat"), ("x.PNG", "dog")]
    assert list(data.encoded) == [FILES[2], FILES[1], FILES[0]]


LISTS = {
    "csv": ("train.csv", "image,label\nimages/a.png,dog\nimages/b.png,cat\n"),
    "other names and columns": ("train.csv", "id,Label,Filename\n1,dog,images/a.png\n\n2,cat,images/b.png\n"),
    "semicolons": ("train.csv", "path;class\nimages/a.png;dog\nimages/b.png; cat \n"),
    "tabs, from Windows": ("train.csv", "\ufefffile_name\tcategory\r\nimages/a.png\tdog\r\nimages/b.png\tcat\r\n"),
    "jsonl": (
        "train.jsonl",
        '{"image": "images/a.png", "label": "dog"}\n\n{"label": "cat", "image": "images/b.png", "x": 1}',
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path: Path, name: str) -> None:
    write(tmp_path / "images" / "a.png", FILES[0])
    write(tmp_path / "images" / "b.png", FILES[1])
    write(tmp_path / LISTS[name][0], LISTS[name][1])
    data = load(tmp_path)
    assert data.labels == ("cat", "dog")
    assert truth(data) == [("a.png", "dog"), ("b.png", "cat")]
    assert list(data.encoded) == FILES[:2]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_lists_are_the_same_in_every_notation(labels: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with (path / "train.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "label"), *((f"{i}.png", label) for i, label in enumerate(labels))])
        (path / "test.jsonl").write_text(
            "".join(json.dumps({"image": f"{i}.png", "label": label}) + "\n" for i, label in enumerate(labels))
        )
        (path / "0.png").write_bytes(FILES[0])
        sources = (path / "train.csv", path / "test.jsonl")
        first, second = (read(path, source, "train", None) for source in sources)
        assert not first.problems
        assert truth(first.data) == truth(second.data) == [(f"{i}.png", label) for i, label in enumerate(labels)]


def test_labels_are_those_of_train(tmp_path: Path) -> None:
    for name in ("train/bird", "train/cat", "train/dog", "val/dog", "val/cat"):
        write(tmp_path / name / "a.png", FILES[0])
    write(tmp_path / "test.csv", "image,label\ntrain/dog/a.png,dog\n")
    for split, class_ids in (("train", [0, 1, 2]), ("val", [1, 2]), ("test", [2])):
        data = load(tmp_path, split)
        assert data.labels == ("bird", "cat", "dog")
        assert data.class_ids.tolist() == class_ids


def test_a_packed_split_with_labels_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "train.npz", archive())
    write(tmp_path / "val.npz", archive(classes=np.array(["dog", "cat"])))
    data = load(tmp_path, "val")
    assert (data.labels, data.class_ids.tolist()) == (("cat", "dog"), [1, 0, 1, 0, 1, 0])


def test_labels_missing_in_train(tmp_path: Path) -> None:
    write(tmp_path / "train" / "cat" / "a.png", FILES[0])
    write(tmp_path / "val" / "cow" / "a.png", FILES[0])
    write(tmp_path / "test.csv", "image,label\ntrain/cat/a.png,cat\ntrain/cat/a.png,cow\ntrain/cat/a.png,\n")
    write(tmp_path / "more.npz", archive())
    with pytest.raises(DataError, match=r"val/cow: expected one of the labels cat, found 'cow'"):
        load(tmp_path, "val")
    with pytest.raises(DataError, match=r"test.csv: line 3: .* cat, found 'cow' \(and 1 more: vitrine data check\)"):
        load(tmp_path, "test")
    with pytest.raises(DataError, match=r"more.npz: expected one of the labels cat, found 'dog'"):
        load(tmp_path, "more")


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt"])
def test_a_file_gives_the_order_of_labels(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train" / "cat" / "a.png", FILES[0])
    write(tmp_path / "train" / "dog" / "b.png", FILES[0])
    write(tmp_path / "test.csv", "image,label\ntrain/cat/a.png,1\ntrain/dog/b.png,dog\n")
    write(tmp_path / name, "dog\ncat\n\n")
    assert load(tmp_path).labels == ("dog", "cat")
    assert truth(load(tmp_path)) == truth(load(tmp_path, "test")) == [("a.png", "cat"), ("b.png", "dog")]


@pytest.mark.parametrize(("content", "found"), [("", "none"), ("a\nb\na\n", "'a' twice"), (b"\xff\xfe\xff", "decode")])
def test_invalid_label_files(tmp_path: Path, content: str | bytes, found: str) -> None:
    write(tmp_path / "train" / "a" / "a.png", FILES[0])
    write(tmp_path / "labels.txt", content)
    with pytest.raises(DataError, match=rf"labels\.txt: expected .*{found}"):
        load(tmp_path)


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    assert sort_labels(["10", "9", "1"]) == ("1", "9", "10")
    assert sort_labels(["10", "9", "x"]) == ("10", "9", "x")
    write(tmp_path / "a.png", FILES[0])
    write(tmp_path / "train.csv", "image,label\na.png,9\na.png,10\na.png,1\n")
    write(tmp_path / "test.csv", "image,label\na.png,2\n")
    assert truth(load(tmp_path)) == [("a.png", "9"), ("a.png", "10"), ("a.png", "1")]
    with pytest.raises(DataError, match="expected one of the labels 1, 9, 10, found '2'"):
        load(tmp_path, "test")


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
        pytest.param(archive(classes=np.array(["cat", "cat"])), id="two labels of one name"),
        pytest.param(archive(offsets=np.cumsum([0, *map(len, FILES)])[::-1]), id="offsets fall"),
        pytest.param(archive(offsets=np.cumsum([0, *map(len, FILES)]) * 2), id="offsets past the end"),
    ],
)
def test_broken_archives(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "train.npz", content)
    with pytest.raises(DataError, match=r"train\.npz: expected"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "", r"expected a column image or path .*, found none"),
        ("train.csv", "photo,label\na.png,cat\n", r"expected a column image or path .*, found photo, label"),
        ("train.csv", "image,sort\na.png,cat\n", r"expected a column label or class .*, found image, sort"),
        ("train.csv", "image,label\n", "expected an image on each line, found no"),
        ("train.csv", "image,label\n,cat\n", r"line 2: expected the path of an image, found nothing"),
        ("train.csv", b"image,label\n\xff,cat\n", "expected an image and its label on each line: .*decode"),
        ("train.csv", "image,label\na.png,cat\nmissing.png,cat\n", r"1 of 2 images are not there: \['missing.png'\]"),
        ("train.jsonl", '{"image": "a.png"', "expected an image and its label on each line"),
        ("train.jsonl", '["a.png", "cat"]', r"line 1: expected .*, found \["),
        ("train.jsonl", '{"image": "a.png"}', "expected a column label or class"),
    ],
)
def test_broken_lists(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path / "a.png", FILES[0])
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="expected <label>/<image>, found no JPEG"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("n01440764", "n02123045", "n15075141"), ("tench", "tabby", "toilet tissue")),
        (("n01440764", "tabby"), ("n01440764", "tabby")),
    ],
)
def test_folders_named_by_imagenets_ids_get_its_labels(
    tmp_path: Path, names: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    for name in names:
        write(tmp_path / "train" / name / "a.png", FILES[0])
    write(tmp_path / "val" / "n01440764" / "a.png", FILES[0])
    write(tmp_path / "test" / labels[0] / "a.png", FILES[0])
    assert load(tmp_path).labels == labels
    assert truth(load(tmp_path, "val")) == truth(load(tmp_path, "test")) == [("a.png", labels[0])]
