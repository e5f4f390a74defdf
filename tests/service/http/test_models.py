"""`GET /models` and `GET /models/{name}`."""

import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

Serving = Callable[..., AbstractContextManager[Any]]


def test_models_are_listed_with_labels_metrics_versions_and_variants(server: str) -> None:
    models = httpx.get(f"{server}/models").json()["models"]
    assert [(model["name"], model["version"], model["task"]) for model in models] == [
        ("colours", "1", "image-classification"),
        ("squares", "1", "object-detection"),
    ]
    assert models[0]["labels"] == ["blue", "green", "red"]
    assert models[0]["versions"] == ["1"]
    assert models[0]["variants"] == ["fp32", "fp16-weights", "int8-dynamic"]
    assert models[0]["default_variant"] == "fp32"
    assert 0 <= models[0]["metrics"]["values"]["top1"] <= 1
    assert [model["is_default"] for model in models] == [True, True]
    assert [model["samples"] for model in models] == [3, 3]
    assert models[0]["explanations"] == ["attention-rollout", "class-attention", "occlusion"]
    assert models[1]["explanations"] == ["cross-attention", "occlusion", "encoder-attention"]


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_samples_are_the_images_that_the_model_was_verified_with(name: str, server: str, tiny_bundles: Path) -> None:
    golden = np.load(tiny_bundles / name / "1" / "golden.npz")
    for number, pixels in enumerate(golden["pixels"]):
        answer = httpx.get(f"{server}/models/{name}/samples/{number}")
        assert answer.headers["content-type"] == "image/png"
        shown = np.asarray(Image.open(io.BytesIO(answer.content)))
        height, width = golden["sizes"][number] if "sizes" in golden else pixels.shape[:2]
        np.testing.assert_array_equal(shown, pixels[:height, :width])
    for number in ("3", "-1", "x", "1.0"):
        answer = httpx.get(f"{server}/models/{name}/samples/{number}")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"sample: expected a number from 0 to 2, found '{number}'"


def test_a_single_file_has_no_samples(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles / "colours" / "1" / "model.onnx") as (url, *_):
        assert httpx.get(f"{url}/models").json()["models"][0]["samples"] == 0
        answer = httpx.get(f"{url}/models/colours/samples/0")
    assert answer.json()["error"]["message"] == "sample: expected none, as one ONNX file alone is served, found '0'"


@pytest.mark.parametrize("reference", ["colours", "colours@1"])
def test_a_models_whole_manifest(reference: str, server: str, tiny_bundles: Path) -> None:
    response = httpx.get(f"{server}/models/{reference}").json()
    assert response["versions"] == ["1"]
    written = json.loads((tiny_bundles / "colours" / "1" / "manifest.json").read_text())
    assert response["manifest"]["preprocessing"] == written["preprocessing"]
    assert response["manifest"]["metrics"] == written["metrics"]
    assert response["manifest"].keys() == written.keys()


def test_an_unknown_model_is_404(server: str) -> None:
    response = httpx.get(f"{server}/models/cats")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "no model named 'cats' here; available: colours, squares"
