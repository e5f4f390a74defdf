"""An HTTP server for tests of downloads."""

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FileServer(ThreadingHTTPServer):
    """HTTP server that can drop connections and send wrong data."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}  # more of them, of the answers for a path; "": of any other
        self.asked: list[tuple[str, str | None]] = []  # path and range of each request
        self.breaks_after: int | None = None  # bytes of each answer
        self.resumes = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FileServer)
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        content = server.files.get(self.path)
        headers = server.headers.get(self.path, server.headers.get("", {}))
        if content is None:
            self.send_response(404)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        start = int(re.findall(r"\d+", asked)[0]) if asked and server.resumes else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        end = len(content) if server.breaks_after is None else start + server.breaks_after
        if self.command == "GET":
            self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
