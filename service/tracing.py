"""Spans: BentoML makes one of each HTTP request, here is one of each gRPC call, and those of the stages below both."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from service.observation import GRPC, QUIET, Observation
from service.settings import Settings

_GRPC_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}  # the server's
_LAST_SECONDS = 5.0  # that sending gets when the server stops; a collector that does not answer takes longer


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
    """Write what is known of a request into its span, which must not have ended yet, and its stages below it."""
    parent = trace.get_current_span()
    if not _is_sampled(parent):
        return
    model = _named(model=observation.model, version=observation.version, variant=observation.variant)
    parent.set_attributes({**model, **_named(request_id=observation.request_id, error=observation.error)})
    if observation.images:
        parent.set_attribute("vitrine.images", observation.images)
        parent.set_attribute("vitrine.batch_sizes", tuple(observation.batches))
    if observation.method == GRPC:
        parent.set_attribute("rpc.response.status_code", observation.status)
        if observation.status in _GRPC_FAULTS:
            parent.set_status(Status(StatusCode.ERROR, observation.error))
    else:  # BentoML's middleware names it by what the client wrote, and notes the query
        parent.update_name(f"{observation.method} {observation.route}".rstrip())
        if observation.route:
            parent.set_attribute("http.route", observation.route)
        if isinstance(parent, ReadableSpan) and parent.attributes is not None:
            parent.set_attribute("http.url", str(parent.attributes.get("http.url", "")).partition("?")[0])
    context = trace.set_span_in_context(parent)
    tracer = _tracer()
    for stage in observation.stages:
        span = tracer.start_span(stage.name, context, attributes=model, start_time=stage.start)
        span.end(stage.end)


@contextmanager
def grpc_span(settings: Settings, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    """The span of a gRPC call, as BentoML's middleware makes one of an HTTP request (W3C trace context)."""
    if not settings.traces_endpoint:
        yield
        return
    service, _, name = method.removeprefix("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    with _tracer().start_as_current_span(
        f"{service}/{name}",
        propagate.extract(metadata),
        SpanKind.SERVER,
        attributes,
        record_exception=False,  # an error is answered by raising, too
        set_status_on_exception=False,
    ):
        yield


def send_spans() -> None:
    """Send the spans that still wait, for a few seconds at most; later ones are dropped.

    BentoML leaves it to an exit handler, but uvicorn ends its process by the signal that it has got, without any.
    """
    sending = threading.Thread(target=_provider().shutdown, daemon=True)
    sending.start()
    sending.join(_LAST_SECONDS)


def _named(**values: str) -> dict[str, str]:
    return {f"vitrine.{name}": value for name, value in values.items() if value}


def _is_sampled(span: Span) -> bool:
    # BentoML's spans record even where none is ever sent.
    return span.is_recording() and span.get_span_context().trace_flags.sampled


def _provider() -> TracerProvider:
    # BentoML does not make its provider the global one.
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider = BentoMLContainer.tracer_provider.get()
    assert isinstance(provider, TracerProvider)
    return provider


def _tracer() -> trace.Tracer:
    return _provider().get_tracer("vitrine")
