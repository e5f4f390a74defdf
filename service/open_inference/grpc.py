"""The Open Inference Protocol over gRPC, beside the HTTP server in the same process, with health and reflection."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc.aio import ServicerContext as Context
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vitrine import __version__
from vitrine.bundle.errors import ParameterError, UnknownModelError, VitrineError
from vitrine.service.errors import STATUS, TIMEOUT, preview
from vitrine.service.observability.middleware import request_id, track_request
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.observability.tracing import grpc_span, record_spans
from vitrine.service.open_inference import open_inference_pb2 as pb
from vitrine.service.open_inference import open_inference_pb2_grpc as pb_grpc
from vitrine.service.open_inference.inference import (
    EXTENSIONS,
    PLATFORM,
    SERVER,
    InferenceRequest,
    RequestedOutput,
    Tensor,
    infer,
    model_metadata,
    reference,
    tensor_from_array,
    tensor_from_bytes,
    tensor_from_values,
    tensor_to_bytes,
)
from vitrine.service.runtime.serving import Serving

_log = logging.getLogger("bentoml.vitrine")

SERVICE = "inference.GRPCInferenceService"
_ROOM = 64 * 1024  # for what a message holds beside its tensors
_GRACE_SECONDS = 30.0  # that calls in work get when the server stops

CODES = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNPROCESSABLE_ENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Answer = TypeVar("Answer", bound=Message)


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The calls of the protocol, each answered by the code that answers it over HTTP."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whether every computing thread gets on."""
        return pb.ServerLiveResponse(live=self._serving.live())

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether it can answer. (There is no server before all models are loaded.)"""
        return pb.ServerReadyResponse(ready=self._serving.live())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether a model is loaded."""

        async def answer(record: RequestRecord) -> pb.ModelReadyResponse:
            try:
                self._serving.repository.get(reference(request.name, request.version))
            except UnknownModelError:
                return pb.ModelReadyResponse(ready=False)
            return pb.ModelReadyResponse(ready=True)

        return await self._answered("ModelReady", context, answer)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name, version and extensions."""

        async def answer(record: RequestRecord) -> pb.ServerMetadataResponse:
            return pb.ServerMetadataResponse(name=SERVER, version=__version__, extensions=EXTENSIONS)

        return await self._answered("ServerMetadata", context, answer)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """A model's tensors."""

        async def answer(record: RequestRecord) -> pb.ModelMetadataResponse:
            found = model_metadata(self._serving, reference(request.name, request.version))
            inputs, outputs = (
                [
                    pb.ModelMetadataResponse.TensorMetadata(name=t.name, datatype=t.datatype, shape=t.shape)
                    for t in tensors
                ]
                for tensors in (found.inputs, found.outputs)
            )
            return pb.ModelMetadataResponse(
                name=found.name, versions=found.versions, platform=PLATFORM, inputs=inputs, outputs=outputs
            )

        return await self._answered("ModelMetadata", context, answer)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Ask a model."""

        async def answer(record: RequestRecord) -> pb.ModelInferResponse:
            record.bytes_in = request.ByteSize()
            async with asyncio.timeout(self._serving.settings.timeout_seconds):
                # Tensors in `contents` are copied number by number; raw ones cost nothing.
                asked = parse(request) if request.raw_input_contents else await asyncio.to_thread(parse, request)
                answered = await infer(self._serving, record, asked)
            manifest = answered.bundle.manifest
            return pb.ModelInferResponse(
                model_name=manifest.name,
                model_version=manifest.version,
                id=answered.id,
                outputs=[
                    pb.ModelInferResponse.InferOutputTensor(name=t.name, datatype=t.datatype, shape=t.shape)
                    for t in answered.outputs
                ],
                raw_output_contents=[tensor_to_bytes(tensor) for tensor in answered.outputs],
            )

        return await self._answered("ModelInfer", context, answer)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """The state of every version of every model."""

        async def answer(record: RequestRecord) -> pb.RepositoryIndexResponse:
            models = [
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name,
                    version=entry.version,
                    state="READY" if entry.ready else "UNAVAILABLE",
                    reason=entry.reason,
                )
                for entry in self._serving.repository.index()
                if entry.ready or not request.ready
            ]
            return pb.RepositoryIndexResponse(models=models)

        return await self._answered("RepositoryIndex", context, answer)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model in every worker."""

        async def answer(record: RequestRecord) -> pb.RepositoryModelLoadResponse:
            if request.parameters:
                found = ", ".join(request.parameters)[:100]
                raise ParameterError("parameters", expected="none: a model is configured by its bundle", found=found)
            await self._serving.load(request.model_name)
            return pb.RepositoryModelLoadResponse()

        return await self._answered("RepositoryModelLoad", context, answer)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model in every worker."""

        async def answer(record: RequestRecord) -> pb.RepositoryModelUnloadResponse:
            await self._serving.unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()

        return await self._answered("RepositoryModelUnload", context, answer)

    async def _answered(
        self, method: str, context: Context, answer: Callable[[RequestRecord], Awaitable[Answer]]
    ) -> Answer:
        """What `answer` gives; an error becomes the protocol's status with the same sentence as over HTTP."""
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        route = f"/{SERVICE}/{method}"
        record = RequestRecord(
            method="gRPC",
            path=route,
            route=route,
            client=context.peer(),
            request_id=request_id(metadata.get("x-request-id")),
        )
        code, sentence = grpc.StatusCode.INTERNAL, "an unexpected error; see the server's log"
        with grpc_span(self._serving.settings, route, metadata), track_request(record):
            try:
                self._serving.keys.check(metadata.get("authorization"), metadata.get("x-api-key"))
                answered = await answer(record)
            except VitrineError as error:
                record.error = error.code
                code, sentence = CODES[STATUS[type(error)]], str(error)
            except TimeoutError:
                record.error = TIMEOUT
                code, sentence = grpc.StatusCode.DEADLINE_EXCEEDED, "the request was not answered in time"
            except Exception:
                record.error = "internal_error"
                _log.exception("%s failed", method)
            else:
                record.status, record.bytes_out = grpc.StatusCode.OK.name, answered.ByteSize()
                record_spans(self._serving.settings, record)
                return answered
            record.status = code.name
            record_spans(self._serving.settings, record)
            await context.abort(code, sentence)
        raise AssertionError("abort raises")


def parse(request: pb.ModelInferRequest) -> InferenceRequest:
    """Read a request, whose tensors are all in `raw_input_contents` or all in `contents`.

    Raises:
        ParameterError: it is not as the protocol says.
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
            inputs.append(_tensor_of_contents(entry))
    requested = [RequestedOutput(entry.name, _classes(entry.parameters)) for entry in request.outputs]
    variant = _value(request.parameters, "variant")
    if variant is not None and not isinstance(variant, str):
        raise ParameterError("variant", expected="text", found=preview(variant))
    return InferenceRequest(
        reference(request.model_name, request.model_version), inputs, requested, request.id, variant
    )


_CONTENTS = {"UINT8": "uint_contents", "INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}


def _tensor_of_contents(entry: pb.ModelInferRequest.InferInputTensor) -> Tensor:
    field = _CONTENTS.get(entry.datatype)
    values = getattr(entry.contents, field) if field else ()
    if entry.datatype == "BYTES":
        return tensor_from_values(entry.name, entry.datatype, entry.shape, list(values))
    array = np.fromiter(values, np.float64 if entry.datatype == "FP32" else np.int64, len(values))
    return tensor_from_array(entry.name, entry.datatype, entry.shape, array)


def _classes(parameters: Mapping[str, pb.InferParameter]) -> int:
    classes = _value(parameters, "classification") or 0
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ParameterError("classification", expected="a number of classes", found=preview(classes))
    return classes


def _value(parameters: Mapping[str, pb.InferParameter], name: str) -> Any:
    if name not in parameters:
        return None
    parameter = parameters[name]
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


@asynccontextmanager
async def grpc_server(serving: Serving) -> AsyncIterator[None]:
    """The gRPC server on the settings' port while the block runs; none if the port is 0.

    Each worker listens on the same port (SO_REUSEPORT); the system spreads connections among them. When the block ends,
    no more calls are taken and those in work are finished.
    """
    settings = serving.settings
    if settings.grpc_port == 0:
        yield
        return
    most = settings.max_body_bytes + _ROOM
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.aio.server(options=options)
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(serving), server)  # type: ignore[no-untyped-call]
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    for service in ("", SERVICE):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(_GRACE_SECONDS)
