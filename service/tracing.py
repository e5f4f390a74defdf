"""Spans of a request's stages, below the span that BentoML's OpenTelemetry middleware makes of the request."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind

from service.observation import Observation
from service.settings import Settings


def bentoml_tracing(settings: Settings) -> dict[str, Any]:
    """BentoML's configuration of tracing. Without a collector its middleware lets all requests pass."""
    if not settings.traces_endpoint:
        return {"excluded_urls": ".*"}  # it would build a span for every event of every request, and send none
    return {
        "exporter_type": "otlp",
        "sample_rate": settings.traces_share,
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
    parent.set_attributes({**attributes, "vitrine.request_id": observation.request_id})
    parent.set_attribute("vitrine.images", observation.images)
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
    context = propagate.extract(metadata)
    with _tracer().start_as_current_span(method.removeprefix("/"), context, SpanKind.SERVER):
        yield


def _is_sampled(span: Span) -> bool:
    # BentoML's spans record even where none is ever sent.
    return span.is_recording() and span.get_span_context().trace_flags.sampled


def _tracer() -> trace.Tracer:
    # BentoML does not make its provider the global one.
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider: trace.TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider.get_tracer("vitrine")
