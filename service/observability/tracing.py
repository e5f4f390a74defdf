"""OpenTelemetry spans: one per request, over HTTP or gRPC, with its stages as children."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from vitrine import __version__
from vitrine.service.observability.request_record import GRPC, RequestRecord
from vitrine.service.settings import Settings

if TYPE_CHECKING:  # as slow to import as all our own code, and only needed with a collector
    from opentelemetry.sdk.trace import TracerProvider

# gRPC statuses that are the server's fault
_GRPC_SERVER_ERRORS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_REPEAT_SECONDS = 600.0  # between log lines of the same kind about the collector
_SHUTDOWN_SECONDS = 5.0  # for the last export; an unreachable collector would take longer


@contextmanager
def http_span(settings: Settings, record: RequestRecord, headers: Mapping[str, str]) -> Iterator[None]:
    """Make the block the span of an HTTP request (semantic conventions for HTTP); probes have none."""
    if not settings.traces_endpoint or record.quiet:
        yield
        return
    host, _, port = record.client.rpartition(":")
    attributes: dict[str, AttributeValue] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "url.scheme": "http",
        "client.address": host,
        "client.port": int(port),
        "user_agent.original": headers.get("user-agent", ""),
    }
    with _server_span(settings, record.method, attributes, headers):
        yield


@contextmanager
def grpc_span(settings: Settings, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    """Make the block the span of a gRPC call (semantic conventions for RPC)."""
    if not settings.traces_endpoint:
        yield
        return
    service, _, name = method.removeprefix("/").partition("/")
    attributes: dict[str, AttributeValue] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    with _server_span(settings, f"{service}/{name}", attributes, metadata):
        yield


@contextmanager
def _server_span(
    settings: Settings, name: str, attributes: Mapping[str, AttributeValue], carrier: Mapping[str, str]
) -> Iterator[None]:
    with _tracer(settings.traces_endpoint, settings.traces_share).start_as_current_span(
        name,
        propagate.extract(carrier),
        SpanKind.SERVER,
        attributes,
        record_exception=False,  # client errors are exceptions, too
        set_status_on_exception=False,
    ):
        yield


def trace_id() -> str:
    """Return the id of the current trace in hexadecimal; empty if none is sampled."""
    span = trace.get_current_span()
    return f"{span.get_span_context().trace_id:032x}" if _is_sampled(span) else ""


def record_spans(settings: Settings, record: RequestRecord) -> None:
    """Set the attributes of the request's span, which must still be open, and add its stages as child spans."""
    parent = trace.get_current_span()
    if not _is_sampled(parent):
        return
    model = _attributes(model=record.model, version=record.version, variant=record.variant)
    parent.set_attributes({**model, **_attributes(request_id=record.request_id, key=record.key, error=record.error)})
    if record.images:
        parent.set_attribute("vitrine.images", record.images)
        parent.set_attribute("vitrine.batch_sizes", tuple(record.batches))
    if record.method == GRPC:
        parent.set_attribute("rpc.response.status_code", record.status)
        if record.status in _GRPC_SERVER_ERRORS:
            parent.set_status(Status(StatusCode.ERROR, record.error))
    else:
        parent.update_name(f"{record.method} {record.route}".rstrip())
        if record.route:
            parent.set_attribute("http.route", record.route)
        if record.status:
            parent.set_attribute("http.response.status_code", int(record.status))
        if record.status.startswith("5"):
            parent.set_status(Status(StatusCode.ERROR, record.error))
    context = trace.set_span_in_context(parent)
    tracer = _tracer(settings.traces_endpoint, settings.traces_share)
    epoch = time.time_ns() - time.monotonic_ns()
    for stage in record.stages:
        span = tracer.start_span(stage.name, context, attributes=model, start_time=epoch + stage.start)
        span.end(epoch + stage.end)


def shutdown_tracing(settings: Settings) -> None:
    """Export the remaining spans, for a few seconds at most; later spans are dropped.

    This cannot be an exit handler: uvicorn ends its process by re-raising the signal, which runs none.
    """
    if not settings.traces_endpoint:
        return
    provider = _provider(settings.traces_endpoint, settings.traces_share)
    exporting = threading.Thread(target=provider.shutdown, daemon=True)
    exporting.start()
    exporting.join(_SHUTDOWN_SECONDS)


def _attributes(**values: str) -> dict[str, str]:
    return {f"vitrine.{name}": value for name, value in values.items() if value}


def _is_sampled(span: Span) -> bool:
    return span.is_recording() and span.get_span_context().trace_flags.sampled


class _SeldomFilter(logging.Filter):
    """Lets each kind of message pass once in a while, without a traceback.

    A collector that is down would cause several for each batch of spans.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}  # time.monotonic() by format string

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._passed.get(str(record.msg), -_REPEAT_SECONDS) < _REPEAT_SECONDS:
            return False
        self._passed[str(record.msg)] = now
        record.exc_info = None
        return True


@cache
def _tracer(endpoint: str, share: float) -> trace.Tracer:
    return _provider(endpoint, share).get_tracer("vitrine")


@cache
def _provider(endpoint: str, share: float) -> "TracerProvider":
    """Return the provider of this process; made on the first request, as it starts a thread."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    seldom = _SeldomFilter()
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("opentelemetry."):
            logging.getLogger(name).addFilter(seldom)
    resource = Resource.create({"service.name": "vitrine", "service.version": __version__})
    resource = resource.merge(OTELResourceDetector().detect())  # such as OTEL_SERVICE_NAME
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider
