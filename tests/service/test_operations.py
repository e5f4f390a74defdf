"""Operations: health, metrics, model list, OpenAPI, errors of other routes, start and stop."""

import io
import json
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

Serving = Callable[..., AbstractContextManager[Any]]


@pytest.mark.parametrize("route", ["livez", "readyz"])
def test_probes(route: str, server: str) -> None:
    assert httpx.get(f"{server}/{route}").status_code == 200


def test_the_openapi_page_is_self_contained(server: str) -> None:
    page = httpx.get(f"{server}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")
    for asset in ("static_content/swagger-ui.css", "static_content/swagger-ui-bundle.js"):
        assert asset in page.text
        assert httpx.get(f"{server}/{asset}").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/nowhere", 404, "not_found"),
        ("GET", "/classify", 405, "method_not_allowed"),
        ("PUT", "/detect", 405, "method_not_allowed"),
        ("POST", "/models", 405, "method_not_allowed"),
        ("POST", "/readyz", 405, "method_not_allowed"),
        ("GET", "/static_content/nothing.js", 404, "not_found"),
        ("DELETE", "/schema.json", 405, "method_not_allowed"),
    ],
)
def test_all_errors_have_the_same_shape(method: str, path: str, status: int, code: str, server: str) -> None:
    response = httpx.request(method, server + path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"].startswith(f"{method} {path}")


def test_serve_prints_the_models_and_stops_on_sigterm(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles) as (url, _, process, lines):
        printed = "".join(lines)
        assert f"on {url}" in printed
        assert "colours 1  image-classification, 3 labels" in printed
        assert "squares 1  object-detection, 3 labels" in printed
        assert f"curl -F image=@examples/frog.jpg -F model=colours {url}/classify" in printed
        assert httpx.post(f"{url}/classify", content=photograph).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in "".join(lines)


def test_the_highest_version_is_served(serve: Serving, tiny_bundles: Path, tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        target = tmp_path / "colours" / version
        shutil.copytree(tiny_bundles / "colours" / "1", target)
        manifest = json.loads((target / "manifest.json").read_text())
        (target / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
    with serve(tmp_path) as (url, _, _, _):
        (model,) = httpx.get(f"{url}/models").json()["models"]
        assert (model["version"], model["versions"]) == ("10", ["1", "2", "10"])
        missing = httpx.post(f"{url}/detect", content=b"x")
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "no object-detection model here; available: none"


def test_a_request_that_times_out_is_504(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles, VITRINE_TIMEOUT_SECONDS="1e-6") as (url, _, _, _):
        response = httpx.post(f"{url}/classify", content=photograph)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"


def test_the_server_survives_work_that_times_out(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(buffer, "PNG")  # small to send, slow to decode
    with serve(tiny_bundles, VITRINE_TIMEOUT_SECONDS="0.3") as (url, _, _, _):
        response = httpx.post(f"{url}/classify", content=buffer.getvalue())
        assert response.status_code == 504
        # the abandoned image may still hold a core for a moment
        assert any(httpx.post(f"{url}/classify", content=photograph).status_code == 200 for _ in range(20))


def test_a_non_ascii_content_type_is_accepted(server: str, photograph: bytes) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/\xff\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(photograph) + photograph)
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 200")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["model"]["name"] == "colours"


def test_a_second_server_does_not_affect_the_metrics_of_the_first(
    serve: Serving, server: str, tiny_bundles: Path, photograph: bytes
) -> None:
    httpx.post(f"{server}/classify", content=photograph)
    counted = 'vitrine_requests_total{model="colours",route="/classify",status="200"'
    assert counted in httpx.get(f"{server}/metrics").text
    with serve(tiny_bundles):
        assert counted in httpx.get(f"{server}/metrics").text


def test_a_port_in_use_is_refused(server: str, tiny_bundles: Path, run_vitrine: Callable[..., str]) -> None:
    port = server.rpartition(":")[2]
    printed = run_vitrine("serve", "--port", port, status=1)
    assert (
        printed
        == f"vitrine: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port\n"
    )


def test_a_client_that_disconnects_early_is_harmless(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles) as (url, _, _, lines):
        host, port = url.removeprefix("http://").split(":")
        for content_type in ("image/jpeg", "multipart/form-data; boundary=x"):
            with socket.create_connection((host, int(port))) as connection:
                headers = ("Host: x", f"Content-Type: {content_type}", "Content-Length: 9999", "", "")
                head = "\r\n".join(("POST /classify HTTP/1.1", *headers))
                connection.sendall(head.encode() + photograph[:1000])
        assert httpx.post(f"{url}/classify", content=photograph).status_code == 200
    assert "Traceback" not in "".join(lines)


def test_limits_come_from_the_environment(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles, VITRINE_MAX_PIXELS="1000", VITRINE_MAX_BODY_BYTES="100000") as (url, _, _, _):
        response = httpx.post(f"{url}/classify", content=photograph)
        assert response.status_code == 413
        assert "at most 1000 pixels are accepted, found 640 x 480" in response.json()["error"]["message"]
        assert httpx.post(f"{url}/classify", content=bytes(200_000)).status_code == 413


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VITRINE_THREADS": "0"}, "VITRINE_THREADS: Input should be greater than or equal to 1, found '0'"),
        ({"VITRINE_BUNDLES": "/nowhere"}, "VITRINE_BUNDLES: expected bundles, found none in /nowhere; `pip install"),
    ],
)
def test_serve_refuses_invalid_settings_in_one_line(
    environment: dict[str, str],
    message: str,
    run_vitrine: Callable[..., str],
    free_ports: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"vitrine: {message}" in run_vitrine("serve", *free_ports, status=1)


def test_serve_refuses_a_tampered_bundle(
    tiny_bundles: Path,
    tmp_path: Path,
    run_vitrine: Callable[..., str],
    free_ports: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_bundles, tmp_path, dirs_exist_ok=True)
    model = tmp_path / "colours" / "1" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    monkeypatch.setenv("VITRINE_BUNDLES", str(tmp_path))
    assert f"vitrine: {model}: sha256: expected" in run_vitrine("serve", *free_ports, status=1)
