"""Errors of the service and their HTTP responses: one JSON shape, and under /v2 that of the Open Inference Protocol."""

import logging
import math
import reprlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar

import orjson
from pydantic import ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.bundle.errors import (
    BundleError,
    ImageTooLargeError,
    ParameterError,
    ProviderError,
    ResourceError,
    UndecodableImageError,
    UnknownModelError,
    UnsupportedImageError,
    VitrineError,
)
from vitrine.bundle.exhaustion import exhausted_resource

_log = logging.getLogger("bentoml.vitrine")

TIMEOUT = "timeout"


class StrictSchema:
    """Base of response bodies: their JSON schema forbids additional properties."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Error(StrictSchema):
    """An error: a stable code and a message."""

    code: str  # stable and machine-readable
    message: str  # for people: what and where, what was expected, what was found


@dataclass(frozen=True, slots=True)
class ErrorAnswer(StrictSchema):
    """The body of every response with status 400 or above, outside /v2."""

    error: Error


@dataclass(frozen=True, slots=True)
class ProtocolErrorAnswer(StrictSchema):
    """The body of every response with status 400 or above under /v2."""

    error: str


class UnauthorizedError(VitrineError):
    """The request has no API key, or an unknown one."""

    code = "unauthorized"

    def __init__(self, *, found: str) -> None:
        super().__init__(f"API key: expected Authorization: Bearer KEY or X-API-Key: KEY, found {found}")


class ForbiddenError(VitrineError):
    """The operator has disabled this."""

    code = "forbidden"

    def __init__(self, what: str, *, setting: str) -> None:
        super().__init__(f"{what} is disabled; {setting} enables it")


class NotAcceptableError(VitrineError):
    """The response is available in no media type that the client accepts."""

    code = "not_acceptable"

    def __init__(self, *, offered: str, found: str) -> None:
        super().__init__(f"Accept: expected one of {offered}, found {found[:200]!r}")


class OverloadedError(VitrineError):
    """The queue is full, or takes too long."""

    code = "overloaded"

    def __init__(self, waiting: int, seconds: float) -> None:
        """Args: the number of waiting images, and the time to process them."""
        self.retry_after = max(1, math.ceil(seconds))
        super().__init__(f"{waiting} images are waiting, about {seconds:.1f} s of work; try again later")


class RateLimitedError(VitrineError):
    """The client sends more requests than `VITRINE_KEY_RATE` allows."""

    code = "rate_limited"

    def __init__(self, rate: float, seconds: float) -> None:
        """Args: the requests per second that are allowed, and the time until the next one is."""
        self.retry_after = max(1, math.ceil(seconds))
        super().__init__(
            f"expected at most {rate:g} requests per second of a client, found more; try again in {seconds:.2f} s"
        )


class BodiesError(OverloadedError):
    """The bodies of the requests in progress take too much memory."""

    def __init__(self, used: int, limit: int) -> None:
        """Args: bytes of these bodies, and how many there may be."""
        self.retry_after = 1
        VitrineError.__init__(
            self, f"the bodies of the requests in progress take {used} of at most {limit} bytes; try again later"
        )


class ClientDisconnectedError(Exception):
    """The client closed the connection before the response was ready."""


class UnavailableError(VitrineError):
    """The server is temporarily unavailable."""

    code = "unavailable"


class UnfinishedError(VitrineError):
    """A change of the served models was not finished in time."""

    code = TIMEOUT

    def __init__(self, name: str, seconds: float) -> None:
        what = f"model {name[:100]!r}: expected to change it in {seconds:.1f} s, found it unfinished"
        super().__init__(f"{what}; it may still take effect")


class WorkerError(VitrineError):
    """A worker has not followed a change that another worker made."""

    code = "worker_behind"

    def __init__(self, pid: int, found: str) -> None:
        super().__init__(f"worker {pid}: expected it to follow the change, found {found}; it tries again")


class MalformedRequestError(VitrineError):
    """Bytes that are no HTTP request, or an ambiguous one."""

    code = "bad_request"

    def __init__(self, where: str, *, expected: str, found: object) -> None:
        super().__init__(f"{where}: expected {expected}, found {found}")


class UnsupportedVersionError(VitrineError):
    """A request of another version of HTTP."""

    code = "unsupported_version"

    def __init__(self, found: str) -> None:
        super().__init__(f"request: expected HTTP/1.1 or HTTP/1.0, found HTTP/{found}")


class UrlTooLongError(VitrineError):
    """The URL is too long."""

    code = "url_too_long"

    def __init__(self, *, limit: int) -> None:
        super().__init__(f"URL: expected at most {limit} bytes, found more")


class HeadersTooLargeError(VitrineError):
    """There are too many headers, or they are too long."""

    code = "headers_too_large"

    def __init__(self, *, limit: int, unit: str) -> None:
        super().__init__(f"headers: expected at most {limit} {unit}, found more")


class SlowRequestError(VitrineError):
    """The client sends its request too slowly."""

    code = "too_slow"

    def __init__(self, part: str, seconds: float, received: int | None = None) -> None:
        """Args: what has not arrived within so many seconds, and how many bytes of it have, if that is known."""
        found = "a part at most" if received is None else f"{received} bytes"
        super().__init__(f"{part}: expected sooner, found {found} in {seconds:.1f} s")


class TooManyConnectionsError(VitrineError):
    """There are too many connections."""

    code = "too_many_connections"
    retry_after = 1

    def __init__(self, limit: int) -> None:
        super().__init__(f"all {limit} connections are in use; try again later")


class ClientConnectionsError(TooManyConnectionsError):
    """One client has too many connections."""

    def __init__(self, limit: int) -> None:
        VitrineError.__init__(self, f"connections: expected at most {limit} from one address, found more")


STATUS: dict[type[VitrineError], HTTPStatus] = {
    ParameterError: HTTPStatus.BAD_REQUEST,
    UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    UnknownModelError: HTTPStatus.NOT_FOUND,
    NotAcceptableError: HTTPStatus.NOT_ACCEPTABLE,
    ImageTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedImageError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    UndecodableImageError: HTTPStatus.UNPROCESSABLE_ENTITY,
    RateLimitedError: HTTPStatus.TOO_MANY_REQUESTS,
    OverloadedError: HTTPStatus.SERVICE_UNAVAILABLE,
    BodiesError: HTTPStatus.SERVICE_UNAVAILABLE,
    BundleError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnfinishedError: HTTPStatus.GATEWAY_TIMEOUT,
    WorkerError: HTTPStatus.SERVICE_UNAVAILABLE,
    ResourceError: HTTPStatus.SERVICE_UNAVAILABLE,
    ProviderError: HTTPStatus.SERVICE_UNAVAILABLE,
    MalformedRequestError: HTTPStatus.BAD_REQUEST,
    UnsupportedVersionError: HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
    UrlTooLongError: HTTPStatus.REQUEST_URI_TOO_LONG,
    HeadersTooLargeError: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    SlowRequestError: HTTPStatus.REQUEST_TIMEOUT,
    TooManyConnectionsError: HTTPStatus.SERVICE_UNAVAILABLE,
    ClientConnectionsError: HTTPStatus.TOO_MANY_REQUESTS,
}
_STATUSES = set(HTTPStatus)
CLIENT_CLOSED_REQUEST = 499

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = 100


def preview(value: object) -> str:
    """Return a short repr of client input for an error message.

    Any depth of nesting is safe; `repr` would exceed the recursion limit.
    """
    return _short_repr.repr(value)


def error_response(scope: Scope, status: int, code: str, message: str) -> Response:
    """Return an error response in the shape that belongs to the request's route."""
    record = scope.get("vitrine.record")
    if record is not None:
        record.error = code
    message = message.encode(errors="backslashreplace").decode()  # JSON input may hold a lone surrogate: "\\ud800"
    protocol = scope["path"] == "/v2" or scope["path"].startswith("/v2/")
    body = ProtocolErrorAnswer(error=message) if protocol else ErrorAnswer(error=Error(code=code, message=message))
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")


def vitrine_error_response(scope: Scope, error: VitrineError) -> Response:
    """Return the response to an error that the client or the operator can act on."""
    response = error_response(scope, STATUS[type(error)], error.code, str(error))
    if isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, OverloadedError | RateLimitedError | TooManyConnectionsError):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


async def on_vitrine_error(request: Request, error: Exception) -> Response:
    """Handle a `VitrineError`."""
    assert isinstance(error, VitrineError)
    return vitrine_error_response(request.scope, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handle an error of the HTTP layer, such as an unknown path or a method that the route does not have."""
    assert isinstance(error, HTTPException)
    response = _http_error(request.scope, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def on_timeout(request: Request, error: Exception) -> Response:
    """Handle a request that took longer than `timeout_seconds`."""
    return error_response(request.scope, HTTPStatus.GATEWAY_TIMEOUT, TIMEOUT, "the request was not answered in time")


async def on_incomplete_body(request: Request, error: Exception) -> Response:
    """Handle a client that disconnected while sending its body; the response is discarded."""
    message = "the request's body ended too early"
    return error_response(request.scope, HTTPStatus.BAD_REQUEST, "incomplete", message)


async def on_client_disconnected(request: Request, error: Exception) -> Response:
    """Handle a client that disconnected while waiting: nginx's status 499, for the log; the response is discarded."""
    request.scope["vitrine.record"].error = "client_disconnected"
    return Response(status_code=CLIENT_CLOSED_REQUEST, media_type="application/json")


async def on_internal_error(request: Request, error: Exception) -> Response:
    """Handle a bug without showing internals. Starlette re-raises the error, so that the traceback is logged."""
    message = "an unexpected error; see the server's log"
    return error_response(request.scope, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message)


_LOG_SECONDS = 10.0
_last_logged: dict[str, float] = {}


def find_exhaustion(error: Exception) -> UnavailableError | None:
    """Return the error to show if the server has run out of something, which is logged now and then, else None."""
    what = exhausted_resource(error)
    if not what:
        return None
    now = time.monotonic()
    if now - _last_logged.get(what, -math.inf) > _LOG_SECONDS:
        _last_logged[what] = now
        _log.error("out of %s: %s: %s", what, type(error).__name__, error)
    return UnavailableError(f"the server is out of {what}; try again later")


async def on_error(request: Request, error: Exception) -> Response:
    """Handle any other error: the server has run out of something, or it is a bug."""
    unavailable = find_exhaustion(error)
    if unavailable is not None:
        return vitrine_error_response(request.scope, unavailable)
    raise error


Handler = Callable[[Request, Exception], Awaitable[Response]]

ERROR_HANDLERS: dict[type[Exception], Handler] = {
    VitrineError: on_vitrine_error,
    HTTPException: on_http_exception,
    TimeoutError: on_timeout,
    ClientDisconnect: on_incomplete_body,
    ClientDisconnectedError: on_client_disconnected,
    MemoryError: on_error,
    OSError: on_error,
    RuntimeError: on_error,
    Exception: on_internal_error,
}


def find_error_handler(error: Exception) -> Handler:
    """Return the handler of an error, as Starlette would look it up."""
    handler = next(ERROR_HANDLERS[kind] for kind in type(error).__mro__ if kind in ERROR_HANDLERS)
    return on_internal_error if handler is on_error and find_exhaustion(error) is None else handler


class ErrorShapeMiddleware:
    """Replace the plain-text errors of BentoML's own routes by errors in our JSON shape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        replaced = False

        async def send_json_error(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                headers = dict(message["headers"])
                replaced = headers.get(b"content-type") != b"application/json"
                if replaced:
                    response = _http_error(scope, message["status"])
                    other = [(k, v) for k, v in message["headers"] if not k.startswith(b"content-")]  # such as "allow"
                    response.raw_headers.extend(other)
                    await response(scope, receive, send)
                    return
            if not replaced:
                await send(message)

        await self.app(scope, receive, send_json_error)


def _http_error(scope: Scope, status: int) -> Response:
    phrase = HTTPStatus(status).phrase if status in _STATUSES else "error"
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return error_response(scope, status, code, f"{scope['method']} {scope['path']}: {phrase.lower()}")
