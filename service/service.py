"""The BentoML service. BentoML runs the processes; `service.app` has the routes."""

import logging
import os
from typing import Any

import bentoml
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from vitrine.service.access import AccessMiddleware, Keys
from vitrine.service.app import HOT_ROUTES, create_app, start_loading
from vitrine.service.connections import use_connections
from vitrine.service.errors import ErrorShapeMiddleware
from vitrine.service.front import Dispatcher, TrailingSlashMiddleware
from vitrine.service.http.bodies import BodyBudgetMiddleware
from vitrine.service.launch import WORKING_DIRECTORY, shared_folder
from vitrine.service.observability.logs import configure
from vitrine.service.observability.middleware import RequestRecordMiddleware
from vitrine.service.open_inference.http import HEADER_LENGTH
from vitrine.service.rate_limit import RateLimit
from vitrine.service.runtime.sizing import size
from vitrine.service.settings import SettingsError, read_settings

_STARTED = "_VITRINE_STARTED"  # id of the first process, inherited by the workers; not a setting
_is_first = _STARTED not in os.environ
os.environ.setdefault(_STARTED, str(os.getpid()))

if WORKING_DIRECTORY in os.environ:  # set by `vitrine serve`, not by `bentoml serve`
    os.chdir(os.environ[WORKING_DIRECTORY])
_settings = read_settings()
configure(_settings.log_format, probes=_settings.log_probes)
_sizing = size(_settings)
_keys = Keys(_settings.api_keys, _settings.api_keys_file)
if _is_first:  # once, not in every worker
    _log = logging.getLogger("bentoml.vitrine")
    _log.info("%s", _sizing.reason)
    if _sizing.warning:
        _log.warning("%s", _sizing.warning)
    if not (_settings.loopback_only or _keys.needed):
        _log.warning("VITRINE_API_KEYS is not set: anyone who can reach %s can send requests", _settings.host)
try:
    _limit = RateLimit(_settings.key_rate, shared_folder())
except SettingsError as error:  # `vitrine serve` has checked it; the folder has failed since
    logging.getLogger("bentoml.vitrine").warning("VITRINE_KEY_RATE holds for each worker alone: %s", error)
    _limit = RateLimit(_settings.key_rate, None)
_app = create_app(_settings, _sizing, _keys, _limit, shared_folder(), parent=int(os.environ[_STARTED]))


class Vitrine:
    """Image classification and object detection with vision transformers."""


def _front(bentoml_app: ASGIApp) -> ASGIApp:
    """Return both applications behind the middleware of all requests; the last line is the outermost."""
    app: ASGIApp = Dispatcher(_app, bentoml_app, HOT_ROUTES)
    app = BodyBudgetMiddleware(app, _settings.max_bodies_bytes)
    app = AccessMiddleware(app, keys=_keys, limit=_limit, metrics_need_key=_settings.metrics_need_key)
    if _settings.cors_origins:  # outside of `AccessMiddleware`: preflight requests have no key
        app = CORSMiddleware(
            app,
            allow_origins=_settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type", "X-Request-ID", HEADER_LENGTH],
            expose_headers=["X-Request-ID", "Server-Timing", "Retry-After", HEADER_LENGTH],
        )
    return TrailingSlashMiddleware(RequestRecordMiddleware(ErrorShapeMiddleware(app), _settings))


class _Service(bentoml.Service[Any]):  # type: ignore[misc]  # BentoML is not typed
    """BentoML's service with `_front` as its ASGI application."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        use_connections(_settings)
        start_loading(_app)  # while BentoML imports its application's dependencies
        return _front(super().to_asgi(is_main))


# BentoML's access log decodes the content type as UTF-8; any other encoding would break the response. Its metrics have
# a label value for every requested path, without bound. Its tracing makes a span for each body chunk of every request,
# even if no span is exported. Our own are in `service.observability.middleware`.
vitrine = bentoml.service(
    name="vitrine",
    workers=_sizing.workers,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
    service_class=_Service,
)(Vitrine)
vitrine.mount_asgi_app(_app, path="/")  # for its lifespan only; requests do not come this way
