"""From each request's first byte to its last: what is observed becomes headers, a log line, metrics and spans."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.service.observability import metrics
from vitrine.service.observability.logs import log_request
from vitrine.service.observability.request_record import STAGES, RequestRecord, current
from vitrine.service.observability.tracing import http_span, record_spans, trace_id
from vitrine.service.paths import PROBES
from vitrine.service.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_INCOMPLETE = "499"  # the client was gone before the answer began


def request_id(sent: str | None) -> str:
    """The client's id of a request, if it is one that can be passed on, else a new one."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"


@contextmanager
def recorded(record: RequestRecord) -> Iterator[None]:
    """A request, over HTTP or gRPC; when the block ends, it is logged and counted with `record.status`.

    Spans are no part of this: `tracing.record_spans` has to be called while the request's span is open.
    """
    start = time.monotonic()
    record.trace_id = trace_id()
    current.set(record)  # until the task ends: its traceback is logged by uvicorn, outside of this block
    metrics.request_started(record)
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        status = record.status or _INCOMPLETE
        metrics.request_finished(record, status, seconds)
        log_request(record, status, seconds)


class RequestRecordMiddleware:
    """Observes each HTTP request; its answer has `X-Request-ID` (the client's, or a new one) and `Server-Timing`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host, port = scope.get("client") or ("", 0)
        path, headers = scope["path"], Headers(scope=scope)
        record = RequestRecord(
            method=scope["method"],
            path=path,
            route=path if path in PROBES else "",
            client=f"{host}:{port}",
            request_id=request_id(headers.get("x-request-id")),
        )
        scope["vitrine.record"] = record

        async def receive_observed() -> Message:
            message = await receive()
            record.bytes_in += len(message.get("body", b""))
            return message

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = str(message["status"])
                own = [(b"x-request-id", record.request_id.encode())]
                if record.stages:
                    timing = ", ".join(f"{name};dur={1000 * record.seconds(name):.2f}" for name in STAGES)
                    own.append((b"server-timing", timing.encode()))
                message = {**message, "headers": [*message["headers"], *own]}
            else:
                record.bytes_out += len(message.get("body", b""))
            await send(message)

        with http_span(self._settings, record, headers), recorded(record):
            try:
                await self.app(scope, receive_observed, send_observed)
            finally:
                record_spans(self._settings, record)
