"""The service as a whole: every documented status of every route, and one answer whichever way an image goes."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from vitrine.service.http.openapi import openapi_document

Serving = Callable[..., AbstractContextManager[Any]]
KEY = "a-key-of-the-tests-1"
LARGE = 21 * 1024 * 1024

DOCUMENTED = {
    (method, path, int(status))
    for path, operations in json.loads(openapi_document())["paths"].items()
    for method, operation in operations.items()
    for status in operation["responses"]
}
# A bug of the server, and a worker that does not follow the others, are not to be had on purpose.
NOT_ON_PURPOSE = {entry for entry in DOCUMENTED if entry[2] == 500} | {
    ("post", "/v2/repository/models/{name}/unload", 503)
}

PROBES = ("/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
STUCK = {("get", path, 503) for path in PROBES}  # tests/service/runtime/test_model_control.py

IMAGE_ROUTES = ("/classify", "/detect", "/explain")
INFER_ROUTES = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")


@pytest.fixture(scope="module")
def servers(serve: Serving, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URLs of servers: plain; with keys; in no time; with clients in control; with files damaged since; limited."""
    damaged = Path(shutil.copytree(tiny_bundles, tmp_path_factory.mktemp("damaged") / "bundles"))
    settings: dict[str, dict[str, str]] = {
        "plain": {},
        "locked": {"VITRINE_API_KEYS": KEY, "VITRINE_METRICS_NEED_KEY": "true"},
        "hasty": {"VITRINE_TIMEOUT_SECONDS": "1e-6"},
        "controlled": {"VITRINE_MODEL_CONTROL": "true"},
        "damaged": {"VITRINE_MODEL_CONTROL": "true", "VITRINE_BUNDLES": str(damaged)},
        "limited": {"VITRINE_KEY_RATE": "1e-3", "VITRINE_METRICS_NEED_KEY": "true"},
    }
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(serve(tiny_bundles, **environment)).url for name, environment in settings.items()
        }
        for name in ("model.int8-dynamic.onnx", "explain.onnx", "golden.npz"):
            for file in damaged.glob(f"*/1/{name}"):
                file.write_bytes(b"x")
        assert httpx.get(f"{urls['limited']}/models").status_code == 200  # the only one for a quarter of an hour
        yield urls


def infer_body(image: bytes, **parameters: str) -> dict[str, Any]:
    data = [base64.b64encode(image).decode()]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}], "parameters": parameters}


def asked(servers: dict[str, str], method: str, path: str, status: int, photograph: bytes) -> httpx.Response:
    """The answer to a request that should have that status."""
    name = {404: "cats", 200: "squares" if path.endswith("unload") else "colours"}.get(status, "colours")
    target = path.replace("{name}", name).replace("{version}", "1").replace("{number}", "3" if status == 400 else "0")
    content = {413: bytes(LARGE), 415: b"no image", 422: b"\x89PNG\r\n\x1a\n"}.get(status, photograph)
    url = servers[{401: "locked", 429: "limited", 503: "damaged", 504: "hasty"}.get(status, "plain")]
    if path in IMAGE_ROUTES:
        queries = {400: "?to=1", 404: "?model=cats", 503: "" if path == "/explain" else "?variant=int8-dynamic"}
        query = queries.get(status, "")
        headers = {"Accept": "text/html"} if status == 406 else {}
        return httpx.post(f"{url}{path}{query}", content=content, headers=headers, timeout=60)
    if path in INFER_ROUTES:
        document = infer_body(content, **({"variant": "int8-dynamic"} if status == 503 else {}))
        text = {400: b"{}", 413: content}.get(status, json.dumps(document).encode())
        return httpx.post(url + target, content=text, timeout=60)
    if "/repository/" in path:
        if status not in (401, 403, 429, 503):
            url = servers["controlled"]
        return httpx.post(url + target, content={400: b"[]", 413: content}.get(status, b""), timeout=60)
    return httpx.request(method, url + target)


@pytest.mark.parametrize(("method", "path", "status"), sorted(DOCUMENTED - NOT_ON_PURPOSE - STUCK))
def test_every_documented_status_is_answered(
    method: str, path: str, status: int, servers: dict[str, str], photograph: bytes
) -> None:
    answer = asked(servers, method, path, status, photograph)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    if status >= 400:
        error = answer.json()["error"]
        assert isinstance(error, str) if path.startswith("/v2") else error.keys() == {"code", "message"}


def test_an_image_has_one_answer_whichever_way_it_goes(
    running: Any, tiny_bundles: Path, photograph: bytes, run_vitrine: Callable[..., str], tmp_path: Path
) -> None:
    """`vitrine predict`, /classify and /detect as form, body and JSON, /v2 over HTTP and gRPC: within 1e-6."""
    image = tmp_path / "photograph.jpg"
    image.write_bytes(photograph)
    records = {}
    for name, options in (("colours", ()), ("squares", ("--threshold", "0"))):
        out = tmp_path / f"{name}.jsonl"
        run_vitrine("predict", tiny_bundles / name / "1", image, "--out", out, *options)
        records[name] = json.loads(out.read_text())
    probabilities = {entry["class_id"]: entry["probability"] for entry in records["colours"]["predictions"]}
    objects = records["squares"]["detections"]

    for route, key, query in (("classify", "predictions", ""), ("detect", "detections", "?threshold=0")):
        url, text = f"{running.url}/{route}{query}", base64.b64encode(photograph).decode()
        answers = [
            httpx.post(url, content=photograph),
            httpx.post(url, files={"image": photograph}),
            httpx.post(url, json={"image": text}),
        ]
        expected = records["colours" if route == "classify" else "squares"][key]
        for answer in answers:
            assert answer.json()[key] == [*map(approximately, expected)]

    for module, address in (
        (tritonclient.http, running.url.removeprefix("http://")),
        (tritonclient.grpc, running.grpc),
    ):
        tensor = module.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([photograph], dtype=object))
        with module.InferenceServerClient(address) as client:
            found = client.infer("colours", [tensor]).as_numpy("probabilities")[0]
            assert dict(enumerate(found.tolist())) == pytest.approx(probabilities, abs=1e-6)
            answer = client.infer("squares", [tensor])
        order = np.argsort(-answer.as_numpy("scores")[0], kind="stable")
        assert answer.as_numpy("scores")[0][order].tolist() == pytest.approx([o["score"] for o in objects], abs=1e-6)
        corners = answer.as_numpy("boxes")[0][order]
        boxes = np.array([list(o["box"].values()) for o in objects]) / [640, 480, 640, 480]
        np.testing.assert_allclose(corners, boxes, atol=1e-6)


def approximately(value: Any) -> Any:
    """As it is, but numbers to within 1e-6 of their size or of 1."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
