"""The OpenAPI 3.1 document of all routes, built from the schemas that the responses are made with."""

import base64
import hashlib
import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from vitrine.bundle.images import SUPPORTED_FORMATS
from vitrine.service.errors import ErrorAnswer, ProtocolErrorAnswer
from vitrine.service.http.parameters import CLASSIFY_PARAMETERS, DETECT_PARAMETERS, EXPLAIN_PARAMETERS, Parameter
from vitrine.service.http.schemas import (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    ExplainedImage,
    ExplainedImages,
    ModelDetail,
    ModelList,
)

Json = dict[str, Any]

_SCHEMAS = (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    ErrorAnswer,
    ExplainedImage,
    ExplainedImages,
    ModelDetail,
    ModelList,
    ProtocolErrorAnswer,
)
_ERRORS = {
    400: "A parameter, a field or the body is missing, unknown, of the wrong type or out of range.",
    401: "The API key is missing or unknown.",
    403: "The operator has disabled this operation.",
    404: "There is no such model, or none for this task.",
    406: "`Accept` names no available media type.",
    413: "The body has too many bytes, or an image too many pixels.",
    415: "The bytes are not of a supported image type.",
    422: "The image is corrupt.",
    429: "More requests per second than the operator allows a client.",
    500: "Internal server error.",
    503: "The queue is full, or the model's files are damaged.",
    504: "Timeout.",
}
_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's own id, or a new one.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of decode, queue and inference, summed over images processed in parallel.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "How to send the key.", "schema": {"type": "string"}},
}
_SECURITY: list[Json] = [{}, {"bearer": []}, {"apiKey": []}]  # keys only if the operator has set them


@cache
def openapi_document() -> str:
    """Return the document as JSON."""
    _, definitions = TypeAdapter.json_schemas(
        [(schema, "serialization", TypeAdapter(schema)) for schema in _SCHEMAS],
        ref_template="#/components/schemas/{model}",
    )
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Vitrine",
            "version": "1",
            "description": "Image classification and object detection with vision transformers.",
        },
        "security": _SECURITY,
        "tags": [
            {"name": "images", "description": "Predictions for images."},
            {"name": "models", "description": "The served models."},
            {"name": "protocol", "description": "Open Inference Protocol (KServe v2), also over gRPC."},
            {"name": "operation", "description": "Health and metrics."},
        ],
        "paths": {**_image_paths(), **_model_paths(), **_protocol_paths(), **_operation_paths()},
        "components": {
            "schemas": {**definitions["$defs"], **_PROTOCOL_SCHEMAS},
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }
    return json.dumps(document)


def _operation(operation_id: str, tag: str, summary: str, ok: Json, errors: tuple[int, ...], **fields: Any) -> Json:
    """Return an operation object: `ok` is its response with status 200."""
    error = _json_content(_reference("ProtocolErrorAnswer" if tag == "protocol" else "ErrorAnswer"))
    headers = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
    if 401 in errors:  # where keys are checked, their limits are
        errors = tuple(sorted((*errors, 429)))
    responses = {str(status): _response(_ERRORS[status], error, *headers.get(status, ())) for status in errors}
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        **fields,
        "responses": {"200": ok, **responses},
    }


def _response(description: str, content: Json | None = None, *headers: str) -> Json:
    names = ("X-Request-ID", *headers)
    response: Json = {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
    }
    return response if content is None else {**response, "content": content}


def _json_content(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Json, **optional: Json) -> Json:
    return {"type": "object", "required": [*required], "properties": {**required, **optional}}


def _array(items: Json, **fields: Any) -> Json:
    return {"type": "array", "items": items, **fields}


def _path_parameter(name: str, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": _STRING, "description": description}


_STRING: Json = {"type": "string"}
_BINARY: Json = {"type": "string", "format": "binary"}
_TEXT_CONTENT: Json = {"text/plain": {"schema": _STRING}}
_BINARY_CONTENT: Json = {"application/octet-stream": {"schema": _BINARY}}
_TABLE = {"type": "string", "description": "A table: a header line, then a line for each prediction."}


def _image_paths() -> Json:
    classify = _image_route("classify", "Classify images", CLASSIFY_PARAMETERS, ("Classification", "Classifications"))
    detect = _image_route("detect", "Detect objects", DETECT_PARAMETERS, ("Detections", "DetectionsOfSeveral"))
    detect["responses"]["200"]["content"] |= {"image/png": {"schema": _BINARY}, "image/jpeg": {"schema": _BINARY}}
    detect["description"] += " A drawing (`Accept: image/png` or `image/jpeg`) is available for a single image only."
    explain = _image_route("explain", "Explain answers", EXPLAIN_PARAMETERS, ("ExplainedImage", "ExplainedImages"))
    del explain["responses"]["200"]["content"]["text/csv"]
    explain["responses"]["200"]["content"] |= {"image/png": {"schema": _BINARY}, "image/jpeg": {"schema": _BINARY}}
    explain["description"] += (
        " A picture (`Accept: image/png` or `image/jpeg`), with a panel for each explanation, is available for a "
        "single image only. `occlusion` runs the network once for each part of the grid."
    )
    return {"/classify": {"post": classify}, "/detect": {"post": detect}, "/explain": {"post": explain}}


def _image_route(operation_id: str, summary: str, parameters: tuple[Parameter, ...], schemas: tuple[str, str]) -> Json:
    properties = {parameter.name: parameter.schema for parameter in parameters}
    image = {**_BINARY, "description": f"One of {', '.join(SUPPORTED_FORMATS)}, detected from its bytes."}
    text = {**_STRING, "description": "Base64 or a data URL. Other URLs are not fetched."}
    json_body = {
        "type": "object",
        "properties": {"image": text, "images": _array(text, minItems=1), **properties},
        "oneOf": [{"required": ["image"]}, {"required": ["images"]}],
        "additionalProperties": False,
    }
    form = {**_object({"image": _array(image, minItems=1)}, **properties), "additionalProperties": False}
    content = {
        **_json_content({"oneOf": [_reference(name) for name in schemas]}),
        "text/csv": {"schema": _TABLE},
    }
    return _operation(
        operation_id,
        "images",
        summary,
        _response("Predictions.", content, "Server-Timing"),
        (400, 401, 404, 406, 413, 415, 422, 500, 503, 504),
        description=(
            "Images are multipart fields `image`, or base64 in JSON, or the body is a single image. Parameters are "
            "query, form or JSON fields. The response to several images (two fields `image`, or `images` in JSON) has "
            "`results` in their order, with an error for each invalid image."
        ),
        parameters=[
            {"name": parameter.name, "in": "query", "schema": parameter.schema, "style": "form", "explode": True}
            for parameter in parameters
        ],
        requestBody={
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                **_json_content(json_body),
                "image/*": {"schema": _BINARY},
                **_BINARY_CONTENT,
            },
        },
    )


def _model_paths() -> Json:
    models = _response("The models.", _json_content(_reference("ModelList")))
    model = _response("The model.", _json_content(_reference("ModelDetail")))
    name = _path_parameter("name", "`name` (its highest version) or `name@version`.")
    sample = _response("The image.", {"image/png": {"schema": _BINARY}})
    number = _path_parameter("number", "From 0; `GET /models` says how many there are.")
    summary = "A model's manifest: labels, measured metrics, preprocessing, variants, provenance"
    return {
        "/models": {"get": _operation("listModels", "models", "The served models", models, (401, 500))},
        "/models/{name}": {
            "get": _operation("describeModel", "models", summary, model, (401, 404, 500), parameters=[name])
        },
        "/models/{name}/samples/{number}": {
            "get": _operation(
                "sample",
                "models",
                "An image that the model was verified with, as the network sees it",
                sample,
                (400, 401, 404, 500, 503),
                parameters=[name, number],
            )
        },
    }


_DATATYPE = {"enum": ["UINT8", "INT64", "FP32", "BYTES"]}
_SHAPE = _array({"type": "integer"})
_PARAMETERS = _reference("Parameters")
_PROTOCOL_SCHEMAS: Json = {
    "Parameters": {
        "type": "object",
        "additionalProperties": {"type": ["string", "integer", "number", "boolean"]},
    },
    "TensorMetadata": _object(
        {"name": _STRING, "datatype": _DATATYPE, "shape": {**_SHAPE, "description": "-1: any length."}}
    ),
    "RequestInput": _object(
        {
            "name": {**_STRING, "description": "`image` (encoded images), or the tensors of the model."},
            "datatype": _DATATYPE,
            "shape": _array({"type": "integer", "minimum": 0}),
        },
        data={"type": "array", "description": "Flat or nested; for BYTES, base64 or data URLs."},
        parameters=_PARAMETERS,
    ),
    "RequestOutput": _object({"name": _STRING}, parameters=_PARAMETERS),
    "InferenceRequest": _object(
        {"inputs": _array(_reference("RequestInput"), minItems=1)},
        id=_STRING,
        parameters=_PARAMETERS,
        outputs=_array(_reference("RequestOutput")),
    ),
    "ResponseOutput": _object(
        {"name": _STRING, "datatype": _DATATYPE, "shape": _SHAPE}, data={"type": "array"}, parameters=_PARAMETERS
    ),
    "InferenceResponse": _object(
        {"model_name": _STRING, "outputs": _array(_reference("ResponseOutput"))},
        model_version=_STRING,
        id=_STRING,
        parameters=_PARAMETERS,
    ),
    "ServerMetadata": _object({"name": _STRING, "version": _STRING, "extensions": _array(_STRING)}),
    "ModelMetadata": _object(
        {
            "name": _STRING,
            "versions": _array(_STRING),
            "platform": _STRING,
            "inputs": _array(_reference("TensorMetadata")),
            "outputs": _array(_reference("TensorMetadata")),
        }
    ),
    "RepositoryIndex": _array(
        _object({"name": _STRING, "version": _STRING, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": _STRING})
    ),
}


def _protocol_operation(
    operation_id: str, summary: str, schema: str | None, errors: tuple[int, ...], **fields: Any
) -> Json:
    ok = _response("Success.", _json_content(_reference(schema)) if schema else None)
    return _operation(operation_id, "protocol", summary, ok, errors, **fields)


def _optional_body(schema: Json) -> Json:
    return {"required": False, "content": _json_content(schema)}


def _protocol_paths() -> Json:
    name = _path_parameter("name", "Name of a model.")
    version = _path_parameter("version", "One of its versions.")
    index_body = _optional_body({"type": "object", "properties": {"ready": {"type": "boolean", "default": False}}})
    paths: Json = {
        "/v2": {
            "get": _protocol_operation(
                "serverMetadata", "The server's name, version and extensions", "ServerMetadata", (401,)
            )
        },
        "/v2/health/live": {"get": _probe("serverLive", "protocol", _LIVE)},
        "/v2/health/ready": {"get": _probe("serverReady", "protocol", _READY)},
        "/v2/repository/index": {
            "post": _protocol_operation(
                "repositoryIndex",
                "The state of every version of every model",
                "RepositoryIndex",
                (400, 401, 413, 500),
                requestBody=index_body,
            )
        },
    }
    for prefix, path, parameters in (
        ("model", "/v2/models/{name}", [name]),
        ("modelVersion", "/v2/models/{name}/versions/{version}", [name, version]),
    ):
        metadata = ("The model's tensors", "ModelMetadata", (401, 404))
        paths[path] = {"get": _protocol_operation(f"{prefix}Metadata", *metadata, parameters=parameters)}
        ready = ("Is the model loaded?", None, (401, 404))
        paths[f"{path}/ready"] = {"get": _protocol_operation(f"{prefix}Ready", *ready, parameters=parameters)}
        paths[f"{path}/infer"] = {"post": _infer(f"{prefix}Infer", parameters)}
    for action in ("load", "unload"):
        paths[f"/v2/repository/models/{{name}}/{action}"] = {
            "post": _protocol_operation(
                f"{action}Model",
                f"{action.capitalize()} a model in every worker",
                None,
                (400, 401, 403, 404, 413, 500, 503),
                parameters=[name],
                requestBody=_optional_body({"type": "object"}),
            )
        }
    return paths


def _infer(operation_id: str, parameters: list[Json]) -> Json:
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
        "description": "Bytes of the JSON document; binary tensors follow it.",
    }
    content = {**_json_content(_reference("InferenceResponse")), **_BINARY_CONTENT}
    return _operation(
        operation_id,
        "protocol",
        "Run inference",
        _response("The outputs.", content, "Server-Timing"),
        (400, 401, 404, 413, 415, 422, 500, 503, 504),
        description=(
            "Tensors are JSON or, by the binary tensor data extension, bytes after the JSON document. "
            "`parameters.variant` chooses a variant of the model."
        ),
        parameters=[*parameters, length],
        requestBody={
            "required": True,
            "content": {**_json_content(_reference("InferenceRequest")), **_BINARY_CONTENT},
        },
    )


_LIVE, _READY = "Are all computing threads making progress?", "Are all models loaded?"


def _operation_paths() -> Json:
    metrics = _response("The metrics.", _TEXT_CONTENT)
    return {
        "/livez": {"get": _probe("livez", "operation", _LIVE)},
        "/healthz": {"get": _probe("healthz", "operation", "The same as /livez")},
        "/readyz": {"get": _probe("readyz", "operation", _READY)},
        "/metrics": {
            "get": _operation("metrics", "operation", "Prometheus metrics", metrics, (401, 500), security=_SECURITY)
        },
    }


def _probe(operation_id: str, tag: str, summary: str) -> Json:
    return _operation(operation_id, tag, summary, _response("Yes."), (500, 503), security=[{}])  # needs no key


# BentoML serves the files of Swagger UI under /static_content; its own page would also load a tag manager.
_PAGE_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})'
DOCS_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Vitrine</title>
<link rel="stylesheet" href="static_content/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="static_content/swagger-ui-bundle.js"></script>
<script>{_PAGE_SCRIPT}</script>
</body>
</html>
"""
# Swagger UI sets styles on its elements and has icons as data URLs.
DOCS_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src 'self' 'sha256-{base64.b64encode(hashlib.sha256(_PAGE_SCRIPT.encode()).digest()).decode()}'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
