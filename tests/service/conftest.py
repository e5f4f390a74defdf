"""A bundle whose latency grows with the brightness of the image, for tests of concurrent events."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

TURNS = 400  # loop turns per level of brightness (0 to 255): about 7 ms


def slow_graph() -> onnx.ModelProto:
    """`pixels` UINT8[batch,height,width,3] -> `probabilities` FP32[batch,2], after a loop for the brightest pixel."""
    body = helper.make_graph(
        [
            helper.make_node("Tanh", ["state"], ["next_state"]),
            helper.make_node("Identity", ["condition"], ["next_condition"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("next_condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [256, 256]),
        ],
    )
    constants = {
        "true": np.array(True),
        "turns_each": np.array(TURNS, np.int64),
        "start": np.full((256, 256), 0.5, np.float32),
        "zero": np.array(0, np.float32),
        "half": np.array([[0.5, 0.5]], np.float32),
        "length": np.array([0], np.int64),
        "two": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["levels"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["levels"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "turns_each"], ["turns"]),
        helper.make_node("Loop", ["turns", "true", "start"], ["end"], body=body),
        helper.make_node("ReduceMean", ["end"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["half", "nothing"], ["answer"]),
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Gather", ["shape", "length"], ["batch"]),
        helper.make_node("Concat", ["batch", "two"], ["answer_shape"], axis=0),
        helper.make_node("Expand", ["answer", "answer_shape"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    return model


@pytest.fixture(scope="session")
def slow_bundle(tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundles/` with slow/1."""
    root = tmp_path_factory.mktemp("slow") / "bundles"
    folder = root / "slow" / "1"
    folder.mkdir(parents=True)
    onnx.save(slow_graph(), folder / "model.onnx")
    pixels, probabilities = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 2), 0.5, np.float32)
    np.savez(folder / "golden.npz", pixels=pixels, probabilities=probabilities)
    manifest = json.loads((tiny_bundles / "colours" / "1" / "manifest.json").read_text())
    manifest |= {
        "name": "slow",
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": ["batch", "height", "width", 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": ["batch", 2]}],
        "labels": ["dark", "bright"],
        "metrics": None,
        "calibration": None,
        "explanation": None,
        "variants": {"fp32": {"metrics": None, "drop": None, "agreement": None}},
    }
    manifest["preprocessing"]["input_size"] = [4, 4]
    manifest["files"] = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "size": (folder / name).stat().st_size,
        }
        for name in ("model.onnx", "golden.npz")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser, which `make test` installs if possible."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "no Chromium: run the tests by `make test`, or install it"
    return found


@pytest.fixture(scope="session")
def bright() -> Callable[[int], bytes]:
    """Make an image for the slow network, given its brightness (0 to 255)."""

    def make(level: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (level,) * 3).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def new_version() -> Callable[[Path, str], Path]:
    """Copy a bundle to another version, atomically, as `vitrine export` does."""

    def copy(bundle: Path, version: str) -> Path:
        hidden, target = bundle.parent / f".{version}", bundle.parent / version
        hidden.mkdir()
        for file in bundle.iterdir():
            (hidden / file.name).write_bytes(file.read_bytes())
        manifest = json.loads((hidden / "manifest.json").read_text())
        (hidden / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
        hidden.rename(target)
        return target

    return copy
