"""`/v2`: the Open Inference Protocol over HTTP, with the binary tensor and model repository extensions."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrine.bundle.errors import ParameterError
from vitrine.service.errors import UnavailableError, preview
from vitrine.service.http.bodies import off_loop, read_body
from vitrine.service.http.json_body import NotJsonError, loads
from vitrine.service.open_inference.inference import (
    MAX_TENSORS,
    SERVER_METADATA,
    InferenceRequest,
    InferenceResponse,
    RequestedOutput,
    Tensor,
    UndecodedElements,
    check_classification,
    check_variant,
    infer,
    load_model,
    model_metadata,
    model_reference,
    repository_index,
    tensor_from_bytes,
    tensor_from_values,
    tensor_to_bytes,
)
from vitrine.service.runtime.serving import Deadline, get_record, get_serving

HEADER_LENGTH = "Inference-Header-Content-Length"
Json = dict[str, Any]


async def server_metadata(request: Request) -> Response:
    """`GET /v2`."""
    return _json_response(SERVER_METADATA)


async def server_health(request: Request) -> Response:
    """`GET /livez` and the other probes; a worker accepts no requests before all models are loaded."""
    trouble = get_serving(request).find_trouble()
    if trouble:
        raise UnavailableError(trouble)
    return Response()


async def metadata(request: Request) -> Response:
    """`GET /v2/models/{name}[/versions/{version}]`."""
    return _json_response(model_metadata(get_serving(request), _reference(request)))


async def model_ready(request: Request) -> Response:
    """`GET /v2/models/{name}[/versions/{version}]/ready`."""
    get_serving(request).repository.get(_reference(request))
    return Response()


async def model_infer(request: Request) -> Response:
    """`POST /v2/models/{name}[/versions/{version}]/infer`."""
    serving, record = get_serving(request), get_record(request)
    await serving.admit(request, name=request.path_params["name"])
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        body = await read_body(request, serving.settings.max_body_bytes)
        deadline.body_received()
        header_length = request.headers.get(HEADER_LENGTH)
        json_bytes = _json_bytes(header_length, len(body))
        parsed, binary = await off_loop(json_bytes, parse, _reference(request), body, header_length)
        response = await infer(serving, record, parsed)
        return await asyncio.to_thread(_infer_response, response, parsed, binary)


async def index(request: Request) -> Response:
    """`POST /v2/repository/index`."""
    serving = get_serving(request)
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        document = await _optional_json(request, deadline)
        return _json_response(repository_index(serving, ready_only=_flag(document, "ready", False)))


async def load(request: Request) -> Response:
    """`POST /v2/repository/models/{name}/load`."""
    serving = get_serving(request)
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        document = await _optional_json(request, deadline)
    # Not within the deadline: what the client is told of a change depends on how far it has come.
    name, parameters = request.path_params["name"], document.get("parameters")
    await load_model(serving, name, parameters, seconds=deadline.remaining)
    return Response()


async def unload(request: Request) -> Response:
    """`POST /v2/repository/models/{name}/unload`."""
    serving = get_serving(request)
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        await _optional_json(request, deadline)
    await serving.unload(request.path_params["name"], seconds=deadline.remaining)
    return Response()


PROTOCOL_ROUTES = (
    ("/v2", server_metadata, "GET"),
    ("/v2/models/{name}", metadata, "GET"),
    ("/v2/models/{name}/versions/{version}", metadata, "GET"),
    ("/v2/models/{name}/ready", model_ready, "GET"),
    ("/v2/models/{name}/versions/{version}/ready", model_ready, "GET"),
    ("/v2/models/{name}/infer", model_infer, "POST"),
    ("/v2/models/{name}/versions/{version}/infer", model_infer, "POST"),
    ("/v2/repository/index", index, "POST"),
    ("/v2/repository/models/{name}/load", load, "POST"),
    ("/v2/repository/models/{name}/unload", unload, "POST"),
)


def protocol_routes(route: type[Route]) -> list[Route]:
    """Return the routes under /v2 as instances of the class `route`."""
    return [route(path, endpoint, methods=[method]) for path, endpoint, method in PROTOCOL_ROUTES]


def _json_bytes(sent: str | None, length: int) -> int:
    """Return the length of the JSON document at the start of a body of `length` bytes."""
    if sent is None:
        return length
    if not re.fullmatch("[0-9]{1,15}", sent) or int(sent) > length:
        raise ParameterError(HEADER_LENGTH, expected=f"0 to {length}", found=repr(sent[:20]))
    return int(sent)


def parse(reference: str, body: bytes, header_length: str | None) -> tuple[InferenceRequest, bool]:
    """Parse a request: a JSON document of `header_length` bytes, followed by binary tensors.

    Returns:
        The request, and whether outputs are binary by default.

    Raises:
        ParameterError: the request does not follow the protocol.
    """
    length = _json_bytes(header_length, len(body))
    document = _object(_loads(body[:length]), "body")
    parameters = _object(document.get("parameters", {}), "parameters")
    inputs, start = [], length
    data = memoryview(body)
    for entry in _objects(document.get("inputs"), "inputs"):
        name, datatype, shape = _text(entry, "name"), _text(entry, "datatype"), _shape(entry)
        input_parameters = _object(entry.get("parameters", {}), f"input {name[:100]}: parameters")
        if "binary_data_size" in input_parameters:
            size = input_parameters["binary_data_size"]
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(data) - start:
                expected = f"0 to {len(data) - start}, the remaining bytes"
                raise ParameterError(f"input {name[:100]}: binary_data_size", expected=expected, found=preview(size))
            inputs.append(tensor_from_bytes(name, datatype, shape, data[start : start + size]))
            start += size
        elif "data" in entry:
            inputs.append(tensor_from_values(name, datatype, shape, entry["data"]))
        else:
            raise ParameterError(f"input {name[:100]}", expected="data or binary_data_size", found="neither")
    if start != len(body):
        raise ParameterError("body", expected="as many bytes as its tensors", found=f"{len(body) - start} more")
    binary = _flag(parameters, "binary_data_output", False)
    requested = [_requested_output(entry, binary) for entry in _objects(document.get("outputs", []), "outputs")]
    variant, request_id = check_variant(parameters.get("variant")), document.get("id", "")
    if not isinstance(request_id, str):
        raise ParameterError("id", expected="text", found=preview(request_id))
    return InferenceRequest(reference, inputs, requested, request_id, variant), binary


def _requested_output(entry: Json, binary: bool) -> RequestedOutput:
    name = _text(entry, "name")
    parameters = _object(entry.get("parameters", {}), f"output {name[:100]}: parameters")
    classification = check_classification(parameters.get("classification", 0))
    return RequestedOutput(name, classification, _flag(parameters, "binary_data", binary))


def _flag(parameters: Json, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ParameterError(name, expected="true or false", found=preview(value))
    return value


def _infer_response(response: InferenceResponse, request: InferenceRequest, binary: bool) -> Response:
    is_binary = {output.name: output.binary for output in request.outputs}
    outputs, parts = [], []
    for tensor in response.outputs:
        entry: Json = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if is_binary.get(tensor.name, binary):
            parts.append(tensor_to_bytes(tensor))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = _values(tensor)
        outputs.append(entry)
    manifest = response.bundle.manifest
    document: Json = {"model_name": manifest.name, "model_version": manifest.version}
    if response.id:
        document["id"] = response.id
    header = orjson.dumps({**document, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parts:
        return Response(header, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(header))}
    return Response(b"".join((header, *parts)), headers=headers, media_type="application/octet-stream")


def _values(tensor: Tensor) -> NDArray[np.generic] | list[str]:
    if isinstance(tensor.data, np.ndarray):
        return np.ascontiguousarray(tensor.data).ravel()
    assert not isinstance(tensor.data, UndecodedElements)
    return [element.decode() for element in tensor.data]


def _reference(request: Request) -> str:
    return model_reference(request.path_params["name"], request.path_params.get("version", ""))


async def _optional_json(request: Request, deadline: Deadline) -> Json:
    body = await read_body(request, get_serving(request).settings.max_body_bytes)
    deadline.body_received()
    return _object(await off_loop(len(body), _loads, body), "body") if body.strip() else {}


def _loads(body: bytes) -> object:
    try:
        return loads(body)
    except NotJsonError as error:
        raise ParameterError("body", expected="a JSON object", found=f"none: {error}") from None


def _object(value: object, name: str) -> Json:
    if not isinstance(value, dict):
        raise ParameterError(name, expected="a JSON object", found=preview(value))
    return value


def _objects(value: object, name: str) -> list[Json]:
    if not isinstance(value, list):
        raise ParameterError(name, expected="a list", found=preview(value))
    if len(value) > MAX_TENSORS:
        raise ParameterError(name, expected=f"at most {MAX_TENSORS}", found=len(value))
    return [_object(entry, name) for entry in value]


def _text(entry: Json, name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise ParameterError(name, expected="text", found=preview(value))
    return value


def _shape(entry: Json) -> Sequence[int]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or any(not isinstance(edge, int) or isinstance(edge, bool) for edge in shape):
        raise ParameterError("shape", expected="a list of lengths", found=preview(shape))
    return shape


def _json_response(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
