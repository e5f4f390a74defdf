import copy
from typing import Any

import pytest
from pydantic import ValidationError

from vitrine.bundle.manifest import MAIN_METRIC, ClassificationPreprocessing, DetectionPreprocessing, Manifest, Task

CHANNELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
CLASSIFICATION = {"task": "image-classification", "input_size": [32, 32], **CHANNELS}
DETECTION = {"task": "object-detection", "shortest_edge": 240, "longest_edge": 320, **CHANNELS}
SHA = "0" * 64
VALID: dict[str, Any] = {
    "schema_version": 2,
    "name": "pets",
    "version": "1",
    "description": "Cats and dogs.",
    "architecture": "vit",
    "task": "image-classification",
    "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": ["batch", 32, 32, 3]}],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": ["batch", 2]}],
    "preprocessing": CLASSIFICATION,
    "labels": ["cat", "dog"],
    "metrics": {"data": "pets", "split": "test", "images": 10, "values": {"top1": 0.9}},
    "parity": {
        "data": "pets",
        "images": 10,
        "max_abs_diff": {"probabilities": 1e-6},
        "max_rel_diff": {"probabilities": 1e-5},
        "top1_agreement": 1.0,
    },
    "variants": {"fp32": {}},
    "default_reason": "It is the only variant.",
    "licences": {"weights": "Apache-2.0", "data": "MIT"},
    "provenance": {
        "training": {
            "recipe": "vit_cifar10",
            "recipe_settings": {"lr": 0.001, "model.stem": "conv"},
            "epochs": 1,
            "seed": 0,
            "seconds": 1.5,
        },
        "architecture_config": {"depth": 6},
        "parameters": 1000,
        "git_commit": "unknown",
        "torch": "2",
        "onnx": "1",
        "opset": 18,
        "checkpoint_sha256": SHA,
    },
    "files": {"model.onnx": {"sha256": SHA, "size": 1}, "golden.npz": {"sha256": SHA, "size": 1}},
}


def changed(place: str, value: object) -> dict[str, Any]:
    """Return VALID with one value changed; `place` is a dotted path, or "files:" and a file name."""
    document = copy.deepcopy(VALID)
    keys = ["files", place.removeprefix("files:")] if place.startswith("files:") else place.split(".")
    target = document
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    return document


def test_round_trip() -> None:
    manifest = Manifest.model_validate(VALID)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Manifest.model_validate(VALID).name = "other"


@pytest.mark.parametrize(
    ("preprocessing", "task", "kind"),
    [
        (CLASSIFICATION, Task.CLASSIFICATION, ClassificationPreprocessing),
        (DETECTION, Task.DETECTION, DetectionPreprocessing),
    ],
)
def test_preprocessing_is_chosen_by_task(preprocessing: dict[str, Any], task: Task, kind: type) -> None:
    metrics = {**VALID["metrics"], "values": {"top1": 0.5, "AP50": 0.5}}
    manifest = Manifest.model_validate({**VALID, "task": task, "preprocessing": preprocessing, "metrics": metrics})
    assert type(manifest.preprocessing) is kind


@pytest.mark.parametrize("task", list(Task))
def test_the_main_metric_is_required(task: Task) -> None:
    preprocessing = {Task.CLASSIFICATION: CLASSIFICATION, Task.DETECTION: DETECTION}[task]
    metrics = {**VALID["metrics"], "values": {"top5": 0.5}}
    with pytest.raises(ValidationError, match=f"metrics: {MAIN_METRIC[task]} is not among top5"):
        Manifest.model_validate({**VALID, "task": task, "preprocessing": preprocessing, "metrics": metrics})


@pytest.mark.parametrize("name", ["a", "vit-cifar10", "0", "a.b_c", "a" * 64])
def test_names(name: str) -> None:
    assert Manifest.model_validate(changed("name", name)).name == name


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("colour", "red", "colour\n  Extra inputs"),
        ("metrics.f1", 0.5, r"metrics.f1\n  Extra inputs"),
        ("preprocessing.shortest_edge", 240, r"shortest_edge\n  Extra inputs"),
        ("schema_version", 1, "schema_version\n  Input should be 2"),
        *[("name", name, "name\n  String should match") for name in ("", "A", "a b", "../a", ".a", "a\n", "a" * 65)],
        *[("version", v, "version\n  String should match") for v in ("", "0", "01", "1.0", "v1", "-1", "1\n")],
        ("version", 1, "version\n  Input should be a valid string"),
        ("task", "segmentation", "task\n  Input should be 'image-classification' or 'object-detection'"),
        ("task", "object-detection", "preprocessing is for image-classification, the bundle for object-detection"),
        ("preprocessing", DETECTION, "preprocessing is for object-detection, the bundle for image-classification"),
        ("preprocessing", {**CLASSIFICATION, "task": "other"}, "'other' found using 'task'"),
        ("preprocessing", CHANNELS, "Unable to extract tag using discriminator 'task'"),
        ("preprocessing.input_size", [0, 32], "input_size.0\n  Input should be greater than or equal to 1"),
        ("preprocessing.crop_pct", 0, "greater than 0"),
        ("preprocessing.crop_pct", 1.01, "less than or equal to 1"),
        ("preprocessing.crop_mode", "border", "'center' or 'squash'"),
        ("preprocessing.interpolation", "nearest", "'bilinear' or 'bicubic'"),
        ("preprocessing.mean", [0.5, 0.5], r"mean.2\n  Field required"),
        ("preprocessing.std", [0.5, 0.5, float("nan")], "finite number"),
        ("labels", [], "at least 1 item"),
        ("labels", ["cat", "cat"], "labels are not unique"),
        ("metrics.images", 0, "metrics.images\n  Input should be greater"),
        ("metrics.values", {"top1": float("inf")}, "finite number"),
        ("inputs", [{"name": "x", "datatype": "FP16", "shape": [1]}], "'UINT8', 'INT64' or 'FP32'"),
        ("files", {"golden.npz": {"sha256": SHA, "size": 1}}, "model.onnx is not listed"),
        ("files", {"model.onnx": {"sha256": SHA, "size": 1}}, "golden.npz is not listed"),
        ("files:README.md", {"sha256": "abc", "size": 1}, "sha256\n  String should match"),
        ("files:README.md", {"sha256": SHA, "size": -1}, "size\n  Input should be greater"),
        *[
            (f"files:{name}", {"sha256": SHA, "size": 1}, "is not the name of a file beside the manifest")
            for name in ("../secret", "/etc/passwd", "a/b", "", ".", "..", "manifest.json")
        ],
    ],
)
def test_errors_name_the_field_and_the_reason(place: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(changed(place, value))


@pytest.mark.parametrize("field", sorted(VALID.keys() - {"schema_version", "metrics"}))
def test_required_fields(field: str) -> None:
    document = {key: value for key, value in VALID.items() if key != field}
    with pytest.raises(ValidationError, match=f"{field}\n  Field required"):
        Manifest.model_validate(document)


def test_accuracy_may_be_unmeasured() -> None:
    document = {key: value for key, value in VALID.items() if key != "metrics"}
    assert Manifest.model_validate(document).metrics is None


def test_calibration_is_optional() -> None:
    assert "calibration" not in VALID
    assert Manifest.model_validate(VALID).calibration is None
    measured = {"temperature": 0.7, "offset": -0.5, "ece_before": 0.08, "ece_after": 0.02}
    for calibration in ({"temperature": 1.5}, measured):
        manifest = Manifest.model_validate({**VALID, "calibration": calibration})
        assert manifest.calibration is not None
        assert manifest.calibration.model_dump(exclude_unset=True) == calibration


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {}, {"temperature": 1, "ece_after": 1.1}])
def test_calibration_is_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="calibration"):
        Manifest.model_validate({**VALID, "calibration": wrong})


def test_weights_are_trained_or_imported() -> None:
    origin = {"file": "vit.npz", "sha256": SHA, "layout": "Google's ViT (.npz)", "arguments": ["image_size=384"]}
    imported = {**VALID["provenance"], "training": None, "imported": origin}
    assert Manifest.model_validate({**VALID, "provenance": imported}).provenance.training is None
    neither = {key: value for key, value in imported.items() if key != "imported"}
    with pytest.raises(ValidationError, match="neither training nor imported is given"):
        Manifest.model_validate({**VALID, "provenance": neither})


def test_detection_edges_in_order() -> None:
    with pytest.raises(ValidationError, match="longest_edge 200 is below shortest_edge 240"):
        DetectionPreprocessing.model_validate({**DETECTION, "longest_edge": 200})
