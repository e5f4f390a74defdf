"""Every error as one JSON object of one shape, whoever raised it."""

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bundle.errors import (
    ImageTooLargeError,
    ParameterError,
    UndecodableImageError,
    UnknownModelError,
    UnsupportedImageError,
    VitrineError,
)
from service.schemas import Error, ErrorAnswer

STATUS: dict[type[VitrineError], HTTPStatus] = {
    ParameterError: HTTPStatus.BAD_REQUEST,
    UnknownModelError: HTTPStatus.NOT_FOUND,
    ImageTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedImageError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    UndecodableImageError: HTTPStatus.UNPROCESSABLE_ENTITY,
}
_STATUSES = set(HTTPStatus)


def error_response(status: int, code: str, message: str) -> Response:
    """The one shape of an error."""
    body = ErrorAnswer(error=Error(code=code, message=message)).model_dump_json()
    return Response(body, status_code=status, media_type="application/json")


async def on_vitrine_error(request: Request, error: Exception) -> Response:
    """An error that the client can act on."""
    assert isinstance(error, VitrineError)
    return error_response(STATUS[type(error)], error.code, str(error))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """An error of the HTTP layer, such as a method that a route does not have."""
    assert isinstance(error, HTTPException)
    response = _http_error(error.status_code, request.method, request.url.path)
    response.headers.update(error.headers or {})
    return response


async def on_timeout(request: Request, error: Exception) -> Response:
    """The answer took longer than `timeout_seconds`."""
    return error_response(HTTPStatus.GATEWAY_TIMEOUT, "timeout", "the request was not answered in time")


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client went away before it had sent everything: nobody reads this, and it is no fault of ours."""
    return error_response(HTTPStatus.BAD_REQUEST, "incomplete", "the request's body ended too early")


async def on_bug(request: Request, error: Exception) -> Response:
    """Anything else: the client learns nothing of the inside; Starlette raises it on, so that the log gets it all."""
    return error_response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "an unexpected error; see the server's log"
    )


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
                    response = _http_error(message["status"], scope["method"], scope["path"])
                    kept = [(k, v) for k, v in message["headers"] if not k.startswith(b"content-")]  # "allow" and such
                    response.raw_headers.extend(kept)
                    await response(scope, receive, send)
                    return
            if not replaced:
                await send(message)

        await self.app(scope, receive, send_shaped)


def _http_error(status: int, method: str, path: str) -> Response:
    phrase = HTTPStatus(status).phrase if status in _STATUSES else "error"
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return error_response(status, code, f"{method} {path}: {phrase.lower()}")
