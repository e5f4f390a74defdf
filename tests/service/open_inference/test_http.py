"""`/v2` over HTTP, tested with Triton's client and with raw requests."""

import base64
import gzip
import io
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.utils import InferenceServerException

from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import load_bundle
from vitrine.bundle.manifest import Precision
from vitrine.bundle.predictors import Classifier, Detector

Serving = Callable[..., AbstractContextManager[Any]]
INFER = "/v2/models/colours/infer"


@pytest.fixture
def client(server: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.removeprefix("http://")) as client:
        yield client


def images_input(*images: bytes, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    content = images if binary else [base64.b64encode(image) for image in images]
    tensor.set_data_from_numpy(np.array(content, dtype=object), binary_data=binary)
    return tensor


def test_the_server_and_its_models_describe_themselves(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("cats")
    assert not client.is_model_ready("colours", "2")
    assert client.get_server_metadata()["name"] == "vitrine"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("squares", "1") == {
        "name": "squares",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
            {"name": "sizes", "datatype": "INT64", "shape": [-1, 2]},
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 8]},
            {"name": "class_ids", "datatype": "INT64", "shape": [-1, 8]},
            {"name": "boxes", "datatype": "FP32", "shape": [-1, 8, 4]},
        ],
    }


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("variant", [Precision.FP32, Precision.FP16_WEIGHTS, Precision.INT8_DYNAMIC])
def test_encoded_images_get_the_predictors_outputs(
    variant: Precision, binary: bool, client: triton.InferenceServerClient, tiny_bundles: Path, photograph: bytes
) -> None:
    blue = plain_image((30, 60, 200))
    parameters = {"variant": variant.value}
    for name in ("colours", "squares"):
        predictor = load_bundle(tiny_bundles / name / "1", variant=variant).predictor
        outputs = [triton.InferRequestedOutput(spec, binary_data=binary) for spec in OUTPUTS[name]]
        response = client.infer(
            name, [images_input(photograph, blue, binary=binary)], outputs=outputs, parameters=parameters
        )
        for i, image in enumerate((photograph, blue)):
            compare(response, i, predictor, image)


OUTPUTS = {"colours": ["probabilities"], "squares": ["scores", "class_ids", "boxes"]}


def plain_image(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


def compare(response: Any, i: int, predictor: Classifier | Detector, image: bytes) -> None:
    decoded = decode_for(image, predictor.preprocessing)
    if isinstance(predictor, Classifier):
        expected = predictor.probabilities([decoded])[0]
        np.testing.assert_allclose(response.as_numpy("probabilities")[i], expected, atol=1e-6)
        return
    scores, boxes = response.as_numpy("scores")[i], response.as_numpy("boxes")[i]
    order = np.argsort(-scores, kind="stable")
    found = predictor.detect(decoded, threshold=0)
    np.testing.assert_allclose(scores[order], [entry.score for entry in found], atol=1e-6)
    assert [predictor.labels[k] for k in response.as_numpy("class_ids")[i][order]] == [entry.label for entry in found]
    corners = np.array([[b.x_min, b.y_min, b.x_max, b.y_max] for b in (entry.box for entry in found)])
    scale = np.array([decoded.width, decoded.height] * 2)
    np.testing.assert_allclose(boxes[order] * scale, corners, atol=1e-3)


def test_pixels_get_the_networks_outputs(client: triton.InferenceServerClient, tiny_bundles: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 16, 16, 3), np.uint8)
    (expected,) = load_bundle(tiny_bundles / "colours" / "1").predictor.network(pixels=pixels)
    for binary in (True, False):
        tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        for compression in (None, "gzip", "deflate"):
            response = client.infer("colours", [tensor], request_compression_algorithm=compression)
            np.testing.assert_allclose(response.as_numpy("probabilities"), expected, atol=1e-6)


def test_a_padded_batch_gets_the_networks_outputs(client: triton.InferenceServerClient, tiny_bundles: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 80, 96, 3), np.uint8)
    sizes = np.array([[80, 96], [64, 90], [70, 64]])
    network = load_bundle(tiny_bundles / "squares" / "1").predictor.network
    inputs = [triton.InferInput("pixels", [3, 80, 96, 3], "UINT8"), triton.InferInput("sizes", [3, 2], "INT64")]
    for tensor, array in zip(inputs, (pixels, sizes), strict=True):
        tensor.set_data_from_numpy(array)
    response = client.infer("squares", inputs)
    for name, expected in zip(OUTPUTS["squares"], network(pixels=pixels, sizes=sizes), strict=True):
        np.testing.assert_allclose(response.as_numpy(name), expected, atol=1e-5)


def test_classification_returns_labels(client: triton.InferenceServerClient, photograph: bytes, server: str) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    response = client.infer("colours", [images_input(photograph)], outputs=outputs, request_id="mine")
    assert response.get_response()["id"] == "mine"
    expected = httpx.post(f"{server}/classify?top_k=2", content=photograph).json()["predictions"]
    texts = [text.decode().split(":") for text in response.as_numpy("probabilities")[0]]
    assert [(int(index), label) for _, index, label in texts] == [(e["class_id"], e["label"]) for e in expected]
    assert [float(score) for score, *_ in texts] == pytest.approx([e["probability"] for e in expected], abs=1e-6)
    outputs = [triton.InferRequestedOutput("scores", class_count=2)]
    with pytest.raises(InferenceServerException, match="classification: expected an output that has classes"):
        client.infer("squares", [images_input(photograph)], outputs=outputs)


def pixels_entry(**changes: object) -> dict[str, object]:
    entry = {"name": "pixels", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [0] * 768}
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "inputs: expected a list, found None"),
        ([], "body: expected a JSON object, found []"),
        ({"inputs": []}, "inputs: expected pixels, or image alone, found none"),
        ({"inputs": [pixels_entry(), pixels_entry()]}, "inputs: expected each name once, found pixels, pixels"),
        ({"inputs": [pixels_entry(name="px")]}, "inputs: expected pixels, or image alone, found px"),
        ({"inputs": [pixels_entry(name=3)]}, "name: expected text, found 3"),
        ({"inputs": [pixels_entry(datatype="FP64")]}, "input pixels: datatype: expected one of UINT8, INT64, FP32, "),
        ({"inputs": [pixels_entry(datatype="INT64")]}, "input pixels: datatype: expected UINT8, found INT64"),
        ({"inputs": [pixels_entry(shape=[1, 16, 16])]}, "input pixels: data: expected 256 values for its shape, found"),
        ({"inputs": [pixels_entry(shape=[768])]}, "input pixels: shape: expected [batch, 16, 16, 3], found [768]"),
        ({"inputs": [pixels_entry(shape=[3, 16, 16, 1])]}, "input pixels: shape: expected [batch, 16, 16, 3], found"),
        ({"inputs": [pixels_entry(shape=[0, 16, 16, 3], data=[])]}, "inputs: expected 1 to 32 images, found 0"),
        ({"inputs": [pixels_entry(shape=[-1, 16, 16, 3])]}, "input pixels: shape: expected at most 8 lengths from 0"),
        ({"inputs": [pixels_entry(shape="all")]}, "shape: expected a list of lengths, found 'all'"),
        ({"inputs": [pixels_entry(data=[256] * 768)]}, "input pixels: data: expected 0 to 255, found 256 to 256"),
        ({"inputs": [pixels_entry(data=[-1] * 768)]}, "input pixels: data: expected 0 to 255, found -1 to -1"),
        ({"inputs": [pixels_entry(data=[0.5] * 768)]}, "input pixels: data: expected integers, found float"),
        ({"inputs": [pixels_entry(data=[True] * 768)]}, "input pixels: data: expected integers, found bool"),
        ({"inputs": [pixels_entry(data=["a"] * 768)]}, "input pixels: data: expected integers, found str"),
        ({"inputs": [pixels_entry(data=[[1], [1, 2]])]}, "input pixels: data: expected integers, found list"),
        ({"inputs": [pixels_entry(data=None)]}, "input pixels: expected data or binary_data_size, found neither"),
        (
            {"inputs": [pixels_entry(data=None, parameters={"binary_data_size": 10})]},
            "input pixels: binary_data_size: expected 0 to 0, the remaining bytes, found 10",
        ),
        (
            {"inputs": [pixels_entry()], "outputs": [{"name": "x"}]},
            "outputs: expected some of probabilities, found 'x'",
        ),
        ({"inputs": [pixels_entry()], "parameters": {"variant": "int4"}}, "variant: expected one of fp32, "),
        ({"inputs": [pixels_entry()], "id": 3}, "id: expected text, found 3"),
        (
            {"inputs": [pixels_entry()], "parameters": {"binary_data_output": 1}},
            "binary_data_output: expected true or false, found 1",
        ),
        ({"inputs": [pixels_entry(name="\ud800")]}, "body: expected a JSON object, found none: "),
        (
            {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}]},
            "input image: data: expected a list of 2 images, found 1",
        ),
        (
            {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["http://127.0.0.1/a"]}]},
            "image: expected base64 or a data URL, found another URL, which is not fetched",
        ),
        (
            {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [1]}]},
            "input image: datatype: expected BYTES, found UINT8",
        ),
    ],
)
def test_an_invalid_request_is_400_with_a_message(document: object, message: str, server: str) -> None:
    response = httpx.post(server + INFER, content=json.dumps(document))
    assert response.status_code == 400, response.text
    assert response.json().keys() == {"error"}
    assert response.json()["error"].startswith(message)


COMPRESSED = gzip.compress(b"{}", mtime=0)  # constant, as it is part of test ids


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "body: expected a JSON object, found none"),
        (b"\xff", {}, 400, "body: expected a JSON object, found none"),
        (b"{}", {"Inference-Header-Content-Length": "3"}, 400, "Inference-Header-Content-Length: expected 0 to 2"),
        (b"{}", {"Inference-Header-Content-Length": "x"}, 400, "Inference-Header-Content-Length: expected 0 to 2"),
        (b'{"inputs":[]}xx', {"Inference-Header-Content-Length": "13"}, 400, "body: expected as many bytes as its"),
        (b"{}", {"Content-Encoding": "br"}, 400, "Content-Encoding: expected gzip or deflate, found 'br'"),
        (b"{}", {"Content-Encoding": "gzip"}, 400, "body: expected data in its Content-Encoding"),
        (COMPRESSED[:-9], {"Content-Encoding": "gzip"}, 400, "body: expected data in its Content-Encoding"),
        (
            COMPRESSED * 2,
            {"Content-Encoding": "gzip"},
            400,
            "body: expected data in its Content-Encoding, found m",
        ),
        (b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400, "Inference-Header-Content-Length: expected 0"),
        (zlib.compress(bytes(50_000_000)), {"Content-Encoding": "deflate"}, 413, "image: at most 20971520 bytes"),
    ],
)
def test_an_invalid_body_is_refused(
    body: bytes, headers: dict[str, str], status: int, message: str, server: str
) -> None:
    response = httpx.post(server + INFER, content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"].startswith(message)


VALID = json.dumps({"inputs": [pixels_entry()], "outputs": [{"name": "probabilities"}], "id": "1"}).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), st.binary(max_size=6)), min_size=1, max_size=3),
    st.none() | st.integers(-2, len(VALID) + 4).map(str),
    st.sampled_from([None, "gzip", "deflate", "br"]),
    st.booleans(),
)
def test_damaged_requests_cause_no_server_error(
    server: str, damages: list[tuple[int, int, bytes]], length: str | None, encoding: str | None, honest: bool
) -> None:
    body = VALID
    for start, dropped, inserted in damages:
        body = body[:start] + inserted + body[start + dropped :]
    if honest:
        body = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding or "", bytes)(body)
    headers = {"Inference-Header-Content-Length": length, "Content-Encoding": encoding}
    response = httpx.post(server + INFER, content=body, headers={k: v for k, v in headers.items() if v is not None})
    assert response.status_code in (200, 400), response.text
    assert response.status_code == 200 or response.json().keys() == {"error"}


def test_errors_of_images_have_their_status(server: str, client: triton.InferenceServerClient) -> None:
    for image, status in ((b"no image", 415), (b"\x89PNG\r\n\x1a\n", 422)):
        with pytest.raises(InferenceServerException, match=rf"\[{status}\] image: "):
            client.infer("colours", [images_input(image)])
    assert httpx.post(f"{server}/v2/models/cats/infer", json={}).status_code == 400
    entry = {"inputs": [pixels_entry()]}
    response = httpx.post(f"{server}/v2/models/cats/infer", json=entry)
    assert (response.status_code, response.json()["error"]) == (
        404,
        "no model named 'cats' here; available: colours, squares",
    )
    assert httpx.get(f"{server}/v2/nowhere").json() == {"error": "GET /v2/nowhere: not found"}
    assert httpx.get(server + INFER).status_code == 405


def test_a_detectors_pixels_are_bounded_by_its_longest_edge(server: str) -> None:
    pixels = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 97, 3], "data": [0] * 291}
    sizes = {"name": "sizes", "datatype": "INT64", "shape": [1, 2], "data": [1, 97]}
    response = httpx.post(f"{server}/v2/models/squares/infer", json={"inputs": [pixels, sizes]})
    assert response.json() == {"error": "input pixels: shape: expected edges from 1 to 96 pixels, found 1 x 97"}
    pixels |= {"shape": [1, 1, 96, 3], "data": [0] * 288}
    for invalid in ([0, 96], [1, 97], [2, 96]):
        sizes["data"] = invalid
        response = httpx.post(f"{server}/v2/models/squares/infer", json={"inputs": [pixels, sizes]})
        assert response.status_code == 400
        assert response.json()["error"].startswith("input sizes: expected for each of 1 images a height from 1 to 1")
    sizes["data"] = [1, 96]
    assert httpx.post(f"{server}/v2/models/squares/infer", json={"inputs": [pixels, sizes]}).status_code == 200


def test_the_repository_is_controlled_by_the_client(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with (
        serve(tiny_bundles, VITRINE_MODEL_CONTROL="true") as running,
        triton.InferenceServerClient(running.url.removeprefix("http://")) as client,
    ):
        assert [(e["name"], e["state"]) for e in client.get_model_repository_index()] == [
            ("colours", "READY"),
            ("squares", "READY"),
        ]
        client.unload_model("colours")
        assert not client.is_model_ready("colours")
        index = client.get_model_repository_index()
        assert index[0] == {"name": "colours", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        ready = httpx.post(f"{running.url}/v2/repository/index", json={"ready": True}).json()
        assert [entry["name"] for entry in ready] == ["squares"]
        with pytest.raises(InferenceServerException, match=r"\[404\] no model named 'colours' here"):
            client.infer("colours", [images_input(photograph)])
        client.load_model("colours")
        assert client.is_model_ready("colours")
        with pytest.raises(InferenceServerException, match=r"\[404\] no model named 'cats' here"):
            client.load_model("cats")
        with pytest.raises(InferenceServerException, match="parameters: expected none: a model is configured by its"):
            client.load_model("colours", config=json.dumps({"max_batch_size": 3}))


def test_calls_in_progress_survive_unloading(serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]) -> None:
    with serve(slow_bundle, VITRINE_MODEL_CONTROL="true", VITRINE_THREADS="2") as running:
        address = running.url.removeprefix("http://")
        outputs: list[Any] = []

        def send() -> None:
            with triton.InferenceServerClient(address) as client:
                outputs.append(client.infer("slow", [images_input(bright(200))]).as_numpy("probabilities"))

        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        while "vitrine_running_images 2.0" not in httpx.get(f"{running.url}/metrics").text:
            pass
        with triton.InferenceServerClient(address) as client:
            client.unload_model("slow")
            assert not client.is_model_ready("slow")
        for thread in threads:
            thread.join()
        assert [array.tolist() for array in outputs] == [[[0.5, 0.5]]] * 2


def test_a_classifier_is_served_at_one_size_even_if_its_graph_takes_any(serve: Serving, slow_bundle: Path) -> None:
    with serve(slow_bundle) as running:
        metadata = httpx.get(f"{running.url}/v2/models/slow").json()
        assert metadata["inputs"][0] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 4, 4, 3]}
        for (height, width), status in (((4, 4), 200), ((5, 4), 400), ((8, 8), 400), ((0, 4), 400)):
            tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, height, width, 3]}
            tensor["data"] = [0] * (height * width * 3)
            response = httpx.post(f"{running.url}/v2/models/slow/infer", json={"inputs": [tensor]})
            assert response.status_code == status, response.text
            if status == 400:
                expected = f"input pixels: shape: expected 4 x 4, found {height} x {width}"
                assert response.json() == {"error": expected}
