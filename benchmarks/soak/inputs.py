"""What each class of input costs the server: its answers, its memory, and what a neighbour feels meanwhile.

One server takes all classes one after the other; each class is sent by four clients at once. Meanwhile a neighbour
sends a small picture every 50 ms, and a probe asks for `/livez` as often.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from benchmarks.serving.models import ROOT
from benchmarks.soak.client import Client, encode_form, encode_request, read_metrics, wait_until_idle
from benchmarks.soak.overload import percentile
from benchmarks.soak.pictures import make_png
from benchmarks.soak.processes import peak_memory, reset_peak, usage
from benchmarks.soak.server import Server, started

_CLIENTS = 4
_PAUSE = 0.05  # seconds between two requests of the neighbour
_ANSWER_SECONDS = 70.0
_MIB = 2**20
_STALL = "vitrine_event_loop_stall_seconds"


@dataclass(frozen=True)
class Result:
    """What was measured for a class of input."""

    name: str
    count: int
    bytes: int  # of the largest request
    outcomes: dict[str, int]  # by status; "lost": no response
    slowest: float  # response, in seconds
    memory_before: float  # MiB, resident
    memory_peak: float
    memory_after: float
    stall: float | None  # longest of the event loop in seconds, if the server measures it
    neighbour_p99: float  # milliseconds
    probe_p99: float


def inputs() -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield name, number of requests and a function that makes the request, of each class."""
    frog = (ROOT / "examples" / "frog.jpg").read_bytes()
    photograph = (ROOT / "examples" / "blood.jpg").read_bytes()

    def classify(body: bytes, **headers: str) -> bytes:
        return encode_request("POST", "/classify?model=vit-cifar10", body, **headers)

    def detect(body: bytes, **headers: str) -> bytes:
        return encode_request("POST", "/detect", body, **headers)

    def form(**fields: bytes | str) -> bytes:
        body, content_type = encode_form(**fields)
        return encode_request("POST", "/classify", body, Content_Type=content_type)

    def as_json(document: object) -> bytes:
        return encode_request("POST", "/classify", orjson.dumps(document), Content_Type="application/json")

    yield "JPEG, 32 x 32", 400, lambda: classify(frog)
    yield "JPEG, 640 x 480, to detect", 100, lambda: detect(photograph)
    yield "JPEG, 640 x 480, drawn as PNG", 100, lambda: detect(photograph, Accept="image/png")
    yield "JPEG, 24 megapixels", 20, lambda: classify(_encoded(_large((6000, 4000)), "JPEG"))
    yield (
        "JPEG, 24 megapixels, drawn as JPEG",
        8,
        lambda: detect(_encoded(_large((6000, 4000)), "JPEG"), Accept="image/jpeg"),
    )
    yield "PNG, 49 megapixels", 8, lambda: classify(_encoded(Image.new("RGB", (7000, 7000), "red"), "PNG"))
    yield "PNG, 49 megapixels, palette with alpha", 8, lambda: classify(_palette_with_alpha())
    yield "PNG, 49 megapixels, 16 bits", 8, lambda: classify(_encoded(Image.new("I;16", (7000, 7000), 9), "PNG"))
    yield "PNG, 50,000,000 x 1", 8, lambda: classify(make_png(50_000_000, 1))
    yield "PNG, 1 x 50,000,000", 8, lambda: classify(make_png(1, 50_000_000))
    yield "PNG, 49 megapixels, broken at its end", 10, lambda: classify(make_png(7000, 7000)[:-60])
    yield "PNG, 100,000 x 100,000 promised", 100, lambda: classify(make_png(100_000, 100_000, empty=True))
    yield "PNG, a million chunks", 4, lambda: classify(make_png(16, 16, chunks=1_000_000))
    yield "TIFF, 49 megapixels, Group 4 noise", 4, lambda: classify(_group4(1, 49_000_000, b"\x55" * 2_000_000))
    for file in sorted((ROOT / "tests" / "reliability").glob("bombs/*")):  # pictures that are hard to make
        yield f"bomb: {file.name}", 4, lambda file=file: classify(file.read_bytes())
    yield "no picture", 400, lambda: classify(b"no picture")
    yield "broken JPEG", 400, lambda: detect(photograph[:5000])
    yield "32 pictures in a form", 20, lambda: _many(frog, 32)
    yield "33 pictures in a form", 20, lambda: _many(frog, 33)
    yield "body of 21 MB", 20, lambda: classify(bytes(21 * _MIB))
    yield "form of a 19 MB field", 8, lambda: form(image=frog, model="m" * (19 * _MIB))
    yield (
        "form that names a codec",
        8,
        lambda: form(image=frog, model="é" * 500_000).replace(b"\r\n\r\n", b"; charset=punycode\r\n\r\n", 1),
    )
    yield "form of a million fields", 8, lambda: _many_fields(1_000_000)
    yield "JSON of 19 MB of base64", 8, lambda: as_json({"image": base64.b64encode(bytes(14 * _MIB)).decode()})
    yield "JSON of three million labels", 4, lambda: as_json({"image": "", "labels": ["a"] * 3_000_000})
    yield (
        "JSON, nested 2,000,000 deep",
        4,
        lambda: encode_request("POST", "/classify", b"[" * 2_000_000, Content_Type="application/json"),
    )
    yield "v2, 19 MB of numbers", 4, lambda: _numbers(19 * _MIB)
    yield "v2, binary, 6,000 pictures of pixels", 8, lambda: _tensor(6000)
    yield "v2, unknown model", 200, lambda: encode_request("POST", "/v2/models/cats/infer", b"{}")


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def _large(size: tuple[int, int]) -> Image.Image:
    return Image.open(ROOT / "examples" / "blood.jpg").resize(size)


def _palette_with_alpha() -> bytes:
    image, buffer = Image.new("P", (7000, 7000), 1), io.BytesIO()
    image.putpalette(bytes(range(48)))
    image.save(buffer, "PNG", transparency=bytes(range(0, 160, 10)))
    return buffer.getvalue()


def _group4(width: int, height: int, data: bytes) -> bytes:
    """A TIFF of one strip that says it is compressed as by a fax."""
    short, long = 3, 4
    start = 8 + 2 + 9 * 12 + 4
    entries = ((256, long, width), (257, long, height), (258, short, 1), (259, short, 4), (262, short, 0))
    entries += ((273, long, start), (277, short, 1), (278, long, height), (279, long, len(data)))
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + fields + bytes(4) + data


def _many(picture: bytes, count: int) -> bytes:
    body, content_type = encode_form(image=picture)
    field, end = body[: body.rindex(b"--a-boundary")], body[body.rindex(b"--a-boundary") :]
    return encode_request("POST", "/classify", field * count + end, Content_Type=content_type)


def _many_fields(count: int) -> bytes:
    """A form whose fields are as short as they can be, as many as a body holds."""
    boundary = b"--b\r\n"
    field = boundary + b'Content-Disposition: form-data; name="a"\r\n\r\n\r\n'
    body = field * min(count, 20_000_000 // len(field)) + b"--b--\r\n"
    return encode_request("POST", "/classify", body, Content_Type="multipart/form-data; boundary=b")


def _numbers(size: int) -> bytes:
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [1] * (size // 2)}
    return encode_request("POST", "/v2/models/vit-cifar10/infer", orjson.dumps({"inputs": [tensor]}))


def _tensor(images: int) -> bytes:
    pixels = np.zeros((images, 32, 32, 3), np.uint8)
    tensor = {"name": "pixels", "shape": pixels.shape, "datatype": "UINT8"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.size}}]}).encode()
    length = str(len(head))
    body = head + pixels.tobytes()
    return encode_request("POST", "/v2/models/vit-cifar10/infer", body, Inference_Header_Content_Length=length)


async def measure(server: Server, name: str, count: int, request: bytes) -> Result:
    """Send a request `count` times, four at once, beside a neighbour and a probe."""
    outcomes, slowest, done = Counter[str](), 0.0, asyncio.Event()
    small = encode_request("POST", "/classify?model=vit-cifar10", (ROOT / "examples" / "frog.jpg").read_bytes())
    client, numbers = Client(server.port), iter(range(count))
    before = usage(server.pid).memory
    reset_peak(server.pid)

    async def send() -> None:
        nonlocal slowest
        for _ in numbers:
            start = time.perf_counter()
            try:
                outcomes[str((await client.ask(request, timeout=_ANSWER_SECONDS)).status)] += 1
            except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                outcomes["lost"] += 1
            slowest = max(slowest, time.perf_counter() - start)

    async def repeat(request: bytes) -> list[float]:
        """Send a small request again and again; without an answer, its time is that of the wait."""
        latencies, neighbour = [], Client(server.port)
        while not done.is_set():
            start = time.perf_counter()
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                await neighbour.ask(request, timeout=_ANSWER_SECONDS)
            latencies.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(_PAUSE)
        neighbour.close()
        return latencies

    watching = asyncio.gather(repeat(small), repeat(encode_request("GET", "/livez")))
    await asyncio.sleep(10 * _PAUSE)
    await asyncio.gather(*(send() for _ in range(_CLIENTS)))
    done.set()
    neighbour, probe = await watching
    client.close()
    peak = peak_memory(server.pid)
    await asyncio.to_thread(wait_until_idle, server.url, 120)
    stalls = [value for key, value in read_metrics(server.url).items() if key.startswith(_STALL)]
    return Result(
        name=name,
        count=count,
        bytes=len(request),
        outcomes=dict(sorted(outcomes.items())),
        slowest=slowest,
        memory_before=before,
        memory_peak=peak,
        memory_after=usage(server.pid).memory,
        stall=max(stalls, default=None),
        neighbour_p99=percentile(neighbour, 0.99),
        probe_p99=percentile(probe, 0.99),
    )


def table(results: list[Result]) -> str:
    """Format the results as the table of docs/operations.md."""
    lines = [
        "| input | bytes | count × outcome | slowest answer | peak memory (before, after) | neighbour p99 | probe |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        outcomes = ", ".join(f"{count} × {status}" for status, count in result.outcomes.items())
        memory = f"{result.memory_peak:.0f} MiB ({result.memory_before:.0f}, {result.memory_after:.0f})"
        stall = "" if result.stall is None else f", stall {1000 * result.stall:.0f}"
        lines.append(
            f"| {result.name} | {result.bytes:,} | {outcomes} | {result.slowest:.2f} s | {memory} "
            f"| {result.neighbour_p99:.0f} ms | {result.probe_p99:.0f} ms{stall} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.inputs", description=__doc__)
    parser.add_argument("--only", default="", help="classes whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args()
    results = []
    with started() as server:
        for name, count, make in inputs():
            if options.only in name:
                results.append(asyncio.run(measure(server, name, count, make())))
                print(results[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
