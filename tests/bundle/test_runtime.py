import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vitrine.bundle.errors import BundleError, ProviderError
from vitrine.bundle.files import hash_file
from vitrine.bundle.manifest import TensorSpec
from vitrine.bundle.runtime import CPU, OnnxNetwork, parse_providers


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    """A graph of `total = float(pixels) + offset`, with a dynamic batch."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["offset"], ["shift"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "shift"], ["total"]),
    ]
    graph = helper.make_graph(
        nodes,
        "adder",
        [
            helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3]),
            helper.make_tensor_value_info("offset", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch", 3])],
    )
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


def test_telemetry_is_off_before_the_runtime_is_imported(root: Path) -> None:
    program = """
import builtins, os, sys
seen = []
original = builtins.__import__
def spy(name, *args, **kwargs):
    if name == "onnxruntime" and name not in sys.modules:
        seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
    return original(name, *args, **kwargs)
builtins.__import__ = spy
import vitrine.bundle.runtime
print(seen)
"""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['1']"


def test_runs_the_graph(adder: Path) -> None:
    (total,) = OnnxNetwork(adder)(pixels=np.array([[1, 2, 3]], np.uint8), offset=np.array([10], np.int64))
    np.testing.assert_array_equal(total, np.array([[11, 12, 13]], np.float32))


def test_specs_match_the_graph(adder: Path) -> None:
    network = OnnxNetwork(adder)
    assert network.inputs == (
        TensorSpec(name="pixels", datatype="UINT8", shape=("batch", 3)),
        TensorSpec(name="offset", datatype="INT64", shape=(1,)),
    )
    assert network.outputs == (TensorSpec(name="total", datatype="FP32", shape=("batch", 3)),)


def test_concurrent_calls_do_not_mix(adder: Path) -> None:
    network = OnnxNetwork(adder)

    def call(value: int) -> bool:
        (total,) = network(pixels=np.full((5, 3), value, np.uint8), offset=np.array([1], np.int64))
        return bool((total == value + 1).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a" * 50])
def test_broken_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"model.onnx: graph: expected an ONNX graph, found \S"):
        OnnxNetwork(file)


def test_missing_and_truncated_file(adder: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere.onnx"):
        OnnxNetwork(adder.with_name("nowhere.onnx"))
    adder.write_bytes(adder.read_bytes()[:-40])
    with pytest.raises(BundleError):
        OnnxNetwork(adder)


def test_providers_by_their_short_names() -> None:
    assert parse_providers("cpu") == parse_providers(" CPU ") == parse_providers("CPUExecutionProvider") == CPU


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda,cpu", r"provider cuda: expected one of .*cpu.*, found none in this installation of ONNX Runtime"),
        ("gpu", r"provider gpu: expected one of .*cpu.*, found no provider of that name"),
        ("", r"provider : expected one of .*cpu.*, found no provider of that name"),
    ],
)
def test_an_unavailable_provider_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        parse_providers(text)


def test_there_is_no_silent_fallback_to_the_cpu(adder: Path) -> None:
    with pytest.raises(
        ProviderError, match=r"provider CUDAExecutionProvider: expected .*, found one that did not start"
    ):
        OnnxNetwork(adder, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


def test_unsupported_tensor_types_are_rejected(adder: Path) -> None:
    model = onnx.load(adder)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    onnx.save(model, adder)
    with pytest.raises(
        BundleError, match=r"model\.onnx: tensor pixels: expected one of .*tensor\(uint8\).*, found tensor\(int8\)"
    ):
        _ = OnnxNetwork(adder).inputs


@pytest.fixture
def large_graph(tmp_path: Path) -> Path:
    """A graph of `answer = float(pixels) @ weights`, with weights large enough to be mapped."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["float", "weights"], ["answer"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 64])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 64])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"about": "itself"})
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    return file


def test_a_mapped_graph_gives_the_same_answers_and_is_written_once(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64), np.uint8)
    plain, first = OnnxNetwork(large_graph), OnnxNetwork(large_graph, cache=cache)
    (made,) = cache.iterdir()
    state = made.stat()
    second = OnnxNetwork(large_graph, threads=2, cache=cache)
    assert list(cache.iterdir()) == [made]
    assert made.stat() == state
    for mapped in (first, second):
        np.testing.assert_array_equal(mapped(pixels=pixels)[0], plain(pixels=pixels)[0])
        assert (mapped.inputs, mapped.outputs, mapped.metadata) == (plain.inputs, plain.outputs, plain.metadata)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(made) in maps.read_text()


def test_a_failed_write_of_the_mapped_graph_falls_back_to_the_file(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    pixels = np.ones((1, 64), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        network = OnnxNetwork(large_graph, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == []
    np.testing.assert_array_equal(network(pixels=pixels)[0], OnnxNetwork(large_graph)(pixels=pixels)[0])


def test_a_changed_graph_is_mapped_again(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    pixels = np.ones((1, 64), np.uint8)
    old = OnnxNetwork(large_graph, cache=cache)
    (before,) = old(pixels=pixels)
    other = Path(shutil.copy(large_graph, tmp_path / "other.onnx"))
    OnnxNetwork(other, cache=cache)
    model = onnx.load(large_graph)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "weights"))
    onnx.save(model, large_graph)
    (after,) = OnnxNetwork(large_graph, cache=cache)(pixels=pixels)
    assert before.any()
    assert not after.any()
    assert len(list(cache.iterdir())) == 2  # the new graph and the other file's
    np.testing.assert_array_equal(old(pixels=pixels)[0], before)
    other.unlink()
    os.utime(large_graph, (0, 0))
    OnnxNetwork(large_graph, cache=cache)
    assert len(list(cache.iterdir())) == 1


def test_concurrent_mapping_of_one_graph(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with ThreadPoolExecutor(4) as pool:
        networks = list(pool.map(lambda _: OnnxNetwork(large_graph, cache=cache), range(8)))
    assert len(list(cache.iterdir())) == 1  # no temporary folder is left
    answers = [network(pixels=np.ones((1, 64), np.uint8))[0] for network in networks]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_without_free_space_the_graph_is_not_mapped(
    large_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=large_graph.stat().st_size))
    assert OnnxNetwork(large_graph, cache=tmp_path)(pixels=np.ones((1, 64), np.uint8))[0].any()
    assert list(tmp_path.iterdir()) == [large_graph]


@pytest.mark.parametrize("fault", ["missing", "a file", "a link in a circle", "damaged", "read-only"])
def test_a_graph_loads_whatever_happened_to_the_cache(fault: str, large_graph: Path, tmp_path: Path) -> None:
    cache, pixels = tmp_path / "cache", np.ones((1, 64), np.uint8)
    expected = OnnxNetwork(large_graph)(pixels=pixels)[0]
    if fault == "a file":
        cache.touch()
    elif fault == "a link in a circle":
        cache.symlink_to("cache")
    elif fault == "damaged":
        cache.mkdir()
        OnnxNetwork(large_graph, cache=cache)
        (graph,) = cache.glob("*/graph.onnx")
        graph.write_bytes(b"")
    elif fault == "read-only":
        cache = Path("/proc/self")  # nobody can make files there
    np.testing.assert_array_equal(OnnxNetwork(large_graph, cache=cache)(pixels=pixels)[0], expected)


@pytest.mark.parametrize("part", ["graph.onnx", "weights.bin"])
def test_a_mapped_graph_that_is_cut_off_is_never_used(part: str, large_graph: Path, tmp_path: Path) -> None:
    cache, pixels = tmp_path / "cache", np.ones((1, 64), np.uint8)
    cache.mkdir()
    expected = OnnxNetwork(large_graph, cache=cache)(pixels=pixels)[0]
    (file,) = cache.glob(f"*/{part}")
    for size in (file.stat().st_size - 1, file.stat().st_size // 2, 1, 0):
        os.truncate(file, size)
        np.testing.assert_array_equal(OnnxNetwork(large_graph, cache=cache)(pixels=pixels)[0], expected)
    file.unlink()
    np.testing.assert_array_equal(OnnxNetwork(large_graph, cache=cache)(pixels=pixels)[0], expected)


def test_the_space_of_a_mapped_graph_is_allocated(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    OnnxNetwork(large_graph, cache=cache)
    for file in cache.glob("*/*"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_a_graph_is_loaded_from_the_content_that_was_checked(large_graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    hashes = {large_graph.name: hash_file(large_graph)}
    OnnxNetwork(large_graph, hashes=hashes, cache=cache)
    state, content = large_graph.stat(), bytearray(large_graph.read_bytes())
    content[content.index(b"weights") + 100] ^= 1  # a weight
    large_graph.write_bytes(content)
    for folder in (None, cache):
        with pytest.raises(BundleError, match=r"model\.onnx: sha256: expected"):
            OnnxNetwork(large_graph, hashes=hashes, cache=folder)
    os.utime(large_graph, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = {large_graph.name: hash_file(large_graph)}
    assert OnnxNetwork(large_graph, hashes=changed, cache=cache)(pixels=np.ones((1, 64), np.uint8))
