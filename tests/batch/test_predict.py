"""Batch prediction: the predictors' answers, in files that survive any end of the process."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pydantic import TypeAdapter

from vitrine.batch.predict import (
    Source,
    Summary,
    find_sources,
    format_record,
    format_summary,
    make_query,
    picture_names,
    predict_files,
)
from vitrine.batch.results import ResultsError
from vitrine.bundle.errors import ParameterError, VitrineError
from vitrine.bundle.images import decode
from vitrine.bundle.loading import Bundle, load_bundle, load_file
from vitrine.bundle.manifest import Precision
from vitrine.bundle.predictors import Classifier, Detector

SUFFIXES = (".jsonl", ".csv", ".coco.json")


@pytest.fixture(scope="module")
def classifier(tiny_bundles: Path) -> Bundle:
    return load_bundle(tiny_bundles / "colours" / "1")


@pytest.fixture(scope="module")
def detector(tiny_bundles: Path) -> Bundle:
    return load_bundle(tiny_bundles / "squares" / "1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folders with eight images of several types, broken images, and files that are not images."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for i, name in enumerate(
        ("b/2.png", "a.jpg", "b/10.webp", "c/d/ü e.gif", "c/=1+2.bmp", "z.tif", "noending", "y.PNG")
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 255, (40 + i, 60 - i, 3), np.uint8))
        image.save(file, ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PNG", "PNG")[i])
    (folder / "b" / "broken.png").write_bytes((folder / "b" / "2.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty").touch()
    (folder / ".hidden.png").write_text("no image")
    return folder


IMAGES = ["a.jpg", "b/10.webp", "b/2.png", "c/=1+2.bmp", "c/d/ü e.gif", "noending", "y.PNG", "z.tif"]
BROKEN = ["b/broken.png", "text.jpg"]


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


class Stopped(Exception):
    pass


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the file size of this process in bytes, so that a write fails halfway, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run(bundle: Bundle, paths: Path | list[Path], out: Path | None, stop_after: int = 0, **options: Any) -> Summary:
    """Predict and stop after `stop_after` files; options other than `annotate` and `providers` go to the query."""
    places = {name: options.pop(name) for name in ("annotate", "providers") if name in options}
    sources = find_sources([paths] if isinstance(paths, Path) else paths)

    def on_result(done: int, record: object) -> None:
        if done == stop_after:
            raise Stopped

    query = make_query(bundle.predictor, **options)
    return predict_files(bundle, query, sources, out=out, callback=on_result, threads=2, **places)


def test_predictions_are_those_of_the_classifier(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    summary = run(classifier, photos, out, top_k=2)
    assert summary == Summary(answered=8, errors=2, skipped=2, resumed=0)
    assert format_summary(summary) == "8 images, 2 errors, 2 other files skipped"
    found = records(out)
    assert [record["path"] for record in found] == [str(photos / name) for name in sorted(IMAGES + BROKEN)]
    assert isinstance(classifier.predictor, Classifier)
    for record in found:
        if "error" in record:
            assert set(record) == {"path", "error"}
            continue
        image = decode(Path(record["path"]).read_bytes())
        expected = classifier.predictor.classify(image, top_k=2)
        assert record == {
            "path": record["path"],
            "model": {"name": "colours", "version": "1", "variant": "fp32"},
            "image": {"width": image.width, "height": image.height},
            "predictions": [asdict(prediction) for prediction in expected],
        }
    codes = {Path(record["path"]).name: record["error"]["code"] for record in found if "error" in record}
    assert codes == {"broken.png": "undecodable_image", "text.jpg": "unsupported_image_type"}


def test_detections_are_those_of_the_detector(detector: Bundle, squares: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run(detector, squares / "images", out, threshold=0.1, max_detections=3, labels=["red", "blue"])
    found = records(out)
    assert len(found) == 36
    assert isinstance(detector.predictor, Detector)
    for record in found:
        expected = detector.predictor.detect(
            decode(Path(record["path"]).read_bytes()), threshold=0.1, max_detections=3, labels={"red", "blue"}
        )
        assert record["detections"] == [asdict(detection) for detection in expected]
    assert any(record["detections"] for record in found)


def test_records_have_the_fields_of_the_service(
    classifier: Bundle, detector: Bundle, photos: Path, tmp_path: Path
) -> None:
    from vitrine.service.errors import ErrorAnswer
    from vitrine.service.http.schemas import Classification, Detections

    for bundle, schema in ((classifier, Classification), (detector, Detections)):
        out = tmp_path / f"{bundle.manifest.name}.jsonl"
        run(bundle, photos, out)
        for record in records(out):
            path = record.pop("path")
            assert path.startswith(str(photos))
            answer = TypeAdapter[object](ErrorAnswer if "error" in record else schema)
            assert answer.dump_python(answer.validate_python(record), mode="json") == record


def test_a_single_onnx_file_gives_the_answers_of_its_bundle(
    classifier: Bundle, tiny_bundles: Path, photos: Path, tmp_path: Path
) -> None:
    alone = load_file(tiny_bundles / "colours" / "1" / "model.onnx")
    outs = tmp_path / "alone.jsonl", tmp_path / "bundle.jsonl"
    run(alone, photos, outs[0])
    run(classifier, photos, outs[1])
    assert outs[0].read_text() == outs[1].read_text().replace('"variant": "fp32"', '"variant": null')


def test_csv_has_a_row_for_each_class(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    run(classifier, photos, tmp_path / "r.csv", top_k=2)
    run(classifier, photos, tmp_path / "r.jsonl", top_k=2)
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["path", "label", "class_id", "probability", "error"]
    expected = []
    for record in records(tmp_path / "r.jsonl"):
        if "error" in record:
            expected.append([record["path"], "", "", "", record["error"]["message"]])
        for one in record.get("predictions", []):
            expected.append([record["path"], one["label"], str(one["class_id"]), repr(one["probability"]), ""])
    assert rows == expected
    assert len(rows) == 2 * 8 + 2


def test_csv_has_a_row_for_each_object(
    detector: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos / "c")  # so that the row begins with "="
    run(detector, [Path("=1+2.bmp")], tmp_path / "r.csv", threshold=0.0, max_detections=4)
    with (tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == ["=1+2.bmp"] * 4
    assert list(rows[0]) == ["path", "label", "class_id", "score", "x_min", "y_min", "x_max", "y_max", "error"]
    image = decode((photos / "c" / "=1+2.bmp").read_bytes())
    assert isinstance(detector.predictor, Detector)
    best = detector.predictor.detect(image, threshold=0.0)[0]
    assert [float(rows[0][edge]) for edge in ("x_min", "y_min", "x_max", "y_max")] == list(asdict(best.box).values())


def test_pycocotools_reads_the_results(detector: Bundle, squares: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.coco.json"
    run(detector, [squares / "images", photos], out, threshold=0.05)
    run(detector, [squares / "images", photos], tmp_path / "r.jsonl", threshold=0.05)
    coco = COCO(str(out))
    answers = [record for record in records(tmp_path / "r.jsonl") if "error" not in record]
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == [record["path"] for record in answers]
    labels = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert labels == dict(enumerate(detector.manifest.labels))
    for number, record in enumerate(answers, start=1):
        found = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert [(labels[one["category_id"]], one["score"]) for one in found] == [
            (one["label"], one["score"]) for one in record["detections"]
        ]
        for one, expected in zip(found, record["detections"], strict=True):
            x, y, width, height = one["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(list(expected["box"].values()))
            assert one["area"] == width * height
            assert one["iscrowd"] == 0
    assert len(coco.getAnnIds()) > 10
    assert coco.loadRes(coco.loadAnns(coco.getAnnIds())).getAnnIds()  # and accepts them as results
    errors = json.loads(out.read_text())["errors"]
    assert [Path(error["path"]).name for error in errors] == ["broken.png", "text.jpg"]


def test_coco_is_rejected_for_a_classifier(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"r\.coco\.json: expected \.jsonl or \.csv for the answers of a classifier"):
        run(classifier, photos, tmp_path / "r.coco.json")
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize("name", ["r.txt", "r.json", "r", "r.jsonl.gz"])
def test_an_unknown_suffix_lists_the_known_ones(detector: Bundle, photos: Path, tmp_path: Path, name: str) -> None:
    found = Path(name).suffix or "no ending"
    with pytest.raises(
        ResultsError, match=rf"expected a name that ends in \.jsonl, \.csv, \.coco\.json, found {found}"
    ):
        run(detector, photos, tmp_path / name)


@pytest.mark.parametrize("ending", SUFFIXES)
@pytest.mark.parametrize("stop_after", [1, 5, 12])
def test_an_interrupted_run_is_resumed(
    detector: Bundle, photos: Path, tmp_path: Path, ending: str, stop_after: int
) -> None:
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"r{ending}"
    expected = run(detector, photos, whole, threshold=0.1)
    with pytest.raises(Stopped):
        run(detector, photos, out, stop_after=stop_after, threshold=0.1)
    assert not out.exists()
    summary = run(detector, photos, out, threshold=0.1)
    assert out.read_bytes() == whole.read_bytes()
    assert summary.resumed == len(
        [
            1
            for name in sorted([*IMAGES, *BROKEN, "notes.txt", "empty"])[:stop_after]
            if name not in ("notes.txt", "empty")
        ]
    )
    assert (summary.answered, summary.errors, summary.skipped) == (expected.answered, expected.errors, expected.skipped)
    assert {file.name for file in tmp_path.iterdir()} == {"photos", whole.name, out.name}


def test_resuming_from_a_partial_file_cut_at_any_byte_gives_the_same_results(
    classifier: Bundle, photos: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(classifier, photos, whole)
    with pytest.raises(Stopped):
        run(classifier, photos, tmp_path / "cut.jsonl", stop_after=12)
    complete = (tmp_path / "cut.jsonl.partial").read_bytes()
    assert len(complete) > whole.stat().st_size

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cut=st.integers(0, len(complete)), tail=st.sampled_from((b"", b"\0\0\0", b"\0\n", b"{}\n")))
    def check(cut: int, tail: bytes) -> None:
        out = tmp_path / "again.jsonl"
        out.unlink(missing_ok=True)
        header = complete.index(b"\n") + 1
        out.with_name("again.jsonl.partial").write_bytes(complete[:cut] + (tail if cut >= header else b""))
        run(classifier, photos, out)
        assert out.read_bytes() == whole.read_bytes()
        assert not out.with_name("again.jsonl.partial").exists()

    check()


def test_added_and_removed_images_are_picked_up_on_resume(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(classifier, photos, tmp_path / "r.jsonl", stop_after=6)
    (photos / "a.jpg").rename(photos / "z2.jpg")
    shutil.copy(photos / "b" / "2.png", photos / "0.png")
    (photos / "b" / "broken.png").unlink()
    summary = run(classifier, photos, tmp_path / "r.jsonl")
    run(classifier, photos, tmp_path / "whole.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (summary.answered, summary.errors) == (9, 1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"top_k": 2}, "top_k: expected 3, as in the results so far, found 2"),
        ({"labels": ["red"]}, r'labels: expected null, as in the results so far, found \["red"\]'),
        ({"annotate": Path("pictures")}, 'annotate: expected null, as in the results so far, found "pictures"'),
        ({"providers": ["other"]}, r'providers: expected \[\], as in the results so far, found \["other"\]'),
        ({"variant": Precision.INT8_DYNAMIC}, 'variant: expected "fp32", .*, found "int8-dynamic"'),
        ({"name": "other"}, 'name: expected "colours", as in the results so far, found "other"'),
    ],
)
def test_results_of_another_configuration_are_refused(
    classifier: Bundle, tiny_bundles: Path, photos: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    out, bundle = tmp_path / "r.jsonl", classifier
    with pytest.raises(Stopped):
        run(classifier, photos, out, stop_after=4, top_k=3)
    before = (tmp_path / "r.jsonl.partial").read_bytes()
    if "variant" in options:
        bundle = load_bundle(tiny_bundles / "colours" / "1", variant=options.pop("variant"))
    if "name" in options:
        renamed = classifier.manifest.model_copy(update={"name": options.pop("name")})
        bundle = Bundle(renamed, classifier.predictor, classifier.path, classifier.variant)
    with pytest.raises(ResultsError, match=f"r.jsonl.partial: {problem}; remove it to start over"):
        run(bundle, photos, out, **{"top_k": 3, **options})
    assert (tmp_path / "r.jsonl.partial").read_bytes() == before
    assert not Path("pictures").exists()


def test_an_existing_file_is_never_touched(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    for name, problem in (("r.jsonl", "is there already"), ("s.jsonl.partial", "found another file")):
        (tmp_path / name).write_text("mine\n")
        with pytest.raises(ResultsError, match=f"{name}: .*{problem}"):
            run(classifier, photos, tmp_path / name.removesuffix(".partial"))
        assert (tmp_path / name).read_text() == "mine\n"
    assert {file.name for file in tmp_path.iterdir()} == {"photos", "r.jsonl", "s.jsonl.partial"}


def test_a_missing_output_folder(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"r\.jsonl\.partial: cannot be written: No such file or directory$"):
        run(classifier, photos, tmp_path / "nowhere" / "r.jsonl")


def test_two_runs_cannot_write_one_file(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    problems = []

    def on_result(done: int, record: object) -> None:
        if not problems:
            with pytest.raises(ResultsError) as raised:
                run(classifier, photos, tmp_path / "r.jsonl")
            problems.append(str(raised.value))

    query, sources = make_query(classifier.predictor), find_sources([photos])
    predict_files(classifier, query, sources, out=tmp_path / "r.jsonl", callback=on_result)
    assert problems == [f"{tmp_path / 'r.jsonl.partial'}: another process is writing it at this moment"]
    assert len(records(tmp_path / "r.jsonl")) == 10


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.1])
def test_a_full_disk_loses_nothing(classifier: Bundle, photos: Path, tmp_path: Path, share: float) -> None:
    """The disk is full at a share of the final size or, in the last case, while the results file is written."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    run(classifier, photos, whole, top_k=1)
    size = whole.stat().st_size
    if share > 1:
        with pytest.raises(Stopped):
            run(classifier, photos, out, top_k=1, stop_after=12)
        size //= 2
    with (
        file_size_limit(int(size * min(share, 1))),
        pytest.raises(ResultsError, match="cannot be written: File too large"),
    ):
        run(classifier, photos, out, top_k=1)
    assert not out.exists()
    assert not out.with_name("r.jsonl.finishing").exists()
    run(classifier, photos, out, top_k=1)
    assert out.read_bytes() == whole.read_bytes()


def test_sigkill_in_the_middle(
    tiny_bundles: Path, classifier: Bundle, photos: Path, tmp_path: Path, root: Path
) -> None:
    """The command is killed while it waits for the last image, a blocking pipe, and then run again."""
    pipe, out = tmp_path / "last.png", tmp_path / "r.jsonl"
    os.mkfifo(pipe)
    bundle = tiny_bundles / "colours" / "1"
    command = [sys.executable, "-m", "vitrine", "predict", *map(str, (bundle, photos, pipe, "--out", out))]
    process = subprocess.Popen(command, cwd=root)
    partial = tmp_path / "r.jsonl.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") == 11):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not out.exists()
    with partial.open("ab") as stream:
        stream.write(b'{"path": "half')
    pipe.unlink()
    shutil.copy(photos / "a.jpg", pipe)
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.stdout == f"predicted: {out}  9 images, 2 errors, 2 other files skipped, 10 done before\n"
    assert (result.returncode, result.stderr) == (1, "")
    run(classifier, [photos, pipe], tmp_path / "whole.jsonl", providers=["CPUExecutionProvider"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_ctrl_c_reports_how_to_resume(tiny_bundles: Path, photos: Path, tmp_path: Path, root: Path) -> None:
    pipe, out = tmp_path / "last.png", tmp_path / "r.csv"
    os.mkfifo(pipe)
    bundle = tiny_bundles / "colours" / "1"
    command = [sys.executable, "-m", "vitrine", "predict", *map(str, (bundle, photos, pipe, "--out", out))]
    # Processes that a shell starts in the background, and those that they start, ignore it.
    obey = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, preexec_fn=obey)
    writer = os.open(pipe, os.O_WRONLY)
    while (tmp_path / "r.csv.partial").read_bytes().count(b"\n") < 11:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    message = process.stderr.readline()  # before closing the pipe releases the thread that reads it
    os.close(writer)
    assert process.wait(timeout=30) == 130
    assert re.sub(r"1[12] of", "12 of", message) == (
        f"vitrine: interrupted after 12 of 13 files; they are kept, and the same command resumes {out}\n"
    )
    assert process.stderr.read() == ""
    process.stderr.close()
    assert (tmp_path / "r.csv.partial").read_bytes().count(b"\n") == 11
    assert not out.exists()


def test_pictures_keep_the_folder_structure(detector: Bundle, photos: Path, tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "r.jsonl"
    run(detector, photos, out, annotate=pictures, threshold=0.0)
    found = {str(file.relative_to(pictures)): file for file in pictures.rglob("*") if file.is_file()}
    expected = ["a.jpg", "b/10.png", "b/2.png", "c/=1+2.png", "c/d/ü e.png", "noending.png", "y.png", "z.png"]
    assert sorted(found) == sorted(expected)
    for name, file in found.items():
        with Image.open(file) as picture:
            assert picture.format == ("JPEG" if name == "a.jpg" else "PNG")
            assert min(picture.size) >= 320
    named = {record["path"]: record["annotated"] for record in records(out) if "error" not in record}
    assert named[str(photos / "b" / "10.webp")] == "b/10.png"


def test_pictures_are_those_of_bundle_drawing(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    from vitrine.bundle.drawing import draw_classification

    run(classifier, [photos / "b" / "2.png"], None, annotate=tmp_path / "pictures", top_k=2)
    image = decode((photos / "b" / "2.png").read_bytes())
    assert isinstance(classifier.predictor, Classifier)
    expected = draw_classification(image, classifier.predictor.classify(image, top_k=2))
    with Image.open(tmp_path / "pictures" / "2.png") as picture:
        assert picture.tobytes() == expected.tobytes()


def test_picture_names_are_unique() -> None:
    paths = ("x/a.jpg", "y/a.jpg", "y/A.JPG", "x/a.png", "x/a.webp", "y/a-2.png", "x/a.jpeg", "x/a")
    sources = [Source(path, Path(path).name, True) for path in paths]
    names = picture_names(sources, {})
    assert list(names.values()) == [
        "a.jpg", "a-2.jpg", "A-3.JPG", "a.png", "a-2.png", "a-2-2.png", "a.jpeg", "a-3.png",
    ]  # fmt: skip
    for count in range(len(paths)):  # a resumed run names the rest in the same way
        assert picture_names(sources, dict(list(names.items())[:count])) == names


@pytest.mark.parametrize("stop_after", [1, 7])
def test_pictures_of_a_resumed_run(detector: Bundle, photos: Path, tmp_path: Path, stop_after: int) -> None:
    shutil.copytree(photos, tmp_path / "more")
    paths, pictures = [photos, tmp_path / "more"], tmp_path / "pictures"
    with pytest.raises(Stopped):
        run(detector, paths, tmp_path / "r.jsonl", stop_after=stop_after, annotate=pictures, threshold=0.0)
    summary = run(detector, paths, tmp_path / "r.jsonl", annotate=pictures, threshold=0.0)
    assert summary.answered == len([file for file in pictures.rglob("*") if file.is_file()]) == 16
    for record in records(tmp_path / "r.jsonl"):
        if "error" not in record:
            assert (pictures / record["annotated"]).exists()


def test_pictures_never_overwrite_images(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    before = (photos / "a.jpg").read_bytes()
    for out in (None, tmp_path / "r.jsonl"):
        with pytest.raises(ResultsError, match="photos: expected a new or an empty folder for the pictures"):
            run(classifier, photos, out, annotate=photos)
    with pytest.raises(ResultsError, match=r"expected a folder for the pictures, found: File exists"):
        run(classifier, photos, None, annotate=photos / "a.jpg")
    with pytest.raises(Stopped):
        run(classifier, photos, tmp_path / "r.jsonl", stop_after=3, annotate=tmp_path / "pictures")
    with pytest.raises(
        ResultsError, match=r"a\.jpg: expected an image elsewhere, found it in the folder of the pictures"
    ):
        run(classifier, [tmp_path / "pictures" / "a.jpg"], tmp_path / "r.jsonl", annotate=tmp_path / "pictures")
    assert (photos / "a.jpg").read_bytes() == before
    assert not (tmp_path / "r.jsonl").exists()


def test_own_output_is_excluded(photos: Path) -> None:
    own = [photos / "r.jsonl", photos / "r.jsonl.partial", photos / "pictures"]
    before = find_sources([photos])
    (photos / "pictures").mkdir()
    for file in (*own[:2], photos / "pictures" / "a.png"):
        file.touch()
    assert find_sources([photos], exclude=own) == before
    with pytest.raises(VitrineError, match="expected a folder of images, found one that pictures are written to"):
        find_sources([photos / "pictures"], exclude=own)


def test_files_are_found_once_and_in_order(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    (photos / "c" / "again").symlink_to(photos / "c")  # a cycle
    (photos / "b" / "gone.png").symlink_to("nowhere")
    (photos / "b" / "self").symlink_to("self")
    found = [source.path for source in find_sources([Path("z.tif"), Path("b"), Path("./b/2.png"), Path("c")])]
    assert found == [
        "z.tif",
        "b/10.webp",
        "b/2.png",
        "b/broken.png",
        "b/gone.png",
        "b/self",
        "c/=1+2.bmp",
        "c/d/ü e.gif",
    ]
    everything = [source.relative for source in find_sources([Path(".")])]
    assert everything == sorted(everything, key=lambda name: name.split("/"))
    assert "c/=1+2.bmp" in everything


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VitrineError, match="expected image files, found no file"):
        find_sources([tmp_path])


def test_an_input_file_that_is_not_an_image_is_an_error(classifier: Bundle, photos: Path, tmp_path: Path) -> None:
    paths = [photos / "notes.txt", photos / "nowhere.png", photos / "empty", photos / "a.jpg"]
    summary = run(classifier, paths, tmp_path / "r.jsonl")
    assert summary == Summary(answered=1, errors=3, skipped=0, resumed=0)
    found = records(tmp_path / "r.jsonl")
    assert [record.get("error", {}).get("code") for record in found] == [
        "unsupported_image_type", "unreadable_file", "undecodable_image", None,
    ]  # fmt: skip
    assert found[1]["error"]["message"] == "file: expected one that can be read, found: No such file or directory"


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_name_that_is_not_utf_8(classifier: Bundle, photos: Path, tmp_path: Path, ending: str) -> None:
    """CSV keeps the bytes of the name; JSON cannot, and escapes them as Python does."""
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(photos / "b" / "2.png", tmp_path / name)
    out = tmp_path / f"r{ending}"
    with pytest.raises(Stopped):
        run(classifier, [tmp_path / name, photos], out, stop_after=2, top_k=1)
    assert run(classifier, [tmp_path / name, photos], out, top_k=1).resumed == 2
    if ending == ".csv":
        assert out.read_bytes().splitlines()[1].startswith(os.fsencode(tmp_path / name) + b",")
    else:
        record = records(out)[0]
        assert record["path"] == str(tmp_path / name)
        assert "caf\\udce9.png: " in format_record(record)


def test_parameters_are_checked_by_task(classifier: Bundle, detector: Bundle) -> None:
    for bundle, options, problem in (
        (classifier, {"threshold": 0.5}, "threshold: expected none: it is for a detector, found 0.5"),
        (classifier, {"max_detections": 5}, "max_detections: expected none: it is for a detector, found 5"),
        (detector, {"top_k": 5}, "top_k: expected none: it is for a classifier, found 5"),
        (classifier, {"top_k": 0}, "top_k: expected an integer of at least 1, found 0"),
        (detector, {"threshold": 2.0}, "threshold: expected a number from 0 to 1, found 2.0"),
        (detector, {"labels": ["rad"]}, "labels: expected some of the model's 3 labels, such as 'red', found 'rad'"),
    ):
        with pytest.raises(ParameterError) as raised:
            make_query(bundle.predictor, **options)
        assert str(raised.value) == problem


def test_only_a_few_images_are_in_progress(classifier: Bundle, photos: Path) -> None:
    """Of 1,000 files, only a few per thread are read before the first result is consumed."""
    later = [photos / f"{i}.png" for i in range(1000)]
    codes: list[str | None] = []

    def on_result(number: int, record: Any) -> None:
        codes.append(record.get("error", {}).get("code"))
        if number == 1:
            for path in later:
                path.touch()

    sources = find_sources([photos / "a.jpg", *later])
    predict_files(classifier, make_query(classifier.predictor), sources, threads=2, callback=on_result)
    assert len(codes) == 1001
    assert set(codes[1:9]) <= {"unreadable_file", "undecodable_image"}
    assert set(codes[9:]) == {"undecodable_image"}
