"""Hostile bodies never make the event loop stand still: no client can make others wait.

On a busy machine it stands still, too. A process beside the server that does nothing but sleep notices that: such an
attempt does not count.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.reliability.bombs import BOMBS, DECODED

Serving = Callable[..., AbstractContextManager[Any]]
MIB = 1024 * 1024
MAX_STALL = 0.05  # seconds
ATTEMPTS = 5
JSON, FORM = "application/json", "multipart/form-data; boundary=x"
INFER = "/v2/models/vit-cifar10/infer"
SLEEPER = """
import sys, threading, time
latest = 0.0
def answer():
    global latest
    for _ in sys.stdin:
        print(latest, flush=True)
        latest = 0.0
threading.Thread(target=answer, daemon=True).start()
while threading.active_count() > 1:
    start = time.monotonic()
    time.sleep(0.01)
    latest = max(latest, time.monotonic() - start - 0.01)
"""


def part(name: str, data: bytes, *headers: str) -> bytes:
    lines = ["--x", f'Content-Disposition: form-data; name="{name}"', *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def repeated(text: str, size: int) -> bytes:
    return text.encode() * (size // len(text.encode()))


def image_json(field: str) -> Callable[[int], bytes]:
    """A document of /classify that repeats a text."""
    start, text, end = field.split("|")
    return lambda size: b'{"image": "", ' + start.encode() + repeated(text, size) + end.encode() + b"}"


def infer_json(datatype: str, shape: list[int], field: str) -> Callable[[int], bytes]:
    """A document of /v2 whose input repeats a text."""
    head = {"name": "pixels" if datatype != "BYTES" else "image", "datatype": datatype, "shape": shape}
    start, text, end = field.split("|")
    document = b'{"inputs": [' + json.dumps(head)[:-1].encode() + b", "
    return lambda size: document + start.encode() + repeated(text, size) + end.encode() + b"}]}"


# By name: the path, the Content-Type, and the body of about so many bytes.
CORPUS: dict[str, tuple[str, str, Callable[[int], bytes]]] = {
    "a codec that takes quadratic time": (
        "/classify",
        f"{FORM}; charset=punycode",
        lambda size: form(part("model", b"a" * MIB)),
    ),
    "long fields": ("/classify", FORM, lambda size: form(*[part("model", b"a" * MIB)] * (size // MIB))),
    "many parts": ("/classify", FORM, lambda size: form(*[part("labels", b"a")] * (size // 70))),
    "many headers": ("/classify", FORM, lambda size: form(part("a", b"", *["X: y"] * (size // 6)))),
    "almost boundaries": ("/classify", FORM, lambda size: form(part("image", repeated("\r\n--xa", size)))),
    "boundary with padding": ("/classify", FORM, lambda size: b"--x" + b" " * size),
    "line breaks": ("/classify", FORM, lambda size: repeated("\r\n", size)),
    "field of numbers": ("/classify", FORM, lambda size: form(part("labels", b"[" + b"1," * 500_000 + b"1]"))),
    "numbers": ("/classify", JSON, image_json('"x": [|1,|1]')),
    "lists": ("/classify", JSON, image_json('"x": [|[],|[]]')),
    "objects": ("/classify", JSON, image_json('"x": [|{},|{}]')),
    "texts": ("/classify", JSON, image_json('"x": [|"",|""]')),
    "labels": ("/classify", JSON, image_json('"labels": [|"cat",|"cat"]')),
    "labels in a text": ("/classify", JSON, image_json('"labels": "|cat,|cat"')),
    "nested lists": ("/classify", JSON, lambda size: b"[" * size),
    "spaces": ("/classify", JSON, lambda size: b" " * size + b"{}"),
    "base64 in words": ("/classify", JSON, lambda size: b'{"image": "' + repeated("a ", size) + b'"}'),
    "base64": ("/classify", JSON, lambda size: b'{"image": "' + repeated("abcd", size) + b'"}'),
    "escaped base64": ("/classify", JSON, lambda size: b'{"image": "' + repeated("\\u0041", size) + b'"}'),
    "backslashes": ("/classify", JSON, lambda size: b'{"image": "' + repeated("\\\\", size) + b'"}'),
    "escaped quotes": ("/classify", JSON, lambda size: b'{"image": "' + repeated('\\"', size) + b'"}'),
    "emoji": ("/classify", JSON, lambda size: b'{"image": "' + repeated("😀", size) + b'"}'),
    "images": ("/classify", JSON, lambda size: b'{"images": [' + repeated('"",', size) + b'""]}'),
    "tensor of integers": (INFER, JSON, infer_json("UINT8", [9], '"data": [|1,|1]')),
    "tensor of floats": (INFER, JSON, infer_json("FP32", [9], '"data": [|1.5,|1]')),
    "nested tensor": (INFER, JSON, infer_json("UINT8", [9], '"data": [|[1],|[1]]')),
    "tensor of texts": (INFER, JSON, infer_json("BYTES", [1], '"data": [|"",|""]')),
    "long shape": (INFER, JSON, infer_json("BYTES", [1], '"data": [], "shape": [|1,|1]')),
    "outputs": (INFER, JSON, lambda size: b'{"inputs": [], "outputs": [' + repeated('{"name":"a"},', size) + b"{}]}"),
    "repository": ("/v2/repository/index", JSON, lambda size: b'{"x": [' + repeated("1,", size) + b"1]}"),
    "raw bytes": ("/classify", "image/png", bytes),
}


class Sleeper:
    """A process that sleeps, and knows how late it was woken up."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SLEEPER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def latest(self) -> float:
        """Return by how many seconds it was late at most since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def sleeper() -> Iterator[Sleeper]:
    sleeper = Sleeper()
    yield sleeper
    sleeper.close()


@pytest.fixture(scope="module")
def url(serve: Serving, two_bundles: Path) -> Iterator[str]:
    with serve(two_bundles, VITRINE_WORKERS="1") as server:
        yield server.url


def stalls(url: str) -> dict[float, float]:
    """How many stalls there were so far, of at most so many seconds."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    (family,) = [family for family in families if family.name == "vitrine_event_loop_stall_seconds"]
    return {float(s.labels["le"]): s.value for s in family.samples if s.name.endswith("_bucket")}


def longest(before: dict[float, float], after: dict[float, float]) -> float:
    """Return an upper bound of the longest stall in between."""
    count = after[float("inf")] - before[float("inf")]
    return min(bound for bound in after if after[bound] - before[bound] == count)


def send(url: str, path: str, body: bytes, **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with suppress(httpx.TransportError):  # answered before everything was sent
        return httpx.post(url + path, content=body, headers=names, timeout=60).status_code
    return 0


def check(url: str, sleeper: Sleeper, attack: Callable[[], object]) -> None:
    """Check that the event loop goes on during an attack."""
    found = []
    for _ in range(ATTEMPTS):
        before = stalls(url)
        sleeper.latest()
        attack()
        after = stalls(url)
        found.append((longest(before, after), sleeper.latest()))
        if found[-1][0] <= MAX_STALL:
            return
    quiet = [stall for stall, noise in found if noise < MAX_STALL / 2]
    assert not quiet, f"(stall, lateness of a process that sleeps) in seconds: {found}"
    assert min(stall for stall, _ in found) <= 10 * MAX_STALL, found


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("size", [4 * MIB, pytest.param(19 * MIB, marks=pytest.mark.soak)])
def test_hostile_bodies_do_not_stop_the_event_loop(name: str, size: int, url: str, sleeper: Sleeper) -> None:
    path, content_type, make = CORPUS[name]
    body = make(size)

    def attack() -> None:
        assert send(url, path, body, Content_Type=content_type) in (0, 200, 400, 413, 415, 422)

    check(url, sleeper, attack)


REFUSED = {name: bomb for name, bomb in BOMBS.items() if not bomb.slow and not bomb.outcomes & DECODED}


@pytest.mark.parametrize("form", sorted({name.partition("/")[0] for name in REFUSED}))
def test_refused_bombs_do_not_stop_the_event_loop(form: str, url: str, sleeper: Sleeper) -> None:
    bodies = {name: bomb.make() for name, bomb in REFUSED.items() if name.startswith(f"{form}/")}

    def attack() -> None:
        statuses = {name: send(url, "/classify", body) for name, body in bodies.items()}
        assert set(statuses.values()) <= {413, 422}, statuses

    check(url, sleeper, attack)


@pytest.mark.soak
def test_images_that_are_decoded_in_python_do_not_stop_the_event_loop(url: str, sleeper: Sleeper) -> None:
    body = BOMBS["bmp/rle8, 2 MP of single pixels"].make()

    def attack() -> None:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: send(url, "/classify", body), range(4))) <= {413, 503}

    check(url, sleeper, attack)


def test_compressed_bodies_do_not_stop_the_event_loop(url: str, sleeper: Sleeper) -> None:
    path, content_type, make = CORPUS["tensor of integers"]
    bodies = [gzip.compress(make(size), 1) for size in (8 * MIB, 200 * MIB)]

    def attack() -> None:
        statuses = [send(url, path, body, Content_Type=content_type, Content_Encoding="gzip") for body in bodies]
        assert statuses == [400, 413]

    check(url, sleeper, attack)


def test_many_large_bodies_at_once_do_not_stop_the_event_loop(url: str, sleeper: Sleeper) -> None:
    path, content_type, make = CORPUS["tensor of integers"]
    body = make(2 * MIB)

    def attack() -> None:
        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(lambda _: send(url, path, body, Content_Type=content_type), range(6))) == {400}

    check(url, sleeper, attack)
