"""Disconnected clients, overload, and the files of a server."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request

from vitrine.service.errors import ClientDisconnectedError
from vitrine.service.runtime.serving import Deadline

Serving = Callable[..., AbstractContextManager[Any]]


def send_and_disconnect(url: str, path: str, body: bytes, *, whole: bool = True) -> None:
    """Send a request, or half of it, and disconnect before the response."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + (body if whole else body[: len(body) // 2]))
        time.sleep(0.2)  # until the server has received it


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_of_disconnected_clients_are_not_processed(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_TIMEOUT_SECONDS="60") as running:
        for _ in range(6):
            send_and_disconnect(running.url, "/classify", bright(200))
        # at most one of the six has started; the others would take seconds each
        start = time.monotonic()
        assert httpx.post(f"{running.url}/classify", content=bright(0), timeout=60).status_code == 200
        waited = time.monotonic() - start
        start = time.monotonic()
        assert httpx.post(f"{running.url}/classify", content=bright(200), timeout=60).status_code == 200
        alone = time.monotonic() - start
        assert waited < 3 * alone
        wait_until(lambda: sum(" 499 " in line for line in running.lines) == 6)
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'status="499",version="1"} 6.0' in metrics
        assert 'vitrine_rejected_total{reason="client_disconnected"} 6.0' in metrics


def test_a_client_that_disconnects_while_sending_is_harmless(
    serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    with serve(tiny_bundles) as running:
        send_and_disconnect(running.url, "/classify", photograph, whole=False)
        send_and_disconnect(running.url, "/v2/models/colours/infer", photograph, whole=False)
        assert httpx.post(f"{running.url}/classify", content=photograph).status_code == 200
        wait_until(lambda: sum("incomplete" in line for line in running.lines) == 2)
        assert not any("Traceback" in line for line in running.lines)


def test_a_request_that_would_wait_too_long_is_refused_before_its_body_is_read(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_MAX_WAIT_SECONDS="0.1") as running:
        connections = []
        for _ in range(3):
            connection = socket.create_connection((urlsplit(running.url).hostname, urlsplit(running.url).port))
            body = bright(250)
            connection.sendall(
                f"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            connections.append(connection)
            time.sleep(0.1)
        # an incomplete body: the response comes nevertheless
        with socket.create_connection((urlsplit(running.url).hostname, urlsplit(running.url).port)) as connection:
            connection.settimeout(30)
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\nabc")
            response = ""
            while "}" not in response:
                response += connection.recv(10_000).decode()
        assert response.startswith("HTTP/1.1 503")
        assert "retry-after: " in response.lower()
        assert "overloaded" in response
        for connection in connections:
            connection.close()


def test_livez_reports_a_stuck_thread(serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]) -> None:
    with serve(slow_bundle, VITRINE_STUCK_SECONDS="0.3") as (url, *_):
        assert httpx.get(f"{url}/livez").status_code == 200
        thread = threading.Thread(target=lambda: httpx.post(f"{url}/classify", content=bright(255), timeout=60))
        thread.start()
        wait_until(lambda: httpx.get(f"{url}/livez").status_code == 503)
        for path in ("/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"):
            assert httpx.get(url + path).status_code == 503
        thread.join()
        wait_until(lambda: httpx.get(f"{url}/livez").status_code == 200)


def test_a_stopped_server_leaves_no_files(
    serve: Serving, tiny_bundles: Path, tmp_path: Path, photograph: bytes
) -> None:
    with serve(tiny_bundles, TMPDIR=str(tmp_path), VITRINE_WORKERS="2") as running:
        assert httpx.post(f"{running.url}/classify", content=photograph).status_code == 200
        (folder,) = tmp_path.glob("vitrine-*")
        assert len(list(folder.glob("*/graph.onnx"))) == 2  # one per bundle, shared by all sessions and workers
        wait_until(lambda: len(list(folder.glob("*.counters"))) == 2)  # one per worker
    assert running.process.returncode == 0
    assert not list(tmp_path.glob("vitrine-*"))


def test_a_failed_start_leaves_no_files(
    run_vitrine: Callable[..., str], free_ports: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("VITRINE_BUNDLES", str(tmp_path))
    assert "found none" in run_vitrine("serve", *free_ports, status=1)
    assert not list(tmp_path.iterdir())


def request_of(*messages: str) -> Request:
    """A request whose connection delivers these messages, and then none."""
    remaining = list(messages)

    async def receive() -> dict[str, object]:
        if not remaining:
            await asyncio.Event().wait()
        return {"type": remaining.pop(0)}

    return Request({"type": "http"}, receive)


def within_deadline(block: Callable[[Deadline], Coroutine[Any, Any, object]], seconds: float, *messages: str) -> object:
    """Run a block under a deadline; return its result."""

    async def scenario() -> object:
        before = asyncio.all_tasks()
        async with Deadline(request_of(*messages), seconds) as deadline:
            result = await block(deadline)
        await asyncio.sleep(0.15)  # what was left behind would cancel this
        assert asyncio.all_tasks() == before
        return result

    return asyncio.run(asyncio.wait_for(scenario(), 30))


async def forever(deadline: Deadline) -> None:
    deadline.body_received()
    await asyncio.Event().wait()


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.12])
def test_a_request_ends_at_its_deadline(seconds: float) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        within_deadline(forever, seconds)
    assert seconds <= time.monotonic() - start < 20  # later, it was that of `within_deadline`


@pytest.mark.parametrize("seconds", [0.1, 60])
@pytest.mark.parametrize("watched", [False, True])
def test_a_request_that_ends_in_time_leaves_nothing_behind(seconds: float, watched: bool) -> None:
    async def block(deadline: Deadline) -> int:
        deadline.body_received()
        await asyncio.sleep(0.07 if watched and seconds > 1 else 0)  # after 0.05 s, a disconnect is watched for
        return 1

    assert within_deadline(block, seconds) == 1


@pytest.mark.parametrize("before", [(), ("http.request",), ("http.request", "http.request")])
def test_a_client_that_leaves_ends_its_request(before: tuple[str, ...]) -> None:
    with pytest.raises(ClientDisconnectedError):
        within_deadline(forever, 60, *before, "http.disconnect")


def test_a_body_is_not_read_by_the_watch_for_a_disconnect() -> None:
    async def block(deadline: Deadline) -> int:
        await asyncio.sleep(0.2)
        return 1

    assert within_deadline(block, 60, "http.disconnect") == 1


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError()])
def test_the_errors_of_a_request_are_its_own(error: BaseException) -> None:
    async def block(deadline: Deadline) -> None:
        raise error

    with pytest.raises(type(error)):
        within_deadline(block, 60)


def test_a_request_that_is_cancelled_from_outside_stays_cancelled() -> None:
    async def scenario() -> None:
        async def request() -> None:
            async with Deadline(request_of(), 0.05):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(30)  # cancelled by the deadline
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(30)

        with pytest.raises(asyncio.CancelledError):
            await asyncio.ensure_future(request())

    asyncio.run(asyncio.wait_for(scenario(), 30))
