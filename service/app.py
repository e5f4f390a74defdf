"""The HTTP application: which route is answered by whom, and what is there while it serves."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bundle.errors import VitrineError
from bundle.repository import Repository
from bundle.runtime import parse_providers
from service import metrics
from service.access import Keys
from service.control import Control
from service.errors import on_bug, on_disconnect, on_http_exception, on_timeout, on_vitrine_error
from service.images import classify, detect
from service.models import describe_model, list_models
from service.openapi import DOCS_PAGE, openapi_document
from service.protocol_grpc import grpc_server
from service.protocol_http import protocol_routes
from service.scheduler import Scheduler
from service.serving import Serving, serving_of
from service.settings import Settings
from service.sizing import Sizing
from service.tracing import send_spans

_log = logging.getLogger("bentoml.vitrine")  # BentoML's handlers and format


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    return Response(openapi_document(), media_type="application/json")


async def docs(request: Request) -> Response:
    """`GET /`: the OpenAPI page."""
    return HTMLResponse(DOCS_PAGE)


async def prometheus(request: Request) -> Response:
    """`GET /metrics`."""
    text = await asyncio.to_thread(metrics.exposition, serving_of(request).repository)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})


class _Route(Route):
    """A route that the request's observation knows."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["vitrine.observation"].route = self.path
        await super().handle(scope, receive, send)


def create_app(settings: Settings, sizing: Sizing, keys: Keys, shared: Path) -> Starlette:
    """The routes as an ASGI application that loads its bundles when it starts.

    It needs `ObservationMiddleware` around it. `shared` is a folder of all workers of this server.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        providers = parse_providers(settings.providers)
        repository = await asyncio.to_thread(Repository, *settings.bundles, providers=providers)
        scheduler = Scheduler(sizing.threads, settings.max_queue)
        control = await asyncio.to_thread(Control, repository, shared, poll_seconds=settings.poll_seconds)
        app.state.serving = Serving(settings, repository, scheduler, control, keys)
        watching = asyncio.create_task(control.watch())
        try:
            async with grpc_server(app.state.serving):
                metrics.worker_ready()
                _log.info("ready: %s", ", ".join(repository.bundles))
                yield
        finally:
            watching.cancel()
            control.close()
            scheduler.close()
            if settings.traces_endpoint:
                await asyncio.to_thread(send_spans)

    return Starlette(
        routes=[
            _Route("/classify", classify, methods=["POST"]),
            _Route("/detect", detect, methods=["POST"]),
            _Route("/models", list_models, methods=["GET"]),
            _Route("/models/{name}", describe_model, methods=["GET"]),
            _Route("/openapi.json", openapi, methods=["GET"]),
            _Route("/docs.json", openapi, methods=["GET"]),  # where BentoML would answer a document of its own
            _Route("/metrics", prometheus, methods=["GET"]),
            _Route("/", docs, methods=["GET"]),
            *protocol_routes(_Route),
        ],
        exception_handlers={
            VitrineError: on_vitrine_error,
            HTTPException: on_http_exception,
            TimeoutError: on_timeout,
            ClientDisconnect: on_disconnect,
            Exception: on_bug,
        },
        lifespan=lifespan,
    )
