"""API keys and CORS, on a real server over both transports."""

import base64
import http.client
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import bentoml
import grpc
import httpx
import pytest
import tritonclient.grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from vitrine.service.access import Keys, KeysError, read_keys
from vitrine.service.errors import UnauthorizedError
from vitrine.service.settings import hash_key

Serving = Callable[..., AbstractContextManager[Any]]

KEY, OTHER = "a-key-of-the-tests-1", "a-key-of-the-tests-2"
ORIGIN = "http://page.example"
OPEN = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/", "/page/app.js", "/docs")
OPEN += ("/openapi.json", "/docs.json", "/metrics")


class Pages(ThreadingHTTPServer):
    """Another origin, which serves the same page at every path."""

    page = b""

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Page(BaseHTTPRequestHandler):
    server: Pages

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.page)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    with Pages(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def locked(serve: Serving, tiny_bundles: Path, pages: Pages) -> Iterator[Any]:
    keys, origins = f"{KEY},{hash_key(OTHER)}", f"{ORIGIN}, {pages.origin}"
    with serve(tiny_bundles, VITRINE_API_KEYS=keys, VITRINE_CORS_ORIGINS=origins) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {OTHER}"},
        {"X-API-Key": KEY},
        {"X-API-Key": OTHER, "Authorization": "Basic abc"},
        {"X-API-Key": OTHER, "Authorization": "Bearer of-a-proxy-before-the-server"},
    ],
)
def test_a_known_key_is_accepted(headers: dict[str, str], locked: Any, photograph: bytes) -> None:
    assert httpx.post(f"{locked.url}/classify", content=photograph, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, "none"),
        ({"X-API-Key": ""}, "none"),
        ({"Authorization": "Basic abc"}, "none"),
        ({"Authorization": KEY}, "none"),
        ({"Authorization": "Bearer nonsense"}, "an unknown one"),
        ({"Authorization": "Bearer nonsense", "X-API-Key": "nonsense"}, "an unknown one"),
        ({"X-API-Key": hash_key(OTHER)}, "an unknown one"),  # the hash is not a key
        ({"X-API-Key": KEY + "x"}, "an unknown one"),
    ],
)
def test_no_key_or_an_unknown_one_is_401(headers: dict[str, str], found: str, locked: Any) -> None:
    sentence = f"API key: expected Authorization: Bearer KEY or X-API-Key: KEY, found {found}"
    response = httpx.post(f"{locked.url}/classify", content=b"x", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {"error": {"code": "unauthorized", "message": sentence}}
    assert httpx.get(f"{locked.url}/v2", headers=headers).json() == {"error": sentence}


def test_a_body_without_a_key_is_not_read(locked: Any) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_public_paths_need_no_key(locked: Any) -> None:
    for path in OPEN:
        assert httpx.get(locked.url + path).status_code == 200, path


words = "classify detect models colours v2 health live livez readyz metrics openapi.json schema.json static_content"
tricks = ["", ".", "..", "%2e%2e", "%00", ";x", "%5c", "CLASSIFY", "Livez", "swagger-ui.css", "%63lassify", "live%7a"]
segments = st.sampled_from([*words.split(), *tricks])
separators = st.sampled_from(["/", "//", "%2f", "%252F", "\\"])
paths = st.lists(st.tuples(separators, segments), max_size=4).map(lambda parts: "".join(map("".join, parts)))
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])


@given(methods, paths.map("/".__add__))
@example("GET", "//models")
@example("POST", "//classify")
@example("GET", "/livez/../models")
@example("GET", "/models/")
@example("GET", "/LIVEZ")
@example("GET", "/static_content/../models")
@example("GET", "/static_content/%2e%2e/models")
@example("GET", "/static_content%2f..%2fmodels")
@example("GET", "/schema.json")
@example("GET", "/v2/health/live/../../models/colours")
@example("GET", "/livez%2f..%2fmodels")
@example("GET", "/%6dodels")
@example("GET", "/nowhere")
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_path_bypasses_the_key(locked: Any, method: str, path: str) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=10)) as connection:  # sends the path unchanged
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
    decoded = unquote(path).removesuffix("/") or "/"
    if decoded in OPEN or (decoded.startswith("/static_content/") and ".." not in decoded):
        assert response.status in (200, 404, 405)
        assert b"colours" not in body or decoded == "/metrics"
    else:
        assert response.status == 401


def test_the_environment_of_a_worker_has_no_plain_key(locked: Any) -> None:
    """`vitrine serve` replaces itself by BentoML's process, whose children inherit its environment."""
    environment = Path(f"/proc/{locked.process.pid}/environ").read_bytes()
    assert KEY.encode() not in environment
    assert hash_key(KEY).encode() in environment


def test_a_websocket_needs_a_key_too(locked: Any) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers = {**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert httpx.get(f"{locked.url}/models", headers=headers).status_code in (401, 403)


def test_bentomls_client_is_authenticated_by_its_token(locked: Any, photograph: bytes, tmp_path: Path) -> None:
    image = tmp_path / "photograph.jpg"
    image.write_bytes(photograph)
    with bentoml.SyncHTTPClient(locked.url, token=KEY) as client:
        assert client.classify(image=image, model="colours")["model"]["name"] == "colours"


def test_metrics_need_a_key_if_set(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_API_KEYS=KEY, VITRINE_METRICS_NEED_KEY="true") as (url, *_):
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"X-API-Key": KEY}).status_code == 200


def test_grpc_needs_the_same_keys_but_health_needs_none(locked: Any) -> None:
    with tritonclient.grpc.InferenceServerClient(locked.grpc) as client:
        assert client.is_server_live()
        with pytest.raises(InferenceServerException, match=r"UNAUTHENTICATED.*found none"):
            client.get_model_metadata("colours")
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": OTHER}):
            assert client.get_model_metadata("colours", headers=headers).name == "colours"
    with grpc.insecure_channel(locked.grpc) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_preflight_requests_need_no_key(locked: Any, photograph: bytes) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = httpx.options(f"{locked.url}/classify", headers={"Origin": ORIGIN, **preflight})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "X-API-Key" in allowed.headers["access-control-allow-headers"]
    refused = httpx.post(f"{locked.url}/classify", content=photograph, headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN  # otherwise the page cannot read the error
    response = httpx.post(f"{locked.url}/classify", content=photograph, headers={"Origin": ORIGIN, "X-API-Key": KEY})
    assert response.status_code == 200
    assert "X-Request-ID" in response.headers["access-control-expose-headers"]
    assert "Origin" in response.headers["vary"]
    assert "access-control-allow-credentials" not in response.headers
    for origin in ("http://other.example", "null", f"{ORIGIN}.other.example", ORIGIN.upper(), ""):
        other = httpx.options(f"{locked.url}/classify", headers={"Origin": origin, **preflight})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        assert other.json()["error"]["code"] == "bad_request"  # all errors have the same shape


PAGE = """<!doctype html><pre id="seen">nothing</pre><script type="module">
const image = Uint8Array.from(atob("IMAGE"), (letter) => letter.charCodeAt(0));
const seen = [];
for (const key of ["KEY", "of-somebody-else"]) {
  const headers = {"X-API-Key": key, "X-Request-ID": "page-1", "Content-Type": "image/jpeg"};
  try {
    const response = await fetch("URL/classify?model=colours", {method: "POST", body: image, headers});
    const body = await response.json();
    seen.push(response.status, response.headers.get("X-Request-ID"), body.model?.name ?? body.error.code);
  } catch (error) {
    seen.push(error.name);
  }
}
document.getElementById("seen").textContent = seen.join(" ");
</script>"""


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "200 page-1 colours 401 page-1 unauthorized"),
        ("localhost", "TypeError TypeError"),  # the same page, but from an origin that is not allowed
    ],
)
def test_only_pages_of_allowed_origins_can_use_the_service(
    host: str, expected: str, locked: Any, pages: Pages, photograph: bytes, chromium: str, tmp_path: Path
) -> None:
    values = {"IMAGE": base64.b64encode(photograph).decode(), "KEY": KEY, "URL": locked.url}
    pages.page = re.sub('IMAGE|KEY(?=")|URL', lambda word: values[word[0]], PAGE).encode()
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"http://{host}:{pages.server_port}/"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f'<pre id="seen">{expected}</pre>' in shown.stdout, shown.stdout[:500] + shown.stderr[-2000:]


def test_the_key_file_is_reloaded_and_an_invalid_one_changes_nothing(
    serve: Serving, tiny_bundles: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ci {hash_key(KEY)}\n")

    def wait_for_status(key: str, status: int) -> None:
        deadline = time.monotonic() + 20
        while httpx.get(f"{url}/models", headers={"X-API-Key": key}).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with serve(tiny_bundles, VITRINE_API_KEYS_FILE=str(file)) as (url, _, _, lines):
        wait_for_status(KEY, 200)
        wait_for_status(OTHER, 401)
        file.write_text(f"# the old one is gone\n{hash_key(OTHER)}\n")
        wait_for_status(OTHER, 200)
        wait_for_status(KEY, 401)
        file.write_text("a-plain-key-by-mistake\n")
        deadline = time.monotonic() + 20
        while not any("API keys not reloaded" in line for line in lines):
            assert httpx.get(f"{url}/models", headers={"X-API-Key": OTHER}).status_code == 200
            assert time.monotonic() < deadline
    printed = "".join(lines)
    assert "by-mistake" not in printed
    assert KEY not in printed
    assert OTHER not in printed


def test_a_public_server_without_keys_logs_a_warning(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_HOST="0.0.0.0") as (_, _, _, lines):
        assert any("VITRINE_API_KEYS is not set: anyone who can reach 0.0.0.0" in line for line in lines)
    with serve(tiny_bundles, VITRINE_HOST="0.0.0.0", VITRINE_API_KEYS=KEY) as (_, _, _, lines):
        assert not any("VITRINE_API_KEYS is not set" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "plain\n",
            "line 1: expected [NAME] sha256:HASH, found something else; `vitrine key` makes a key and its line, ",
        ),
        ("plain\n", "`printf %s KEY | sha256sum` hashes a key that you have"),
        (f"# a\n\nci {'sha256:'}{'0' * 63}\n", "line 3: expected [NAME]"),
        (f"two words sha256:{'0' * 64}\n", "line 1: expected [NAME]"),
        (f"{'n' * 65} sha256:{'0' * 64}\n", "line 1: expected a name of at most 64 printable characters"),
        (f"a\u202eb sha256:{'0' * 64}\n", "line 1: expected a name"),
        (f"a\x1b[2J sha256:{'0' * 64}\n", "line 1: expected a name"),
        (f"sha256:{'1' * 64} sha256:{'0' * 64}\n", "line 1: expected a name"),
        (f"plain-key-as-its-name {hash_key('plain-key-as-its-name')}\n", "line 1: expected a name"),
    ],
)
def test_a_key_file_line_without_a_hash_is_refused_and_not_shown(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(KeysError) as caught:
        read_keys(file)
    assert message in str(caught.value)
    assert "plain" not in str(caught.value)
    with pytest.raises(KeysError, match="expected a readable file of keys"):
        Keys((), tmp_path / "nowhere")


def test_a_key_is_known_by_its_name_or_the_start_of_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"ci {hash_key(KEY)}\nci {hash_key(KEY + '-next')}\nmüller {hash_key(OTHER)}\n{hash_key('x' * 16)}\n"
    )
    keys = Keys([hash_key("y" * 16)], file)
    assert [keys.check(None, key) for key in (KEY, KEY + "-next", OTHER)] == ["ci", "ci", "müller"]
    for key in ("x" * 16, "y" * 16):
        assert keys.check(f"Bearer {key}", None) == hash_key(key).removeprefix("sha256:")[:8]
    assert keys.check("Bearer unknown", KEY) == "ci"


def test_a_key_is_limited_over_both_transports_and_others_are_not(
    serve: Serving, tiny_bundles: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ci {hash_key(KEY)}\nother {hash_key(OTHER)}\n")
    environment = {"VITRINE_API_KEYS_FILE": str(file), "VITRINE_KEY_RATE": "0.01", "VITRINE_WORKERS": "2"}
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json", **environment) as running:
        first = httpx.get(f"{running.url}/models", headers={"X-API-Key": KEY, "X-Request-ID": "first"})
        assert first.status_code == 200
        for _ in range(8):  # new connections, to either worker
            refused = httpx.post(f"{running.url}/classify", content=b"x", headers={"X-API-Key": KEY})
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limited"
            assert 90 < int(refused.headers["retry-after"]) <= 100
        assert httpx.get(f"{running.url}/v2", headers={"X-API-Key": KEY}).json().keys() == {"error"}
        with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
            with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*0\.01 requests per second"):
                client.get_model_metadata("colours", headers={"x-api-key": KEY})
            assert client.get_model_metadata("colours", headers={"x-api-key": OTHER}).name == "colours"
        for path in OPEN:
            assert httpx.get(running.url + path).status_code == 200, path
        assert httpx.get(f"{running.url}/models", headers={"X-API-Key": "unknown"}).status_code == 401
        running.process.terminate()
        running.process.wait(timeout=30)
    lines = [json.loads(line) for line in running.lines]
    requests = [line for line in lines if line.get("route") not in (None, "")]
    assert {line["key"] for line in requests if line["status"] in ("200", "OK", "RESOURCE_EXHAUSTED")} <= {
        "ci",
        "other",
        "",
    }
    (line,) = [line for line in requests if line["request_id"] == "first"]
    assert (line["key"], line["status"]) == ("ci", "200")
    assert " key=ci first" in line["message"]
    assert {line["key"] for line in lines if line.get("error") == "rate_limited"} == {"ci"}
    assert not any(KEY in line or OTHER in line for line in running.lines)


def test_without_keys_each_address_is_limited(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_KEY_RATE="0.01") as running:
        statuses = [httpx.get(f"{running.url}/models").status_code for _ in range(3)]
        assert statuses == [200, 429, 429]
        with (
            tritonclient.grpc.InferenceServerClient(running.grpc) as client,  # from the same address
            pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"),
        ):
            client.get_model_metadata("colours", headers={"x-api-key": "chosen-by-the-client"})


def test_an_empty_key_file_rejects_everyone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch()
    with pytest.raises(UnauthorizedError):
        Keys((), file).check("Bearer x", None)
    Keys(()).check(None, None)  # no keys are set: everyone is allowed


def test_the_key_command_makes_a_valid_key(run_vitrine: Callable[..., str], tmp_path: Path) -> None:
    printed = run_vitrine("key", "--name", "ci").splitlines()
    key, line = printed[0].split()[-1], printed[1].split(":", 1)[1].strip()
    file = tmp_path / "keys"
    file.write_text(line)
    Keys((), file).check(f"Bearer {key}", None)
    assert line.startswith("ci sha256:")
    assert "expected one word" in run_vitrine("key", "--name", "two words", status=1)
