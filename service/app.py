"""The HTTP routes. Each reads its request, calls a predictor on a thread and writes the answer; nothing else."""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from bundle.errors import VitrineError
from bundle.images import decode
from bundle.manifest import Task
from bundle.predictors import Classifier, Detector
from bundle.repository import Repository
from bundle.runtime import parse_providers
from service.errors import on_bug, on_disconnect, on_http_exception, on_timeout, on_vitrine_error
from service.openapi import DOCS_PAGE, openapi_document
from service.requests import read_image_request
from service.schemas import Classification, Detections, ModelDescription, ModelList
from service.settings import Settings, read_settings

_log = logging.getLogger("bentoml.vitrine")  # BentoML's handlers and format


@dataclass(frozen=True)
class Serving:
    """What the routes share while the process serves."""

    settings: Settings
    repository: Repository
    pool: ThreadPoolExecutor  # one image in work per thread; the others wait, and leave when their time is up


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    settings = read_settings()
    providers = parse_providers(settings.providers)
    repository = await asyncio.to_thread(Repository, settings.bundles, providers=providers)
    with ThreadPoolExecutor(settings.threads, "image") as pool:
        app.state.serving = Serving(settings, repository, pool)
        _log.info("ready: %s", ", ".join(repository.bundles))
        yield


def _serving(request: Request) -> Serving:
    return cast(Serving, request.app.state.serving)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


async def classify(request: Request) -> Response:
    """`POST /classify`."""
    serving = _serving(request)
    settings = serving.settings
    async with asyncio.timeout(settings.timeout_seconds):
        asked = await read_image_request(request, ("model", "top_k"), settings.max_body_bytes)
        bundle = serving.repository.get(Task.CLASSIFICATION, asked.text("model"))
        predictor = cast(Classifier, bundle.predictor)
        top_k = asked.integer("top_k", 5)

        def work() -> Response:
            image = decode(asked.image, max_pixels=settings.max_pixels)
            return _json(Classification.of(bundle, image.size, predictor.classify(image, top_k=top_k)))

        return await asyncio.get_running_loop().run_in_executor(serving.pool, work)


async def detect(request: Request) -> Response:
    """`POST /detect`."""
    serving = _serving(request)
    settings = serving.settings
    async with asyncio.timeout(settings.timeout_seconds):
        known = ("model", "threshold", "max_detections")
        asked = await read_image_request(request, known, settings.max_body_bytes)
        bundle = serving.repository.get(Task.DETECTION, asked.text("model"))
        predictor = cast(Detector, bundle.predictor)
        threshold = asked.number("threshold", 0.5)
        max_detections = asked.integer("max_detections", 100)

        def work() -> Response:
            image = decode(asked.image, max_pixels=settings.max_pixels)
            found = predictor.detect(image, threshold=threshold, max_detections=max_detections)
            return _json(Detections.of(bundle, image.size, found))

        return await asyncio.get_running_loop().run_in_executor(serving.pool, work)


async def models(request: Request) -> Response:
    """`GET /models`."""
    manifests = [bundle.manifest for bundle in _serving(request).repository.bundles.values()]
    described = [ModelDescription.model_validate(manifest, from_attributes=True) for manifest in manifests]
    return _json(ModelList(models=described))


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    return Response(openapi_document(), media_type="application/json")


async def docs(request: Request) -> Response:
    """`GET /`: the OpenAPI page."""
    return HTMLResponse(DOCS_PAGE)


def create_app() -> Starlette:
    """The routes as an ASGI application that loads its bundles when it starts."""
    return Starlette(
        routes=[
            Route("/classify", classify, methods=["POST"]),
            Route("/detect", detect, methods=["POST"]),
            Route("/models", models, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/docs.json", openapi, methods=["GET"]),  # where BentoML would answer a document of its own
            Route("/", docs, methods=["GET"]),
        ],
        exception_handlers={
            VitrineError: on_vitrine_error,
            HTTPException: on_http_exception,
            TimeoutError: on_timeout,
            ClientDisconnect: on_disconnect,
            Exception: on_bug,
        },
        lifespan=_lifespan,
    )
