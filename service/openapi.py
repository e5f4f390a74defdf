"""The OpenAPI 3.1 document of `service.app`, built from the schemas that the answers are made with."""

import json
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from bundle.images import SUPPORTED_FORMATS
from service.schemas import Classification, Detections, ErrorAnswer, ModelList

_ERRORS = {
    "400": "A parameter is missing, unknown or outside its range.",
    "404": "No model of that name serves this task.",
    "413": "The image has too many bytes or pixels.",
    "415": "The bytes are not of a supported image type.",
    "422": "The image is broken.",
    "500": "A bug of the server.",
    "504": "Not answered in time.",
}
_MODEL = {"type": "string", "description": "Name of a model; by default the first of GET /models for the task."}
_TOP_K = {"type": "integer", "minimum": 1, "default": 5, "description": "How many classes to answer."}
_THRESHOLD = {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5, "description": "Smallest score."}
_MAX_DETECTIONS = {"type": "integer", "minimum": 1, "default": 100, "description": "Largest number of objects."}


@cache
def openapi_document() -> str:
    """The document as JSON."""
    _, definitions = models_json_schema(
        [(schema, "serialization") for schema in (Classification, Detections, ModelList, ErrorAnswer)],
        ref_template="#/components/schemas/{model}",
    )
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Vitrine",
            "version": "1",
            "description": "Image classification and object detection with vision transformers.",
        },
        "paths": {
            "/classify": {"post": _image_route("Classify an image", Classification, model=_MODEL, top_k=_TOP_K)},
            "/detect": {
                "post": _image_route(
                    "Find objects in an image",
                    Detections,
                    model=_MODEL,
                    threshold=_THRESHOLD,
                    max_detections=_MAX_DETECTIONS,
                )
            },
            "/models": {
                "get": {"summary": "The served models", "responses": {"200": _answer("The models.", ModelList)}}
            },
            "/livez": {"get": _probe("Is the process alive?")},
            "/readyz": {"get": _probe("Are all models loaded?")},
            "/metrics": {"get": _probe("Prometheus metrics")},
        },
        "components": {"schemas": definitions["$defs"]},
    }
    return json.dumps(document)


def _image_route(summary: str, schema: type, **parameters: dict[str, Any]) -> dict[str, Any]:
    image = {"type": "string", "format": "binary", "description": f"One of {', '.join(SUPPORTED_FORMATS)}."}
    form = {"type": "object", "required": ["image"], "properties": {"image": image, **parameters}}
    query = [{"name": name, "in": "query", "schema": parameter} for name, parameter in parameters.items()]
    return {
        "summary": summary,
        "description": "The image is a multipart field, or the body itself. Parameters are form or query fields.",
        "parameters": query,
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": {**form, "additionalProperties": False}},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": _answer("The answer.", schema),
            **{status: _answer(description, ErrorAnswer) for status, description in _ERRORS.items()},
        },
    }


def _answer(description: str, schema: type) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _probe(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "Yes.", "content": {"text/plain": {}}}}}


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
