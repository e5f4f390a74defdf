"""Reports of tiny runs: correct, complete and self-contained."""

import base64
import html.parser
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vitrine.models.training.checkpoint import METRICS_FILE, Origin, load_checkpoint, save_checkpoint
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.errors import CheckpointError, DataError
from vitrine.models.training.evaluation.metrics import evaluate
from vitrine.models.training.evaluation.report import learning_curves, read_metrics, write_report
from vitrine.models.training.network import checkpoint_predictor

VOID = {"meta", "br", "img"}
FIRST = {
    "epoch": 1,
    "step": 8,
    "seconds": 2.0,
    "images_per_second": 90.0,
    "lr": 1e-3,
    "loss": 2.5,
    "class": 1,
    "l1": 0.5,
}
SECOND = {**FIRST, "epoch": 2, "step": 16, "loss": 1.5, "AP": 0.1, "AP50": 0.3, "AP_red": 0.1, "AP_small": 0.0}
LINES = [FIRST, SECOND]


class Page(html.parser.HTMLParser):
    """Parser of a page; rejects tags that do not match."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag and self.open[-1] in ("td", "tr", "p", "li"):
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "

    def pictures(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in self.links]


def test_a_classifiers_report(classifier_run: Path, colours: Path, tmp_path: Path) -> None:
    page = Page(write_report(classifier_run, tmp_path / "deep" / "report.html", split="test"))
    predictor, _ = checkpoint_predictor(load_checkpoint(classifier_run))
    metrics = evaluate(predictor, load_split(colours, "image-classification", "test"))
    assert f"{100 * metrics['top1']:.1f} %" in page.text
    for words in (
        "colours",
        "vit",
        "6 of 6",
        "Training loss",
        "Validation accuracy",
        "Confusion matrix",
        "Calibration",
    ):
        assert words in page.text
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "://" not in page.source


def test_a_detectors_report(detector_run: Path, tmp_path: Path) -> None:
    page = Page(write_report(detector_run, tmp_path / "report.html"))
    for words in ("Average precision by label", "Precision over recall", "objects missed", "red", "green", "blue"):
        assert words in page.text
    assert 1 <= len(page.pictures()) <= 12
    assert all(max(picture.size) <= 520 for picture in page.pictures())
    assert page.source.count('class="mark missed"') > 0


def test_it_is_written_to_the_run_and_evaluates_the_held_out_images(classifier_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(classifier_run, tmp_path / "run")
    assert write_report(run) == run / "report.html"
    assert "held out of train" in Page(run / "report.html").text


def test_without_metrics_there_are_no_curves(classifier_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(classifier_run, tmp_path / "run")
    (run / METRICS_FILE).unlink()
    text = Page(write_report(run)).text
    assert "Training loss" not in text
    assert "Confusion matrix" in text


def imported(run: Path, out: Path, **changes: object) -> Path:
    """A run's weights, saved as if imported."""
    out.mkdir()
    origin = Origin("published.safetensors", "0" * 64, "timm", [], [])
    checkpoint = replace(load_checkpoint(run), progress=None, origin=origin)
    save_checkpoint(replace(checkpoint, **changes), out)
    return out


def test_an_imported_runs_report(classifier_run: Path, colours: Path, tmp_path: Path) -> None:
    run = imported(classifier_run, tmp_path / "imported", temperature=2.0)
    with pytest.raises(DataError, match="it was imported and has no data set; pass --data"):
        write_report(run)
    text = Page(write_report(run, data_path=colours, split="test")).text
    assert "published.safetensors" in text
    assert "With temperature 2, as served" in text
    assert "Training loss" not in text


def test_labels_are_escaped(classifier_run: Path, colours: Path, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&\"'"
    data = tmp_path / "colours"
    shutil.copytree(colours / "test", data / "test")
    checkpoint = load_checkpoint(classifier_run)
    labels = ["<b onload=x>", *checkpoint.labels[1:]]
    (data / "test" / checkpoint.labels[0]).rename(data / "test" / labels[0])
    origin = Origin(bad, "0" * 64, "timm", [], [])
    run = imported(classifier_run, tmp_path / "imported", labels=labels, origin=origin)
    page = Page(write_report(run, data_path=data, split="test"))
    assert bad in page.text
    assert labels[0] in page.text
    assert "<b onload" not in page.source
    assert "<script" not in page.source


def test_many_labels(classifier_run: Path, tmp_path: Path) -> None:
    """Above 30 labels, confusions are listed instead of the matrix."""
    checkpoint = load_checkpoint(classifier_run)
    labels = [f"label {i:02}" for i in range(40)]
    for label in labels:
        folder = tmp_path / "data" / "val" / label
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16), (int(label[-2:]) * 6, 90, 30)).save(folder / "0.png")
    weights = {
        name: tensor.repeat(14, *[1] * (tensor.ndim - 1))[:40] if name.startswith("head.") else tensor
        for name, tensor in checkpoint.weights.items()
    }
    run = imported(classifier_run, tmp_path / "imported", labels=labels, weights=weights)
    text = Page(write_report(run, data_path=tmp_path / "data")).text
    assert "Weakest classes" in text
    assert "Confusion matrix" not in text


def test_no_run_and_no_place_to_write(classifier_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a run"):
        write_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the report could not be written"):
        write_report(classifier_run, tmp_path / "file" / "report.html")


def test_curves_separate_loss_terms_and_metrics() -> None:
    drawn = {chart.title: [curve.name for curve in chart.curves] for chart in learning_curves(LINES)}
    assert drawn == {
        "Training loss": ["loss"],
        "Parts of the loss": ["class", "l1"],
        "Validation average precision": ["AP", "AP50"],
        "Learning rate": ["lr"],
    }
    assert learning_curves([]) == []


@pytest.mark.parametrize("broken", ["", '{"epoch": 3, "lo', "[1]", '{"loss": 1}', "NaN"])
def test_lines_that_a_crash_cut_off_are_left_out(broken: str, tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text("".join(json.dumps(line) + "\n" for line in [LINES[1], *LINES]) + broken)
    assert read_metrics(file) == LINES
    assert read_metrics(tmp_path / "none") == []


def test_the_command(detector_run: Path, tmp_path: Path, run_vitrine: Callable[..., str]) -> None:
    out = tmp_path / "report.html"
    assert f"report: {out}" in run_vitrine("report", detector_run, "--out", out, "--split", "test")
    assert out.is_file()


@pytest.mark.parametrize(
    ("seconds", "duration", "per_epoch"),
    [(80.0, "80 s", "20 s"), (480.0, "8 min", "2 min"), (7200.0, "2.0 h", "30 min")],
)
def test_the_facts_of_a_run(
    seconds: float, duration: str, per_epoch: str, classifier_run: Path, colours: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(classifier_run)
    assert checkpoint.progress is not None
    progress = replace(checkpoint.progress, epoch=4, seconds=seconds)
    for temperature, shown in ((1.0, "1 (not calibrated)"), (1.25, "1.25")):
        run = tmp_path / str(temperature)
        run.mkdir()
        save_checkpoint(replace(checkpoint, progress=progress, temperature=temperature), run)
        lines = [{**FIRST, "epoch": i + 1, "images_per_second": rate} for i, rate in enumerate((90.0, 1e6, 110.0))]
        (run / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        text = " ".join(Page(write_report(run, data_path=colours, split="test")).text.split())
        for fact in (
            f"Epochs 4 of {progress.recipe['epochs']}",
            f"Training time {duration}",
            f"Time per epoch {per_epoch}",
            "Training speed 110 images/s",
            f"Temperature {shown}",
        ):
            assert fact in text
