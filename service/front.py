"""Dispatch each request to our application or to BentoML's."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.service.errors import find_error_handler, on_internal_error
from vitrine.service.paths import STATIC_FILES

Endpoint = Callable[[Request], Awaitable[Response]]


class Dispatcher:
    """Pass BentoML's own routes to BentoML, and all others to our application.

    BentoML would wrap every request in a task, a timer that lives for the whole timeout, spans and a context, and match
    its routes twice: 0.2 ms of event loop time that our routes do not need. The hot routes are looked up here;
    Starlette would reach the same endpoints through two middlewares and its list of routes.
    """

    def __init__(self, app: Starlette, bentoml_app: ASGIApp, hot_routes: Mapping[tuple[str, str], Endpoint]) -> None:
        """Args: our application, BentoML's, and endpoints by method and path."""
        self.app, self.bentoml_app, self.hot_routes = app, bentoml_app, hot_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(STATIC_FILES):
            await self.bentoml_app(scope, receive, send)
        elif (endpoint := self.hot_routes.get((scope["method"], scope["path"]))) is not None:
            await self._call_endpoint(endpoint, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _call_endpoint(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self.app
        scope["vitrine.record"].route = scope["path"]
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as error:
            handler = find_error_handler(error)
            await (await handler(request, error))(scope, receive, send)
            if handler is on_internal_error:
                raise
        else:
            await response(scope, receive, send)


class TrailingSlashMiddleware:
    """Treat `/classify/` like `/classify`: many clients lose the body of a request that is redirected."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope["path"] = scope["path"][:-1]
        await self.app(scope, receive, send)
