"""Spans as received by a collector, by OTLP over HTTP."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.utils
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Serving = Callable[..., AbstractContextManager[Any]]
SERVICE = "inference.GRPCInferenceService"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(NamedTuple):
    """An OTLP receiver."""

    endpoint: str
    spans: list[Any]  # received spans
    headers: list[Any]  # headers of the export requests
    resources: list[Any]  # resources of the spans


@contextmanager
def collecting() -> Iterator[Collector]:
    spans: list[Any] = []
    headers: list[Any] = []
    resources: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers.append(self.headers)
            for entry in ExportTraceServiceRequest.FromString(body).resource_spans:
                resources.append(entry.resource)
                for scope in entry.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Collector(f"http://127.0.0.1:{server.server_port}/v1/traces", spans, headers, resources)
        server.shutdown()


def traced(serve: Serving, bundles: Path, send: Callable[[Any], None], **environment: str) -> list[Any]:
    """The spans of the trace `TRACE`, to which `send` belongs, once the server has ended."""
    with collecting() as collector:
        with serve(bundles, VITRINE_TRACES_ENDPOINT=collector.endpoint, **environment) as running:
            send(running)
        return [span for span in collector.spans if span.trace_id.hex() == TRACE]


def attributes(described: Any) -> dict[str, str]:
    """The string attributes of a span or a resource."""
    return {entry.key: entry.value.string_value for entry in described.attributes}


def test_the_stages_are_children_of_the_requests_span_in_the_clients_trace(
    serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    def send(running: Any) -> None:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "mine"}
        httpx.post(f"{running.url}/classify", content=photograph, headers=headers)

    spans = traced(serve, tiny_bundles, send)
    (request,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert request.name == "POST /classify"
    assert attributes(request)["http.route"] == "/classify"
    assert attributes(request)["vitrine.model"] == "colours"
    assert attributes(request)["vitrine.request_id"] == "mine"
    stages = {span.name: span for span in spans if span.name in ("decode", "queue", "inference")}
    assert len(stages) == 3
    for span in stages.values():
        assert span.parent_span_id == request.span_id
        assert attributes(span)["vitrine.variant"] == "fp32"
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    order = sorted(stages, key=lambda name: stages[name].start_time_unix_nano)
    assert order == ["queue", "decode", "inference"]


def test_grpc_calls_are_traced_alike(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    def send(running: Any) -> None:
        tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([photograph], dtype=object))
        with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
            client.infer("colours", [tensor], headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})

    spans = traced(serve, tiny_bundles, send)
    (call,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert call.name == "inference.GRPCInferenceService/ModelInfer"
    assert {span.name for span in spans if span.parent_span_id == call.span_id} == {"decode", "queue", "inference"}
    assert attributes(call)["rpc.response.status_code"] == "OK"


@pytest.mark.parametrize("flags", ["00", "01"])
def test_the_client_decides_whether_it_is_traced(
    flags: str, serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    def send(running: Any) -> None:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
        httpx.post(f"{running.url}/classify", content=photograph, headers=headers)

    assert bool(traced(serve, tiny_bundles, send, VITRINE_TRACES_SHARE="0")) == (flags == "01")


def test_errors_are_traced_and_query_strings_are_not(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    servers: list[Any] = []

    def send(running: Any) -> None:
        servers.append(running)
        httpx.post(f"{running.url}/classify?model=colours", content=b"no image", headers=headers)
        httpx.get(f"{running.url}/nowhere/secret?secret=1", headers=headers)
        with (
            tritonclient.grpc.InferenceServerClient(running.grpc) as client,
            pytest.raises(tritonclient.utils.InferenceServerException),
        ):
            client.get_model_metadata("nothing", headers=headers)

    spans = traced(serve, tiny_bundles, send, VITRINE_LOG_FORMAT="json")
    by_name = {span.name: span for span in spans if span.parent_span_id.hex() == PARENT}
    undecoded, unknown, call = (by_name[name] for name in ("POST /classify", "GET", f"{SERVICE}/ModelMetadata"))
    assert attributes(undecoded)["vitrine.error"] == "unsupported_image_type"
    assert attributes(undecoded)["url.path"] == "/classify"
    assert attributes(unknown)["vitrine.error"] == "not_found"
    assert not any("secret=1" in text for span in spans for text in attributes(span).values())
    assert attributes(call)["rpc.response.status_code"] == "NOT_FOUND"
    assert {span.status.code for span in (undecoded, unknown, call)} == {0}  # not the server's fault
    logged = [line for line in map(json.loads, servers[0].lines) if "path" in line]
    assert {line["trace_id"] for line in logged} == {TRACE}


def test_probes_are_not_traced(serve: Serving, tiny_bundles: Path) -> None:
    def send(running: Any) -> None:
        for path in ("/livez", "/readyz", "/metrics", "/v2/health/ready", "/v2/health/live"):
            httpx.get(running.url + path, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).raise_for_status()

    assert traced(serve, tiny_bundles, send) == []


def test_an_unreachable_collector_is_harmless(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles, VITRINE_TRACES_ENDPOINT="http://127.0.0.1:9/v1/traces") as running:
        assert httpx.post(f"{running.url}/classify", content=photograph).status_code == 200
        running.process.terminate()
        assert running.process.wait(timeout=20) == 0


def test_opentelemetrys_own_variables_are_honoured(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-collector-key=secret",
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=tests",
    }
    with collecting() as collector:
        with serve(tiny_bundles, VITRINE_TRACES_ENDPOINT=collector.endpoint, **variables) as running:
            httpx.get(f"{running.url}/models").raise_for_status()
        assert collector.headers[0]["x-collector-key"] == "secret"
        resource = attributes(collector.resources[0])
        assert (resource["service.name"], resource["deployment.environment.name"]) == ("mine", "tests")


@contextmanager
def broken_collector(fault: str) -> Iterator[str]:
    """The endpoint of a collector that refuses connections, accepts them and never answers, or answers nonsense."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"nonsense\r\n\r\n")

        if fault == "down":
            listener.close()
        elif fault == "nonsense":
            threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{port}/v1/traces"


@pytest.mark.parametrize("fault", ["down", "hanging", "nonsense"])
def test_a_broken_collector_costs_a_few_log_lines(
    fault: str, serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    hurry = {"OTEL_BSP_SCHEDULE_DELAY": "20", "OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4"}
    hurry["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"] = "0.1"  # seconds
    with broken_collector(fault) as endpoint:
        with serve(tiny_bundles, VITRINE_TRACES_ENDPOINT=endpoint, **hurry) as running, httpx.Client() as client:
            deadline = time.monotonic() + 30
            while not any("Failed to export" in line for line in running.lines):
                assert time.monotonic() < deadline
                client.post(f"{running.url}/classify", content=photograph, timeout=5).raise_for_status()
            for _ in range(100):
                client.post(f"{running.url}/classify", content=photograph, timeout=5).raise_for_status()
        assert running.process.returncode == 0
    complaints = [line for line in running.lines if "[INFO]" not in line and "[" in line]
    assert len(complaints) <= 4, "".join(complaints)
    assert "Traceback" not in "".join(running.lines)
