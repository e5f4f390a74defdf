"""The schema that BentoML's client (`bentoml.SyncHTTPClient`) fetches first, to learn the routes."""

import json
from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from vitrine.service.http.parameters import CLASSIFY_PARAMETERS, DETECT_PARAMETERS, EXPLAIN_PARAMETERS, Parameter


async def schema(request: Request) -> Response:
    """`GET /schema.json`. BentoML's own would list the typed methods of the service, which has none.

    The fields are those that `_bentoml_impl.client` reads: name, route, input and output of each method.
    """
    return Response(client_schema(), media_type="application/json")


@cache
def client_schema() -> str:
    """Return the schema as JSON."""
    routes = [
        _route("classify", CLASSIFY_PARAMETERS),
        _route("detect", DETECT_PARAMETERS),
        _route("explain", EXPLAIN_PARAMETERS),
    ]
    return json.dumps({"name": "vitrine", "type": "service", "routes": routes})


def _route(name: str, parameters: tuple[Parameter, ...]) -> dict[str, object]:
    properties = {parameter.name: parameter.schema for parameter in parameters}
    image = {"type": "file", "format": "image", "description": "A file, or a path to one."}
    return {
        "name": name,
        "route": f"/{name}",
        "input": {"type": "object", "properties": {"image": image, **properties}, "required": ["image"]},
        "output": {"type": "object"},
    }
