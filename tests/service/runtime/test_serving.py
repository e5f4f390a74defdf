"""What becomes of requests whose clients do not wait, and of a server's files."""

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

Serving = Callable[..., AbstractContextManager[Any]]


def leave(url: str, path: str, body: bytes, *, whole: bool = True) -> None:
    """Send a request, or half of it, and close the connection before the answer."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + (body if whole else body[: len(body) // 2]))
        time.sleep(0.2)  # the server has got it


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_work_of_clients_that_have_left_is_never_done(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_TIMEOUT_SECONDS="60") as running:
        for _ in range(6):
            leave(running.url, "/classify", bright(200))
        # one of the six at most is at work: the others would take seconds each
        start = time.monotonic()
        assert httpx.post(f"{running.url}/classify", content=bright(0), timeout=60).status_code == 200
        waited = time.monotonic() - start
        start = time.monotonic()
        assert httpx.post(f"{running.url}/classify", content=bright(200), timeout=60).status_code == 200
        alone = time.monotonic() - start
        assert waited < 3 * alone
        eventually(lambda: sum(" 499 " in line for line in running.lines) == 6)
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'status="499",version="1"} 6.0' in metrics
        assert 'vitrine_rejected_total{reason="client_left"} 6.0' in metrics


def test_a_client_that_leaves_while_it_sends_disturbs_nobody(
    serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    with serve(tiny_bundles) as running:
        leave(running.url, "/classify", photograph, whole=False)
        leave(running.url, "/v2/models/colours/infer", photograph, whole=False)
        assert httpx.post(f"{running.url}/classify", content=photograph).status_code == 200
        eventually(lambda: sum("incomplete" in line for line in running.lines) == 2)
        assert not any("Traceback" in line for line in running.lines)


def test_what_would_wait_too_long_is_refused_before_its_body_is_read(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_MAX_WAIT_SECONDS="0.1") as running:
        held = []
        for _ in range(3):
            connection = socket.create_connection((urlsplit(running.url).hostname, urlsplit(running.url).port))
            body = bright(250)
            connection.sendall(
                f"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            held.append(connection)
            time.sleep(0.1)
        # only a part of a body that never ends: the answer comes all the same
        with socket.create_connection((urlsplit(running.url).hostname, urlsplit(running.url).port)) as connection:
            connection.settimeout(30)
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\nabc")
            answer = ""
            while "}" not in answer:
                answer += connection.recv(10_000).decode()
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: " in answer.lower()
        assert "overloaded" in answer
        for connection in held:
            connection.close()


def test_a_server_that_ends_leaves_no_files(
    serve: Serving, tiny_bundles: Path, tmp_path: Path, photograph: bytes
) -> None:
    with serve(tiny_bundles, TMPDIR=str(tmp_path), VITRINE_WORKERS="2") as running:
        assert httpx.post(f"{running.url}/classify", content=photograph).status_code == 200
        (folder,) = tmp_path.glob("vitrine-*")
        assert len(list(folder.glob("*/graph.onnx"))) == 2  # one for each bundle, for all sessions and workers
        eventually(lambda: len(list(folder.glob("*.numbers"))) == 2)  # of each worker
    assert running.process.returncode == 0
    assert not list(tmp_path.glob("vitrine-*"))


def test_a_broken_bundle_leaves_no_files_either(
    run_vitrine: Callable[..., str], free_ports: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("VITRINE_BUNDLES", str(tmp_path))
    assert "found none" in run_vitrine("serve", *free_ports, status=1)
    assert not list(tmp_path.iterdir())
