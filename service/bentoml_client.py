"""What BentoML's own client (`bentoml.SyncHTTPClient`) asks for first: the schema of the routes that it calls."""

import json
from functools import cache

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.parameters import CLASSIFY_PARAMETERS, DETECT_PARAMETERS, Parameter

_PATH = "/schema.json"


class ClientSchemaMiddleware:
    """Answers `GET /schema.json`, which BentoML would answer with the typed methods of the service: it has none.

    The fields are those that `_bentoml_impl.client` reads: name, route, input and output of each method.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == _PATH and scope["method"] in ("GET", "HEAD"):
            await Response(client_schema(), media_type="application/json")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


@cache
def client_schema() -> str:
    """The document as JSON."""
    routes = [_route("classify", CLASSIFY_PARAMETERS), _route("detect", DETECT_PARAMETERS)]
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
