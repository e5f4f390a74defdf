"""From each request's first byte to its last: what is observed becomes headers, a log line, metrics and spans."""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.logs import log_request
from service.observation import STAGES, Observation, current
from service.tracing import record_spans, trace_id

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_INCOMPLETE = "499"  # the client was gone before the answer began
_BENTOML_ROUTES = {"/livez", "/readyz", "/healthz", "/schema.json"}  # answered outside of our application


def request_id(sent: str | None) -> str:
    """The client's id of a request, if it is one that can be passed on, else a new one."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


@contextmanager
def observed(observation: Observation) -> Iterator[None]:
    """A request, over HTTP or gRPC; when the block ends, it is logged and counted with `observation.status`.

    Spans are no part of this: `tracing.record_spans` has to be called while the request's span is open.
    """
    start = time.monotonic()
    observation.trace_id = trace_id()
    current.set(observation)  # until the task ends: its traceback is logged by uvicorn, outside of this block
    metrics.began(observation)
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        status = observation.status or _INCOMPLETE
        metrics.record(observation, status, seconds)
        log_request(observation, status, seconds)


class ObservationMiddleware:
    """Observes each HTTP request; its answer has `X-Request-ID` (the client's, or a new one) and `Server-Timing`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host, port = scope.get("client") or ("", 0)
        path = scope["path"]
        observation = Observation(
            method=scope["method"],
            path=path,
            route=path if path in _BENTOML_ROUTES else "",
            client=f"{host}:{port}",
            request_id=request_id(Headers(scope=scope).get("x-request-id")),
        )
        scope["vitrine.observation"] = observation

        async def receive_observed() -> Message:
            message = await receive()
            observation.bytes_in += len(message.get("body", b""))
            return message

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                observation.status = str(message["status"])
                record_spans(observation)  # the middleware of OpenTelemetry ends the request's span with the body
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = observation.request_id
                if observation.stages:
                    timing = (f"{name};dur={1000 * observation.seconds(name):.2f}" for name in STAGES)
                    headers["Server-Timing"] = ", ".join(timing)
            else:
                observation.bytes_out += len(message.get("body", b""))
            await send(message)

        with observed(observation):
            try:
                await self.app(scope, receive_observed, send_observed)
            finally:
                if not observation.status:  # no answer has begun
                    record_spans(observation)
