"""Load generation: `wrk` for throughput and latency, our own clients for overload, which tell accepted from refused."""

import asyncio
import os
import re
import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("post.lua")
_MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


@dataclass(frozen=True)
class Window:
    """Results of one measurement."""

    rate: float  # responses with status 200 per second
    p50: float  # milliseconds
    p99: float  # milliseconds
    failed: int = 0  # responses with another status, and broken connections


def run_wrk(url: str, connections: int, seconds: int, *, body: Path | None = None, headers: str = "") -> Window:
    """Generate load with wrk; each connection sends its next request when the response arrives.

    Args:
        body: sent by POST; without it, the requests are GET.
        headers: headers of the POST, one `name: value` per line.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "--latency"]
    environment = dict(os.environ)
    if body is not None:
        command += ["-s", str(_SCRIPT)]
        environment |= {"BODY": str(body), "HEADERS": headers}
    text = subprocess.run([*command, url], env=environment, capture_output=True, text=True, check=True).stdout
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    failed += sum(map(int, ",".join(re.findall(r"Socket errors: (.*)", text)).translate(_DIGITS).split()))
    succeeded = float(_search(r"(\d+) requests in", text)) - failed
    duration = _milliseconds(_search(r"requests in ([0-9.]+[a-z]+)", text)) / 1000
    p50, p99 = (_milliseconds(_search(rf"{percentile}%\s+([0-9.]+[a-z]+)", text)) for percentile in (50, 99))
    return Window(succeeded / duration, p50, p99, failed)


_DIGITS = {code: " " for code in range(128) if not chr(code).isdigit()}


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk: expected {pattern}, found {text}")
    return match[1]


def _milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([a-z]+)", text).groups()  # type: ignore[union-attr]
    return float(number) * _MILLISECONDS[unit]


@dataclass(frozen=True)
class Overload:
    """Results under overload."""

    accepted: Window
    refused: float  # responses with status 503 per second
    health_p99: float  # milliseconds of a health probe during the overload
    after: list[float]  # milliseconds of single requests right after the clients have disconnected


def overload(port: int, path: str, body: bytes, *, connections: int, seconds: float, probe: str) -> Overload:
    """Send requests on many connections; each retries immediately, whatever the response. All disconnect together."""
    return asyncio.run(_overload(port, path, body, connections, seconds, probe))


async def _overload(port: int, path: str, body: bytes, connections: int, seconds: float, probe: str) -> Overload:
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    request, times, probes = head.encode() + body, defaultdict(list), []  # type: ignore[var-annotated]
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                start = time.perf_counter()
                status = await _exchange(reader, writer, request)
                times[status].append(1000 * (time.perf_counter() - start))
        finally:
            writer.transport.abort()

    async def probe_health() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            start = time.perf_counter()
            await _exchange(reader, writer, f"GET {probe} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
            probes.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0.05)
        writer.close()

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    await probe_health()
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    after = []
    for _ in range(5):
        start = time.perf_counter()
        await _exchange(reader, writer, request)
        after.append(1000 * (time.perf_counter() - start))
    writer.close()
    accepted = sorted(times[200]) or [0.0]
    failed = sum(len(durations) for status, durations in times.items() if status not in (200, 503))
    window = Window(len(times[200]) / seconds, statistics.median(accepted), accepted[int(0.99 * len(accepted))], failed)
    return Overload(window, len(times[503]) / seconds, sorted(probes)[int(0.99 * len(probes))], after)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Send a request, read the response and return its status."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = re.search(r"content-length: *(\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(head.split()[1])
