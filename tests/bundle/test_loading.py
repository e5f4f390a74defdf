import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vitrine.bundle.errors import BundleError
from vitrine.bundle.files import hash_file
from vitrine.bundle.loading import find_bundles, load_bundle, load_explain_network, load_file, read_manifest
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


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "golden.npz"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link in a circle", "empty", "huge"])
@pytest.mark.timeout(30)
def test_whatever_lies_in_a_files_place_is_refused_by_name(kind: str, name: str, bundle: Path) -> None:
    file = bundle / name
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("device", "link in a circle"):
        file.symlink_to("/dev/zero" if kind == "device" else name)
    else:
        file.touch()
        os.truncate(file, 100 * 2**30 if kind == "huge" else 0)
    for load in (load_bundle, load_explain_network):
        with pytest.raises(BundleError, match=rf"{name}: (file: expected a re|size: expected|document: expected Inv)"):
            load(bundle)


@pytest.mark.parametrize("cached", [False, True])
def test_weights_in_another_file_are_checked(cached: bool, bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path if cached else None
    model = bundle / "model.onnx"
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="weights.bin")
    edit_manifest(bundle, explanation=None)
    rehash(bundle, "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx: external data: expected weights in .*, found 'weights\.bin'"):
        load_bundle(bundle, cache=cache)
    with pytest.raises(BundleError, match=r"model\.onnx: external data: expected weights in .*, found 'weights\.bin'"):
        load_file(model, cache=cache)
    rehash(bundle, "weights.bin")
    load_bundle(bundle, cache=cache)
    weights = np.fromfile(bundle / "weights.bin", np.uint8)
    weights[len(weights) // 2] ^= 1
    weights.tofile(bundle / "weights.bin")
    with pytest.raises(BundleError, match=r"weights\.bin: sha256"):
        load_bundle(bundle, cache=cache)


@pytest.mark.parametrize(
    "location", ["../model.onnx", "{bundle}/model.onnx", "inner/../model.onnx", "", "*/_ORT_MEM_ADDR_/*"]
)
def test_weights_outside_of_the_bundle_are_refused(location: str, bundle: Path) -> None:
    location = location.format(bundle=bundle)
    graph = onnx.load(bundle / "explain.onnx", load_external_data=False)
    named = [entry for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert named
    named[-1].value = location
    onnx.save(graph, bundle / "explain.onnx")
    rehash(bundle, "explain.onnx")
    with pytest.raises(BundleError, match=r"explain\.onnx: external data: expected weights in") as refused:
        load_explain_network(bundle)
    assert repr(location) in str(refused.value)


def test_a_loaded_graph_does_not_depend_on_its_file(bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    inputs = {spec.name: np.load(bundle / "golden.npz")[spec.name] for spec in read_manifest(bundle).inputs}
    explain = load_explain_network(bundle)
    assert explain is not None
    networks = [load_bundle(bundle).predictor.network, load_bundle(bundle, cache=cache).predictor.network, explain]
    before = [network(**inputs) for network in networks]
    for file in bundle.iterdir():
        os.truncate(file, 0)
    shutil.rmtree(cache)
    for network, answers in zip(networks, before, strict=True):
        for answer, expected in zip(network(**inputs), answers, strict=True):
            np.testing.assert_array_equal(answer, expected)


def test_golden_samples_that_unpack_to_too_much_are_refused(bundle: Path) -> None:
    golden = dict(np.load(bundle / "golden.npz"))
    with zipfile.ZipFile(bundle / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{next(iter(golden))}.npy", b"")
        archive.filelist[0].file_size = 2**29
    rehash(bundle, "golden.npz")
    with pytest.raises(
        BundleError, match=r"golden\.npz: arrays: expected .* found \w+: expected at most 268435456 bytes"
    ):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "array", [np.zeros((0,)), np.array("text"), np.array(1 + 1j), np.zeros((3, 1, 1, 1), np.int64)]
)
def test_golden_inputs_that_the_graph_does_not_take(array: Any, bundle: Path) -> None:
    golden = dict(np.load(bundle / "golden.npz"))
    np.savez(bundle / "golden.npz", **{**golden, "pixels": array})
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: arrays: expected"):
        load_bundle(bundle)


def test_a_golden_array_whose_header_promises_more_than_there_is(bundle: Path) -> None:
    golden = dict(np.load(bundle / "golden.npz"))
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive, archive.open(f"{next(iter(golden))}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**60,)})
    rehash(bundle, "golden.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: arrays: expected"):
        load_bundle(bundle)
