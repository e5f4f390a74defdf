"""Memory is flat over thousands of failed requests of every kind: nothing of them stays."""

import asyncio
import base64
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from benchmarks.soak.client import HOST, Client, encode_request, wait_until, wait_until_idle
from benchmarks.soak.processes import usage

_SIZE = 200_000  # bytes of each failing image: a hundredth of them that stayed would show
_CONCURRENT = 8
_MOST_GROWTH = 24.0  # MiB, of all processes; allocators and caches settle


def noise_png(edge: int = 260) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = noise_png(32)
NOISE = noise_png()
assert len(NOISE) > _SIZE
BROKEN = NOISE[: len(NOISE) // 2] + b"\0" * (len(NOISE) // 2)  # breaks in the middle of its pixels
UNKNOWN = b"no image " * (_SIZE // 9)
_HUGE_HEADER = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + NOISE[24:29]
HUGE = NOISE[:12] + _HUGE_HEADER + zlib.crc32(_HUGE_HEADER).to_bytes(4, "big") + NOISE[33:]


def classify(image: bytes, query: str = "") -> bytes:
    return encode_request("POST", f"/classify?model=vit-cifar10{query}", image)


def form(*images: bytes, name: str = "image") -> bytes:
    boundary = b"a-boundary"
    head = f'\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'.encode()
    parts = [b"--" + boundary + head + image + b"\r\n" for image in images]
    body = b"".join([*parts, b"--", boundary, b"--\r\n"])
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    return encode_request("POST", "/classify?model=vit-cifar10", body, Content_Type=content_type)


def as_json(*images: bytes) -> bytes:
    document = {"model": "vit-cifar10", "images": [base64.b64encode(image).decode() for image in images]}
    return encode_request("POST", "/classify", json.dumps(document).encode(), Content_Type="application/json")


def protocol(*images: bytes) -> bytes:
    data = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "parameters": parameters}
    header = orjson.dumps({"inputs": [tensor]})
    return encode_request(
        "POST",
        "/v2/models/vit-cifar10/infer",
        header + data,
        Inference_Header_Content_Length=str(len(header)),
        Content_Type="application/octet-stream",
    )


def explain(image: bytes, query: str) -> bytes:
    return encode_request("POST", f"/explain?{query}", image)


PICTURE = {"Accept": "image/png"}
FAILURES: dict[str, tuple[bytes, int]] = {  # request and status; 0: the client leaves before the answer
    "400 parameter": (classify(NOISE, "&top_k=0"), 400),
    "400 form": (form(NOISE, name="picture"), 400),
    "400 v2": (protocol(GOOD, BROKEN).replace(b'"shape":[2]', b'"shape":[3]'), 400),
    "404": (encode_request("POST", "/classify?model=none", NOISE), 404),
    "406": (encode_request("POST", "/classify", NOISE, **PICTURE), 406),
    "413": (classify(HUGE), 413),
    "415": (classify(UNKNOWN), 415),
    "422": (classify(BROKEN), 422),
    "422 picture": (encode_request("POST", "/detect", BROKEN, **PICTURE), 422),
    "400 explanation": (explain(NOISE, "model=detr-bccd&threshold=1&target=0"), 400),
    "422 explanation": (explain(BROKEN, "model=vit-cifar10"), 422),
    "422 v2": (protocol(GOOD, BROKEN, GOOD), 422),
    "several, one broken": (form(GOOD, BROKEN, GOOD), 200),
    "several, all broken": (as_json(BROKEN, UNKNOWN, HUGE), 200),
    "client gone": (encode_request("POST", "/detect", NOISE), 0),
    "client gone, explanation": (explain(NOISE, "model=vit-cifar10&method=occlusion&grid=16"), 0),
    "client gone, v2": (protocol(GOOD, NOISE, BROKEN), 0),
}
TIMED_OUT = "504"
FAILURES_OF_TIME = {TIMED_OUT: (encode_request("POST", "/detect", NOISE), 504)}


async def fail_often(port: int, kind: str, count: int) -> None:
    """Let so many requests fail, some of them at once."""
    client, remaining = Client(port), iter(range(count))
    request, status = (FAILURES | FAILURES_OF_TIME)[kind]

    async def work() -> None:
        for _ in remaining:
            if status:
                answer = await client.ask(request)
                assert answer.status == status, answer.body[:300]
                continue
            _, writer = await asyncio.open_connection(HOST, port)
            writer.write(request)
            await writer.drain()
            writer.transport.abort()

    await asyncio.gather(*(work() for _ in range(_CONCURRENT)))
    client.close()


def check_memory_is_flat(server: Any, kind: str, count: int) -> None:
    """Check that memory is the same after `count` failures, once a tenth of them have warmed the server up."""
    port = int(server.url.rpartition(":")[2])
    asyncio.run(fail_often(port, kind, count // 10))
    wait_until_idle(server.url)
    before = usage(server.process.pid)
    asyncio.run(fail_often(port, kind, count))
    wait_until_idle(server.url)

    def is_flat() -> bool:
        after = usage(server.process.pid)
        return after.memory < before.memory + _MOST_GROWTH and after.files <= before.files + 1

    wait_until(is_flat, f"no more memory and files than {before}", 15)


@pytest.fixture(scope="module")
def impatient(serve: Any, two_bundles: Path) -> Iterator[Any]:
    """A server at which every request for a detector times out."""
    with serve(two_bundles, VITRINE_TIMEOUT_SECONDS="0.005") as server:
        yield server


async def be_refused(port: int, count: int) -> None:
    """Send requests to a server with a short queue until so many were refused."""
    client, refused = Client(port), 0

    async def work() -> None:
        nonlocal refused
        while refused < count:
            answer = await client.ask(encode_request("POST", "/detect", NOISE))
            assert answer.status in (200, 503), answer.body[:300]
            refused += answer.status == 503

    await asyncio.gather(*(work() for _ in range(_CONCURRENT)))
    client.close()


def check_refusals(serve: Any, bundles: Path, count: int) -> None:
    with serve(bundles, VITRINE_THREADS="1", VITRINE_MAX_QUEUE="1") as server:
        port = int(server.url.rpartition(":")[2])
        asyncio.run(be_refused(port, count // 10))
        before = usage(server.process.pid)
        asyncio.run(be_refused(port, count))
        wait_until_idle(server.url)
        assert usage(server.process.pid).memory < before.memory + _MOST_GROWTH


def test_refusals_leave_nothing_in_memory(serve: Any, two_bundles: Path) -> None:
    check_refusals(serve, two_bundles, 400)


@pytest.mark.soak
def test_ten_thousand_refusals_leave_nothing_in_memory(serve: Any, two_bundles: Path) -> None:
    check_refusals(serve, two_bundles, 10_000)


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_leave_nothing_in_memory(attacked: Any, kind: str) -> None:
    check_memory_is_flat(attacked, kind, 300)


def test_requests_that_time_out_leave_nothing_in_memory(impatient: Any) -> None:
    check_memory_is_flat(impatient, TIMED_OUT, 300)


@pytest.mark.soak
@pytest.mark.parametrize("kind", FAILURES)
def test_ten_thousand_failures_leave_nothing_in_memory(attacked: Any, kind: str) -> None:
    check_memory_is_flat(attacked, kind, 10_000)


@pytest.mark.soak
def test_ten_thousand_requests_that_time_out_leave_nothing_in_memory(impatient: Any) -> None:
    check_memory_is_flat(impatient, TIMED_OUT, 10_000)
