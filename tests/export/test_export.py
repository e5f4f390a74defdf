"""`vitrine export`, `verify` and `evaluate` on tiny trained runs: the bundle is correct, or not written."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from vitrine.bundle.errors import BundleError
from vitrine.bundle.images import decode
from vitrine.bundle.loading import find_bundles, load_bundle, read_golden, read_manifest
from vitrine.bundle.manifest import Precision, Variant
from vitrine.bundle.predictors import Classifier
from vitrine.export.errors import AccuracyError, ExportError
from vitrine.export.export import export_run
from vitrine.export.inputs import make_inputs
from vitrine.models.training.checkpoint import Origin, load_checkpoint, save_checkpoint
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.evaluation.calibration import apply_temperature
from vitrine.models.training.evaluation.metrics import ClassificationPredictions, evaluate, measure, predict
from vitrine.models.training.network import checkpoint_predictor
from vitrine.models.training.registry import load_recipe

Run = Callable[..., str]
ORIGIN = Origin("published.safetensors", "0" * 64, "timm", [], [])


def test_the_bundle_holds_what_the_contract_lists(tiny_bundles: Path) -> None:
    for name in ("colours", "squares"):
        path = tiny_bundles / name / "1"
        expected = {
            "README.md",
            "explain.onnx",
            "golden.npz",
            "manifest.json",
            "model.onnx",
            "model.fp16-weights.onnx",
            "model.int8-dynamic.onnx",
            "reliability.svg",
            "samples.jpg",
        }
        assert {file.name for file in path.iterdir()} == expected
        assert read_manifest(path).files.keys() == expected - {"README.md", "manifest.json"}
    assert {entry.name for entry in tiny_bundles.iterdir()} == {"colours", "squares"}  # nothing partial is left


def test_the_manifest_is_readable_in_a_diff(tiny_bundles: Path) -> None:
    text = (tiny_bundles / "squares" / "1" / "manifest.json").read_text()
    assert '"shape": ["batch", "height", "width", 3]' in text
    assert '"labels": ["blue", "green", "red"]' in text
    assert max(map(len, text.splitlines())) < 200


def test_variants_are_measured(tiny_bundles: Path, colours: Path, squares: Path) -> None:
    for name, data, metric in (("colours", colours, "top1"), ("squares", squares, "AP")):
        path = tiny_bundles / name / "1"
        manifest = read_manifest(path)
        assert manifest.metrics is not None
        assert (manifest.default_variant, manifest.default_reason) == (Precision.FP32, "Its outputs match torch's.")
        for precision, variant in manifest.variants.items():
            if precision is Precision.FP32:
                assert variant == Variant()
                continue
            split = load_split(data, manifest.task, "test")
            values = measure(predict(load_bundle(path, variant=precision).predictor, split), split)
            assert variant.metrics == values
            assert variant.drop == pytest.approx(100 * (manifest.metrics.values[metric] - values[metric]), abs=1e-3)
            assert 0.5 < variant.agreement <= 1
            assert manifest.files[precision.file].size < manifest.files["model.onnx"].size


def test_torch_and_onnx_are_equally_accurate(tiny_bundles: Path) -> None:
    for name, metric in (("colours", "top1"), ("squares", "AP")):
        manifest = read_manifest(tiny_bundles / name / "1")
        assert manifest.parity.torch_metrics[metric] == pytest.approx(manifest.metrics.values[metric], abs=5e-3)


def test_a_variant_that_loses_too_much_fails_the_export(classifier_run: Path, tmp_path: Path, run_vitrine: Run) -> None:
    """A drop below -101 points is impossible."""
    with pytest.raises(AccuracyError, match=r"fp16-weights: top1: expected at most -101 points below fp32, found -?\d"):
        export_run(classifier_run, tmp_path / "colours" / "1", variants=[Precision.FP16_WEIGHTS], max_drop=-101)
    assert list(tmp_path.iterdir()) == []


def test_another_default_is_recorded_and_served(classifier_run: Path, tmp_path: Path, run_vitrine: Run) -> None:
    out = tmp_path / "colours" / "1"
    options = ("--variant", "int8-dynamic", "--default", "int8-dynamic", "--max-drop", "20", "--latency", "own")
    run_vitrine("export", classifier_run, "--out", out, *options)
    manifest = read_manifest(out)
    assert manifest.default_reason.startswith("It was chosen at export; it loses ")
    golden = np.load(out / "golden.npz")
    (served_by_default,) = load_bundle(out).predictor.network(pixels=golden["pixels"])
    np.testing.assert_allclose(served_by_default, golden["int8-dynamic.probabilities"], atol=1e-3)
    assert [row.name for row in manifest.latency.rows][:3] == ["torch", "model.onnx", "model.int8-dynamic.onnx"]
    card = (out / "README.md").read_text()
    assert "--default int8-dynamic" in card
    assert "| model.int8-dynamic.onnx |" in card
    printed = run_vitrine("export", classifier_run, "--out", tmp_path / "b" / "1", "--default", "int8-static", status=1)
    assert "default variant: expected one of fp32, found int8-static" in printed


def test_labels_that_do_not_fit_the_head_are_refused(classifier_run: Path, tmp_path: Path, run_vitrine: Run) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = load_checkpoint(classifier_run)
    save_checkpoint(replace(checkpoint, labels=[*checkpoint.labels, "violet"], progress=None, origin=ORIGIN), run)
    printed = run_vitrine("export", run, "--out", tmp_path / "bundles" / "a" / "1", status=1)
    assert "weights: expected those of vit with 4 labels, found otherwise: size mismatch for head.weight" in printed
    assert not (tmp_path / "bundles").exists()


def test_variants_of_an_imported_run_need_data(classifier_run: Path, colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(replace(load_checkpoint(classifier_run), progress=None, origin=ORIGIN), run)
    variants = [Precision.INT8_DYNAMIC]
    with pytest.raises(ExportError, match="int8-dynamic: expected --data, on which to measure what the variants lose"):
        export_run(run, tmp_path / "bundles" / "a" / "1", variants=variants)
    manifest = export_run(run, tmp_path / "bundles" / "a" / "1", variants=variants, max_drop=20, data_path=colours)
    assert manifest.variants[Precision.INT8_DYNAMIC].metrics is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_export_leaves_no_partial_bundle(
    number: signal.Signals, classifier_run: Path, tmp_path: Path
) -> None:
    bundles = tmp_path / "bundles"
    command = [sys.executable, "-m", "vitrine", "export", str(classifier_run), "--out", str(bundles / "colours" / "1")]
    process = subprocess.Popen(command)
    while not list(bundles.glob(".export-*/colours/1/model.onnx")):
        with pytest.raises(subprocess.TimeoutExpired):  # still running
            process.wait(timeout=0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == (128 + number if number is signal.SIGTERM else -number)
    assert find_bundles(bundles) == []
    assert not (bundles / "colours").exists()
    assert bool(list(bundles.iterdir())) == (number is signal.SIGKILL)


def test_verify_against_the_run_again(
    tiny_bundles: Path, classifier_run: Path, detector_run: Path, tmp_path: Path, run_vitrine: Run
) -> None:
    path = tiny_bundles / "colours" / "1"
    printed = run_vitrine("verify", path, "--run", classifier_run)
    assert "(fp32, fp16-weights, int8-dynamic, explain)" in printed
    assert "matches torch: largest difference probabilities " in printed
    printed = run_vitrine("verify", path, "--run", detector_run, status=1)
    assert f"architecture: expected that of {detector_run}, detr, found vit" in printed
    other = tmp_path / "other"
    other.mkdir()
    checkpoint = load_checkpoint(classifier_run)
    weights = {**checkpoint.weights, "blocks.1.attn.qkv.weight": 2 * checkpoint.weights["blocks.1.attn.qkv.weight"]}
    save_checkpoint(replace(checkpoint, weights=weights), other)
    printed = run_vitrine("verify", path, "--run", other, status=1)
    assert "it begins in network.blocks.1.attn.qkv (Linear)" in printed


def test_a_provider_that_is_not_there(
    tiny_bundles: Path, classifier_run: Path, tmp_path: Path, run_vitrine: Run
) -> None:
    for command in (
        ("verify", tiny_bundles / "colours" / "1"),
        ("export", classifier_run, "--out", tmp_path / "a" / "1"),
    ):
        assert "provider cuda: expected one of" in run_vitrine(*command, "--providers", "cuda,cpu", status=1)


def test_card_describes_explanations(tiny_bundles: Path, colours: Path, tmp_path: Path, run_vitrine: Run) -> None:
    bundle, image = tiny_bundles / "colours" / "1", colours / "test" / "red" / "0.png"
    printed = run_vitrine("explain", bundle, image, "--out", tmp_path / "seen.png")
    assert re.search(r"explained by .*seen\.png\n  \w+ \d+\.\d%", printed)
    assert decode((tmp_path / "seen.png").read_bytes()).size == (400, 362)
    assert "No such file" in run_vitrine("explain", bundle, tmp_path / "no.png", "--out", tmp_path / "a.png", status=1)
    assert "unknown file extension" in run_vitrine("explain", bundle, image, "--out", tmp_path / "a.xyz", status=1)


def test_a_detector_explains_from_a_point(tiny_bundles: Path, squares: Path, tmp_path: Path, run_vitrine: Run) -> None:
    command = ["explain", tiny_bundles / "squares" / "1", squares / "images" / "test0.png", "--out", tmp_path / "a.png"]
    command += ["--method", "encoder-attention"]
    assert run_vitrine(*command, "--point", 10, 20).startswith("explained by encoder-attention")
    assert "x, y: expected a pixel of the image of 80 x 72, found 80, 20" in run_vitrine(
        *command, "--point", 80, 20, status=1
    )
    assert "x, y: expected both for method=encoder-attention" in run_vitrine(*command, status=1)


def test_the_trained_network_has_learned(tiny_bundles: Path, colours: Path) -> None:
    assert read_manifest(tiny_bundles / "colours" / "1").metrics.values["top1"] > 0.8


def test_metrics_are_those_of_the_served_file(tiny_bundles: Path, colours: Path, run_vitrine: Run) -> None:
    path = tiny_bundles / "colours" / "1"
    bundle = load_bundle(path)
    data = load_split(colours, bundle.manifest.task, "test")
    assert evaluate(bundle.predictor, data) == bundle.manifest.metrics.values
    printed = run_vitrine("evaluate", path, "--data", colours)
    assert f"top1\t{bundle.manifest.metrics.values['top1']:.4f}" in printed


def test_run_and_bundle_evaluate_alike(
    classifier_run: Path, detector_run: Path, tiny_bundles: Path, colours: Path, squares: Path, run_vitrine: Run
) -> None:
    for run, name, data in ((classifier_run, "colours", colours), (detector_run, "squares", squares)):
        of_run = run_vitrine("evaluate", run, "--data", data)
        of_bundle = run_vitrine("evaluate", tiny_bundles / name / "1", "--data", data)
        assert of_run == of_bundle


def test_evaluate_json(tiny_bundles: Path, colours: Path, squares: Path, run_vitrine: Run) -> None:
    path = tiny_bundles / "colours" / "1"
    document = json.loads(run_vitrine("evaluate", path, "--data", colours, "--json"))
    assert document["metrics"] == read_manifest(path).metrics.values
    assert (document["data"], document["split"], document["images"]) == ("colours", "test", 36)
    assert document["labels"] == list(read_manifest(path).labels)
    confusion = np.array(document["confusion"])
    assert confusion.sum(axis=1).tolist() == [12, 12, 12]
    assert confusion.trace() / 36 == document["metrics"]["top1"]
    of_detector = json.loads(run_vitrine("evaluate", tiny_bundles / "squares" / "1", "--data", squares, "--json"))
    assert "confusion" not in of_detector


def test_evaluate_warns_of_random_weights(
    classifier_run: Path, colours: Path, tmp_path: Path, run_vitrine: Run
) -> None:
    origin = replace(ORIGIN, untrained=["head.weight", "head.bias"])
    run = tmp_path / "imported"
    run.mkdir()
    save_checkpoint(replace(load_checkpoint(classifier_run), progress=None, origin=origin), run)
    printed = run_vitrine("evaluate", run, "--data", colours)
    assert f"warning: {run}: head.weight, head.bias are randomly initialised: train before evaluating" in printed
    assert "top1\t" in printed


def test_the_card_says_what_the_manifest_says(tiny_bundles: Path, classifier_run: Path) -> None:
    manifest = read_manifest(tiny_bundles / "colours" / "1")
    card = (tiny_bundles / "colours" / "1" / "README.md").read_text()
    assert f"| top-1 accuracy | {manifest.metrics.values['top1']:.2%} |" in card
    command = next(line for line in card.splitlines() if line.startswith("vitrine train"))
    _, _, recipe, _, _, _, _, *settings = shlex.split(command)
    assert load_recipe(recipe, settings) == load_checkpoint(classifier_run).progress.read_recipe()


@pytest.fixture(scope="module")
def calibrated_run(classifier_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `colours` with a temperature."""
    run = tmp_path_factory.mktemp("runs") / "calibrated"
    run.mkdir()
    save_checkpoint(replace(load_checkpoint(classifier_run), temperature=2.5), run)
    return run


def test_probabilities_are_served_with_the_runs_temperature(
    calibrated_run: Path, classifier_run: Path, tiny_bundles: Path, colours: Path, tmp_path: Path
) -> None:
    manifest = export_run(calibrated_run, tmp_path / "calibrated" / "1")
    data = load_split(colours, manifest.task, "test")
    of_onnx = predict(load_bundle(tmp_path / "calibrated" / "1").predictor, data)
    of_torch = predict(checkpoint_predictor(load_checkpoint(calibrated_run))[0], data)
    fitted = predict(load_bundle(tiny_bundles / "colours" / "1").predictor, data)
    for predictions in (of_onnx, of_torch, fitted):
        assert isinstance(predictions, ClassificationPredictions)
    np.testing.assert_allclose(of_onnx.probabilities, of_torch.probabilities, atol=1e-5)
    own = load_checkpoint(classifier_run).temperature  # fitted by training
    plain = replace(fitted, probabilities=apply_temperature(fitted.probabilities, 1 / own))
    np.testing.assert_allclose(of_onnx.probabilities, apply_temperature(plain.probabilities, 2.5), atol=1e-4)

    shipped, found = read_manifest(tiny_bundles / "colours" / "1"), manifest.calibration
    assert shipped.calibration.temperature == own
    assert found.temperature == 2.5
    assert found.ece_before == pytest.approx(measure(plain, data)["ECE"], abs=1e-3)
    assert found.ece_after == manifest.metrics.values["ECE"]
    assert abs(found.ece_after - found.ece_before) > 0.01
    assert manifest.metrics.values["top1"] == shipped.metrics.values["top1"]
    card = (tmp_path / "calibrated" / "1" / "README.md").read_text()
    assert "divides its logits by the temperature 2.5, fitted on held-out images" in card
    assert f"is {found.ece_after:.2%}, without the temperature {found.ece_before:.2%}." in card


def test_exporting_twice_gives_the_same_graphs(classifier_run: Path, tiny_bundles: Path, tmp_path: Path) -> None:
    """In another process, whose string hashes differ from the fixture's."""
    variants = [Precision.FP16_WEIGHTS, Precision.INT8_DYNAMIC]
    export_run(classifier_run, tmp_path / "colours" / "1", variants=variants, max_drop=20)
    for file in (tmp_path / "colours" / "1").iterdir():
        if file.name not in ("manifest.json", "README.md"):
            assert file.read_bytes() == (tiny_bundles / "colours" / "1" / file.name).read_bytes(), file.name


def test_an_existing_version_is_never_changed(classifier_run: Path, tiny_bundles: Path, run_vitrine: Run) -> None:
    printed = run_vitrine("export", classifier_run, "--out", tiny_bundles / "colours" / "1", status=1)
    assert "a version is never changed, choose the next number" in printed


@pytest.mark.parametrize("out", ["Colours/1", "colours/one", "colours/0"])
def test_a_bad_name_leaves_nothing_behind(out: str, classifier_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"name|version"):
        export_run(classifier_run, tmp_path / out)
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, run_vitrine: Run) -> None:
    printed = run_vitrine("export", tmp_path, "--out", tmp_path / "a" / "1", status=1)
    assert "expected a run with checkpoint.pt, found none" in printed


def test_verify_accepts_the_bundle_and_refuses_changed_weights(
    tiny_bundles: Path, tmp_path: Path, run_vitrine: Run
) -> None:
    assert "verified: squares 1" in run_vitrine("verify", tiny_bundles / "squares" / "1")
    path = tmp_path / "squares" / "1"
    shutil.copytree(tiny_bundles / "squares" / "1", path)
    model = onnx.load(path / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    onnx.save(model, path / "model.onnx")
    assert "size: expected" in run_vitrine("verify", path, status=1) or "sha256" in run_vitrine(
        "verify", path, status=1
    )

    # with a matching hash, the golden sample fails
    import hashlib

    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="golden answer"):
        load_bundle(path)


def test_the_golden_sample_is_real_images(tiny_bundles: Path, colours: Path) -> None:
    manifest = read_manifest(tiny_bundles / "colours" / "1")
    golden = read_golden(tiny_bundles / "colours" / "1", manifest)
    preprocessing = manifest.preprocessing
    images = [decode(data) for data in load_split(colours, manifest.task, "test").encoded[:3]]
    np.testing.assert_array_equal(golden["pixels"], make_inputs(images, preprocessing)["pixels"])
    predictor = load_bundle(tiny_bundles / "colours" / "1").predictor
    assert isinstance(predictor, Classifier)
    np.testing.assert_allclose(golden["probabilities"], predictor.probabilities(images), atol=1e-5)
