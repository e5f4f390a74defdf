"""Connections: uvicorn's HTTP protocol with limits and deadlines, and without requests that parsers read differently.

Uvicorn waits for ever: for headers, for bodies, and for clients that do not read their answer. Each connection here has
one timer, which looks once per second what it is waiting for; requests themselves set no timers.
"""

import asyncio
import logging
import re
import resource
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

import httptools
import uvicorn.config
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vitrine.bundle.errors import VitrineError
from vitrine.service.errors import (
    ClientConnectionsError,
    HeadersTooLargeError,
    MalformedRequestError,
    SlowRequestError,
    TooManyConnectionsError,
    UnsupportedVersionError,
    UrlTooLongError,
    vitrine_error_response,
)
from vitrine.service.observability import metrics
from vitrine.service.observability.logs import log_request
from vitrine.service.observability.request_record import RequestRecord, client_network
from vitrine.service.response_headers import add_security_headers
from vitrine.service.settings import Settings

_log = logging.getLogger("bentoml.vitrine")

MAX_URL_BYTES = 16 * 1024
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024  # of all headers together, with those after a body in chunks
MAX_PIPELINED = 16  # requests that wait for the answers before them
MAX_REQUESTS = 10_000  # of a connection
MIN_BYTES_PER_SECOND = 1000  # of a body, on average after its first `receive_seconds`
MAX_SMALL_CHUNKS, MIN_CHUNK_BYTES = 1000, 256  # chunks may be smaller on average as long as there are few
MAX_UNSENT_BYTES = 256 * 1024 * 1024  # of all answers that clients have not read yet

_TICK_SECONDS = 1.0
_LINGER_SECONDS = 2.0  # what still arrives after a refusal is dropped: to close at once could destroy the refusal
_SPARE_CONNECTIONS = 64  # connections above the limit that are refused with an answer
_SPARE_FILES = 128  # file descriptors for everything else
_BODY_HEADERS = (b"content-length", b"transfer-encoding")
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")  # RFC 3986, section 3.2.2, and a port
_TLS_HANDSHAKE = b"\x16\x03"


@dataclass(frozen=True)
class Limits:
    """The limits that are settings; see there."""

    connections: int
    connections_per_client: int
    receive_seconds: float
    body_seconds: float
    send_seconds: float
    keep_alive_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Return the limits of the settings; file descriptors may allow only fewer connections."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections = max(1, min(settings.max_connections, files - _SPARE_FILES - _SPARE_CONNECTIONS))
        return cls(
            connections,
            settings.max_connections_per_client or max(1, connections // 2),
            settings.receive_seconds,
            settings.timeout_seconds,
            settings.send_seconds,
            settings.keep_alive_seconds,
        )


def use_connections(settings: Settings) -> None:
    """Let uvicorn use `Connection` from now on. BentoML makes uvicorn's configuration, and leaves the protocol open."""
    Connection.limits = Limits.of(settings)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


class _Phase(Enum):
    IDLE = auto()  # no part of another request has arrived
    HEADERS = auto()
    BODY = auto()


class Connection(HttpToolsProtocol):
    """A client's connection, within the limits."""

    limits: ClassVar[Limits]
    _by_client: ClassVar[Counter[str]] = Counter()
    _unsent: ClassVar[dict["Connection", float]] = {}  # connections whose client reads slowly, and since when

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._call_app: ASGIApp = self.app
        self.app = self._run_app
        self.ws_protocol_class = None
        self.timeout_keep_alive = 0  # `_watch` closes idle connections
        self._phase, self._since = _Phase.IDLE, self.loop.time()
        self._advanced = False  # a request, a chunk or a part of a body has begun in the bytes that are being parsed
        self._running: Any = None  # uvicorn's state of the request that is being answered
        self._header_count = self._header_bytes = self._unfinished_bytes = self._hosts = 0
        self._body_bytes = self._chunks = self._requests = 0
        self._refusal: VitrineError | None = None  # set: nothing is parsed any more
        self._closes = False  # what follows is dropped: it belongs to another protocol
        self._lingers_until: float | None = None
        self._address = ""

    # Events of the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        limits = self.limits
        self._tick = min(_TICK_SECONDS, limits.receive_seconds / 4, limits.send_seconds / 4)
        self._timer = self.loop.call_later(self._tick, self._watch)
        self._address = client_network(self.client[0]) if self.client else ""
        self._by_client[self._address] += 1
        excess = len(self.connections) - limits.connections
        if excess > _SPARE_CONNECTIONS:
            metrics.count_rejected(TooManyConnectionsError.code)
            transport.abort()
        elif self._by_client[self._address] > limits.connections_per_client:
            self._refuse(ClientConnectionsError(limits.connections_per_client))
        elif excess > 0 and not self._close_oldest():
            self._refuse(TooManyConnectionsError(limits.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self._running is not None:  # uvicorn tells only the last request of the pipeline
            self._running.disconnected = True
            self._running.message_event.set()
        self._timer.cancel()
        self.pipeline.clear()
        del self._timer, self.app, self.cycle  # no reference cycles: the garbage collector hardly ever runs
        self._refusal = self._running = self.timeout_keep_alive_task = None
        self._unsent.pop(self, None)
        self._by_client[self._address] -= 1
        if not self._by_client[self._address]:
            del self._by_client[self._address]

    def data_received(self, data: bytes) -> None:
        """Parse what the client has sent."""
        if self._refusal is not None or self._closes:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # a wish, which we do not grant: the request itself is answered
            self._closes = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            cause = error.__context__  # raised by one of the methods below
            self._refuse(cause if isinstance(cause, VitrineError) else _malformed(data, error, self._requests))
        else:
            if self._phase is not _Phase.IDLE:
                self._unfinished_bytes = 0 if self._advanced else self._unfinished_bytes + len(data)
                self._advanced = False
                if self._unfinished_bytes > MAX_URL_BYTES + MAX_HEADER_BYTES:
                    self._refuse(HeadersTooLargeError(limit=MAX_HEADER_BYTES, unit="bytes"))

    def timeout_keep_alive_handler(self) -> None:
        """Do nothing: `_watch` closes idle connections."""

    def pause_writing(self) -> None:
        """Note that the client does not read its answer; if too much is unsent, give up who has waited longest."""
        super().pause_writing()
        self._unsent.setdefault(self, self.loop.time())
        while len(self._unsent) > 1 and sum(map(_unsent_bytes, self._unsent)) > MAX_UNSENT_BYTES:
            next(iter(self._unsent))._give_up("too much is unsent")

    def resume_writing(self) -> None:
        """Note that the client has read most of its answer."""
        super().resume_writing()
        self._unsent.pop(self, None)

    # Events of the parser.

    def on_message_begin(self) -> None:
        """Start the deadline of the headers."""
        super().on_message_begin()
        self._phase, self._since, self._advanced = _Phase.HEADERS, self.loop.time(), True
        self._header_count = self._header_bytes = self._unfinished_bytes = self._hosts = 0
        self._body_bytes = self._chunks = 0

    def on_url(self, url: bytes) -> None:
        """Collect the URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise UrlTooLongError(limit=MAX_URL_BYTES)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; one that follows the body is only counted."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        if self._header_count > MAX_HEADERS:
            raise HeadersTooLargeError(limit=MAX_HEADERS, unit="headers")
        if self._header_bytes > MAX_HEADER_BYTES:
            raise HeadersTooLargeError(limit=MAX_HEADER_BYTES, unit="bytes")
        if self._phase is not _Phase.HEADERS:
            return
        super().on_header(name, value)
        lower = name.lower()
        if lower == b"host":
            self._hosts += 1
            if not _HOST.fullmatch(value.strip()):
                raise MalformedRequestError("Host", expected="a host and perhaps a port", found=repr(value[:100]))
        elif lower == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise MalformedRequestError("Transfer-Encoding", expected="chunked", found=repr(value[:100]))

    def on_headers_complete(self) -> None:
        """Start the request, unless a proxy in front could see another one in the same bytes."""
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if version not in ("1.0", "1.1"):
            raise UnsupportedVersionError(version)
        if method == b"CONNECT":
            raise MalformedRequestError("method", expected="one of a server", found="CONNECT, which is for proxies")
        if self._hosts > 1 or (self._hosts == 0 and version == "1.1"):
            raise MalformedRequestError("headers", expected="one Host", found=self._hosts)
        if version == "1.0" and any(name == b"transfer-encoding" for name, _ in self.headers):
            raise MalformedRequestError("Transfer-Encoding", expected="HTTP/1.1", found="HTTP/1.0")
        if self.parser.should_upgrade() and any(name in _BODY_HEADERS for name, _ in self.headers):
            raise MalformedRequestError("Upgrade", expected="none in a request with a body", found="one")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise MalformedRequestError("requests", expected=f"at most {MAX_PIPELINED} ahead", found="more")
        super().on_headers_complete()
        self._phase, self._since = _Phase.BODY, self.loop.time()
        self._requests += 1
        if self._requests >= MAX_REQUESTS:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count the chunks: millions of a byte each would keep the event loop busy."""
        self._advanced = True
        self._chunks += 1
        if self._chunks > MAX_SMALL_CHUNKS + self._body_bytes / MIN_CHUNK_BYTES:
            expected = f"chunks of at least {MIN_CHUNK_BYTES} bytes on average"
            raise MalformedRequestError("body", expected=expected, found=f"{self._chunks} in {self._body_bytes} bytes")

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body."""
        self._advanced = True
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request, but not its answer."""
        super().on_message_complete()
        self._phase, self._since = _Phase.IDLE, self.loop.time()

    def on_response_complete(self) -> None:
        """Start the next request of the pipeline, or wait for one."""
        super().on_response_complete()
        if self._phase is _Phase.IDLE:
            self._since = self.loop.time()

    # The application.

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; if the rest of a body cannot come, its `receive` raises the reason.

        What it sends over a closed connection goes nowhere. Uvicorn knows this of the last request alone: with several
        in the pipeline, it would write to the closed transport for the one that is being answered.
        """

        async def receive_or_raise() -> Message:
            message = await receive()
            if self._refusal is not None and message.get("more_body", False):
                raise self._refusal
            return message

        cycle: Any = getattr(send, "__self__", None)
        self._running = cycle

        async def send_unless_closed(message: Message) -> None:
            try:
                if not self.transport.is_closing():
                    await send(message)
            except RuntimeError:
                if not self.transport.is_closing():  # it may have been closed while `send` waited for the client
                    raise
            if self.transport.is_closing() and not cycle.response_complete:
                cycle.disconnected = True  # else uvicorn logs an unfinished response as our fault

        await self._call_app(scope, receive_or_raise, send_unless_closed)

    # Deadlines and refusals.

    def _watch(self) -> None:
        """Look whether the client keeps within the deadline of what the connection is waiting for."""
        self._timer = self.loop.call_later(self._tick, self._watch)
        now, limits = self.loop.time(), self.limits
        if not _unsent_bytes(self):
            self._unsent.pop(self, None)
        elif now - self._unsent.setdefault(self, now) > limits.send_seconds:
            self._give_up(f"its answer was not read within {limits.send_seconds:g} s")
            return
        waited = now - self._since
        if self._lingers_until is not None:
            if now > self._lingers_until:
                self.transport.abort()
        elif self._refusal is not None or self.transport.is_closing():
            pass
        elif self._phase is _Phase.BODY:
            if self.flow.read_paused:  # we are slow, not the client
                self._since += self._tick
            elif waited > min(limits.receive_seconds + self._body_bytes / MIN_BYTES_PER_SECOND, limits.body_seconds):
                self._refuse(SlowRequestError("body", waited, self._body_bytes))
        elif self._phase is _Phase.HEADERS:
            if waited > limits.receive_seconds:
                self._refuse(SlowRequestError("headers", waited, self._header_bytes))
        elif self._is_waiting and waited > (limits.keep_alive_seconds if self._requests else limits.receive_seconds):
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: VitrineError) -> None:
        """Parse no more. Answer the request that is arriving by the error, after those before it, and close."""
        self._refusal = error.with_traceback(None)
        if self._is_answering:
            self.cycle.keep_alive = False
            self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]
            self.cycle.message_event.set()  # it may be waiting for its body: `_run_app` raises the error
            if self._phase is not _Phase.BODY:
                metrics.count_rejected(error.code)
        elif self._phase is _Phase.BODY:  # the request was answered before the end of its body
            metrics.count_rejected(error.code)
            self._linger()
        else:
            self.transport.write(self._refusal_bytes(error))
            self._linger()

    def _refusal_bytes(self, error: VitrineError) -> bytes:
        """Return the answer to what did not become a request; it is counted and logged like one."""
        method, url = "", b""
        if self._phase is _Phase.HEADERS:
            with suppress(httptools.HttpParserError):
                method = self.parser.get_method().decode(errors="replace")
            url = self.url.partition(b"?")[0]
        host, port = self.client or ("", 0)
        record = RequestRecord(method=method, path=url.decode("latin-1"), client=f"{host}:{port}")
        response = vitrine_error_response({"path": record.path, "vitrine.record": record}, error)
        record.status, record.bytes_out = str(response.status_code), len(response.body)
        metrics.request_started(record)
        metrics.request_finished(record, record.status, 0.0)
        log_request(record, record.status, 0.0)
        headers = [*self.server_state.default_headers, *add_security_headers(response.raw_headers)]
        headers += [(b"x-request-id", record.request_id.encode()), (b"connection", b"close")]
        lines = [STATUS_LINE[response.status_code], *(b"%s: %s\r\n" % header for header in headers), b"\r\n"]
        return b"".join([*lines, b"" if method == "HEAD" else bytes(response.body)])

    def _linger(self) -> None:
        """Close our side, drop what still arrives for a moment, then close."""
        self._lingers_until = self.loop.time() + _LINGER_SECONDS
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.transport.write_eof()

    def _give_up(self, reason: str) -> None:
        """Drop the connection with all that is unsent."""
        metrics.count_rejected("unread")
        _log.info("connection of %s dropped: %s", self._address, reason)
        self._unsent.pop(self, None)
        self.transport.abort()

    def _close_oldest(self) -> bool:
        """Close the connection that has been waiting longest for a request, in favour of this one, if there is any."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        waiting = (other for other in others if other._is_waiting)
        oldest = min(waiting, key=lambda other: other._since, default=None)
        if oldest is None:
            return False
        oldest.transport.close()
        return True

    @property
    def _is_waiting(self) -> bool:
        return self._phase is not _Phase.BODY and not self._is_answering and not self.transport.is_closing()


class _LingeringTransport:
    """What uvicorn writes the last answer of a connection to; it lingers instead of closing at once."""

    def __init__(self, connection: Connection) -> None:
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing
        self.close = connection._linger


def _unsent_bytes(connection: Connection) -> int:
    return connection.transport.get_write_buffer_size()


def _malformed(data: bytes, error: Exception, requests: int) -> VitrineError:
    """Return the error for what the parser cannot read."""
    if requests == 0 and data.startswith(_TLS_HANDSHAKE):
        return MalformedRequestError("request", expected="plain HTTP", found="TLS; try http:// instead of https://")
    if data.startswith(b"PRI * HTTP/2.0"):
        return UnsupportedVersionError("2.0")
    if isinstance(error, httptools.HttpParserCallbackError):  # raised by uvicorn
        return MalformedRequestError("URL", expected="a path", found="something else")
    return MalformedRequestError("request", expected="HTTP/1.1", found=error)
