"""Security headers, on the responses of a real server."""

import re
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from vitrine.service.response_headers import SECURITY_HEADERS

EXPECTED = {name.decode(): value.decode() for name, value in SECURITY_HEADERS}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/models", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/schema.json", 200),
        ("GET", "/metrics", 200),
        ("GET", "/livez", 200),
        ("GET", "/static_content/swagger-ui.css", 200),
        ("GET", "/v2/models/colours", 200),
        ("POST", "/v2/repository/index", 200),
        ("GET", "/v2/nothing", 404),
        ("GET", "/static_content/nothing", 404),
        ("DELETE", "/classify", 405),
        ("POST", "/livez", 405),
        ("POST", "/v2/repository/models/colours/unload", 403),
    ],
)
def test_every_response_has_them_once(method: str, path: str, status: int, server: str) -> None:
    response = httpx.request(method, server + path)
    assert response.status_code == status
    for name, value in EXPECTED.items():
        assert response.headers.get_list(name) == [value]
    assert "server" not in response.headers


def test_answers_about_images_have_them(server: str, photograph: bytes) -> None:
    for accept in ("application/json", "text/csv", "image/png"):
        response = httpx.post(f"{server}/detect?threshold=0", content=photograph, headers={"Accept": accept})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(accept)
        assert EXPECTED.items() <= dict(response.headers).items()
    refused = httpx.post(f"{server}/classify", content=b"no image")
    assert refused.status_code == 415
    assert EXPECTED.items() <= dict(refused.headers).items()


@pytest.mark.parametrize("request_line", [b"not HTTP", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", b"GET / HTTP/9.9"])
def test_refusals_of_what_is_no_request_have_them(request_line: bytes, server: str) -> None:
    with socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2])), timeout=20) as client:
        client.sendall(request_line + b"\r\n\r\n")
        head = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")[0].decode()
    assert head.startswith("HTTP/1.1 ")
    assert all(f"\r\n{name}: {value}" in head for name, value in EXPECTED.items())


def test_the_page_may_run_its_own_script_only(server: str) -> None:
    """That the page works under its policy is seen in tests/service/http/test_openapi.py."""
    page = httpx.get(f"{server}/docs")
    (policy,) = page.headers.get_list("content-security-policy")
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert "unsafe" not in directives["script-src"]
    assert {**EXPECTED, "content-security-policy": policy}.items() <= dict(page.headers).items()
    (script,) = re.findall(r"<script>(.*?)</script>", page.text)
    assert script.startswith("SwaggerUIBundle(")


class Copy(BaseHTTPRequestHandler):
    """The page with one more script, with and without its policy."""

    policy, page = "", ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if self.path == "/with":
            self.send_header("Content-Security-Policy", self.policy)
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("path", "title"), [("/without", "forged"), ("/with", "Vitrine")])
def test_the_policy_stops_a_foreign_script(path: str, title: str, server: str, chromium: str, tmp_path: Path) -> None:
    page = httpx.get(f"{server}/docs")
    Copy.policy = page.headers["content-security-policy"]
    Copy.page = page.text.replace("</body>", "<script>document.title = 'forged'</script></body>")
    with ThreadingHTTPServer(("127.0.0.1", 0), Copy) as copy:
        threading.Thread(target=copy.serve_forever, daemon=True).start()
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        url = f"http://127.0.0.1:{copy.server_port}{path}"
        shown = subprocess.run([*command, url], capture_output=True, text=True, timeout=120)
        copy.shutdown()
    assert f"<title>{title}</title>" in shown.stdout
