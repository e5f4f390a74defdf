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
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from benchmarks.serving.models import ROOT
from benchmarks.soak.client import Client, encode_form, encode_request, read_metrics, wait_until_idle
from benchmarks.soak.overload import percentile
from benchmarks.soak.pictures import make_png
from benchmarks.soak.processes import peak_memory, reset_peak, resident_memory
from benchmarks.soak.server import Server, started
from tests.reliability.bombs import BOMBS

_CLIENTS = 4
_PAUSE = 0.05  # seconds between two requests of the neighbour
_ANSWER_SECONDS = 70.0
_MIB = 2**20
_STALLS = re.compile(r'vitrine_event_loop_stall_seconds_bucket\{le="(.*)"\}')


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
    stall: float  # longest of the event loop in seconds, rounded up to a bound of its histogram
    neighbour_p99: float  # milliseconds
    probe_p99: float


def inputs() -> Iterator[tuple[str, Callable[[], list[bytes]]]]:
    """Yield the name of each class, and a function that makes its requests."""
    frog = (ROOT / "examples" / "frog.jpg").read_bytes()
    photograph = (ROOT / "examples" / "blood.jpg").read_bytes()

    def classify(body: bytes, **headers: str) -> bytes:
        return encode_request("POST", "/classify?model=vit-cifar10", body, **headers)

    def detect(body: bytes, **headers: str) -> bytes:
        return encode_request("POST", "/detect", body, **headers)

    def explain(body: bytes, query: str, **headers: str) -> bytes:
        return encode_request("POST", f"/explain?{query}", body, **headers)

    def form(*images: bytes, **fields: bytes | str) -> bytes:
        body, content_type = encode_form(*images, **fields)
        return encode_request("POST", "/classify", body, Content_Type=content_type)

    def as_json(document: object) -> bytes:
        return _json_body(orjson.dumps(document))

    yield "JPEG, 32 x 32", lambda: [classify(frog)] * 400
    yield "JPEG, 640 x 480, to detect", lambda: [detect(photograph)] * 100
    yield "JPEG, 640 x 480, drawn as PNG", lambda: [detect(photograph, Accept="image/png")] * 100
    yield "JPEG, 640 x 480, explained", lambda: [explain(photograph, "model=detr-bccd")] * 100
    yield (
        "JPEG, 640 x 480, 32 boxes explained as PNG",
        lambda: [explain(photograph, "model=detr-bccd&max_targets=32&threshold=0", Accept="image/png")] * 8,
    )
    yield (
        "JPEG, 640 x 480, 192 parts hidden",
        lambda: [explain(photograph, "model=detr-bccd&method=occlusion&grid=16")] * 4,
    )
    yield (
        "JPEG, 24 megapixels, explained as PNG",
        lambda: [explain(_large_photograph(), "model=vit-cifar10", Accept="image/png")] * 8,
    )
    yield "JPEG, 24 megapixels", lambda: [classify(_large_photograph())] * 20
    yield "JPEG, 24 megapixels, drawn as JPEG", lambda: [detect(_large_photograph(), Accept="image/jpeg")] * 8
    yield "PNG, 49 megapixels", lambda: [classify(_png(Image.new("RGB", (7000, 7000), "red")))] * 8
    yield "PNG, 49 megapixels, 16 bits", lambda: [classify(_png(Image.new("I;16", (7000, 7000), 9)))] * 8
    yield "PNG, 49 megapixels, palette with alpha", lambda: [classify(_palette_with_alpha())] * 8
    yield "PNG, 49 megapixels, broken at its end", lambda: [classify(make_png(7000, 7000)[:-60])] * 10
    yield "PNG, 50,000,000 x 1", lambda: [classify(make_png(50_000_000, 1))] * 8
    for kind in sorted({name.partition("/")[0] for name in BOMBS}):
        bombs = [bomb for name, bomb in BOMBS.items() if name.startswith(f"{kind}/")]
        name = f"{len(bombs)} bombs of {kind.upper()} (`tests/reliability/bombs.py`)"
        yield name, lambda bombs=bombs: [classify(bomb.make()) for bomb in bombs]
    yield "no picture", lambda: [classify(b"no picture")] * 400
    yield "broken JPEG", lambda: [detect(photograph[:5000])] * 400
    yield "32 pictures in a form", lambda: [form(*[frog] * 32)] * 20
    yield "33 pictures in a form", lambda: [form(*[frog] * 33)] * 20
    yield "body of 21 MiB", lambda: [classify(bytes(21 * _MIB))] * 20
    yield "body of 19 MiB that is no picture", lambda: [classify(bytes(19 * _MIB))] * 40
    yield "form with a field of 19 MiB", lambda: [form(frog, model="m" * (19 * _MIB))] * 8
    yield "form that names a codec", lambda: [_with_codec(form(frog, model="é" * 500_000))] * 8
    yield "form of 400,000 fields", lambda: [_many_fields()] * 8
    yield "JSON with 19 MiB of base64", lambda: [as_json({"image": base64.b64encode(bytes(14 * _MIB)).decode()})] * 8
    yield "JSON of three million labels", lambda: [as_json({"image": "", "labels": ["a"] * 3_000_000})] * 4
    yield "JSON, 2,000,000 brackets", lambda: [_json_body(b"[" * 2_000_000)] * 4
    yield "v2, JSON of 19 MiB of numbers", lambda: [_numbers(19 * _MIB)] * 4
    yield "v2, binary, 6,000 pictures as pixels", lambda: [_tensor(6000)] * 8
    yield "v2, unknown model", lambda: [encode_request("POST", "/v2/models/cats/infer", b"{}")] * 200


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _large_photograph() -> bytes:
    buffer = io.BytesIO()
    Image.open(ROOT / "examples" / "blood.jpg").resize((6000, 4000)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _json_body(body: bytes) -> bytes:
    return encode_request("POST", "/classify", body, Content_Type="application/json")


def _with_codec(form: bytes) -> bytes:
    """Let the text fields of a form name a codec that takes quadratic time."""
    return form.replace(b"multipart/form-data;", b"multipart/form-data; charset=punycode;", 1)


def _palette_with_alpha() -> bytes:
    image, buffer = Image.new("P", (7000, 7000), 1), io.BytesIO()
    image.putpalette(bytes(range(48)))
    image.save(buffer, "PNG", transparency=bytes(range(0, 160, 10)))
    return buffer.getvalue()


def _many_fields() -> bytes:
    """A form whose fields are as short as they can be, as many as a body holds."""
    boundary = b"--b\r\n"
    field = boundary + b'Content-Disposition: form-data; name="a"\r\n\r\n\r\n'
    body = field * (20_000_000 // len(field)) + b"--b--\r\n"
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


async def measure(server: Server, name: str, requests: Sequence[bytes]) -> Result:
    """Send the requests, four at once, beside a neighbour and a probe."""
    outcomes, slowest, done = Counter[str](), 0.0, asyncio.Event()
    small = encode_request("POST", "/classify?model=vit-cifar10", (ROOT / "examples" / "frog.jpg").read_bytes())
    client, waiting = Client(server.port), iter(requests)
    before, stalls = resident_memory(server.pid), _stalls(server)
    reset_peak(server.pid)

    async def send() -> None:
        nonlocal slowest
        for request in waiting:
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
    return Result(
        name=name,
        count=len(requests),
        bytes=max(map(len, requests)),
        outcomes=dict(sorted(outcomes.items())),
        slowest=slowest,
        memory_before=before,
        memory_peak=peak,
        memory_after=resident_memory(server.pid),
        stall=_longest_stall(stalls, _stalls(server)),
        neighbour_p99=percentile(neighbour, 0.99),
        probe_p99=percentile(probe, 0.99),
    )


def _stalls(server: Server) -> dict[float, float]:
    """Return the cumulative histogram of the event loop's stalls, by upper bound."""
    matches = ((_STALLS.fullmatch(name), count) for name, count in read_metrics(server.url).items())
    return {float(match[1]): count for match, count in matches if match}


def _longest_stall(before: Mapping[float, float], after: Mapping[float, float]) -> float:
    grown = {bound: count - before.get(bound, 0) for bound, count in after.items()}
    return min((bound for bound, count in grown.items() if count == grown[math.inf]), default=math.nan)


def table(results: list[Result]) -> str:
    """Format the results as the table of docs/operations.md."""
    lines = [
        "| input | bytes | outcomes | slowest answer | peak memory (before, after) | neighbour | probe | stall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        outcomes = ", ".join(f"{count} × {status}" for status, count in result.outcomes.items())
        memory = f"{result.memory_peak:.0f} MiB ({result.memory_before:.0f}, {result.memory_after:.0f})"
        lines.append(
            f"| {result.name} | {result.bytes:,} | {outcomes} | {result.slowest:.2f} s | {memory} "
            f"| {result.neighbour_p99:.0f} ms | {result.probe_p99:.0f} ms | {1000 * result.stall:g} ms |"
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
        for name, make in inputs():
            if options.only in name:
                results.append(asyncio.run(measure(server, name, make())))
                print(results[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
