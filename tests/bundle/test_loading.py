import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vitrine.bundle.errors import BundleError
from vitrine.bundle.loading import find_bundles, hash_file, load_bundle, load_explain_network, load_file, read_manifest
from vitrine.bundle.manifest import Precision


@pytest.fixture(params=["colours", "squares"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that a test may damage."""
    path = tmp_path / request.param / "1"
    shutil.copytree(tiny_bundles / request.param / "1", path)
    return path


def edit_manifest(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def rehash(path: Path, name: str) -> None:
    """Update the hash of `name` in the manifest, as a tamperer would."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hash_file(path / name), "size": (path / name).stat().st_size}
    edit_manifest(path, files=files)


def test_a_real_bundle_loads(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.manifest.labels == loaded.predictor.labels == ("blue", "green", "red")


def test_bundles_are_found_by_name_and_ascending_version(tmp_path: Path) -> None:
    for place in ("b/1", "a/10", "a/9", "a/2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").touch()
    (tmp_path / "c" / "1").mkdir(parents=True)  # without a manifest
    assert [str(path.relative_to(tmp_path)) for path in find_bundles(tmp_path)] == ["a/2", "a/9", "a/10", "b/1"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}', "\xff"])
def test_invalid_manifests(content: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 1}, "schema_version: expected Input should be 2, found 1"),
        ({"version": "2"}, r"name, version: expected folder \w+/2, found folder \w+/1"),
        ({"labels": ["a", "b"]}, "labels: expected [0-9] labels, found 2|labels"),
        ({"colour": "blue"}, "colour: expected Extra inputs are not permitted"),
    ],
)
def test_inconsistent_manifests(fields: dict[str, Any], message: str, bundle: Path) -> None:
    edit_manifest(bundle, **fields)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_missing_or_changed_file(name: str, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: sha256: expected [0-9a-f]{{64}}, found"):
        load_bundle(bundle)
    (bundle / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name}: size: expected {len(content)}, found {len(content) - 1}"):
        load_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: file: expected .* found no such file"):
        load_bundle(bundle)


def test_a_graph_with_other_inputs(bundle: Path) -> None:
    inputs = json.loads((bundle / "manifest.json").read_text())["inputs"]
    edit_manifest(bundle, inputs=[{**inputs[0], "name": "image"}, *inputs[1:]])
    with pytest.raises(BundleError, match=r"model.onnx: inputs: expected .*image.* found .*pixels"):
        load_bundle(bundle)


def test_golden_answers_that_differ_from_the_graph(bundle: Path) -> None:
    golden = dict(np.load(bundle / "golden.npz"))
    first = read_manifest(bundle).outputs[0].name
    np.savez_compressed(bundle / "golden.npz", **{**golden, first: golden[first] + np.float32(0.01)})
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=f"{first}: expected the golden answer to within 0.001, found a difference"):
        load_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_unreadable_golden_samples(content: bytes, bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(content)
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: arrays: expected pixels"):
        load_bundle(bundle)


def test_every_variant_loads_and_a_missing_one_is_rejected(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert set(manifest.variants) == {Precision.FP32, Precision.FP16_WEIGHTS, Precision.INT8_DYNAMIC}
    for variant in manifest.variants:
        assert load_bundle(bundle, variant=variant).manifest == manifest
    with pytest.raises(
        BundleError, match=r"variants: expected one of fp32, fp16-weights, int8-dynamic, found int8-static"
    ):
        load_bundle(bundle, variant=Precision.INT8_STATIC)


def test_a_variant_with_other_answers_is_rejected(bundle: Path) -> None:
    for file, other in (("model.int8-dynamic.onnx", "model.fp16-weights.onnx"), ("explain.onnx", "model.onnx")):
        shutil.copy(bundle / other, bundle / file)
        with pytest.raises(BundleError, match=f"{file}: (size|sha256)"):
            load_bundle(bundle)
        rehash(bundle, file)
    with pytest.raises(BundleError, match=r"explain\.onnx: outputs"):
        load_explain_network(bundle)
    golden = dict(np.load(bundle / "golden.npz"))
    name = next(name for name in golden if name.startswith("int8-dynamic."))
    np.savez(bundle / "golden.npz", **{**golden, name: golden[name] + 0.2})
    rehash(bundle, "golden.npz")
    with pytest.raises(
        BundleError, match=r"model\.int8-dynamic\.onnx: \w+: expected the golden answer to within 0\.05"
    ):
        load_bundle(bundle, variant=Precision.INT8_DYNAMIC)


def test_a_single_file_gives_the_answers_of_its_bundle(bundle: Path, tmp_path: Path) -> None:
    for variant in read_manifest(bundle).variants:
        file = tmp_path / "alone.onnx"
        shutil.copy(bundle / variant.file, file)
        alone, whole = load_file(file), load_bundle(bundle, variant=variant)
        assert alone.manifest.labels == whole.manifest.labels
        assert alone.manifest.provenance == whole.manifest.provenance
        assert alone.manifest.metrics is None
        golden = np.load(bundle / "golden.npz")
        inputs = {spec.name: golden[spec.name] for spec in whole.manifest.inputs}
        for a, b in zip(alone.predictor.network(**inputs), whole.predictor.network(**inputs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_files_with_missing_or_wrong_metadata_are_rejected(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "alone.onnx"
    model = onnx.load(bundle / "model.onnx")
    identity = json.loads(model.metadata_props[0].value)
    outputs = [{**spec, "shape": ["batch", *spec["shape"][1:-1], 77]} for spec in identity["outputs"]]
    for metadata, message in (
        ({}, "metadata vitrine: expected that of a bundle's file, found Invalid JSON"),
        ({"vitrine": "{}"}, "metadata vitrine: expected that of a bundle's file, found Field required"),
        ({"vitrine": json.dumps({**identity, "outputs": outputs})}, "outputs: expected"),
    ):
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, file)
        with pytest.raises(BundleError, match=message):
            load_file(file)
