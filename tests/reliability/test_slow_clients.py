"""Three hundred slow clients of each kind: all are cut off in time, and others are served meanwhile."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.client import HOST, Client, encode_request, wait_until, wait_until_idle
from benchmarks.soak.processes import usage

Serving = Callable[..., AbstractContextManager[Any]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CLIENTS = 300
HASTY = {
    "VITRINE_RECEIVE_SECONDS": "3",
    "VITRINE_SEND_SECONDS": "5",
    "VITRINE_KEEP_ALIVE_SECONDS": "5",
    "VITRINE_TIMEOUT_SECONDS": "10",
}
CUT_OFF_SECONDS = 120.0  # the deadlines, and room for a busy machine
HEAD = b"POST /classify HTTP/1.1\r\nHost: vitrine\r\n"


@pytest.fixture(scope="module")
def hasty(serve: Serving, two_bundles: Path) -> Iterator[Any]:
    """A server with short deadlines."""
    with serve(two_bundles, VITRINE_LOG_FORMAT="json", **HASTY) as server:
        yield server


async def drip(streams: Streams, head: bytes, drop: bytes) -> None:
    """Send a head, then the same few bytes again and again."""
    reader, writer = streams
    ended = asyncio.create_task(reader.read())
    writer.write(head)
    while not ended.done():
        writer.write(drop)
        await asyncio.wait([ended], timeout=0.3)


async def nothing(streams: Streams) -> None:
    await streams[0].read()


async def headers(streams: Streams) -> None:
    await drip(streams, HEAD, b"X-A: b\r\n")


async def body(streams: Streams) -> None:
    await drip(streams, HEAD + b"Content-Length: 1000000\r\n\r\n", b"a")


async def chunks(streams: Streams) -> None:
    await drip(streams, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n")


async def idle(streams: Streams) -> None:
    streams[1].write(encode_request("GET", "/v2"))
    await streams[0].read()


async def unread(streams: Streams) -> None:
    """Ask for far more than the kernel's buffers hold, and read none of it."""
    writer = streams[1]
    writer.write(encode_request("GET", "/static_content/swagger-ui-bundle.js") * 16)
    while not writer.transport.is_closing():
        writer.write(b"\r\n")  # fails once the server has cut off
        await writer.drain()
        await asyncio.sleep(0.3)


KINDS: tuple[Callable[[Streams], Awaitable[None]], ...] = (nothing, headers, body, chunks, idle, unread)


async def attack(server: Any, behave: Callable[[Streams], Awaitable[None]], photograph: bytes) -> list[float]:
    """Let slow clients connect, and return the latencies of another client until all are cut off."""
    port, latencies = int(server.url.rpartition(":")[2]), []

    async def slow() -> None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
        streams = await asyncio.open_connection(sock=connection, limit=4096)
        with suppress(ConnectionError):
            await behave(streams)
        streams[1].transport.abort()

    client = Client(port)
    request = encode_request("POST", "/classify?model=vit-cifar10", photograph)
    async with asyncio.timeout(CUT_OFF_SECONDS):
        attackers = asyncio.gather(*(slow() for _ in range(CLIENTS)))
        while not attackers.done():
            answer = await client.ask(request)
            assert answer.status == 200
            latencies.append(answer.seconds)
            await asyncio.sleep(0.05)
        await attackers
    client.close()
    return latencies


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_slow_clients_are_cut_off(kind: Callable[[Streams], Awaitable[None]], hasty: Any, photograph: bytes) -> None:
    before, start = usage(hasty.process.pid), time.monotonic()
    latencies = asyncio.run(attack(hasty, kind, photograph))
    seconds = time.monotonic() - start
    wait_until_idle(hasty.url)
    wait_until(lambda: usage(hasty.process.pid).files - before.files < 20, "connections to be closed")
    after = usage(hasty.process.pid)
    print(f"{kind.__name__}: cut off after {seconds:.1f} s, others' slowest answer {max(latencies):.3f} s")
    assert max(latencies) < 5
    assert after.memory - before.memory < 100
    assert "Traceback" not in "".join(hasty.lines)
