"""The BentoML service: BentoML runs the processes, health checks and tracing; `service.app` has the routes."""

import logging
import os
import tempfile
from pathlib import Path

import bentoml
from starlette.middleware.cors import CORSMiddleware

from service.access import AccessMiddleware, Keys
from service.app import create_app
from service.bentoml_client import ClientSchemaMiddleware
from service.errors import ErrorShapeMiddleware
from service.logs import configure
from service.observing import ObservationMiddleware
from service.protocol_http import HEADER_LENGTH
from service.serving import Serving
from service.settings import read_settings
from service.sizing import size
from service.tracing import bentoml_tracing

# The arbiter imports this module before it starts the workers, which inherit its environment. Not a setting.
_SHARED = "_VITRINE_SHARED"
_is_first = _SHARED not in os.environ
if _is_first:
    os.environ[_SHARED] = tempfile.mkdtemp(prefix="vitrine-")

_settings = read_settings()
configure(_settings.log_format, probes=_settings.log_probes)
_sizing = size(_settings)
_keys = Keys(_settings.api_keys, _settings.api_keys_file)
if _is_first:  # once, not in every worker
    _log = logging.getLogger("bentoml.vitrine")
    _log.info("%s", _sizing.reason)
    if _sizing.warning:
        _log.warning("%s", _sizing.warning)
    if not (_settings.only_here or _keys.needed):
        _log.warning("everybody who reaches %s may ask: no VITRINE_API_KEYS are set", _settings.host)
_app = create_app(_settings, _sizing, _keys, Path(os.environ[_SHARED]))


class Vitrine:
    """Image classification and object detection with vision transformers."""

    async def __is_alive__(self) -> bool:
        """`GET /livez`. (A worker answers nothing at all before everything is loaded, verified and warm.)"""
        serving = _app.state.serving
        assert isinstance(serving, Serving)
        return serving.live()

    __is_ready__ = __is_alive__


# BentoML's own timeout cannot be switched off and answers in another shape: it only has to be the later one.
# Its access log decodes a request's content type as UTF-8: any other would break the answer. Its metrics have a label
# for every path that anybody asks for, without end. Ours are in `service.metrics`.
vitrine = bentoml.service(
    name="vitrine",
    workers=_sizing.workers,
    traffic={"timeout": 90},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing=bentoml_tracing(_settings),
)(Vitrine)
vitrine.mount_asgi_app(_app, path="/")
# The first is the outermost.
vitrine.add_asgi_middleware(ObservationMiddleware)
vitrine.add_asgi_middleware(ErrorShapeMiddleware)
if _settings.cors_origins:  # outside of access: a browser asks for permission without a key
    vitrine.add_asgi_middleware(
        CORSMiddleware,
        allow_origins=_settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "X-API-Key", "Content-Type", "X-Request-ID", HEADER_LENGTH],
        expose_headers=["X-Request-ID", "Server-Timing", "Retry-After", HEADER_LENGTH],
    )
vitrine.add_asgi_middleware(AccessMiddleware, keys=_keys, metrics_need_key=_settings.metrics_need_key)
vitrine.add_asgi_middleware(ClientSchemaMiddleware)
