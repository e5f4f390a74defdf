"""Spans: BentoML makes one of each HTTP request, here is one of each gRPC call, and those of the stages below both."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from service.observation import QUIET, Observation
from service.settings import Settings

_GRPC_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}  # the server's


def bentoml_tracing(settings: Settings) -> dict[str, Any]:
    """BentoML's configuration of tracing. Without a collector its middleware lets all requests pass."""
    if not settings.traces_endpoint:
        return {"excluded_urls": ".*"}  # it would build a span for every event of every request, and send none
    return {
        "exporter_type": "otlp",
        "sample_rate": settings.traces_share,
        "excluded_urls": [f"{re.escape(path)}$" for path in sorted(QUIET)],
        "otlp": {"protocol": "http", "endpoint": settings.traces_endpoint, "http": {}},
    }


def trace_id() -> str:
    """Of the trace that is recorded now, in hexadecimal; empty where none is."""
    span = trace.get_current_span()
    return f"{span.get_span_context().trace_id:032x}" if _is_sampled(span) else ""


def record_spans(observation: Observation) -> None:
    """Write the stages of a request as children of its span, which must not have ended yet."""
    parent = trace.get_current_span()
    if not _is_sampled(parent):
        return
    known = {"model": observation.model, "version": observation.version, "variant": observation.variant}
    attributes = {f"vitrine.{name}": value for name, value in known.items() if value}
    own = {
        "request_id": observation.request_id,
        "images": observation.images,
        "batch_sizes": tuple(observation.batches),
        "error": observation.error,
    }
    parent.set_attributes({**attributes, **{f"vitrine.{name}": value for name, value in own.items() if value}})
    if observation.method != "gRPC":  # by default its name is what the client wrote, of which there is no end
        parent.update_name(f"{observation.method} {observation.route}".rstrip())
        if observation.route:
            parent.set_attribute("http.route", observation.route)
    context = trace.set_span_in_context(parent)
    tracer = _tracer()
    for stage in observation.stages:
        span = tracer.start_span(stage.name, context, attributes=attributes, start_time=stage.start)
        span.end(stage.end)


@contextmanager
def grpc_span(settings: Settings, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    """The span of a gRPC call, as BentoML's middleware makes one of an HTTP request (W3C trace context)."""
    if not settings.traces_endpoint:
        yield
        return
    service, _, name = method.removeprefix("/").partition("/")
    with _tracer().start_as_current_span(
        f"{service}/{name}",
        propagate.extract(metadata),
        SpanKind.SERVER,
        {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        record_exception=False,  # an error is answered by raising, too
        set_status_on_exception=False,
    ):
        yield


def record_grpc_status(status: str) -> None:
    """Write how a gRPC call was answered into its span."""
    span = trace.get_current_span()
    span.set_attribute("rpc.grpc.status", status)
    if status in _GRPC_FAULTS:
        span.set_status(Status(StatusCode.ERROR, status))


def _is_sampled(span: Span) -> bool:
    # BentoML's spans record even where none is ever sent.
    return span.is_recording() and span.get_span_context().trace_flags.sampled


def _tracer() -> trace.Tracer:
    # BentoML does not make its provider the global one.
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider: trace.TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider.get_tracer("vitrine")
