import copy
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.data.layouts import has_split, load_split, load_training_splits
from vitrine.models.training.errors import DataError

WIDTH, HEIGHT = 12, 8
Box = tuple[int, int, int, int]
Object = tuple[str, Box]


def png(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load(path: Path, split: str = "train") -> DetectionData:
    data = load_split(path, Task.DETECTION, split)
    assert isinstance(data, DetectionData)
    return data


def objects(data: DetectionData) -> dict[str, list[tuple[str, list[float]]]]:
    """Label and box of each object of each image."""
    return {
        Path(name).stem: [(data.labels[i], box) for i, box in zip(ids.tolist(), boxes.tolist(), strict=True)]
        for name, ids, boxes in zip(data.names, data.class_ids, data.boxes, strict=True)
    }


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


def coco(path: Path, name: str = "train.json", images: str = "images", content: str | None = None) -> None:
    for image in "abc":
        write(path / images / f"{image}.png", png())
    write(path / name, json.dumps(COCO) if content is None else content)


def voc(root: Path, split: str, images: dict[str, list[Object]], *, difficult: int = 0) -> None:
    write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}  1\n" for name in images))
    for name, own in images.items():
        write(root / "JPEGImages" / f"{name}.jpg", png())
        tags = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult>"
            "<part><bndbox><xmin>0</xmin></bndbox></part>"
            f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, (x0, y0, x1, y1) in own
        )
        write(root / "Annotations" / f"{name}.xml", f"<annotation>{tags}</annotation>")


def yolo(path: Path, images: str, texts: str, content: dict[str, list[Object]], labels: list[str]) -> None:
    for name, own in content.items():
        write(path / images / f"{name}.png", png())
        text = ""
        for label, (x0, y0, x1, y1) in own:
            centre, size = (
                f"{(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT}",
                f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}",
            )
            text += f"{labels.index(label)} {centre} {size}\n"
        write(path / texts / f"{name}.txt", text)


def test_coco_with_holes_in_its_category_ids(tmp_path: Path) -> None:
    coco(tmp_path)
    data = load(tmp_path)
    assert data.labels == ("cat", "dog")
    assert [ids.tolist() for ids in data.class_ids] == [[1, 0], [0], []]
    assert data.boxes[0].tolist() == [[1, 1, 3, 4], [0, 0, 6, 4]]
    assert data.boxes[1].tolist() == [[2.5, 1, 3.5, 2]]  # neither the crowd nor the empty box
    assert data.boxes[2].shape == (0, 4)
    assert (data.boxes[2].dtype, data.class_ids[2].dtype) == (np.float32, np.int64)
    assert list(data.names) == [f"{tmp_path}/images/{name}.png" for name in "bac"]
    assert data.image(0).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
    ],
)
def test_other_places_of_coco(tmp_path: Path, name: str, images: str) -> None:
    coco(tmp_path / "0")
    coco(tmp_path / "1", name, images)
    assert objects(load(tmp_path / "0")) == objects(load(tmp_path / "1"))
    assert not has_split(tmp_path / "1", "val")


def test_valid_is_val(tmp_path: Path) -> None:
    coco(tmp_path, "train/_annotations.coco.json", "train")
    coco(tmp_path, "valid/_annotations.coco.json", "valid")
    train, val = load_training_splits(tmp_path, Task.DETECTION, held_out=None, seed=0)
    assert (len(train), len(val), val.split, val.names[0]) == (3, 3, "val", f"{tmp_path}/valid/b.png")


def remove_category(document: dict[str, Any]) -> None:
    document["categories"].pop()


def remove_image(document: dict[str, Any]) -> None:
    document["images"].pop(0)


def repeat_image(document: dict[str, Any]) -> None:
    document["images"].append({"id": 7, "file_name": "c.png"})


def shorten_box(document: dict[str, Any]) -> None:
    document["annotations"][0]["bbox"] = [1, 2, 3]


def infinite_box(document: dict[str, Any]) -> None:
    document["annotations"][0]["bbox"] = [1, 2, float("inf"), 3]


def repeat_label(document: dict[str, Any]) -> None:
    document["categories"][1]["name"] = "dog"


def remove_annotations(document: dict[str, Any]) -> None:
    del document["annotations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_category, "annotation number 1: expected one of the labels dog, found 'category 5'"),
        (remove_image, "annotation number 0: KeyError 7"),
        (repeat_image, "not in COCO's format: ValueError two images have the same id"),
        (shorten_box, "annotation number 0: ValueError"),
        (infinite_box, "annotation number 0: expected a box of finite numbers"),
        (repeat_label, "expected labels with different names, found 'dog' twice"),
        (remove_annotations, "not in COCO's format: KeyError 'annotations'"),
    ],
)
def test_coco_that_contradicts_itself(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    document = copy.deepcopy(COCO)
    change(document)
    coco(tmp_path, content=json.dumps(document))
    with pytest.raises(DataError, match=rf"train\.json: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"categories": [1]}'])
def test_files_that_are_not_coco(tmp_path: Path, content: str) -> None:
    coco(tmp_path, content=content)
    with pytest.raises(DataError, match="not in COCO's format"):
        load(tmp_path)


def test_images_that_are_missing(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"images: 1 of 3 images are not there: \['a.png'\]"):
        load(tmp_path)


def test_labels_are_those_of_train(tmp_path: Path) -> None:
    coco(tmp_path)
    document = copy.deepcopy(COCO)
    document["categories"] = [{"id": 90, "name": "dog"}, {"id": 5, "name": "cow"}]
    coco(tmp_path, "test.json", content=json.dumps(document))
    document["annotations"] = document["annotations"][:1]
    coco(tmp_path, "val.json", content=json.dumps(document))
    assert (load(tmp_path, "val").labels, load(tmp_path, "val").class_ids[0].tolist()) == (("cat", "dog"), [1])
    with pytest.raises(DataError, match=r"test\.json: annotation number 1: .*labels cat, dog, found 'cow'"):
        load(tmp_path, "test")
    write(tmp_path / "labels.txt", "dog\ncow\n")
    assert objects(load(tmp_path, "test"))["b"] == [("dog", [1, 1, 3, 4]), ("cow", [0, 0, 6, 4])]


PICTURES: dict[str, list[Object]] = {"a": [("dog", (1, 2, 5, 6)), ("cat", (0, 0, 12, 8))], "b": []}


@pytest.mark.parametrize("folder", ["", "VOC2007", "VOCdevkit/VOC2012"])
def test_voc(tmp_path: Path, folder: str) -> None:
    voc(tmp_path / folder, "train", PICTURES)
    data = load(tmp_path)
    assert data.labels == ("cat", "dog")
    assert objects(data) == {"a": [("dog", [1, 2, 5, 6]), ("cat", [0, 0, 12, 8])], "b": []}


def test_years_of_voc_are_taken_together_with_the_labels_of_train(tmp_path: Path) -> None:
    voc(tmp_path / "VOCdevkit" / "VOC2007", "train", PICTURES)
    voc(tmp_path / "VOCdevkit" / "VOC2012", "train", {"c": [("bird", (0, 0, 2, 2))]})
    voc(tmp_path / "VOCdevkit" / "VOC2007", "val", {"d": [("dog", (0, 0, 2, 2))]})
    assert load(tmp_path).labels == load(tmp_path, "val").labels == ("bird", "cat", "dog")
    assert sorted(objects(load(tmp_path))) == ["a", "b", "c"]
    assert load(tmp_path, "val").class_ids[0].tolist() == [2]


def test_difficult_objects_are_left_out(tmp_path: Path) -> None:
    voc(tmp_path, "train", PICTURES)
    voc(tmp_path, "val", {"c": [("dog", (0, 0, 2, 2))]}, difficult=1)
    assert objects(load(tmp_path, "val")) == {"c": []}


def test_voc_that_counts_from_zero_and_names_its_images(tmp_path: Path) -> None:
    voc(tmp_path, "train", {"a": [("dog", (-1, -1, 2, 2))]})
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "other.png")
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<annotation>", "<annotation><filename>other.png</filename>"))
    assert objects(load(tmp_path)) == {"other": [("dog", [0, 0, 2, 2])]}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("</annotation>", "", r"a\.xml: not in VOC's format: no element found"),
        ("<xmin>2</xmin>", "", r"a\.xml: object 1: expected name and bndbox, found 'dog' \['', "),
        ("<xmin>2</xmin>", "<xmin>left</xmin>", r"a\.xml: object 1: expected name and bndbox"),
        ("<name>dog</name>", "", r"a\.xml: object 1: expected name and bndbox, found ''"),
        ("<xmin>2</xmin>", "<xmin>nan</xmin>", r"a\.xml: object 1: expected a box of finite numbers"),
    ],
)
def test_broken_voc(tmp_path: Path, before: str, after: str, message: str) -> None:
    voc(tmp_path, "train", PICTURES)
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_voc_without_an_annotation(tmp_path: Path) -> None:
    voc(tmp_path, "train", PICTURES)
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(
        DataError, match=r"a\.xml.: not in VOC's format.*No such file|a\.xml: not in VOC's format.*No such"
    ):
        load(tmp_path)


NAMES = {
    "data.yaml": ["names: [dog, cat]", "nc: 2\nnames:\n- dog\n- 'cat'\n", "names:\n  1: cat\n  0: dog\ntrain: x\n"],
    "classes.txt": ["dog\ncat\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in NAMES for content in NAMES[name]])
@pytest.mark.parametrize("folders", [("images/train", "labels/train"), ("train/images", "train/labels")])
def test_yolo(tmp_path: Path, name: str, content: str, folders: tuple[str, str]) -> None:
    write(tmp_path / name, content)
    yolo(tmp_path, *folders, PICTURES, ["dog", "cat"])
    write(tmp_path / folders[0] / "sub" / "c.png", png())
    write(tmp_path / folders[1] / "sub" / "c.txt", "\n1 0 0 0.5 0 0.25 0.5\n")  # a triangle
    (tmp_path / folders[1] / "b.txt").unlink()  # as good as an empty file
    data = load(tmp_path)
    assert data.labels == ("dog", "cat")
    assert {name: [label for label, _ in own] for name, own in objects(data).items()} == {
        "a": ["dog", "cat"],
        "b": [],
        "c": ["cat"],
    }
    np.testing.assert_allclose(data.boxes[0], [[1, 2, 5, 6], [0, 0, 12, 8]], atol=1e-6)
    np.testing.assert_allclose(data.boxes[2], [[0, 0, 6, 4]])


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "dog\n")
    write(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 1 0.5\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    data = load(tmp_path)
    assert data.image(0).size == (HEIGHT, WIDTH)
    assert data.boxes[0].tolist() == [[0, 3, 8, 9]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels/train/a.txt", "0 0.5 0.5 1\n", r"a\.txt: line 1: expected a class id and four fractions"),
        ("labels/train/a.txt", "0 0.5 0.5 1 1\n0 0.5 0.5 1 1 0.9\n", r"a\.txt: line 2: expected a class id"),
        ("labels/train/a.txt", "dog 0.5 0.5 1 1\n", r"a\.txt: line 1: expected a class id .*found 'dog 0.5"),
        (
            "labels/train/a.txt",
            "2 0.5 0.5 1 1\n",
            r"a\.txt: line 1: expected one of the labels dog, cat, found 'class 2'",
        ),
        ("labels/train/a.txt", "-1 0.5 0.5 1 1\n", r"line 1: expected one of the labels dog, cat, found 'class -1'"),
        ("labels/train/a.txt", "0 nan 0.5 1 1\n", r"a\.txt: line 1: expected a box of finite numbers"),
        ("labels/train/a.txt", b"\xff\xff", r"a\.txt: cannot be read: .*decode"),
        ("images/train/a.png", "no image", r"a\.png: cannot be read as an image"),
        ("data.yaml", "names: {", r"data\.yaml: expected names, a list or numbered from 0"),
        ("data.yaml", "nc: 2", r"data\.yaml: expected names, a list or numbered from 0: KeyError"),
        ("data.yaml", "names: {0: dog, 2: cat}", r"data\.yaml: expected names, a list or numbered from 0: KeyError 1"),
        ("data.yaml", "names: dog", r"data\.yaml: expected names, a list or numbered from 0"),
        ("data.yaml", "names: [dog, dog]", r"data\.yaml: expected labels with different names, found 'dog' twice"),
        ("data.yaml", "just text", r"data\.yaml: expected names"),
    ],
)
def test_broken_yolo(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path / "data.yaml", "names: [dog, cat]")
    yolo(tmp_path, "images/train", "labels/train", PICTURES, ["dog", "cat"])
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_yolo_without_names(tmp_path: Path) -> None:
    yolo(tmp_path, "images/train", "labels/train", PICTURES, ["dog", "cat"])
    with pytest.raises(DataError, match=r"expected data.yaml or classes.txt with the names of the classes"):
        load(tmp_path)


boxes = st.tuples(
    st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1), st.integers(1, WIDTH), st.integers(1, HEIGHT)
).map(lambda b: (b[0], b[1], max(b[0] + 1, b[2]), max(b[1] + 1, b[3])))
pictures = st.lists(st.lists(st.tuples(st.sampled_from(["cat", "dog", "horse"]), boxes)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(pictures)
def test_all_layouts_give_the_same_data(own: list[list[Object]]) -> None:
    content = {f"{i}": boxes for i, boxes in enumerate(own)}
    labels = ["cat", "dog", "horse"]
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(own))],
        "categories": [{"id": 2 * i, "name": label} for i, label in enumerate(labels)],
        "annotations": [
            {"image_id": i, "category_id": 2 * labels.index(label), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i, boxes in enumerate(own)
            for label, (x0, y0, x1, y1) in boxes
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        voc(path / "voc", "train", content)
        yolo(path / "yolo", "images/train", "labels/train", content, labels)
        write(path / "yolo" / "data.yaml", json.dumps({"names": labels}))
        (path / "coco").mkdir()
        (path / "voc" / "JPEGImages").rename(path / "coco" / "images")
        (path / "voc" / "JPEGImages").symlink_to(path / "coco" / "images")
        write(path / "coco" / "train.json", json.dumps(document))
        found = [objects(load(path / layout)) for layout in ("coco", "voc", "yolo")]
        expected = {name: [(label, list(map(float, box))) for label, box in boxes] for name, boxes in content.items()}
        assert found[0] == found[1] == expected
        for name, wanted in expected.items():
            assert [label for label, _ in found[2][name]] == [label for label, _ in wanted]
            np.testing.assert_allclose([box for _, box in found[2][name]], [box for _, box in wanted], atol=1e-5)
