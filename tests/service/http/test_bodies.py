"""Bodies: bounds for one, a budget for all of them, and nothing of it is lost afterwards."""

import asyncio
import gzip
import threading
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from vitrine.bundle.errors import ImageTooLargeError, ParameterError
from vitrine.service.errors import BodiesError
from vitrine.service.http.bodies import BodyBudgetMiddleware, off_loop, read_body
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import Scheduler
from vitrine.service.runtime.serving import Serving

LIMIT = 1000
Headers = dict[str, str]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(1, 1)
    yield scheduler
    scheduler.close()


def receiver(chunks: Iterable[bytes], disconnect: bool = False) -> Receive:
    parts = iter([*chunks, None])
    following = next(parts)

    async def receive() -> Message:
        nonlocal following
        chunk, following = following, next(parts, None)
        if disconnect and following is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk or b"", "more_body": following is not None}

    return receive


def request_scope(headers: Headers) -> Scope:
    return {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}


def read(chunks: Iterable[bytes], disconnect: bool = False, **headers: str) -> bytes:
    scope = request_scope({name.replace("_", "-"): value for name, value in headers.items()})
    return asyncio.run(read_body(Request(scope, receiver(chunks, disconnect)), LIMIT))


def test_chunks_are_joined() -> None:
    assert read([b"ab", b"", b"c"]) == b"abc"
    assert read([b""]) == b""
    assert read([bytes(LIMIT)], content_length=str(LIMIT)) == bytes(LIMIT)


@pytest.mark.parametrize("declared", ["1001", "9" * 5000])
def test_a_body_that_is_declared_too_large_is_not_read(declared: str) -> None:
    with pytest.raises(ImageTooLargeError, match="at most 1000 bytes are accepted, found"):
        read([], content_length=declared)


def test_a_body_that_grows_too_large_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="at most 1000 bytes are accepted, found more"):
        read([bytes(600), bytes(600)])


def test_a_disconnect_is_no_body() -> None:
    with pytest.raises(ClientDisconnect):
        read([b"ab", b"c"], disconnect=True)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_encoded_bodies_are_decoded(compress: Callable[[bytes], bytes]) -> None:
    body = compress(b"hello")
    for name in ("gzip", "Deflate", " gzip "):
        assert read([body[:5], body[5:]], content_encoding=name) == b"hello"
    assert read([b"hello"], content_encoding="identity") == b"hello"


@pytest.mark.parametrize(
    ("encoding", "body", "message"),
    [
        ("br", b"", "Content-Encoding: expected gzip or deflate, found 'br'"),
        ("gzip, gzip", b"", "Content-Encoding: expected gzip or deflate, found 'gzip, gzip'"),
        ("gzip", b"hello", "body: expected data in its Content-Encoding, found"),
        ("gzip", gzip.compress(b"hello")[:-1], "body: expected data in its Content-Encoding, found an early end"),
        ("gzip", gzip.compress(b"a") * 2, "body: expected data in its Content-Encoding, found more after its end"),
    ],
    ids=["br", "twice", "not gzip", "cut", "two in one"],
)
def test_other_encodings_are_refused(encoding: str, body: bytes, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        read([body], content_encoding=encoding)


def test_a_body_that_is_too_large_once_decompressed_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="found more once decompressed"):
        read([gzip.compress(bytes(LIMIT + 1))], content_encoding="gzip")


def test_many_chunks_take_the_memory_of_their_bytes() -> None:
    chunks, sent = (b"a" for _ in range(50_000)), receiver([])

    async def receive() -> Message:
        chunk = next(chunks, None)
        return await sent() if chunk is None else {"type": "http.request", "body": chunk, "more_body": True}

    tracemalloc.start()
    try:
        body = asyncio.run(read_body(Request(request_scope({}), receive), 1_000_000))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert body == b"a" * 50_000


class Budget:
    """The middleware with an application that reads a body and then waits."""

    def __init__(self, limit: int, scheduler: Scheduler) -> None:
        self.proceed, self.error = asyncio.Event(), False
        self.middleware = BodyBudgetMiddleware(self._app, limit)
        self._starlette = Starlette()
        self._starlette.state.serving = Serving(None, None, scheduler, None, None, None)  # type: ignore[arg-type]

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(Request(scope, receive), 10_000_000)
        await self.proceed.wait()
        if self.error:
            raise ZeroDivisionError
        await send({"type": "http.response.start"})

    async def request(self, chunks: Iterable[bytes], sender: str = "", **headers: str) -> None:
        async def send(message: Message) -> None:
            assert message["type"] == "http.response.start"

        scope = request_scope({name.replace("_", "-"): value for name, value in headers.items()})
        scope["app"], scope["vitrine.record"] = self._starlette, RequestRecord(key=sender)
        await self.middleware(scope, receiver(chunks), send)

    def start(self, *chunks: bytes, sender: str = "") -> Awaitable[None]:
        return asyncio.ensure_future(self.request(chunks, sender))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("headers", [{}, {"content_length": "600000"}])
def test_bodies_beyond_the_budget_are_refused(headers: Headers, scheduler: Scheduler) -> None:
    async def scenario() -> None:
        budget = Budget(1_000_000, scheduler)
        first = budget.start(bytes(300_000), bytes(300_000))
        await until(lambda: budget.middleware.budget.used == 600_000)
        with pytest.raises(BodiesError, match=r"take \d+ of at most 1000000 bytes; try again later") as refused:
            await budget.request([bytes(300_000), bytes(300_000)], **headers)
        assert refused.value.retry_after >= 1
        assert budget.middleware.budget.used == 600_000
        budget.proceed.set()
        await first

    asyncio.run(scenario())


def test_a_sender_leaves_a_part_of_the_budget_to_others(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        budget = Budget(1_000_000, scheduler)
        running = [budget.start(bytes(350_000), sender="greedy") for _ in range(2)]
        await until(lambda: budget.middleware.budget.used == 700_000)
        with pytest.raises(BodiesError):
            await budget.request([bytes(100_000)], "greedy")
        running.append(budget.start(bytes(250_000), sender="modest"))
        await until(lambda: budget.middleware.budget.used == 950_000)
        with pytest.raises(BodiesError):
            await budget.request([bytes(100_000)], "modest")
        running.append(budget.start(bytes(60_000), sender="modest"))  # small bodies always fit
        await until(lambda: budget.middleware.budget.used == 1_010_000)
        budget.proceed.set()
        await asyncio.gather(*running)
        assert not budget.middleware.budget.by_sender

    asyncio.run(scenario())


def test_a_body_counts_as_large_as_it_is_decompressed(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        budget = Budget(1_000_000, scheduler)
        first = budget.start(bytes(600_000))
        await until(lambda: budget.middleware.budget.used == 600_000)
        with pytest.raises(BodiesError):
            await budget.request([gzip.compress(bytes(600_000))], content_encoding="gzip")
        budget.proceed.set()
        await first

    asyncio.run(scenario())


def test_a_request_alone_is_never_refused(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        budget = Budget(100_000, scheduler)
        budget.proceed.set()
        await budget.request([bytes(500_000), bytes(500_000)], content_length="1000000")

    asyncio.run(scenario())


def test_the_budget_is_returned_after_an_error_or_a_cancellation(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        budget = Budget(1_000_000, scheduler)
        cancelled = asyncio.ensure_future(budget.request([bytes(600_000)]))
        await until(lambda: budget.middleware.budget.used == 600_000)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert budget.middleware.budget.used == 0
        budget.error = True
        budget.proceed.set()
        with pytest.raises(ZeroDivisionError):
            await budget.request([bytes(600_000)])
        assert budget.middleware.budget.used == 0

    asyncio.run(scenario())


def test_only_large_bodies_leave_the_event_loop() -> None:
    async def scenario() -> None:
        here = threading.get_ident()
        assert await off_loop(100, threading.get_ident) == here
        assert await off_loop(1_000_000, threading.get_ident) != here

    asyncio.run(scenario())
