"""Results files: the content of each format, and resuming from a file cut at any byte."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrine.batch.results import Results, ResultsError, result_files

CONFIG = {"name": "cells", "threshold": 0.5, "labels": None}
LABELS = ("red", 'a "b", c')
MODEL = {"name": "cells", "version": "1", "variant": "fp32"}


def detection(class_id: int, score: float, x_min: float, y_min: float, x_max: float, y_max: float) -> dict[str, Any]:
    box = {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max}
    return {"label": LABELS[class_id], "class_id": class_id, "score": score, "box": box}


def answer(path: str, *detections: dict[str, Any]) -> dict[str, Any]:
    return {"path": path, "model": MODEL, "image": {"width": 30, "height": 20}, "detections": list(detections)}


def failure(path: str) -> dict[str, Any]:
    return {"path": path, "error": {"code": "undecodable_image", "message": "image: cut,\nshort"}}


RECORDS = [
    answer("=1.png", detection(1, 0.75, 1.5, 2.0, 4.5, 10.0), detection(0, 0.5, 0.0, 0.0, 30.0, 20.0)),
    failure("b,\n.png"),
    answer("nothing.png"),
    answer("last.png", detection(0, 0.25, 1.0, 1.0, 2.0, 2.0)),
]
PATHS = [record["path"] for record in RECORDS]


def write(out: Path, records: list[dict[str, Any]] = RECORDS) -> None:
    with Results(out, CONFIG, LABELS, boxes=True) as results:
        results.begin()
        for record in records:
            if record["path"] not in results.answered:
                results.add(record)
        results.finish([record["path"] for record in records])
    assert list(out.parent.iterdir()) == [out]


def test_jsonl_has_one_record_per_line(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl")
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == RECORDS


def test_csv(tmp_path: Path) -> None:
    write(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["path", "label", "class_id", "score", "x_min", "y_min", "x_max", "y_max", "error"],
        ["=1.png", 'a "b", c', "1", "0.75", "1.5", "2.0", "4.5", "10.0", ""],
        ["=1.png", "red", "0", "0.5", "0.0", "0.0", "30.0", "20.0", ""],
        ["b,\n.png", "", "", "", "", "", "", "", "image: cut,\nshort"],
        ["last.png", "red", "0", "0.25", "1.0", "1.0", "2.0", "2.0", ""],
    ]


def test_coco(tmp_path: Path) -> None:
    write(tmp_path / "r.coco.json")
    document = json.loads((tmp_path / "r.coco.json").read_text())
    size = {"width": 30, "height": 20}
    assert document == {
        "info": CONFIG,
        "categories": [{"id": 0, "name": "red"}, {"id": 1, "name": 'a "b", c'}],
        "images": [
            {"id": i, "file_name": name, **size} for i, name in enumerate(("=1.png", "nothing.png", "last.png"), 1)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "bbox": box, "score": score, "area": area, "iscrowd": 0}
            for i, image, kind, box, score, area in (
                (1, 1, 1, [1.5, 2.0, 3.0, 8.0], 0.75, 24.0),
                (2, 1, 0, [0.0, 0.0, 30.0, 20.0], 0.5, 600.0),
                (3, 3, 0, [1.0, 1.0, 1.0, 1.0], 0.25, 1.0),
            )
        ],
        "errors": [failure("b,\n.png")],
    }


# Characters of file names; bytes that are not UTF-8 become these surrogates (PEP 383).
LETTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff")
NAMES = st.text(LETTERS, min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.lists(NAMES, min_size=1, max_size=5, unique=True), ending=st.integers(0, 2), cut=st.floats(0, 1))
def test_a_file_cut_at_any_byte_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], ending: int, cut: float
) -> None:
    records = [failure(path) if i == 1 else answer(path, detection(0, 0.5, 1, 2, 3, 4)) for i, path in enumerate(paths)]
    suffix = (".jsonl", ".csv", ".coco.json")[ending]
    whole, out = (tmp_path_factory.mktemp("results") / f"r{suffix}" for _ in range(2))
    write(whole, records)
    with Results(out, CONFIG, LABELS, boxes=True) as results:
        results.begin()
        for record in records:
            results.add(record)
        assert list(results.records(reversed(paths))) == records[::-1]
    partial = result_files(out)[1]
    partial.write_bytes(partial.read_bytes()[: round(cut * partial.stat().st_size)])
    write(out, records)
    assert out.read_bytes() == whole.read_bytes()


def test_records_are_indexed_on_resume(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    with Results(out, CONFIG, LABELS, boxes=True) as results:
        assert not results.has_header
        results.begin()
        results.add(RECORDS[1])
        results.add({**RECORDS[2], "annotated": "nothing.png"})
    with Results(out, CONFIG, LABELS, boxes=True) as results:
        assert results.has_header
        assert list(results.answered) == PATHS[1:3]
        assert results.failed == {PATHS[1]}
        assert results.pictures == {"nothing.png": "nothing.png"}


def test_an_empty_partial_file_is_removed(tmp_path: Path) -> None:
    with Results(tmp_path / "r.jsonl", CONFIG, LABELS, boxes=True):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b"{}\n", b"[1]\n", b"\0\0\0\n", b'{"format": "another"}\n'])
def test_a_foreign_file_is_left_unchanged(tmp_path: Path, content: bytes) -> None:
    partial = tmp_path / "r.jsonl.partial"
    partial.write_bytes(content)
    with pytest.raises(ResultsError, match="expected results that can be resumed"):
        Results(tmp_path / "r.jsonl", CONFIG, LABELS, boxes=True)
    assert partial.read_bytes() == content


def test_results_of_another_configuration_are_left_unchanged(tmp_path: Path) -> None:
    with Results(tmp_path / "r.jsonl", CONFIG, LABELS, boxes=True) as results:
        results.begin()
    before = (tmp_path / "r.jsonl.partial").read_bytes()
    with pytest.raises(ResultsError, match=r"threshold: expected 0.5, as in the results so far, found 0.6"):
        Results(tmp_path / "r.jsonl", {**CONFIG, "threshold": 0.6}, LABELS, boxes=True)
    with pytest.raises(ResultsError, match=r"top_k: expected null, as in the results so far, found 3"):
        Results(tmp_path / "r.jsonl", {**CONFIG, "top_k": 3}, LABELS, boxes=True)
    assert (tmp_path / "r.jsonl.partial").read_bytes() == before


def test_the_partial_file_is_kept_if_finishing_fails(tmp_path: Path) -> None:
    """The final rename fails because the target is a folder; the partial file remains."""
    out = tmp_path / "r.jsonl"
    with Results(out, CONFIG, LABELS, boxes=True) as results:
        results.begin()
        results.add(RECORDS[0])
        out.mkdir()
        with pytest.raises(ResultsError, match="cannot be written: Is a directory; 1 answer is kept, and the same"):
            results.finish(PATHS)
    assert {file.name for file in tmp_path.iterdir()} == {"r.jsonl", "r.jsonl.partial"}
