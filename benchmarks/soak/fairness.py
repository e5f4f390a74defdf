"""A small request beside large ones: how much longer does it take?

`python -m benchmarks.soak.fairness` asks for the classes of a small image, one request after another, alone and beside
clients that send large requests without a pause, all from the same address. The promise: the 95th percentile is at most
three times that of the idle server, plus one running item.
"""

import argparse
import asyncio
import io
import time
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from benchmarks.serving.models import ROOT
from benchmarks.soak.client import Client, encode_request, wait_until_idle
from benchmarks.soak.overload import percentile
from benchmarks.soak.server import started

_CLIENTS = 4  # of each kind of large request
_PAUSE = 0.02  # seconds between the small requests


def make_requests() -> Mapping[str, bytes]:
    """Return a request of each kind; `small` is the one that is measured."""
    photograph = Image.open(ROOT / "examples" / "blood.jpg").convert("RGB")
    small, large = (photograph.resize(size) for size in ((32, 32), (6000, 4000)))
    grey = Image.fromarray(np.tile(np.arange(7000, dtype=np.uint8), (7000, 1)))
    encoded = {"small": encode(small, "PNG"), "24 MP": encode(large, "JPEG"), "49 MP": encode(grey, "PNG")}
    several = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + encoded["small"] + b"\r\n"
        for _ in range(16)
    )
    form = {"Content_Type": "multipart/form-data; boundary=b"}
    occlusion = "model=vit-cifar10&method=occlusion&grid=16"
    return {
        "small": encode_request("POST", "/classify?model=vit-cifar10", encoded["small"]),
        "annotated PNG, 24 MP": encode_request("POST", "/detect", encoded["24 MP"], Accept="image/png"),
        "occlusion, 256 parts": encode_request("POST", f"/explain?{occlusion}", encoded["small"]),
        "16 small images": encode_request("POST", "/classify?model=vit-cifar10", several + b"--b--\r\n", **form),
        "PNG, 49 MP": encode_request("POST", "/classify?model=vit-cifar10", encoded["49 MP"]),
        "JPEG, 24 MP, to detect": encode_request("POST", "/detect", encoded["24 MP"]),
    }


def encode(image: Image.Image, form: str) -> bytes:
    """Return the encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


async def measure(port: int, small: bytes, large: Sequence[bytes], seconds: float) -> tuple[list[float], list[float]]:
    """Return the latencies, in seconds, of the small requests and of the large ones beside them."""
    client, end = Client(port), time.perf_counter() + seconds
    latencies: list[float] = []
    others: list[float] = []

    async def repeat(request: bytes, into: list[float], pause: float) -> None:
        while time.perf_counter() < end:
            answer = await client.ask(request)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {answer.body[:200]!r}")
            into.append(answer.seconds)
            await asyncio.sleep(pause)

    async with asyncio.TaskGroup() as group:
        group.create_task(repeat(small, latencies, _PAUSE))
        for request in large:
            for _ in range(_CLIENTS):
                group.create_task(repeat(request, others, 0.0))
    client.close()
    return latencies, others


def main() -> None:
    """Print the latencies as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kind of large request")
    options = parser.parse_args()
    requests = dict(make_requests())
    small = requests.pop("small")
    rows: dict[str, list[bytes]] = {"nothing": [], **{name: [request] for name, request in requests.items()}}
    rows["all of these"] = list(requests.values())
    with started(VITRINE_TIMEOUT_SECONDS="60") as server:
        asyncio.run(measure(server.port, small, [], 3.0))  # warms up
        for _, request in requests.items():
            asyncio.run(measure(server.port, request, [], 0.1))
        print("| beside | small: p50 | p95 | p99 | large, alone | large, p50 |\n|---|---|---|---|---|---|")
        for name, large in rows.items():
            alone = [asyncio.run(measure(server.port, request, [], 0.1))[0][0] for request in large]
            wait_until_idle(server.url)
            latencies, others = asyncio.run(measure(server.port, small, large, options.seconds))
            wait_until_idle(server.url, 60)
            figures = [percentile(latencies, share) for share in (0.5, 0.95, 0.99)]
            figures += [max(alone, default=0.0), percentile(others, 0.5)]
            print(f"| {name} | {' | '.join(f'{1000 * figure:.1f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
