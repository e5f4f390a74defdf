"""`POST /explain` over HTTP: the maps of `bundle.explaining`, of the answers of `/classify` and `/detect`."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vitrine.bundle.explaining import Explainer, Method, default_question, methods_of
from vitrine.bundle.images import decode, decode_for
from vitrine.bundle.loading import load_bundle, load_explain_network

Serving = Callable[..., AbstractContextManager[Any]]
CLASSIFIER, DETECTOR = "colours", "squares"


def explained(server: str, image: bytes, accept: str = "application/json", **parameters: object) -> httpx.Response:
    headers = {"Accept": accept}
    return httpx.post(f"{server}/explain", content=image, params=parameters, headers=headers, timeout=120)  # type: ignore[arg-type]


def rotated_by_exif(image: Image.Image) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # the stored image must be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        (CLASSIFIER, "attention-rollout", {}),
        (CLASSIFIER, "class-attention", {}),
        (CLASSIFIER, "occlusion", {"grid": 3}),
        (CLASSIFIER, "occlusion", {"grid": 4, "target": 2}),
        (DETECTOR, "cross-attention", {"threshold": 0.0, "max_targets": 3}),
        (DETECTOR, "occlusion", {"threshold": 0.0, "target": 1, "grid": 2}),
    ],
)
def test_the_maps_are_those_of_the_library(
    model: str, method: str, options: dict[str, Any], server: str, tiny_bundles: Path, photograph: bytes
) -> None:
    bundle = load_bundle(path := tiny_bundles / model / "1")
    explainer = Explainer(bundle.manifest, bundle.predictor, load_explain_network(path))
    question = default_question(bundle.manifest, method=Method(method), **options)
    expected = explainer.explain(decode_for(photograph, bundle.predictor.preprocessing), question)
    answer = explained(server, photograph, model=model, method=method, **options).json()
    assert answer["model"]["name"] == model
    assert answer["method"] == method
    assert answer["methods"] == list(methods_of(bundle.manifest))
    assert answer["image"] == {"width": 640, "height": 480}
    assert answer["milliseconds"] > 0
    for found, entry in zip(answer["explanations"], expected, strict=True):
        np.testing.assert_allclose(found["heatmap"]["values"], entry.heatmap.values, atol=1e-5)
        assert (found["heatmap"]["rows"], found["heatmap"]["columns"]) == entry.heatmap.values.shape
        assert found["heatmap"]["box"] == pytest.approx(vars(entry.heatmap.box))
        assert found["target"]["label"] == entry.target.label
    parts = {"occlusion": answer["explanations"][0]["heatmap"]}.get(method, {"rows": 0, "columns": 0})
    assert answer["images_computed"] == 1 + parts["rows"] * parts["columns"]


def test_the_targets_are_the_answers_of_classify_and_detect(server: str, photograph: bytes) -> None:
    best = httpx.post(f"{server}/classify", content=photograph).json()["predictions"]
    for target in (None, 0, 1, "2", best[-1]["label"]):
        parameters = {} if target is None else {"target": target}
        (found,) = explained(server, photograph, model=CLASSIFIER, **parameters).json()["explanations"]
        known = [entry for entry in best if target in (None, entry["label"], entry["class_id"], str(entry["class_id"]))]
        assert found["target"]["label"] == known[0]["label"]
        assert found["target"]["probability"] == pytest.approx(known[0]["probability"], abs=1e-5)
    options = {"threshold": 0.0, "max_detections": 4}
    detections = httpx.post(f"{server}/detect", content=photograph, params=options).json()["detections"]
    found = explained(server, photograph, model=DETECTOR, **options).json()["explanations"]
    assert [entry["target"]["score"] for entry in found] == pytest.approx(
        [entry["score"] for entry in detections], abs=1e-5
    )
    (third,) = explained(server, photograph, model=DETECTOR, target=2, **options).json()["explanations"]
    assert third["target"]["box"] == pytest.approx(detections[2]["box"], abs=1e-3)


def test_heads_layers_and_points(server: str, photograph: bytes) -> None:
    (found,) = explained(server, photograph, model=CLASSIFIER, method="class-attention", heads=True).json()[
        "explanations"
    ]
    np.testing.assert_allclose(np.mean(found["heads"], axis=0), found["heatmap"]["values"], atol=1e-6)
    assert len(found["heads"]) > 1
    (found,) = explained(server, photograph, model=CLASSIFIER, layers=True).json()["explanations"]
    answer = httpx.post(f"{server}/classify", content=photograph).json()["predictions"]
    assert len(found["layers"]) > 1
    assert [entry["label"] for entry in found["layers"][-1]] == [entry["label"] for entry in answer]
    for entry, expected in zip(found["layers"][-1], answer, strict=True):
        assert entry["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    options = {"model": DETECTOR, "method": "encoder-attention"}
    (found,) = explained(server, photograph, x=10, y=20.5, **options).json()["explanations"]
    assert found["target"] == {"x": 10, "y": 20.5}
    assert np.sum(found["heatmap"]["values"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("model", [CLASSIFIER, DETECTOR])
def test_a_rotated_photograph_is_explained_as_the_upright_one(model: str, server: str, photograph: bytes) -> None:
    options = {"threshold": 0, "max_targets": 2} if model == DETECTOR else {}
    buffer = io.BytesIO()
    decode(photograph).save(buffer, "PNG")
    upright, turned = (
        explained(server, data, model=model, **options).json()
        for data in (buffer.getvalue(), rotated_by_exif(decode(photograph)))
    )
    assert turned["image"] == upright["image"]
    for a, b in zip(upright["explanations"], turned["explanations"], strict=True):
        assert a["heatmap"]["box"] == b["heatmap"]["box"]
        np.testing.assert_allclose(a["heatmap"]["values"], b["heatmap"]["values"], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        (CLASSIFIER, {"method": "grad-cam"}, "method: expected one of attention-rollout, class-attention, occlusion"),
        (CLASSIFIER, {"method": "cross-attention"}, "method: expected one of attention-rollout"),
        (CLASSIFIER, {"target": "no such label"}, "target: expected a label of the model, or a class id from 0 to 2"),
        (CLASSIFIER, {"target": 3}, "target: expected a label, or a class id from 0 to 2, found 3"),
        (CLASSIFIER, {"target": "all"}, "target: expected a label of the model"),
        (CLASSIFIER, {"threshold": 0.1}, "threshold: expected none for a classifier"),
        (CLASSIFIER, {"x": 1, "y": 1}, "x: expected none for a classifier"),
        (CLASSIFIER, {"grid": 4}, "grid: expected method=occlusion, found method=attention-rollout"),
        (CLASSIFIER, {"heads": "maybe"}, "heads: expected true or false"),
        (CLASSIFIER, {"heads": True}, "heads: expected method=class-attention"),
        (CLASSIFIER, {"layers": True, "method": "occlusion"}, "layers: expected another method than occlusion"),
        (CLASSIFIER, {"opacity": 1.5}, "opacity: expected a number from 0 to 1"),
        (CLASSIFIER, {"variant": "fp32"}, "variant: expected one of the parameters"),
        (DETECTOR, {"heads": True}, "heads: expected none for a detector"),
        (DETECTOR, {"target": "WBC"}, "target: expected all, or the index of a detection"),
        (DETECTOR, {"target": -1}, "target: expected an index from 0, found -1"),
        (DETECTOR, {"target": 0, "threshold": 1}, "target: expected an index below the number of detections, 0"),
        (DETECTOR, {"target": 0, "threshold": 1, "method": "occlusion"}, "target: expected an index below the number"),
        (DETECTOR, {"method": "encoder-attention"}, "x, y: expected both for method=encoder-attention"),
        (DETECTOR, {"method": "encoder-attention", "x": 1}, "y: expected a number"),
        (
            DETECTOR,
            {"method": "encoder-attention", "x": 640, "y": 1},
            "x, y: expected a pixel of the image of 640 x 480",
        ),
        (DETECTOR, {"method": "encoder-attention", "x": "nan", "y": 1}, "x, y: expected a pixel"),
        (DETECTOR, {"max_targets": 33}, "max_targets: expected an integer from 1 to 32"),
        (DETECTOR, {"threshold": 2}, "threshold: expected a number from 0 to 1"),
        (DETECTOR, {"labels": "no such label"}, "labels: expected some of the model's"),
    ],
)
def test_what_cannot_be_explained_is_refused_by_name(
    model: str, parameters: dict[str, object], message: str, server: str, photograph: bytes
) -> None:
    answer = explained(server, photograph, model=model, **parameters)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(message)


def test_several_images_keep_their_order_and_errors(server: str, photograph: bytes) -> None:
    files = [("image", ("a", photograph)), ("image", ("b", b"no image")), ("image", ("c", photograph))]
    answer = httpx.post(f"{server}/explain", files=files, data={"model": CLASSIFIER}).json()
    first, broken, last = answer["results"]
    assert first == last
    assert first["image"] == {"width": 640, "height": 480}
    assert broken["error"]["code"] == "unsupported_image_type"


@pytest.mark.parametrize(("accept", "form"), [("image/png", "PNG"), ("image/jpeg", "JPEG")])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (CLASSIFIER, {}),
        (CLASSIFIER, {"method": "occlusion", "grid": 2}),
        (DETECTOR, {"threshold": 0, "max_targets": 4}),
        (DETECTOR, {"method": "encoder-attention", "x": 320, "y": 240}),
    ],
)
def test_a_picture_shows_the_heat(
    model: str, options: dict[str, object], accept: str, form: str, server: str, photograph: bytes
) -> None:
    answer = explained(server, photograph, accept, model=model, **options)
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.format == form
    first = np.asarray(picture.convert("RGB").crop((0, 0, 640, 480)), int)
    difference = np.abs(first - np.asarray(decode(photograph)))
    assert (difference > 30).any(axis=2).mean() > 0.01
    plain = Image.open(io.BytesIO(explained(server, photograph, accept, model=model, opacity=0, **options).content))
    unheated = np.abs(np.asarray(plain.convert("RGB").crop((0, 0, 640, 480)), int) - np.asarray(decode(photograph)))
    assert (unheated > 30).any(axis=2).mean() < (difference > 30).any(axis=2).mean()


@pytest.mark.parametrize(("accept", "images"), [("text/csv", 1), ("image/png", 2)])
def test_an_unavailable_media_type_is_406(accept: str, images: int, server: str, photograph: bytes) -> None:
    files = [("image", ("a", photograph))] * images
    answer = httpx.post(f"{server}/explain?model={CLASSIFIER}", files=files, headers={"Accept": accept})
    assert answer.status_code == 406


def test_a_single_file_is_explained_by_occlusion(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles / "colours" / "1" / "model.onnx") as (url, *_):
        answer = explained(url, photograph, grid=2).json()
        assert answer["methods"] == ["occlusion"]
        assert answer["images_computed"] == 5
        refused = explained(url, photograph, method="attention-rollout")
        assert refused.json()["error"]["message"].startswith("method: expected one of occlusion, found")


def test_other_requests_pass_explanations(serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]) -> None:
    """Two explanations of 17 slow calls each share the one thread of two that they may occupy."""
    with serve(slow_bundle, VITRINE_THREADS="2", VITRINE_WORKERS="1", VITRINE_TIMEOUT_SECONDS="60") as (url, *_):
        with ThreadPoolExecutor(2) as pool:
            options = {"method": "occlusion", "grid": 4}
            long = [pool.submit(explained, url, bright(20), target=target, **options) for target in (0, 1)]
            for _ in range(5):
                assert httpx.post(f"{url}/classify", content=bright(0), timeout=60).status_code == 200
            assert not any(future.done() for future in long)
        assert [future.result().json()["images_computed"] for future in long] == [17] * 2
