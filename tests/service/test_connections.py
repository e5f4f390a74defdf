"""Connections: what is refused, and that nothing is left of them. Uvicorn itself runs here, with a small app."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vitrine.bundle.errors import VitrineError
from vitrine.service import connections
from vitrine.service.connections import Connection, Limits
from vitrine.service.errors import vitrine_error_response

GENEROUS = Limits(100, 100, 60.0, 60.0, 60.0, 60.0)
HOST = b"Host: x\r\n"
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
WAIT = 10.0  # seconds


left: list[bytes] = []  # the queries of clients that have left `/wait`


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """`/echo` answers with the size of the body, `/large` with many bytes, `/wait` never, the others at once."""
    if scope["type"] != "http":
        return
    request = Request(scope, receive)
    response: Response = JSONResponse({"path": scope["path"]})
    if scope["path"] == "/large":
        response = Response(bytes(64 * 1024 * 1024))
    if scope["path"] == "/echo":
        try:
            response = JSONResponse({"size": len(await request.body())})
        except ClientDisconnect:
            return
        except VitrineError as error:
            response = vitrine_error_response(scope, error)
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope["query_string"])
        return
    await response(scope, receive, send)


class Client:
    """A connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """The next answer: status, headers, and its JSON."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT)
        first, *lines = head.decode().strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), WAIT)
        return int(first.split()[1]), headers, json.loads(body)

    async def closed(self) -> bool:
        """Whether the server closes the connection, without another byte."""
        try:
            return await asyncio.wait_for(self.reader.read(), WAIT) == b""
        except ConnectionError:
            return True


Connect = Callable[[], Awaitable[Client]]


@asynccontextmanager
async def served(limits: Limits) -> AsyncIterator[Connect]:
    """Uvicorn with `Connection` on a free port; every connection must be gone in the end, without the collector."""
    Connection.limits = limits
    Connection._by_client.clear()
    config = uvicorn.Config(app, port=0, http=Connection, lifespan="off", log_config=None, server_header=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    clients = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection("127.0.0.1", port)))
        return clients[-1]

    gc.collect()
    gc.disable()
    seen = weakref.WeakSet[Connection]()
    try:
        yield connect
        seen.update(server.server_state.connections)
        for client in clients:
            client.writer.transport.abort()
        async with asyncio.timeout(WAIT):
            while server.server_state.connections or seen:
                await asyncio.sleep(0.01)
        assert not Connection._by_client
        assert not Connection._unsent
    finally:
        gc.enable()
        serving.cancel()
        for listener in server.servers:
            listener.close()


def run(test: Callable[[Connect], Awaitable[None]], **limits: Any) -> None:
    async def main() -> None:
        async with served(replace(GENEROUS, **limits)) as connect:
            await test(connect)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def request(path: bytes = b"/", *headers: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%s %s HTTP/%s\r\n%s\r\n" % (
        method,
        path,
        version,
        b"".join(line + b"\r\n" for line in (b"Host: x", *headers)),
    )


REFUSED = [
    (b"hello\r\n\r\n", 400, "bad_request", "request: expected HTTP/1.1, found Invalid method encountered"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request", "found TLS; try http:// instead"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "unsupported_version", "found HTTP/2.0"),
    (request(version=b"2.0"), 505, "unsupported_version", "found HTTP/2.0"),
    (b"GET /\r\n\r\n", 505, "unsupported_version", "found HTTP/0.9"),
    (request(version=b"1.2"), 400, "bad_request", "Invalid HTTP version"),
    (request(b"a:443", method=b"CONNECT"), 400, "bad_request", "found CONNECT, which is for proxies"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request", "headers: expected one Host, found 0"),
    (request(b"/", b"Host: y"), 400, "bad_request", "headers: expected one Host, found 2"),
    (request(b"/\xff"), 400, "bad_request", "Invalid char in url path"),
    (request(b"/" + b"a" * 20_000), 414, "url_too_long", "URL: expected at most 16384 bytes, found more"),
    (request(b"/" + b"a" * 200_000), 414, "url_too_long", "found more"),
    (b"GET /" + b"a" * 20_000, 414, "url_too_long", "found more"),
    (request(b"/", *[b"A: b"] * 100), 431, "headers_too_large", "headers: expected at most 100 headers"),
    (request(b"/", *[b"A: " + b"b" * 900] * 50), 431, "headers_too_large", "expected at most 32768 bytes"),
    (request(b"/", b"A: " + b"b" * 100_000), 431, "headers_too_large", "expected at most 32768 bytes"),
    (request()[:-2] + b"A: " + b"b" * 2_000_000, 431, "headers_too_large", "expected at most 32768 bytes"),
    (request(b"/v2", b"Host: y"), 400, "", "headers: expected one Host, found 2"),
    (request(b"/", b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 1"), 400, "bad_request", "Upgrade: exp"),
    # What two parsers may read differently.
    (request(b"/", b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400, "bad_request", "Transfer-Encoding"),
    (request(b"/", b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400, "bad_request", "Content-Length"),
    (request(b"/", b"Content-Length: 5", b"Content-Length: 5"), 400, "bad_request", "Duplicate Content-Length"),
    (request(b"/", b"Content-Length: 5", b"Content-Length: 6"), 400, "bad_request", "Duplicate Content-Length"),
    (request(b"/", b"Content-Length: 5, 5"), 400, "bad_request", "Invalid character in Content-Length"),
    (request(b"/", b"Content-Length: +5"), 400, "bad_request", "Invalid character in Content-Length"),
    (request(b"/", b"Content-Length: 0x5"), 400, "bad_request", "Invalid character in Content-Length"),
    (request(b"/", b"Content-Length: -1"), 400, "bad_request", "Invalid character in Content-Length"),
    (request(b"/", b"Content-Length: " + b"9" * 30), 400, "bad_request", "Content-Length overflow"),
    (request(b"/", b"Content-Length : 5"), 400, "bad_request", "Invalid header field char"),
    (request(b"/", b"Transfer-Encoding: gzip, chunked"), 400, "bad_request", "expected chunked, found b'gzip"),
    (request(b"/", b"Transfer-Encoding: chunked, chunked"), 400, "bad_request", "Transfer-Encoding"),
    (request(b"/", b"Transfer-Encoding: xchunked"), 400, "bad_request", "Transfer-Encoding"),
    (request(b"/", b"Transfer-Encoding: identity"), 400, "bad_request", "Transfer-Encoding"),
    (request(b"/", b"Transfer-Encoding: chunked", version=b"1.0"), 400, "bad_request", "found HTTP/1.0"),
    (request(b"/", b"A: b", b" c"), 400, "bad_request", "Unexpected whitespace after header value"),
    (request(b"/", b"A: b\x00c"), 400, "bad_request", "Invalid header value char"),
    (b"GET / HTTP/1.1\nHost: x\n\n", 400, "bad_request", "Expected CRLF after version"),
    (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400, "bad_request", "Missing expected CR"),
    (b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400, "bad_request", "Missing expected LF"),
    # Bodies.
    (CHUNKED + b"5\nhello\n0\n\n", 400, "bad_request", "Missing expected CR after chunk size"),
    (CHUNKED + b"5;a\nhello\r\n0\r\n\r\n", 400, "bad_request", "Missing expected CR after chunk extension"),
    (CHUNKED + b"-5\r\nhello\r\n", 400, "bad_request", "Invalid character in chunk size"),
    (CHUNKED + b"f" * 17 + b"\r\nhello\r\n", 400, "bad_request", "Chunk size overflow"),
    (CHUNKED + b"5\r\nhello!!\r\n0\r\n\r\n", 400, "bad_request", "found Expected LF after chunk data"),
    (CHUNKED + b"1\r\na\r\n" * 2000, 400, "bad_request", "body: expected chunks of at least 256 bytes on average"),
    (CHUNKED + b"0\r\n" + b"A: b\r\n" * 200, 431, "headers_too_large", "expected at most 100 headers"),
    (CHUNKED + b"0\r\nA: " + b"b" * 2_000_000, 431, "headers_too_large", "expected at most 32768 bytes"),
    (CHUNKED + b"5\r\nhello\r\n5;" + b"a" * 2_000_000, 431, "headers_too_large", "expected at most 32768 bytes"),
]


def test_what_is_refused() -> None:
    async def check(connect: Connect, sent: bytes, status: int, code: str, message: str) -> None:
        client = await connect()
        client.send(sent)
        found, headers, document = await client.answer()
        error = document["error"]
        assert (found, headers["connection"]) == (status, "close"), sent[:200]
        assert headers["content-type"] == "application/json"
        assert message in (error["message"] if code else error), sent[:200]
        assert not code or error["code"] == code
        assert await client.closed()

    async def test(connect: Connect) -> None:
        await asyncio.gather(*(check(connect, *case) for case in REFUSED))

    run(test)


ACCEPTED = [
    request(b"/?" + b"a" * 16_000, *[b"A: b"] * 90),
    request(b"/", b"A: " + b"b" * 30_000),
    request(b"http://x/"),
    request(version=b"1.0"),
    b"\r\n\r\n" + request(),
    request(b"/", b"Content-Length: 5") + b"hello",
    CHUNKED + b"5;name=value\r\nhello\r\n" + b"%x\r\n%s\r\n" % (300_000, bytes(300_000)) + b"0\r\nA: b\r\n\r\n",
    CHUNKED + b"100\r\n" + (bytes(256) + b"\r\n100\r\n") * 5000 + bytes(256) + b"\r\n0\r\n\r\n",
]


def test_what_is_not_refused() -> None:
    async def test(connect: Connect) -> None:
        for sent in ACCEPTED:
            client = await connect()
            client.send(sent)
            assert (await client.answer())[0] == 200, sent[:200]

    run(test)


def test_another_protocol_is_a_wish_that_is_not_granted() -> None:
    async def test(connect: Connect) -> None:
        for wish in (b"websocket", b"h2c"):
            client = await connect()
            client.send(request(b"/", b"Connection: Upgrade", b"Upgrade: " + wish) + b"\x81\x05hello")
            status, headers, document = await client.answer()
            assert (status, headers["connection"], document) == (200, "close", {"path": "/"})
            assert await client.closed()

    run(test)


def test_requests_before_a_broken_one_are_answered_first() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(request(b"/a") + request(b"/b") + request(b"/c", b"Host: y"))
        assert (await client.answer())[2] == {"path": "/a"}
        _, headers, document = await client.answer()
        assert (document, headers["connection"]) == ({"path": "/b"}, "close")
        assert await client.closed()

    run(test)


def test_pipelined_requests_are_answered_in_order_and_limited() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(b"".join(request(b"/%d" % i) for i in range(17)))
        for i in range(17):
            assert (await client.answer())[2] == {"path": f"/{i}"}
        client.send(b"".join(request(b"/%d" % i) for i in range(1000)))
        for i in range(17):
            assert (await client.answer())[2] == {"path": f"/{i}"}
        assert await client.closed()

    run(test)


def test_a_request_with_others_in_the_pipeline_notices_that_its_client_has_left() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(request(b"/") + request(b"/wait?first") + request(b"/wait?second"))
        assert (await client.answer())[2] == {"path": "/"}
        client.writer.transport.abort()
        async with asyncio.timeout(WAIT):
            while b"first" not in left:
                await asyncio.sleep(0.01)

    run(test)


def test_a_connection_is_closed_after_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_REQUESTS", 3)

    async def test(connect: Connect) -> None:
        client = await connect()
        for i in range(3):
            client.send(request())
            _, headers, _ = await client.answer()
            assert ("connection" in headers) == (i == 2)
        assert await client.closed()

    run(test)


def test_headers_after_the_body_do_not_become_headers() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(CHUNKED + b"5\r\nhello\r\n0\r\nX-API-Key: secret\r\n\r\n" + request(b"/next"))
        assert (await client.answer())[2] == {"size": 5}
        assert (await client.answer())[2] == {"path": "/next"}

    run(test)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET / HT", "headers: expected sooner"),
        (request()[:-2], "headers: expected sooner"),
        (CHUNKED, "body: expected sooner, found 0 bytes"),
        (CHUNKED + b"5\r\nhe", "body: expected sooner, found 2 bytes"),
        (request(b"/echo", b"Content-Length: 9", method=b"POST") + b"hello", "body: expected sooner, found 5 bytes"),
        (request(b"/first") + b"GET / HT", "headers: expected sooner"),
    ],
)
def test_a_slow_request_is_408(sent: bytes, expected: str) -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(sent)
        status, headers, document = await client.answer()
        if b"/first" in sent:
            assert (status, document) == (200, {"path": "/first"})
            status, headers, document = await client.answer()
        assert (status, headers["connection"], document["error"]["code"]) == (408, "close", "too_slow")
        assert expected in document["error"]["message"]
        assert await client.closed()

    run(test, receive_seconds=0.2)


def test_a_trickle_is_too_slow_but_a_steady_body_is_not() -> None:
    async def test(connect: Connect) -> None:
        trickle, steady = await connect(), await connect()
        for client in (trickle, steady):
            client.send(request(b"/echo", b"Content-Length: 20000", method=b"POST"))
        for _ in range(10):
            trickle.send(b"a")
            steady.send(bytes(2000))
            await asyncio.sleep(0.1)
        assert (await steady.answer())[2] == {"size": 20_000}
        assert (await trickle.answer())[0] == 408

    run(test, receive_seconds=0.6)


def test_a_body_has_a_deadline_however_steady() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(request(b"/echo", b"Content-Length: 20000000", method=b"POST"))
        answer = asyncio.create_task(client.answer())
        while not answer.done():
            client.send(bytes(2000))
            await asyncio.sleep(0.05)
        assert (await answer)[0] == 408

    run(test, receive_seconds=0.2, body_seconds=1.0)


def test_idle_connections_are_closed() -> None:
    async def test(connect: Connect) -> None:
        silent, idle, blank = await connect(), await connect(), await connect()
        idle.send(request())
        blank.send(request())
        assert (await idle.answer())[0] == (await blank.answer())[0] == 200
        blank.send(b"\r\n")  # may precede a request, but is none
        for client in (silent, idle, blank):
            assert await client.closed()

    run(test, receive_seconds=0.2, keep_alive_seconds=0.4)


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def test(connect: Connect) -> None:
        client = await connect()
        client.send(request(b"/large"))
        async with asyncio.timeout(WAIT):
            while not Connection._unsent:
                await asyncio.sleep(0.01)
            while Connection._unsent:
                await asyncio.sleep(0.01)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.reader.readexactly(64 * 1024 * 1024)

    run(test, send_seconds=0.4)


def test_unread_answers_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_UNSENT_BYTES", 100 * 1024 * 1024)

    async def test(connect: Connect) -> None:
        for _ in range(5):
            client = await connect()
            client.send(request(b"/large"))
            await asyncio.sleep(0.1)
        assert len(Connection._unsent) == 1

    run(test)


def test_connections_above_the_limit_are_503() -> None:
    async def test(connect: Connect) -> None:
        busy = [await connect() for _ in range(3)]
        for client in busy:
            client.send(CHUNKED)
        await asyncio.sleep(0.1)
        status, headers, document = await (await connect()).answer()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert document["error"] == {
            "code": "too_many_connections",
            "message": "all 3 connections are in use; try again later",
        }

    run(test, connections=3)


def test_an_idle_connection_makes_room() -> None:
    async def test(connect: Connect) -> None:
        oldest, *others = [await connect() for _ in range(3)]
        for client in (oldest, *others):
            client.send(request())
            assert (await client.answer())[0] == 200
            await asyncio.sleep(0.01)  # the loop's clock counts milliseconds
        late = await connect()
        late.send(request(b"/late"))
        assert (await late.answer())[2] == {"path": "/late"}
        assert await oldest.closed()
        for client in others:
            client.send(request())
            assert (await client.answer())[0] == 200

    run(test, connections=3)


def test_connections_of_one_client_above_the_limit_are_429() -> None:
    async def test(connect: Connect) -> None:
        first, second, third = await connect(), await connect(), await connect()
        status, headers, document = await third.answer()
        assert (status, headers["retry-after"]) == (429, "1")
        assert "at most 2 from one address" in document["error"]["message"]
        for client in (first, second):
            client.send(request())
            assert (await client.answer())[0] == 200

    run(test, connections_per_client=2)
