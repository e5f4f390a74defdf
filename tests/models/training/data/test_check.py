import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.check import DataSummary, Sizes, check_data, format_summary
from vitrine.models.training.errors import DataError


def png(number: int, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def findings(summary: DataSummary, level: str) -> list[tuple[str, str]]:
    return [(found.kind, str(found)) for found in summary.findings if found.level == level]


def test_a_valid_data_set(colours: Path, tmp_path: Path) -> None:
    summary = check_data(colours, sheets=tmp_path / "sheets")
    assert (summary.task, summary.labels, summary.findings) == (Task.CLASSIFICATION, ("blue", "green", "red"), [])
    assert {name: split.images for name, split in summary.splits.items()} == {"train": 120, "test": 36}
    assert summary.splits["test"].per_class == {"blue": 12, "green": 12, "red": 12}
    assert summary.splits["test"].sizes == Sizes((20, 20, 20), (16, 16, 16))
    assert sorted(file.name for file in (tmp_path / "sheets").iterdir()) == ["test.png", "train.png"]
    assert format_summary(summary).endswith("\nerrors: 0, warnings: 0")
    assert json.loads(json.dumps(summary.as_json()))["splits"]["train"]["images"] == 120


def test_boxes_are_counted(squares: Path, tmp_path: Path) -> None:
    summary = check_data(squares, ["val"], sheets=tmp_path)
    (split,) = summary.splits.values()
    boxes = len(json.loads((squares / "val.json").read_text())["annotations"])
    assert (split.images, split.boxes, sum(split.per_class.values())) == (4, boxes, boxes)
    assert split.boxes_by_area == {"small": boxes, "medium": 0, "large": 0}
    assert Image.open(tmp_path / "val.png").width > 4 * 320


def test_broken_and_duplicate_images(tmp_path: Path) -> None:
    for name, content in {
        "train/a/1.png": png(1),
        "train/a/2.png": png(2),
        "train/a/copy.png": png(2),
        "train/a/cut.png": png(3)[:60],
        "train/b/text.png": b"hello",
        "train/b/4.png": png(4),
        "test/b/other_bytes.png": png(1, compress_level=0),
        "test/b/other_size.png": png(4, (30, 40)),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    summary = check_data(tmp_path, sheets=tmp_path / "sheets")
    errors, warnings = findings(summary, "error"), findings(summary, "warning")
    assert [kind for kind, _ in errors] == ["broken image", "broken image", "same picture in two splits"]
    assert "cut.png: " in errors[0][1]
    assert "text.png: " in errors[1][1]
    assert "a/1.png (train): equals" in errors[2][1]
    assert "other_bytes.png (test)" in errors[2][1]
    assert [kind for kind, _ in warnings] == ["class without examples", "same picture twice"]
    assert "test: 1 of 2 classes: a" in warnings[0][1]
    assert "copy.png (train)" in warnings[1][1]
    assert "error: broken image (2)\n" in format_summary(summary)
    assert summary.errors == 3


def coco(path: Path, objects: Sequence[dict[str, Any]]) -> None:
    (path / "images").mkdir(exist_ok=True)
    for i in range(3):
        (path / "images" / f"{i}.png").write_bytes(png(i))
    document = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "id": 0}, *objects],
    }
    (path / "train.json").write_text(json.dumps(document))


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"bbox": [1, 1, 0, 5]}, "empty box", "0.png: annotation 1 of .*train.json: cat: .*found 1, 1, 1, 6"),
    ({"bbox": [1, 1, 5, -2]}, "empty box", "found 1, 1, 6, -1"),
    ({"bbox": [30, 20, 20, 5]}, "box outside its image", "reaches 10.0 pixels out of the image of 40 x 30"),
    ({"bbox": [-5, 0, 10, 5]}, "box outside its image", "reaches 5.0 pixels"),
    ({"bbox": [float("nan"), 0, 10, 5]}, "box without numbers", "finite numbers, found nan, 0"),
    ({"category_id": 7}, "unknown label", "expected one of the labels cat, dog, found 'category 7'"),
    ({"bbox": [1, 2]}, "unreadable annotation", "annotation 1: ValueError"),
    ({"bbox": "all"}, "unreadable annotation", "annotation 1: ValueError"),
    ({"image_id": 9}, "unreadable annotation", "annotation 1: KeyError 9"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_invalid_boxes(tmp_path: Path, change: dict[str, Any], kind: str, message: str) -> None:
    coco(tmp_path, [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "id": 1, **change}])
    summary = check_data(tmp_path, sheets=tmp_path / "sheets")
    ((found, sentence),) = findings(summary, "error")
    assert found == kind
    assert re.search(message, sentence)
    assert summary.splits["train"].boxes == 1  # the valid one


def test_boxes_that_are_rounded_or_crowds(tmp_path: Path) -> None:
    coco(
        tmp_path,
        [
            {"image_id": 1, "category_id": 2, "bbox": [-0.5, 0, 41, 30.9]},
            {"image_id": 1, "category_id": 2, "bbox": [0, 0, 400, 300], "iscrowd": 1},
        ],
    )
    summary = check_data(tmp_path)
    assert summary.findings == []
    split = summary.splits["train"]
    assert (split.boxes, split.left_out, split.without_boxes) == (2, 1, 1)
    assert split.per_class == {"cat": 1, "dog": 1}


def test_an_image_that_is_missing_does_not_hide_the_rest(tmp_path: Path) -> None:
    coco(tmp_path, [{"image_id": 2, "category_id": 2, "bbox": [0, 0, 90, 9]}])
    (tmp_path / "images" / "0.png").unlink()
    summary = check_data(tmp_path)
    assert [kind for kind, _ in findings(summary, "error")] == ["broken image", "box outside its image"]
    assert "No such file" in findings(summary, "error")[0][1]


def test_fractions_are_checked_in_pixels(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "images" / "train" / "a.png").write_bytes(png(1))
    (tmp_path / "labels" / "train" / "a.txt").write_text(
        "0 0.5 0.5 1.01 1.01\n1 0.9 0.5 0.4 0.4\n1 0.5 0.5\n5 0.5 0.5 1 1\n"
    )
    summary = check_data(tmp_path)
    errors = findings(summary, "error")
    assert [kind for kind, _ in errors] == ["unreadable annotation", "box outside its image", "unknown label"]
    assert "line 2" in errors[1][1]
    assert "reaches 4.0 pixels" in errors[1][1]
    assert summary.splits["train"].per_class == {"cat": 1, "dog": 0}


def test_unbalanced_classes(tmp_path: Path) -> None:
    coco(tmp_path, [{"image_id": 1, "category_id": 2, "bbox": [i, 0, 5, 5]} for i in range(10)])
    assert findings(check_data(tmp_path), "warning") == [
        ("unbalanced classes", "train: dog is 10 times as frequent as cat (10 to 1)")
    ]


def test_a_split_that_cannot_be_read_does_not_hide_the_others(squares: Path, tmp_path: Path) -> None:
    for name in ("train.json", "images"):
        (tmp_path / name).symlink_to(squares / name)
    (tmp_path / "val.json").write_text("{")
    summary = check_data(tmp_path)
    assert [kind for kind, _ in findings(summary, "error")] == ["unreadable split"]
    assert list(summary.splits) == ["train"]


def test_nothing_to_check(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train.npz.*train\.json .*found an empty folder"):
        check_data(tmp_path)
    with pytest.raises(DataError, match=r"expected val\.npz"):
        check_data(colours, ["train", "val"])
    shutil.copytree(colours / "test", tmp_path / "more")
    assert list(check_data(tmp_path, ["more"]).splits) == ["more"]
