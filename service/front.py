"""Which application answers a request: ours, or BentoML's."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.service.errors import error_answer, on_internal_error
from vitrine.service.paths import PROBES, STATIC_FILES

Endpoint = Callable[[Request], Awaitable[Response]]


class Front:
    """Passes to BentoML what is its own, and all else to our routes.

    BentoML would wrap every request in a task and a timer that lives for the whole timeout, in spans and in a context,
    and match its routes twice: 0.2 ms of the event loop that no route of ours needs. The busiest routes are looked up
    here; Starlette would come to the same endpoints by way of two middlewares and its list of routes.
    """

    def __init__(self, app: Starlette, bentoml_app: ASGIApp, hot_routes: Mapping[str, Endpoint]) -> None:
        """Args: our application, BentoML's, and the endpoints of POST by their path."""
        self.app, self.bentoml_app, self.hot_routes = app, bentoml_app, hot_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_bentomls(scope["path"]):
            await self.bentoml_app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] in self.hot_routes:
            await self._answer(self.hot_routes[scope["path"]], scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self.app
        scope["vitrine.record"].route = scope["path"]
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as error:
            answer = error_answer(error)
            await (await answer(request, error))(scope, receive, send)
            if answer is on_internal_error:
                raise
        else:
            await response(scope, receive, send)


def _is_bentomls(path: str) -> bool:
    return path in PROBES or path.startswith(STATIC_FILES)
