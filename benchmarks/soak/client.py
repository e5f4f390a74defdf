"""A small HTTP client for load and attacks: raw requests over kept connections, each answer with its time."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    seconds: float  # from the first byte sent to the last one received

    def json(self) -> Any:
        """Return the parsed body."""
        return json.loads(self.body)


def encode_request(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    """Return the bytes of a request. Keywords are headers, with `_` for `-`."""
    lines = [f"{method} {target} HTTP/1.1", "Host: vitrine"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def encode_form(*images: bytes, **fields: bytes | str) -> tuple[bytes, str]:
    """Return a multipart body of images and other fields, and its content type; a field of bytes is a file."""
    boundary = "a-boundary-of-the-soak"
    parts = []
    for name, value in (*(("image", image) for image in images), *fields.items()):
        file, data = ("", value.encode()) if isinstance(value, str) else ('; filename="a"', value)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


async def read_answer(reader: asyncio.StreamReader, start: float = 0.0) -> Answer:
    """Read one response, whose length is in its head or whose chunks tell.

    Raises:
        ConnectionError, asyncio.IncompleteReadError: the connection ends earlier.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head[:-4].split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readline()
        body = b"".join(parts)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
        headers["connection"] = "close"
    return Answer(int(status_line.split()[1]), headers, body, time.perf_counter() - start)


class Client:
    """Connections to a port, as many as there are requests at the same time; each is kept for the next request."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes, *, timeout: float = 120.0) -> Answer:
        """Send a request and return its answer.

        Raises:
            ConnectionError, asyncio.IncompleteReadError: the server closes the connection without an answer.
            TimeoutError: no answer within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while self._idle:
                try:
                    return await self._exchange(*self._idle.pop(), request)
                except (ConnectionError, asyncio.IncompleteReadError):  # closed while it was idle
                    continue
            return await self._exchange(*await asyncio.open_connection(HOST, self.port), request)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Answer:
        start = time.perf_counter()
        try:
            writer.write(request)
            answer = await read_answer(reader, start)
        except BaseException:
            writer.transport.abort()
            raise
        if answer.headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return answer

    def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def read_metrics(url: str) -> dict[str, float]:
    """Return the samples at `/metrics`, by name with labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> float:
    """Wait for a condition; return how long that took, in seconds.

    Raises:
        TimeoutError: it did not become true in time.
    """
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > seconds:
            raise TimeoutError(f"expected {what} within {seconds} s")
        time.sleep(0.02)
    return time.perf_counter() - start


def wait_until_idle(url: str, seconds: float = 30.0) -> float:
    """Wait until no request is in flight, none waits and none computes; return how long that took, in seconds."""

    def is_idle() -> bool:
        samples = read_metrics(url)
        gauges = ("vitrine_requests_in_flight", "vitrine_queue_images", "vitrine_running_images")
        return all(samples.get(name, 0) == 0 for name in gauges)

    return wait_until(is_idle, "no request in flight, in the queue or computing", seconds)
