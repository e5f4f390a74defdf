"""The Open Inference Protocol over gRPC, in the process of the HTTP server, with health and reflection."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import wraps
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc.aio import ServicerContext as Context
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vitrine.bundle.errors import ParameterError, UnknownModelError, VitrineError
from vitrine.service.errors import STATUS, TIMEOUT, find_exhaustion
from vitrine.service.observability.middleware import request_id, track_request
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.observability.tracing import grpc_span, record_spans
from vitrine.service.open_inference import open_inference_pb2 as pb
from vitrine.service.open_inference import open_inference_pb2_grpc as pb_grpc
from vitrine.service.open_inference.inference import (
    SERVER_METADATA,
    InferenceRequest,
    RequestedOutput,
    Tensor,
    check_classification,
    check_variant,
    infer,
    load_model,
    model_metadata,
    model_reference,
    repository_index,
    tensor_from_array,
    tensor_from_bytes,
    tensor_from_values,
    tensor_to_bytes,
)
from vitrine.service.runtime.serving import Serving

_log = logging.getLogger("bentoml.vitrine")

SERVICE = "inference.GRPCInferenceService"
_MESSAGE_OVERHEAD = 64 * 1024  # bytes of a message besides its tensors
_GRACE_SECONDS = 30.0  # grace period for calls in progress at shutdown

CODES = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNPROCESSABLE_ENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Response = TypeVar("Response", bound=Message)


def _recorded(
    method: Callable[["InferenceServicer", Any, RequestRecord], Awaitable[Response]],
) -> Callable[["InferenceServicer", Any, Context], Awaitable[Response]]:
    """Check the key of a call and record it; an error becomes a status with the same message as over HTTP."""
    route = f"/{SERVICE}/{method.__name__}"

    @wraps(method)
    async def call(servicer: "InferenceServicer", request: Any, context: Context) -> Response:
        serving = servicer.serving
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        record = RequestRecord(
            method="gRPC",
            path=route,
            route=route,
            client=_client(context.peer()),
            request_id=request_id(metadata.get("x-request-id")),
        )
        code, message = grpc.StatusCode.INTERNAL, "an unexpected error; see the server's log"
        with grpc_span(serving.settings, route, metadata), track_request(record):
            try:
                record.key = serving.keys.check(metadata.get("authorization"), metadata.get("x-api-key"))
                serving.limit.check(record.sender)
                response = await method(servicer, request, record)
            except VitrineError as error:
                record.error = error.code
                code, message = CODES[STATUS[type(error)]], str(error)
            except TimeoutError:
                record.error = TIMEOUT
                code, message = grpc.StatusCode.DEADLINE_EXCEEDED, "the request was not answered in time"
            except Exception as error:
                unavailable = find_exhaustion(error)
                if unavailable is None:
                    record.error = "internal_error"
                    _log.exception("%s failed", method.__name__)
                else:
                    record.error = unavailable.code
                    code, message = grpc.StatusCode.UNAVAILABLE, str(unavailable)
            else:
                record.status, record.bytes_out = grpc.StatusCode.OK.name, response.ByteSize()
                record_spans(serving.settings, record)
                return response
            record.status = code.name
            record_spans(serving.settings, record)
            await context.abort(code, message)
        raise AssertionError("abort raises")

    return call


def _client(peer: str) -> str:
    """Return a peer's address and port as over HTTP; gRPC writes ipv4:127.0.0.1:80 and ipv6:%5B::1%5D:80."""
    return unquote(peer).partition(":")[2].replace("[", "").replace("]", "")


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The methods of the protocol, implemented by the same functions as over HTTP."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whether no computing thread is stuck, and no worker silent."""
        return pb.ServerLiveResponse(live=not self.serving.find_trouble())

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether the server can handle requests. (It starts only when all models are loaded.)"""
        return pb.ServerReadyResponse(ready=not self.serving.find_trouble())

    @_recorded
    async def ModelReady(self, request: pb.ModelReadyRequest, record: RequestRecord) -> pb.ModelReadyResponse:
        """Whether a model is loaded."""
        try:
            self.serving.repository.get(model_reference(request.name, request.version))
        except UnknownModelError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @_recorded
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, record: RequestRecord
    ) -> pb.ServerMetadataResponse:
        """Name, version and extensions."""
        return pb.ServerMetadataResponse(**SERVER_METADATA)

    @_recorded
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, record: RequestRecord) -> pb.ModelMetadataResponse:
        """A model's tensors."""
        reference = model_reference(request.name, request.version)
        return pb.ModelMetadataResponse(**model_metadata(self.serving, reference))

    @_recorded
    async def ModelInfer(self, request: pb.ModelInferRequest, record: RequestRecord) -> pb.ModelInferResponse:
        """Run inference."""
        record.bytes_in = request.ByteSize()
        async with asyncio.timeout(self.serving.settings.timeout_seconds):
            # Tensors in `contents` are copied number by number; raw ones are not copied.
            parsed = parse(request) if request.raw_input_contents else await asyncio.to_thread(parse, request)
            response = await infer(self.serving, record, parsed)
        manifest = response.bundle.manifest
        return pb.ModelInferResponse(
            model_name=manifest.name,
            model_version=manifest.version,
            id=response.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(name=t.name, datatype=t.datatype, shape=t.shape)
                for t in response.outputs
            ],
            raw_output_contents=[tensor_to_bytes(tensor) for tensor in response.outputs],
        )

    @_recorded
    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, record: RequestRecord
    ) -> pb.RepositoryIndexResponse:
        """The state of every version of every model."""
        entries = repository_index(self.serving, ready_only=request.ready)
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in entries])

    @_recorded
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, record: RequestRecord
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model in every worker."""
        await load_model(self.serving, request.model_name, request.parameters)
        return pb.RepositoryModelLoadResponse()

    @_recorded
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, record: RequestRecord
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model in every worker."""
        await self.serving.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()


def parse(request: pb.ModelInferRequest) -> InferenceRequest:
    """Parse a request, whose tensors are all in `raw_input_contents` or all in `contents`.

    Raises:
        ParameterError: the request does not follow the protocol.
    """
    raw = request.raw_input_contents
    if raw and any(entry.HasField("contents") for entry in request.inputs):
        raise ParameterError("inputs", expected="raw_input_contents or contents", found="both")
    if raw and len(raw) != len(request.inputs):
        raise ParameterError("raw_input_contents", expected=f"{len(request.inputs)}, one an input", found=len(raw))
    inputs = []
    for i, entry in enumerate(request.inputs):
        if raw:
            inputs.append(tensor_from_bytes(entry.name, entry.datatype, entry.shape, memoryview(raw[i])))
        else:
            inputs.append(_tensor_from_contents(entry))
    outputs = [
        RequestedOutput(entry.name, check_classification(_parameter(entry.parameters, "classification") or 0))
        for entry in request.outputs
    ]
    variant = check_variant(_parameter(request.parameters, "variant"))
    reference = model_reference(request.model_name, request.model_version)
    return InferenceRequest(reference, inputs, outputs, request.id, variant)


_CONTENTS = {
    "UINT8": "uint_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}


def _tensor_from_contents(entry: pb.ModelInferRequest.InferInputTensor) -> Tensor:
    field = _CONTENTS.get(entry.datatype)
    values = getattr(entry.contents, field) if field else ()
    if entry.datatype == "BYTES":
        return tensor_from_values(entry.name, entry.datatype, entry.shape, list(values))
    array = np.fromiter(values, np.float64 if entry.datatype == "FP32" else np.int64, len(values))
    return tensor_from_array(entry.name, entry.datatype, entry.shape, array)


def _parameter(parameters: Mapping[str, pb.InferParameter], name: str) -> Any:
    if name not in parameters:
        return None
    parameter = parameters[name]
    field = parameter.WhichOneof("parameter_choice")
    return None if field is None else getattr(parameter, field)


@asynccontextmanager
async def grpc_server(serving: Serving) -> AsyncIterator[None]:
    """Run a gRPC server on the port of the settings during the block; none if the port is 0.

    All workers listen on the same port (SO_REUSEPORT); the kernel distributes connections among them. When the block
    ends, new calls are rejected and calls in progress are finished.
    """
    settings = serving.settings
    if settings.grpc_port == 0:
        yield
        return
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes + _MESSAGE_OVERHEAD),
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.aio.server(options=options)
    add_servicer = pb_grpc.add_GRPCInferenceServiceServicer_to_server
    add_servicer(InferenceServicer(serving), server)  # type: ignore[no-untyped-call]
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    for service in ("", SERVICE):
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield
    finally:
        await health_servicer.enter_graceful_shutdown()
        await server.stop(_GRACE_SECONDS)
