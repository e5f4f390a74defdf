"""Read the bodies of requests: how many bytes of them there may be, of one request and of all that are in progress."""

import asyncio
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.bundle.errors import ImageTooLargeError, ParameterError
from vitrine.service.errors import BodiesError
from vitrine.service.runtime.serving import get_serving

P = ParamSpec("P")
T = TypeVar("T")

SMALL = 64 * 1024  # bytes; so much is parsed on the event loop, which takes less time than to change threads
_MAX_SHARE = 0.75  # of the budget, for one sender
_LEASE = "vitrine.body"  # key of a request's scope

# Two threads: Python runs one of them at a time, and each of them makes the event loop wait.
_parsers = ThreadPoolExecutor(2, "body")


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose duration grows with `size` bytes: in a thread, unless there are few of them."""
    if size <= SMALL:
        return function(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_parsers, lambda: function(*args, **kwargs))


class BodyBudget:
    """The bytes of all bodies that are in memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self.by_sender: Counter[str] = Counter()


class BodyLease:
    """The bytes of the budget that one request has."""

    def __init__(self, budget: BodyBudget, sender: str) -> None:
        self._budget, self._sender, self._held = budget, sender, 0

    def check(self, declared: int) -> None:
        """Check that a body of so many bytes would fit now.

        Small bodies always do, and a sender leaves a part of the budget to others, so that nobody's slow uploads keep
        everybody out.

        Raises:
            BodiesError: it would not, beside those of other requests; a request alone always fits.
        """
        if declared <= SMALL:
            return
        budget = self._budget
        others, own = budget.used - self._held, budget.by_sender[self._sender] - self._held
        share = _MAX_SHARE * budget.max_bytes
        if (others and others + declared > budget.max_bytes) or (own and own + declared > share):
            raise BodiesError(budget.used, budget.max_bytes)

    def add(self, count: int) -> None:
        """Take bytes from the budget.

        Raises:
            BodiesError: see `check`.
        """
        self.check(self._held + count)
        self._held += count
        self._budget.used += count
        self._budget.by_sender[self._sender] += count

    def release(self) -> None:
        """Return all bytes to the budget."""
        if not self._held:
            return
        budget = self._budget
        budget.used -= self._held
        budget.by_sender[self._sender] -= self._held
        if not budget.by_sender[self._sender]:
            del budget.by_sender[self._sender]
        self._held = 0


class BodyBudgetMiddleware:
    """Give each request a lease until its response starts, from when on its body is not needed, or until it fails."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.budget = app, BodyBudget(max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        lease = scope[_LEASE] = BodyLease(self.budget, scope["vitrine.record"].sender)

        async def send_released(message: Message) -> None:
            lease.release()
            await send(message)

        try:
            await self.app(scope, receive, send_released)
        finally:
            lease.release()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request, decompressed.

    Raises:
        ImageTooLargeError: it has more than `max_bytes` bytes, by its header, while it is received, or decompressed;
            the rest is not read.
        BodiesError: the bodies in progress take too many bytes; the rest is not read.
        ParameterError: its Content-Encoding is neither gzip nor deflate, or it is not encoded so.
        ClientDisconnect: the client disconnected before the end of the body.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower() or "identity"
    if encoding not in ("identity", "gzip", "deflate"):
        raise ParameterError("Content-Encoding", expected="gzip or deflate", found=repr(encoding[:50]))
    lease = request.scope.get(_LEASE) or BodyLease(BodyBudget(max_bytes), "")
    try:
        body = await _receive(request, max_bytes, lease)
        if encoding != "identity":
            body = await asyncio.to_thread(_decompress, body, max_bytes)  # zlib does not hold Python's lock
            lease.add(len(body))
    except BodiesError:
        await get_serving(request).scheduler.throttle_refusal()
        raise
    return body


async def _receive(request: Request, max_bytes: int, lease: BodyLease) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal():
        if int(declared[:20]) > max_bytes:
            raise ImageTooLargeError(limit=max_bytes, unit="bytes", found=declared[:20])
        lease.check(int(declared))
    buffer, received, more = BytesIO(), 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        received += len(chunk)
        if received > max_bytes:
            raise ImageTooLargeError(limit=max_bytes, unit="bytes", found="more")
        lease.add(len(chunk))
        if received == len(chunk) and not more:
            return bytes(chunk)
        buffer.write(chunk)
    return buffer.getvalue()


def _decompress(body: bytes, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=47)  # detects gzip and zlib headers
    try:
        plain = decompressor.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ParameterError("body", expected="data in its Content-Encoding", found=error) from error
    if len(plain) > max_bytes:
        raise ImageTooLargeError(limit=max_bytes, unit="bytes", found="more once decompressed")
    if not decompressor.eof or decompressor.unused_data:
        found = "more after its end" if decompressor.eof else "an early end"
        raise ParameterError("body", expected="data in its Content-Encoding", found=found)
    return plain
