"""Faults around the server: processes that are killed or stopped, and memory and file descriptors that run out."""

import base64
import io
import re
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

Serving = Callable[..., AbstractContextManager[Any]]
WAIT = 60.0  # seconds
ONE = {"VITRINE_WORKERS": "1", "VITRINE_THREADS": "1"}


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def workers_of(server: Any) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "_bentoml_impl.worker.service" in child.cmdline()]


def address_of(server: Any) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def limited(worker: psutil.Process, kind: int, value: int) -> Iterator[None]:
    before = resource.prlimit(worker.pid, kind)
    resource.prlimit(worker.pid, kind, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(worker.pid, kind, before)


@pytest.fixture(scope="module")
def lone(serve: Serving, two_bundles: Path) -> Iterator[Any]:
    """A server of one worker."""
    with serve(two_bundles, **ONE) as server:
        yield server


def test_out_of_memory_is_503_and_does_not_blame_the_picture(lone: Any) -> None:
    (worker,) = workers_of(lone)
    small, large = png(32, 32), png(7000, 7000)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(large).decode()]}
    with httpx.Client(base_url=lone.url, timeout=WAIT) as client:
        assert client.post("/classify", content=small).status_code == 200
        with limited(worker, resource.RLIMIT_AS, worker.memory_info().vms + 64 * 1024 * 1024):
            for route in ("/classify", "/detect"):
                answer = client.post(route, content=large)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
                assert "out of memory" in answer.json()["error"]["message"]
            answer = client.post("/v2/models/vit-cifar10/infer", json={"inputs": [tensor]})
            assert (answer.status_code, answer.json()["error"]) == (503, "the server is out of memory; try again later")
            assert client.post("/classify", content=small).status_code == 200
        assert client.post("/classify", content=large).status_code == 200
    assert len([line for line in lone.lines if "out of memory" in line]) == 1
    assert "Traceback" not in "".join(lone.lines)


def test_out_of_file_descriptors_those_who_are_connected_are_served(lone: Any) -> None:
    (worker,) = workers_of(lone)
    with httpx.Client(base_url=lone.url, timeout=WAIT) as client:
        assert client.get("/livez").status_code == 200
        with limited(worker, resource.RLIMIT_NOFILE, worker.num_fds()):
            assert client.post("/classify", content=png(32, 32)).status_code == 200
            answer = client.get("/metrics")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert "out of file descriptors" in answer.json()["error"]["message"]
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{lone.url}/livez", timeout=2.0)
        wait_until(lambda: httpx.get(f"{lone.url}/livez", timeout=WAIT).status_code == 200)
        assert client.get("/metrics").status_code == 200
    assert "Traceback" not in "".join(lone.lines)


def test_clients_that_are_killed_in_the_middle_leave_nothing(lone: Any) -> None:
    (worker,) = workers_of(lone)
    picture = png(3000, 3000)
    head = b"POST /detect HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\nContent-Length: %d\r\n\r\n" % len(picture)
    before = worker.num_fds()
    for _ in range(20):
        for part in (len(picture) // 2, len(picture)):
            with socket.create_connection(address_of(lone), timeout=WAIT) as connection:
                connection.sendall(head + picture[:part])
                reset = struct.pack("ii", 1, 0)  # on, for 0 s: as if the process were killed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    wait_until(lambda: worker.num_fds() <= before)
    assert httpx.post(f"{lone.url}/classify", content=png(32, 32), timeout=WAIT).status_code == 200
    assert not [line for line in lone.lines if "Traceback" in line or ("ERROR" in line and "out of" not in line)]


def test_a_stopped_worker_is_reported_and_all_end_with_the_main_process(serve: Serving, two_bundles: Path) -> None:
    with serve(two_bundles, VITRINE_WORKERS="2", VITRINE_THREADS="1", VITRINE_STUCK_SECONDS="2") as server:

        def probe(path: str = "/livez") -> httpx.Response:
            return httpx.get(server.url + path, timeout=WAIT)

        wait_until(lambda: len([line for line in server.lines if "ready:" in line]) == 2)
        stopped, other = workers_of(server)
        stopped.suspend()
        wait_until(lambda: probe().status_code == 503)
        message = f"worker {stopped.pid}: stopped, or its event loop hangs"
        assert probe().json()["error"] == {"code": "unavailable", "message": message}
        assert probe("/v2/health/live").json()["error"] == message
        stopped.resume()
        wait_until(lambda: probe().status_code == 200)

        folder = Path(other.environ()["_VITRINE_SHARED"])
        stopped.suspend()
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs([stopped, other], timeout=WAIT)
        assert not alive
        assert not folder.exists()
        for port in (address_of(server)[1], int(server.grpc.rpartition(":")[2])):
            with socket.socket() as again:
                again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                again.bind(("127.0.0.1", port))


def received(server: Any) -> float:
    """The number of requests in work, and of those for `/detect` that are answered."""
    text = httpx.get(f"{server.url}/metrics", timeout=WAIT).text
    in_work = re.findall(r"^vitrine_requests_in_flight (\S+)", text, re.MULTILINE)
    answered = re.findall(r'^vitrine_requests_total{.*route="/detect".*} (\S+)', text, re.MULTILINE)
    return sum(map(float, in_work + answered))


def test_requests_in_work_are_answered_when_the_server_is_told_to_stop(serve: Serving, two_bundles: Path) -> None:
    with (
        serve(two_bundles, **ONE, VITRINE_RECEIVE_SECONDS="5") as server,
        ThreadPoolExecutor(4) as pool,
        socket.create_connection(address_of(server), timeout=WAIT) as slow,
    ):
        slow.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello")
        picture = png(4000, 4000)
        answers = [pool.submit(httpx.post, f"{server.url}/detect", content=picture, timeout=WAIT) for _ in range(4)]
        wait_until(lambda: received(server) == 5)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # impatience changes nothing
        assert [answer.result(timeout=WAIT).status_code for answer in answers] == [200] * 4
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        assert server.process.wait(timeout=WAIT) == 0
    assert "Traceback" not in "".join(server.lines)
