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
    """A copy of a real bundle that a test may spoil."""
    path = tmp_path / request.param / "1"
    shutil.copytree(tiny_bundles / request.param / "1", path)
    return path


def change(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def rehash(path: Path, name: str) -> None:
    """Write the hash that `name` now has into the manifest, as somebody who tampers would."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hash_file(path / name), "size": (path / name).stat().st_size}
    change(path, files=files)


def test_a_real_bundle_loads(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.manifest.labels == loaded.predictor.labels == ("blue", "green", "red")


def test_bundles_are_found_by_name_and_ascending_version(tmp_path: Path) -> None:
    for place in ("b/1", "a/10", "a/9", "a/2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").touch()
    (tmp_path / "c" / "1").mkdir(parents=True)  # no manifest, no bundle
    assert [str(path.relative_to(tmp_path)) for path in find_bundles(tmp_path)] == ["a/2", "a/9", "a/10", "b/1"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}', "\xff"])
def test_a_manifest_that_is_none(content: str, bundle: Path) -> None:
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
def test_a_manifest_of_something_else(fields: dict[str, Any], message: str, bundle: Path) -> None:
    change(bundle, **fields)
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
    change(bundle, inputs=[{**inputs[0], "name": "image"}, *inputs[1:]])
    with pytest.raises(BundleError, match=r"model.onnx: inputs: expected .*image.* found .*pixels"):
        load_bundle(bundle)


def test_golden_answers_that_are_not_the_graphs(bundle: Path) -> None:
    golden = dict(np.load(bundle / "golden.npz"))
    first = read_manifest(bundle).outputs[0].name
    np.savez_compressed(bundle / "golden.npz", **{**golden, first: golden[first] + np.float32(0.01)})
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=f"{first}: expected the golden answer to within 0.001, found a difference"):
        load_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_golden_sample_that_cannot_be_read(content: bytes, bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(content)
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: arrays: expected pixels"):
        load_bundle(bundle)


def test_every_variant_loads_and_one_that_is_not_there_is_refused(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert set(manifest.variants) == {Precision.FP32, Precision.FP16_WEIGHTS, Precision.INT8_DYNAMIC}
    for variant in manifest.variants:
        assert load_bundle(bundle, variant=variant).manifest == manifest
    with pytest.raises(
        BundleError, match=r"variants: expected one of fp32, fp16-weights, int8-dynamic, found int8-static"
    ):
        load_bundle(bundle, variant=Precision.INT8_STATIC)


def test_a_variant_with_other_answers_is_refused(bundle: Path) -> None:
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


def test_one_file_alone_answers_what_its_bundle_answers(bundle: Path, tmp_path: Path) -> None:
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


def test_a_file_that_says_nothing_or_something_else_is_refused(bundle: Path, tmp_path: Path) -> None:
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
