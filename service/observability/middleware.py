"""Record each request and turn the record into headers, a log line, metrics and spans."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.service.errors import CLIENT_CLOSED_REQUEST
from vitrine.service.observability import metrics
from vitrine.service.observability.logs import log_request
from vitrine.service.observability.request_record import STAGES, RequestRecord, current_record
from vitrine.service.observability.tracing import http_span, record_spans, trace_id
from vitrine.service.paths import PROBES
from vitrine.service.response_headers import add_security_headers
from vitrine.service.settings import Settings

_ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}(%[A-Za-z0-9._-]{1,16})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(sent: str | None) -> str:
    """Return the request id sent by the client if it is safe to pass on, else a new one."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"


@contextmanager
def track_request(record: RequestRecord) -> Iterator[None]:
    """Log and count the request, over HTTP or gRPC, at the end of the block, with `record.status`.

    This does not record spans: call `tracing.record_spans` while the request's span is open.
    """
    start = time.monotonic()
    record.trace_id = trace_id()
    current_record.set(record)  # until the task ends: uvicorn logs its traceback outside of this block
    metrics.request_started(record)
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        status = record.status or str(CLIENT_CLOSED_REQUEST)  # no status: disconnected before the response started
        metrics.request_finished(record, status, seconds)
        log_request(record, status, seconds)


class RequestRecordMiddleware:
    """Record each HTTP request; add security headers, `X-Request-ID` and `Server-Timing` to its response."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host, port = scope.get("client") or ("", 0)
        if not _ADDRESS.fullmatch(host):  # any text in X-Forwarded-For of a trusted proxy, or none
            host = ""
        path, request_headers = scope["path"], Headers(scope=scope)
        record = RequestRecord(
            method=scope["method"],
            path=path,
            route=path if path in PROBES else "",
            client=f"{host}:{port}",
            request_id=request_id(request_headers.get("x-request-id")),
        )
        scope["vitrine.record"] = record

        async def receive_recorded() -> Message:
            message = await receive()
            record.bytes_in += len(message.get("body", b""))
            return message

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = str(message["status"])
                headers = add_security_headers(message["headers"])
                headers.append((b"x-request-id", record.request_id.encode()))
                if record.stages:
                    timing = ", ".join(f"{name};dur={1000 * record.seconds(name):.2f}" for name in STAGES)
                    headers.append((b"server-timing", timing.encode()))
                message = {**message, "headers": headers}
            else:
                record.bytes_out += len(message.get("body", b""))
            await send(message)

        with http_span(self._settings, record, request_headers), track_request(record):
            try:
                await self.app(scope, receive_recorded, send_recorded)
            finally:
                record_spans(self._settings, record)
