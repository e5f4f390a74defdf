"""The OpenAPI 3.1 document of all routes, built from the schemas that the answers are made with."""

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from vitrine.bundle.images import SUPPORTED_FORMATS
from vitrine.service.errors import ErrorAnswer, ProtocolErrorAnswer
from vitrine.service.http.parameters import CLASSIFY_PARAMETERS, DETECT_PARAMETERS, Parameter
from vitrine.service.http.schemas import (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    ModelDetail,
    ModelList,
)

Json = dict[str, Any]

_ERRORS = {
    400: "A parameter, a field or the body is missing, unknown, of the wrong type or outside its range.",
    401: "The API key is missing or unknown.",
    403: "The operator has not allowed it.",
    404: "There is no such model, or none for this task.",
    406: "The answer exists in no form that `Accept` names.",
    413: "The body has too many bytes, or an image too many pixels.",
    415: "The bytes are not of a supported image type.",
    422: "The image is broken.",
    500: "A bug of the server.",
    503: "Too many images wait already, or the model's files cannot be used.",
    504: "Not answered in time.",
}
_IMAGE_ERRORS = (400, 401, 404, 406, 413, 415, 422, 500, 503, 504)
_INFER_ERRORS = (400, 401, 404, 413, 415, 422, 500, 503, 504)
_OPEN: list[Json] = [{}]  # no key needed

_SCHEMAS = (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    ErrorAnswer,
    ModelDetail,
    ModelList,
    ProtocolErrorAnswer,
)
_ROW = {"type": "string", "description": "A table: a header line, then a line for each answer."}
_BINARY = {"type": "string", "format": "binary"}


@cache
def openapi_document() -> str:
    """The document as JSON."""
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
        "security": [{}, {"bearer": []}, {"apiKey": []}],  # keys only where the operator has set them
        "tags": [
            {"name": "images", "description": "Images in, labels or boxes out."},
            {"name": "models", "description": "What is served."},
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


_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's own, or a new one.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of decode, queue and inference; images are worked on side by side.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "How to send the key.", "schema": {"type": "string"}},
}


def _image_paths() -> Json:
    classify = _image_route("classify", "Classify images", CLASSIFY_PARAMETERS, ("Classification", "Classifications"))
    detect = _image_route("detect", "Find objects in images", DETECT_PARAMETERS, ("Detections", "DetectionsOfSeveral"))
    detect["responses"]["200"]["content"] |= {"image/png": {"schema": _BINARY}, "image/jpeg": {"schema": _BINARY}}
    detect["description"] += " A picture (`Accept: image/png`, `image/jpeg`) is drawn of one image only."
    return {"/classify": {"post": classify}, "/detect": {"post": detect}}


def _image_route(operation: str, summary: str, parameters: tuple[Parameter, ...], answers: tuple[str, str]) -> Json:
    properties = {parameter.name: parameter.schema for parameter in parameters}
    image = {**_BINARY, "description": f"One of {', '.join(SUPPORTED_FORMATS)}, told by its bytes."}
    text = {"type": "string", "description": "Base64 or a data URL. Other URLs are not fetched."}
    json_body = {
        "type": "object",
        "properties": {"image": text, "images": {"type": "array", "items": text, "minItems": 1}, **properties},
        "oneOf": [{"required": ["image"]}, {"required": ["images"]}],
        "additionalProperties": False,
    }
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": image, "minItems": 1}, **properties},
        "additionalProperties": False,
    }
    return {
        "operationId": operation,
        "tags": ["images"],
        "summary": summary,
        "description": (
            "The images are multipart fields `image`, or base64 in JSON, or the body is one image. Parameters are "
            "query, form or JSON fields. One image gets one answer; several (two fields `image`, or `images` in JSON) "
            "get `results` in their order, where an image that is no good has an error."
        ),
        "parameters": [
            {"name": parameter.name, "in": "query", "schema": parameter.schema, "style": "form", "explode": True}
            for parameter in parameters
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": json_body},
                "image/*": {"schema": _BINARY},
                "application/octet-stream": {"schema": _BINARY},
            },
        },
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": _headers("X-Request-ID", "Server-Timing"),
                "content": {
                    "application/json": {"schema": {"oneOf": [_reference(name) for name in answers]}},
                    "text/csv": {"schema": _ROW},
                },
            },
            **_errors(_IMAGE_ERRORS),
        },
    }


def _model_paths() -> Json:
    name = _path_parameter("name", "`name` (its highest version) or `name@version`.")
    return {
        "/models": {"get": _get("listModels", "models", "The served models", _reference("ModelList"), (401, 500))},
        "/models/{name}": {
            "get": _get(
                "describeModel",
                "models",
                "A model's manifest: labels, measured metrics, preprocessing, variants, provenance",
                _reference("ModelDetail"),
                (401, 404, 500),
                parameters=[name],
            )
        },
    }


_NAMED: Json = {"name": {"type": "string"}, "version": {"type": "string"}}
_DATATYPE = {"enum": ["UINT8", "INT64", "FP32", "BYTES"]}
_PROTOCOL_SCHEMAS: Json = {
    "Parameters": {
        "type": "object",
        "additionalProperties": {"type": ["string", "integer", "number", "boolean"]},
    },
    "TensorMetadata": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string"},
            "datatype": _DATATYPE,
            "shape": {"type": "array", "items": {"type": "integer"}, "description": "-1: any length."},
        },
    },
    "RequestInput": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string", "description": "`image` (encoded images), or the tensors of the model."},
            "datatype": _DATATYPE,
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "data": {"type": "array", "description": "Flat or nested; of BYTES base64 or data URLs."},
            "parameters": {"$ref": "#/components/schemas/Parameters"},
        },
    },
    "RequestOutput": {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "parameters": {"$ref": "#/components/schemas/Parameters"}},
    },
    "InferenceRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"$ref": "#/components/schemas/Parameters"},
            "inputs": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/RequestInput"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/RequestOutput"}},
        },
    },
    "InferenceResponse": {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"$ref": "#/components/schemas/Parameters"},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "datatype", "shape"],
                    "properties": {
                        "name": {"type": "string"},
                        "datatype": _DATATYPE,
                        "shape": {"type": "array", "items": {"type": "integer"}},
                        "data": {"type": "array"},
                        "parameters": {"$ref": "#/components/schemas/Parameters"},
                    },
                },
            },
        },
    },
    "ServerMetadata": {
        "type": "object",
        "required": ["name", "version", "extensions"],
        "properties": {**_NAMED, "extensions": {"type": "array", "items": {"type": "string"}}},
    },
    "ModelMetadata": {
        "type": "object",
        "required": ["name", "versions", "platform", "inputs", "outputs"],
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/TensorMetadata"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/TensorMetadata"}},
        },
    },
    "RepositoryIndex": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name", "version", "state", "reason"],
            "properties": {
                **_NAMED,
                "state": {"enum": ["READY", "UNAVAILABLE"]},
                "reason": {"type": "string"},
            },
        },
    },
}


def _protocol_paths() -> Json:
    name = _path_parameter("name", "Name of a model.")
    version = _path_parameter("version", "One of its versions.")
    paths: Json = {
        "/v2": {
            "get": _protocol_get(
                "serverMetadata", "The server's name, version and extensions", "ServerMetadata", (401,)
            )
        },
        "/v2/health/live": {"get": _probe("serverLive", "Does every computing thread get on?", protocol=True)},
        "/v2/health/ready": {"get": _probe("serverReady", "Are all models loaded?", protocol=True)},
        "/v2/repository/index": {"post": _repository_index()},
    }
    for operation, path, parameters in (
        ("model", "/v2/models/{name}", [name]),
        ("modelVersion", "/v2/models/{name}/versions/{version}", [name, version]),
    ):
        metadata = _protocol_get(f"{operation}Metadata", "Its tensors", "ModelMetadata", (401, 404), parameters)
        ready: Json = {
            "operationId": f"{operation}Ready",
            "tags": ["protocol"],
            "summary": "Is it loaded?",
            "parameters": parameters,
            "responses": {"200": {"description": "Yes."}, **_errors((401, 404), protocol=True)},
        }
        paths[path] = {"get": metadata}
        paths[f"{path}/ready"] = {"get": ready}
        paths[f"{path}/infer"] = {"post": _infer(f"{operation}Infer", parameters)}
    for operation in ("load", "unload"):
        paths[f"/v2/repository/models/{{name}}/{operation}"] = {
            "post": {
                "operationId": f"{operation}Model",
                "tags": ["protocol"],
                "summary": f"{operation.capitalize()} a model in every worker",
                "parameters": [name],
                "requestBody": {
                    "required": False,
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                "responses": {
                    "200": {"description": "Done."},
                    **_errors((400, 401, 403, 404, 413, 500, 503), protocol=True),
                },
            }
        }
    return paths


def _repository_index() -> Json:
    body = {"type": "object", "properties": {"ready": {"type": "boolean", "default": False}}}
    return {
        "operationId": "repositoryIndex",
        "tags": ["protocol"],
        "summary": "The state of every version of every model",
        "requestBody": {"required": False, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The index.",
                "content": {"application/json": {"schema": _reference("RepositoryIndex")}},
            },
            **_errors((400, 401, 413, 500), protocol=True),
        },
    }


def _infer(operation: str, parameters: list[Json]) -> Json:
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
        "description": "Bytes of the JSON document, behind which tensors stand in binary form.",
    }
    return {
        "operationId": operation,
        "tags": ["protocol"],
        "summary": "Ask a model",
        "description": (
            "Tensors as JSON or, by the binary tensor data extension, as bytes behind the JSON document. "
            "`parameters.variant` chooses a graph of the model."
        ),
        "parameters": [*parameters, length],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _reference("InferenceRequest")},
                "application/octet-stream": {"schema": _BINARY},
            },
        },
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": _headers("X-Request-ID", "Server-Timing"),
                "content": {
                    "application/json": {"schema": _reference("InferenceResponse")},
                    "application/octet-stream": {"schema": _BINARY},
                },
            },
            **_errors(_INFER_ERRORS, protocol=True),
        },
    }


def _operation_paths() -> Json:
    metrics: Json = {
        "operationId": "metrics",
        "tags": ["operation"],
        "summary": "Prometheus metrics",
        "security": [{}, {"bearer": []}, {"apiKey": []}],
        "responses": {
            "200": {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **_errors((401, 500)),
        },
    }
    return {
        "/livez": {"get": _probe("livez", "Does every computing thread get on?")},
        "/healthz": {"get": _probe("healthz", "The same as /livez")},
        "/readyz": {"get": _probe("readyz", "Are all models loaded?")},
        "/metrics": {"get": metrics},
    }


def _probe(operation: str, summary: str, *, protocol: bool = False) -> Json:
    yes: Json = {"description": "Yes."}
    if not protocol:
        yes["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "operationId": operation,
        "tags": ["protocol" if protocol else "operation"],
        "summary": summary,
        "security": _OPEN,
        "responses": {"200": yes, **_errors((500, 503), protocol=protocol)},
    }


def _protocol_get(
    operation: str, summary: str, schema: str, errors: tuple[int, ...], parameters: list[Json] | None = None
) -> Json:
    return _get(operation, "protocol", summary, _reference(schema), errors, parameters=parameters, protocol=True)


def _get(
    operation: str,
    tag: str,
    summary: str,
    schema: Json,
    errors: tuple[int, ...],
    *,
    parameters: list[Json] | None = None,
    protocol: bool = False,
) -> Json:
    return {
        "operationId": operation,
        "tags": [tag],
        "summary": summary,
        "parameters": parameters or [],
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": _headers("X-Request-ID"),
                "content": {"application/json": {"schema": schema}},
            },
            **_errors(errors, protocol=protocol),
        },
    }


def _errors(statuses: tuple[int, ...], *, protocol: bool = False) -> Json:
    schema = _reference("ProtocolErrorAnswer" if protocol else "ErrorAnswer")
    special = {401: ("WWW-Authenticate",), 503: ("Retry-After",)}
    return {
        str(status): {
            "description": _ERRORS[status],
            "headers": _headers("X-Request-ID", *special.get(status, ())),
            "content": {"application/json": {"schema": schema}},
        }
        for status in statuses
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _path_parameter(name: str, description: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": description,
    }


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# BentoML serves the files of Swagger UI under /static_content; its own page would load a tag manager besides.
DOCS_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Vitrine</title>
<link rel="stylesheet" href="static_content/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="static_content/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})</script>
</body>
</html>
"""
