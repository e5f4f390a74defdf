"""Every error in one shape, whoever raised it: one JSON object, and under /v2 that of the Open Inference Protocol."""

import math
import reprlib
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
    UndecodableImageError,
    UnknownModelError,
    UnsupportedImageError,
    VitrineError,
)

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Error:
    """What went wrong."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    code: str  # stable and machine-readable
    message: str  # for people: what, where, expected, found


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The body of every answer with a status of 400 or above, outside /v2."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    error: Error


@dataclass(frozen=True, slots=True)
class ProtocolErrorAnswer:
    """The body of every answer with a status of 400 or above under /v2."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    error: str


class UnauthorizedError(VitrineError):
    """The request carries no API key, or none that is known."""

    code = "unauthorized"

    def __init__(self, *, found: str) -> None:
        super().__init__(f"API key: expected Authorization: Bearer KEY or X-API-Key: KEY, found {found}")


class ForbiddenError(VitrineError):
    """The operator has not allowed this."""

    code = "forbidden"

    def __init__(self, what: str, *, setting: str) -> None:
        super().__init__(f"{what} is switched off here; {setting} switches it on")


class NotAcceptableError(VitrineError):
    """The answer exists in no form that the client accepts."""

    code = "not_acceptable"

    def __init__(self, *, offered: str, found: str) -> None:
        super().__init__(f"Accept: expected one of {offered}, found {found[:200]!r}")


class OverloadedError(VitrineError):
    """More work waits than may wait."""

    code = "overloaded"

    def __init__(self, waiting: int, seconds: float) -> None:
        """Args: images that wait, and how long they take."""
        self.retry_after = max(1, math.ceil(seconds))
        super().__init__(f"{waiting} images wait already, about {seconds:.1f} s of work; try again later")


class ClientDisconnectedError(Exception):
    """The client has closed its connection before its answer was there."""


class UnavailableError(VitrineError):
    """The server cannot answer for now."""

    code = "unavailable"


class WorkerError(VitrineError):
    """A worker has not followed a change that another one has made."""

    code = "worker_behind"

    def __init__(self, pid: int, found: str) -> None:
        super().__init__(f"worker {pid}: expected it to follow the change, found {found}; the others have changed")


STATUS: dict[type[VitrineError], HTTPStatus] = {
    ParameterError: HTTPStatus.BAD_REQUEST,
    UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    UnknownModelError: HTTPStatus.NOT_FOUND,
    NotAcceptableError: HTTPStatus.NOT_ACCEPTABLE,
    ImageTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedImageError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    UndecodableImageError: HTTPStatus.UNPROCESSABLE_ENTITY,
    OverloadedError: HTTPStatus.SERVICE_UNAVAILABLE,
    BundleError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    WorkerError: HTTPStatus.SERVICE_UNAVAILABLE,
    ProviderError: HTTPStatus.SERVICE_UNAVAILABLE,
}
_STATUSES = set(HTTPStatus)
TIMEOUT = "timeout"
CLIENT_CLOSED_REQUEST = 499

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


def preview(value: object) -> str:
    """What a client sent, for a sentence: short, and however deep it is nested. (`repr` would run out of stack.)"""
    return _brief.repr(value)


def error_response(scope: Scope, status: int, code: str, message: str) -> Response:
    """An error in the shape of the route that was asked."""
    record = scope.get("vitrine.record")
    if record is not None:
        record.error = code
    message = message.encode(errors="backslashreplace").decode()  # JSON can name half a character: "\\ud800"
    protocol = scope["path"] == "/v2" or scope["path"].startswith("/v2/")
    answer = ProtocolErrorAnswer(error=message) if protocol else ErrorAnswer(error=Error(code=code, message=message))
    return Response(orjson.dumps(answer), status_code=status, media_type="application/json")


def vitrine_error_response(scope: Scope, error: VitrineError) -> Response:
    """The answer to an error that the client, or the operator, can act on."""
    response = error_response(scope, STATUS[type(error)], error.code, str(error))
    if isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


async def on_vitrine_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of `VitrineError`."""
    assert isinstance(error, VitrineError)
    return vitrine_error_response(request.scope, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """An error of the HTTP layer, such as a method that a route does not have."""
    assert isinstance(error, HTTPException)
    response = _http_error(request.scope, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def on_timeout(request: Request, error: Exception) -> Response:
    """The answer took longer than `timeout_seconds`."""
    return error_response(request.scope, HTTPStatus.GATEWAY_TIMEOUT, TIMEOUT, "the request was not answered in time")


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client went away before it had sent everything: nobody reads this, and it is no fault of ours."""
    message = "the request's body ended too early"
    return error_response(request.scope, HTTPStatus.BAD_REQUEST, "incomplete", message)


async def on_client_disconnected(request: Request, error: Exception) -> Response:
    """Nobody reads this: it is for the log, in nginx' terms."""
    request.scope["vitrine.record"].error = "client_left"
    return Response(status_code=CLIENT_CLOSED_REQUEST, media_type="application/json")


async def on_internal_error(request: Request, error: Exception) -> Response:
    """Anything else: the client learns nothing of the inside; Starlette raises it on, so that the log gets it all."""
    message = "an unexpected error; see the server's log"
    return error_response(request.scope, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message)


Handler = Callable[[Request, Exception], Awaitable[Response]]

ERROR_HANDLERS: dict[type[Exception], Handler] = {
    VitrineError: on_vitrine_error,
    HTTPException: on_http_exception,
    TimeoutError: on_timeout,
    ClientDisconnect: on_disconnect,
    ClientDisconnectedError: on_client_disconnected,
    Exception: on_internal_error,
}


def error_answer(error: Exception) -> Handler:
    """Who answers an error, as Starlette would find it."""
    return next(ERROR_HANDLERS[kind] for kind in type(error).__mro__ if kind in ERROR_HANDLERS)


class ErrorShapeMiddleware:
    """Gives the errors of BentoML's own routes, which are plain text, the shape of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        replaced = False

        async def send_shaped(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                headers = dict(message["headers"])
                replaced = headers.get(b"content-type") != b"application/json"
                if replaced:
                    response = _http_error(scope, message["status"])
                    kept = [(k, v) for k, v in message["headers"] if not k.startswith(b"content-")]  # "allow" and such
                    response.raw_headers.extend(kept)
                    await response(scope, receive, send)
                    return
            if not replaced:
                await send(message)

        await self.app(scope, receive, send_shaped)


def _http_error(scope: Scope, status: int) -> Response:
    phrase = HTTPStatus(status).phrase if status in _STATUSES else "error"
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return error_response(scope, status, code, f"{scope['method']} {scope['path']}: {phrase.lower()}")
