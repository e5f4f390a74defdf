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
from google.protobuf.message import DecodeError, Message
from grpc.aio import ServicerContext as Context
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vitrine.bundle.errors import BundleError, ParameterError, ResourceError, UnknownModelError, VitrineError
from vitrine.service.errors import STATUS, TIMEOUT, BodiesError, SlowRequestError, find_exhaustion
from vitrine.service.http.bodies import BodyBudget, BodyLease, off_loop
from vitrine.service.observability.middleware import request_id, track_request
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.observability.tracing import grpc_span, record_spans
from vitrine.service.open_inference import open_inference_pb2 as pb
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
from vitrine.service.settings import Settings

_log = logging.getLogger("bentoml.vitrine")

SERVICE = "inference.GRPCInferenceService"
_MESSAGE_OVERHEAD = 64 * 1024  # bytes of a message besides its tensors
_MAX_STRUCTURE = 1024 * 1024  # bytes of a message besides `raw_input_contents`; parsed, they may take 50 times as many
_MAX_FIELDS = 1000  # of a message
_MAX_STREAMS = 256  # calls at a time on one connection
_MAX_PENDING = (
    10_000  # calls that the event loop has not seen yet; gRPC cancels some of those above it, whosever they are
)
_MAX_METADATA = 16 * 1024  # bytes of a call's metadata; above it some calls are refused, above twice as much all
_MAX_OTHER_CALLS = 256  # at a time, besides those that may wait in the queue
_PROMPT_SECONDS = 0.25  # in which a message usually arrives
_IDLE_MILLISECONDS = 5 * 60 * 1000  # after which a connection without calls is closed
_KEEPALIVE_MILLISECONDS = 30_000  # between pings to a connection with calls; one that has vanished is closed
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
    HTTPStatus.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


def _parse_message(request_type: type[Request], raw: bytes) -> Request:
    """Parse a message.

    Raises:
        ParameterError: it is not of this type, or so large besides `raw_input_contents` that it might take many times
            its size in memory.
    """
    raw_field = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER if request_type is pb.ModelInferRequest else None
    try:
        fields, structure = _count_fields(raw, raw_field)
        if structure > _MAX_STRUCTURE or fields > _MAX_FIELDS:
            expected = f"at most {_MAX_STRUCTURE} bytes besides raw_input_contents, in at most {_MAX_FIELDS} fields"
            raise ParameterError("message", expected=expected, found=f"{structure} bytes in {fields} fields")
        message: Request = request_type.FromString(raw)
        return message
    except DecodeError as error:
        name = request_type.DESCRIPTOR.full_name
        raise ParameterError("message", expected=f"a protobuf {name}", found=f"none: {error}") from None


def _count_fields(raw: bytes, raw_field: int | None) -> tuple[int, int]:
    """Return the number of fields of a message, and the bytes of all but `raw_field`."""
    position = fields = structure = 0
    while position < len(raw) and fields <= _MAX_FIELDS:
        start = position
        tag, position = _varint(raw, position)
        length = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 in (0, 2):
            number, position = _varint(raw, position)
            length = number if tag & 7 == 2 else length
        if length is None:
            raise DecodeError("a field of an unknown type")
        position += length
        fields += 1
        structure += position - start if tag >> 3 != raw_field else 0
    return fields, structure


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    number = 0
    for shift, byte in enumerate(raw[position : position + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, position + shift + 1
    raise DecodeError("a number without an end")


def _recorded(
    method: Callable[["InferenceServicer", Any, RequestRecord], Awaitable[Response]],
) -> Callable[["InferenceServicer", object, Context], Awaitable[Response]]:
    """Check the key of a call, parse its message and record it; an error has the same message as over HTTP."""
    route, request_type = f"/{SERVICE}/{method.__name__}", getattr(pb, f"{method.__name__}Request")

    @wraps(method)
    async def call(servicer: "InferenceServicer", _: object, context: Context) -> Response:
        serving = servicer.serving
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        record = RequestRecord(
            method="gRPC",
            path=route,
            route=route,
            client=_client(context.peer()),
            request_id=request_id(metadata.get("x-request-id")),
        )
        lease = None
        code, message = grpc.StatusCode.INTERNAL, "an unexpected error; see the server's log"
        with grpc_span(serving.settings, route, metadata), track_request(record):
            try:
                record.key = serving.keys.check(metadata.get("authorization"), metadata.get("x-api-key"))
                serving.limit.check(record.sender)
                lease = BodyLease(servicer.budget, record.sender)
                raw = await _receive(context, serving.settings, lease)
                record.bytes_in = len(raw)
                request = await off_loop(len(raw), _parse_message, request_type, raw)
                del raw  # it has been copied
                response = await method(servicer, request, record)
            except VitrineError as error:
                if isinstance(error, BodiesError):
                    await serving.scheduler.throttle_refusal()
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
            finally:
                if lease is not None:
                    lease.release()
            record.status = code.name
            record_spans(serving.settings, record)
            await context.abort(code, message)
        raise AssertionError("abort raises")

    return call


async def _receive(context: Context, settings: Settings, lease: BodyLease) -> bytes:
    """Receive the message of a call. One that takes long to arrive counts as if it had as many bytes as are allowed.

    Raises:
        BodiesError: the messages in progress take too many bytes.
        SlowRequestError: it does not arrive in time.
        ParameterError: there is none.
    """
    reading = asyncio.ensure_future(context.read())
    try:
        await asyncio.wait({reading}, timeout=_PROMPT_SECONDS)
        if not reading.done():
            lease.add(settings.max_body_bytes)
            await asyncio.wait({reading}, timeout=settings.receive_seconds)
            if not reading.done():
                raise SlowRequestError("message", _PROMPT_SECONDS + settings.receive_seconds)
            lease.release()
        raw = reading.result()
    finally:
        reading.cancel()
    if not isinstance(raw, bytes):
        raise ParameterError("message", expected="one", found="none")
    lease.add(len(raw))
    return raw


def _client(peer: str) -> str:
    """Return a peer's address and port as over HTTP; gRPC writes ipv4:127.0.0.1:80 and ipv6:%5B::1%5D:80."""
    return unquote(peer).partition(":")[2].replace("[", "").replace("]", "")


async def _check_empty(servicer: "InferenceServicer", context: Context) -> None:
    """Check the message of a probe, which is not recorded."""
    lease = BodyLease(servicer.probe_budget, "")
    try:
        _parse_message(pb.ServerLiveRequest, await _receive(context, servicer.serving.settings, lease))
    except VitrineError as error:
        await context.abort(CODES[STATUS[type(error)]], str(error))
    finally:
        lease.release()


class InferenceServicer:
    """The methods of the protocol, implemented by the same functions as over HTTP."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.budget = serving, BodyBudget(serving.settings.max_bodies_bytes)
        self.probe_budget = BodyBudget(serving.settings.max_body_bytes)  # its own: probes need no key

    async def ServerLive(self, _: object, context: Context) -> pb.ServerLiveResponse:
        """Whether no computing thread is stuck, and no worker silent."""
        await _check_empty(self, context)
        return pb.ServerLiveResponse(live=not self.serving.find_trouble())

    async def ServerReady(self, _: object, context: Context) -> pb.ServerReadyResponse:
        """Whether the server can handle requests. (It starts only when all models are loaded.)"""
        await _check_empty(self, context)
        return pb.ServerReadyResponse(ready=not self.serving.find_trouble())

    @_recorded
    async def ModelReady(self, request: pb.ModelReadyRequest, record: RequestRecord) -> pb.ModelReadyResponse:
        """Whether a model is loaded."""
        try:
            self.serving.repository.get(model_reference(request.name, request.version))
        except (UnknownModelError, BundleError, ResourceError):
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
        seconds = self.serving.settings.timeout_seconds
        await load_model(self.serving, request.model_name, request.parameters, seconds=seconds)
        return pb.RepositoryModelLoadResponse()

    @_recorded
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, record: RequestRecord
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model in every worker."""
        await self.serving.unload(request.model_name, seconds=self.serving.settings.timeout_seconds)
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
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING),
        ("grpc.max_metadata_size", _MAX_METADATA),
        ("grpc.absolute_max_metadata_size", 2 * _MAX_METADATA),
        ("grpc.max_connection_idle_ms", _IDLE_MILLISECONDS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MILLISECONDS),
        ("grpc.max_receive_message_length", settings.max_body_bytes + _MESSAGE_OVERHEAD),
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=settings.max_queue + _MAX_OTHER_CALLS)
    servicer = InferenceServicer(serving)
    # They read the bytes of the message themselves: gRPC would wait for it without a deadline before it calls them, and
    # parse it on the event loop. On the wire, a call with one message is the same.
    handlers = {
        method: grpc.stream_unary_rpc_method_handler(
            getattr(servicer, method), response_serializer=lambda response: response.SerializeToString()
        )
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
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
