"""`GET /models` and `GET /models/{name}`."""

import json
from pathlib import Path

import httpx
import pytest


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
