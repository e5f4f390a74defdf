"""The ASGI application: its routes, and what lives while it serves."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vitrine.bundle.machine import release_memory
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import parse_providers
from vitrine.service.access import Keys
from vitrine.service.errors import ERROR_HANDLERS
from vitrine.service.http.bentoml_client import schema
from vitrine.service.http.explain import explain
from vitrine.service.http.images import classify, detect
from vitrine.service.http.models import describe_model, list_models, sample
from vitrine.service.http.openapi import DOCS_PAGE, DOCS_POLICY, openapi_document
from vitrine.service.http.page import page
from vitrine.service.observability import metrics
from vitrine.service.observability.logs import flush_requests
from vitrine.service.observability.tracing import shutdown_tracing
from vitrine.service.observability.watchdog import watch_event_loop
from vitrine.service.open_inference.grpc import grpc_server
from vitrine.service.open_inference.http import protocol_routes, server_health
from vitrine.service.paths import PROBES, PROTOCOL_PROBES
from vitrine.service.rate_limit import RateLimit
from vitrine.service.runtime.model_control import ModelControl, read_state
from vitrine.service.runtime.scheduler import Scheduler
from vitrine.service.runtime.serving import Serving, get_serving
from vitrine.service.runtime.sizing import Sizing
from vitrine.service.runtime.workers import BEAT_SECONDS, SILENT_SECONDS, Workers, end_within, perform
from vitrine.service.settings import Settings

_log = logging.getLogger("bentoml.vitrine")  # BentoML's handlers and format

HOT_ROUTES = {("POST", "/classify"): classify, ("POST", "/detect"): detect, ("POST", "/explain"): explain} | {
    ("GET", path): server_health for path in PROBES | PROTOCOL_PROBES
}
_SHUTDOWN_SECONDS = 40.0  # longer than gRPC's grace period: after it, a thread that is still busy does not matter
_QUEUE_GAUGE_SECONDS = 0.25
_IDLE_SECONDS = 1.0
_RELEASE_SECONDS = 30.0
_GC_THRESHOLDS = 50_000, 50, 100


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    return Response(openapi_document(), media_type="application/json")


async def docs(request: Request) -> Response:
    """`GET /docs`: the OpenAPI page."""
    return HTMLResponse(DOCS_PAGE, headers={"Content-Security-Policy": DOCS_POLICY})


async def prometheus(request: Request) -> Response:
    """`GET /metrics`."""
    text = await asyncio.to_thread(metrics.exposition, get_serving(request).repository)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})


async def _update_queue_gauges(scheduler: Scheduler) -> None:
    """Update the queue's gauges a few times per second; updating them for each image would cost more."""
    while True:
        metrics.set_queue(scheduler.waiting, scheduler.running)
        await asyncio.sleep(_QUEUE_GAUGE_SECONDS)


def _tune_garbage_collector() -> None:
    """Restrict the garbage collector to objects of requests, and run it rarely.

    All objects that exist by now live until the process ends. Traversing them takes tens of milliseconds each time and
    causes the highest latencies. Requests leave no reference cycles behind, whatever their outcome
    (`tests/reliability/test_leaks.py`).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def _release() -> None:
    gc.collect()  # what replaced models and libraries leave in cycles; the frozen objects are not traversed
    release_memory()


async def _release_memory(scheduler: Scheduler) -> None:
    """Return freed memory to the system when the work has just ended, and at least twice a minute while there is work.

    The C library would keep most of it.
    """
    started, released = 0, time.monotonic()
    while True:
        await asyncio.sleep(_IDLE_SECONDS)
        is_idle = not (scheduler.waiting or scheduler.running)
        if scheduler.started != started and (is_idle or time.monotonic() - released > _RELEASE_SECONDS):
            started, released = scheduler.started, time.monotonic()
            await asyncio.to_thread(_release)


class _Route(Route):
    """A route that notes its path template in the request's record."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["vitrine.record"].route = self.path
        await super().handle(scope, receive, send)


def create_app(
    settings: Settings, sizing: Sizing, keys: Keys, limit: RateLimit, shared: Path, *, parent: int | None = None
) -> Starlette:
    """Create the ASGI application, which loads its bundles at startup and must run inside `RequestRecordMiddleware`.

    Args:
        shared: folder shared by all workers of this server.
        parent: id of the process that started the workers; None: the parent of this one.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        metrics.use_folder(shared)
        start_loading(app)
        repository = await asyncio.wrap_future(app.state.loading)
        scheduler = Scheduler(sizing.threads, settings.max_queue, settings.max_wait_seconds)
        control = await asyncio.to_thread(ModelControl, repository, shared, poll_seconds=settings.poll_seconds)
        silent_seconds = min(SILENT_SECONDS, max(settings.stuck_seconds, 3 * BEAT_SECONDS))
        workers = Workers(shared, parent or os.getppid(), silent_seconds)
        app.state.serving = Serving(settings, repository, scheduler, control, keys, limit, workers)
        duties = (
            control.watch,
            workers.beat,
            partial(_update_queue_gauges, scheduler),
            partial(_release_memory, scheduler),
            watch_event_loop,
        )
        tasks = [asyncio.create_task(perform(duty)) for duty in duties]
        try:
            async with grpc_server(app.state.serving):
                metrics.worker_ready()
                _tune_garbage_collector()
                release_memory()
                _log.info("ready: %s", ", ".join(repository.bundles))
                yield
        finally:
            end_within(_SHUTDOWN_SECONDS)
            for task in tasks:
                task.cancel()
            workers.close()
            control.close()
            scheduler.close()
            await asyncio.to_thread(shutdown_tracing, settings)
            flush_requests()

    app = Starlette(
        routes=[
            *(_Route(path, endpoint, methods=[method]) for (method, path), endpoint in HOT_ROUTES.items()),
            _Route("/models", list_models, methods=["GET"]),
            _Route("/models/{name}", describe_model, methods=["GET"]),
            _Route("/models/{name}/samples/{number}", sample, methods=["GET"]),
            _Route("/openapi.json", openapi, methods=["GET"]),
            _Route("/docs.json", openapi, methods=["GET"]),  # instead of BentoML's own document
            _Route("/schema.json", schema, methods=["GET"]),
            _Route("/metrics", prometheus, methods=["GET"]),
            _Route("/docs", docs, methods=["GET"]),
            *(_Route(path, page, methods=["GET"]) for path in ("/", "/page/{name}") if settings.page),
            *protocol_routes(_Route),
        ],
        exception_handlers=ERROR_HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.load = partial(_load, settings, sizing, shared)
    return app


def start_loading(app: Starlette) -> None:
    """Start to load the bundles in a thread, unless it has started; the lifespan waits for it."""
    if not hasattr(app.state, "loading"):
        pool = ThreadPoolExecutor(1, "loading")
        app.state.loading = pool.submit(app.state.load)
        pool.shutdown(wait=False)


def _load(settings: Settings, sizing: Sizing, shared: Path) -> Repository:
    providers = parse_providers(settings.providers)
    state = read_state(shared)  # of the workers that serve already
    return Repository(
        *settings.bundles,
        cores=sizing.threads,
        providers=providers,
        cache=shared,
        state=state,
        defaults=settings.default_models,
    )
