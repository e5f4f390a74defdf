"""Cards of the tiny bundles, and of modified manifests: all that is in the manifest, and no more."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitrine.bundle.images import decode
from vitrine.bundle.loading import load_bundle, read_manifest
from vitrine.bundle.manifest import (
    Calibration,
    ClassificationPreprocessing,
    Explanation,
    Import,
    Latency,
    LatencyRow,
    Manifest,
    Precision,
    ScoreThreshold,
    Start,
    Variant,
)
from vitrine.bundle.predictors import Classifier
from vitrine.export.model_card import model_card

SHA = "a" * 64
IMPORTED = Import(
    file="vit.safetensors", sha256=SHA, layout="timm", arguments=("--reset-head", "--labels", "my labels")
)


@pytest.fixture(scope="module")
def manifest(tiny_bundles: Path) -> Manifest:
    """Manifest of a classifier."""
    return read_manifest(tiny_bundles / "colours" / "1")


@pytest.fixture(scope="module")
def detector(tiny_bundles: Path) -> Manifest:
    return read_manifest(tiny_bundles / "squares" / "1")


def changed(manifest: Manifest, *, training: dict[str, Any] | None = None, **provenance: Any) -> Manifest:
    trained = manifest.provenance.training
    assert trained is not None
    own = manifest.provenance.model_copy(update={"training": trained.model_copy(update=training or {}), **provenance})
    return Manifest.model_validate(manifest.model_copy(update={"provenance": own}).model_dump())


def with_metrics(manifest: Manifest, **metrics: Any) -> Manifest:
    assert manifest.metrics is not None
    return manifest.model_copy(update={"metrics": manifest.metrics.model_copy(update=metrics)})


def commands(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("vitrine ") and "explain" not in line]


def rows(card: str) -> list[list[str]]:
    """The cells of all tables."""
    return [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ") and "---" not in line]


def test_every_section_of_a_classifier(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert re.findall(r"^## (.*)", card, flags=re.MULTILINE) == [
        "Measured",
        "ONNX against torch",
        "Variants",
        "Explanations",
        "Limits",
        "Reproduce",
        "Use",
    ]
    assert re.findall(r"!\[.*\]\((.*)\)", card) == ["samples.jpg", "reliability.svg"]


def test_pictures_that_the_bundle_lacks_are_not_shown(manifest: Manifest) -> None:
    files = {name: file for name, file in manifest.files.items() if name.endswith((".onnx", ".npz"))}
    assert "![" not in model_card(manifest.model_copy(update={"files": files}))


def test_without_data_nothing_is_measured(manifest: Manifest) -> None:
    parity = manifest.parity.model_copy(update={"data": "generated", "torch_metrics": None})
    update = {"metrics": None, "variants": {Precision.FP32: Variant()}, "parity": parity, "explanation": None}
    card = model_card(manifest.model_copy(update=update))
    assert "Its accuracy was not measured here" in card
    assert rows(card) == []
    assert "Variants" not in card
    assert "Explanations" not in card
    assert "generated images in batches of 1, 3 and 8" in card
    assert "in torch" not in card


def test_metrics_are_listed_with_their_intervals(manifest: Manifest) -> None:
    values = {"top1": 0.5, "ECE": 0.031, "NLL": 1.25, "own": 0.1}
    card = model_card(with_metrics(manifest, values=values, intervals={"top1": (0.4, 0.61), "NLL": (1.0, 1.5)}))
    assert rows(card)[1:5] == [
        ["top-1 accuracy", "50.00%", "40.00% to 61.00%"],
        ["expected calibration error (ECE)", "3.10%", ""],
        ["negative log-likelihood (nats)", "1.250", "1.000 to 1.500"],
        ["own", "10.00%", ""],
    ]
    assert "The intervals show" in card
    assert "The intervals show" not in model_card(with_metrics(manifest, intervals={}))


def test_a_detector_has_a_table_of_its_labels(detector: Manifest) -> None:
    labels = ("small", "cat|dog", "rare")
    values = {
        "AP": 0.5,
        "AP50": 0.7,
        "AP_small": 0.1,
        "AP_label_small": 0.2,
        "AP50_small": 0.3,
        "AP_cat|dog": 0.4,
        "AP50_cat|dog": 0.6,
    }
    named = with_metrics(detector, values=values, intervals={"AP_cat|dog": (0.3, 0.5)}).model_copy(
        update={"labels": labels}
    )
    card = model_card(named)
    assert rows(card)[:7] == [
        ["metric", "value", "95 % interval"],
        ["AP (IoU 0.50:0.95)", "50.00%", ""],
        ["AP50", "70.00%", ""],
        ["AP, small objects", "10.00%", ""],
        ["label", "AP", "95 % interval", "AP50", "95 % interval"],
        ["small", "20.00%", "", "30.00%", ""],
        ["cat\\|dog", "40.00%", "30.00% to 50.00%", "60.00%", ""],
    ]


def test_confusion_is_a_table_of_few_labels_and_the_frequent_pairs(manifest: Manifest) -> None:
    confused = with_metrics(manifest, confusion=((9, 3, 0), (0, 12, 0), (1, 0, 11)))
    card = model_card(confused)
    assert ["red", "1", "0", "11"] in rows(card)
    assert "Most often confused: blue for green (3, 25.0% of them); red for blue (1, 8.3% of them)." in card
    perfect = with_metrics(manifest, confusion=((12, 0, 0), (0, 12, 0), (0, 0, 12)))
    assert "No image is misclassified." in model_card(perfect)


def test_confusion_of_many_labels_lists_pairs_only(manifest: Manifest) -> None:
    labels = tuple(f"label{i}" for i in range(13))
    confusion = tuple(tuple(5 if i == j else int(j == (i + 1) % 13) for j in range(13)) for i in range(13))
    card = model_card(with_metrics(manifest, confusion=confusion).model_copy(update={"labels": labels}))
    assert card.count(" of them)") == 10
    assert "rows" not in card


def test_calibration(manifest: Manifest) -> None:
    assert "temperature" not in model_card(manifest.model_copy(update={"calibration": None}))
    without = manifest.model_copy(update={"metrics": None, "calibration": Calibration(temperature=1.2345)})
    assert "by the temperature 1.23, fitted on held-out images" in model_card(without)
    assert "calibration error" not in model_card(without)
    calibration = Calibration(temperature=0.5, ece_before=0.081, ece_after=0.0123)
    assert "The expected calibration error is 1.23%, without the temperature 8.10%." in model_card(
        manifest.model_copy(update={"calibration": calibration})
    )


def test_calibration_of_scores(detector: Manifest) -> None:
    calibration = Calibration(temperature=0.5, offset=-1.25, ece_before=0.081, ece_after=0.0123)
    card = model_card(detector.model_copy(update={"calibration": calibration}))
    assert "divides the logits of its scores by 0.5 and adds -1.25, fitted on held-out images" in card
    assert "The expected calibration error is 1.23%, without this 8.10%." in card


def test_thresholds_of_a_detector(detector: Manifest) -> None:
    points = (
        ScoreThreshold(score=0.1, precision=0.5, recall=0.91),
        ScoreThreshold(score=0.372, precision=0.8, recall=0.75, best_f1=True),
    )
    card = model_card(with_metrics(detector, thresholds=points))
    assert "`threshold=0.37` balances both" in card
    assert ["0.10", "50.0%", "91.0%"] in rows(card)
    assert ["0.37 (best F1)", "80.0%", "75.0%"] in rows(card)
    assert "threshold=" not in model_card(with_metrics(detector, thresholds=None))


def test_parity_in_numbers_and_in_the_metric(manifest: Manifest) -> None:
    update = {"max_abs_diff": {"probabilities": 2e-6}, "max_rel_diff": {"probabilities": 3e-5}, "top1_agreement": 1.0}
    update["torch_metrics"] = {"top1": 0.5}
    card = model_card(
        with_metrics(manifest, values={"top1": 0.75}).model_copy(
            update={"parity": manifest.parity.model_copy(update=update)}
        )
    )
    assert "largest difference probabilities 2.0e-06 (relative 3.0e-05); same class in 100.00%." in card
    assert "top-1 accuracy is 75.00%, in torch 50.00%." in card


def test_variants_say_what_they_lose(manifest: Manifest) -> None:
    assert manifest.metrics is not None
    top1 = manifest.metrics.values["top1"]
    variants = {
        Precision.FP32: Variant(),
        Precision.FP16_WEIGHTS: Variant(metrics={"top1": top1}, drop=0.0, agreement=1.0),
        Precision.INT8_DYNAMIC: Variant(metrics={"top1": 0.5}, drop=1.234, agreement=0.9, float_layers=("head", "fc")),
    }
    update = {"variants": variants, "default_variant": Precision.INT8_DYNAMIC, "default_reason": "It is small."}
    card = model_card(manifest.model_copy(update=update))
    half = f"{manifest.files['model.fp16-weights.onnx'].size / 1e6:.2f} MB"
    fp32, fp16_weights, int8_dynamic = rows(card)[-3:]
    assert fp32[3:] == [f"{top1:.2%}", "", "", ""]
    assert fp16_weights[1:] == ["`model.fp16-weights.onnx`", half, f"{top1:.2%}", "+0.00", "100.00%", ""]
    assert int8_dynamic[3:] == ["50.00%", "-1.23", "90.00%", "`head`, `fc`"]
    assert "Default variant: `int8-dynamic`. It is small." in card
    export = card[card.index("vitrine export") :]
    assert (
        "--variant fp16-weights \\\n    --variant int8-dynamic \\\n    --max-drop 1.3 \\\n    --default int8-" in export
    )


def test_speed_has_a_column_for_each_setting(manifest: Manifest) -> None:
    slow = LatencyRow(name="torch", size=None, milliseconds=(3.14159, 1234.5))
    fast = LatencyRow(name="model.onnx", size=1_500_000, milliseconds=(1.0, 99.94))
    latency = Latency(machine="a machine", input_size=(16, 20), settings=((1, 1), (8, 2)), rows=(slow, fast))
    card = model_card(manifest.model_copy(update={"latency": latency}))
    assert "Milliseconds per call on 16 x 20 pixels, medians of interleaved calls, on a machine:" in card
    assert rows(card)[-3:] == [
        ["", "file", "batch 1, 1 thread", "batch 8, 2 threads"],
        ["torch", "", "3.14", "1,234"],
        ["model.onnx", "1.50 MB", "1.00", "99.9"],
    ]


def test_card_describes_occlusion_without_attention(manifest: Manifest) -> None:
    card = model_card(manifest.model_copy(update={"explanation": Explanation(method="occlusion", patch_size=4)}))
    assert "Patches of 4 pixels are occluded one at a time" in card
    assert "explain.onnx" not in card


def test_from_random_weights(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert "was trained on `colours` alone, from random weights." in card
    assert [command.split()[1] for command in commands(card)] == ["train", "export"]
    assert "--from" not in card


def test_from_an_imported_run(manifest: Manifest) -> None:
    start = Start(run="published", checkpoint_sha256=SHA)
    card = model_card(changed(manifest, training={"start": start}, imported=IMPORTED))
    first, second, _ = commands(card)
    assert first == "vitrine import vit.safetensors --reset-head --labels 'my labels' --out runs/published"
    assert second.startswith("vitrine train vit_cifar10 --data DATA/colours --out runs/colours --from runs/published")
    assert "was trained on `colours`, from imported weights." in card


def test_from_another_run(manifest: Manifest) -> None:
    card = model_card(changed(manifest, training={"start": Start(run="my first", checkpoint_sha256=SHA)}))
    assert "--from 'runs/my first'" in commands(card)[0]
    assert f"Started from the run `my first` (checkpoint's SHA-256 `{SHA}`)" in card
    assert "was trained on `colours`, from the weights of the run `my first`." in card


@pytest.mark.parametrize("update", [{}, {"crop_pct": 0.875}, {"crop_mode": "squash"}, {"interpolation": "bicubic"}])
def test_ten_lines_predict_what_is_served(
    update: dict[str, Any], manifest: Manifest, tiny_bundles: Path, photograph: bytes, tmp_path: Path
) -> None:
    preprocessing = ClassificationPreprocessing.model_validate(manifest.preprocessing.model_dump() | update)
    card = model_card(manifest.model_copy(update={"preprocessing": preprocessing}))
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    shutil.copy(tiny_bundles / "colours" / "1" / "model.onnx", tmp_path)
    (tmp_path / "photo.jpg").write_bytes(photograph)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    served = load_bundle(tiny_bundles / "colours" / "1").predictor
    assert isinstance(served, Classifier)
    expected = Classifier(served.network, preprocessing, manifest.labels).classify(decode(photograph))
    for line, prediction in zip(done.stdout.splitlines(), expected, strict=True):
        label, probability = line.split()
        assert (label, float(probability)) == (prediction.label, pytest.approx(prediction.probability, abs=0.01))


def test_ten_lines_find_what_is_served(
    detector: Manifest, tiny_bundles: Path, photograph: bytes, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", model_card(detector), flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    shutil.copy(tiny_bundles / "squares" / "1" / "model.onnx", tmp_path)
    (tmp_path / "photo.jpg").write_bytes(photograph)
    code = code.replace(">= 0.5", ">= 0")  # the tiny detector's scores are low
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = load_bundle(tiny_bundles / "squares" / "1").predictor.detect(decode(photograph), threshold=0)
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(entry.label for entry in found)
