"""Read the images and parameters of an HTTP request."""

import base64
import binascii
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import orjson
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from vitrine.bundle.errors import ImageTooLargeError, ParameterError
from vitrine.service.errors import preview
from vitrine.service.http.parameters import LABELS, Parameter
from vitrine.service.settings import Settings

IMAGE, IMAGES = "image", "images"
_MAX_FIELDS = 1000  # of a form; each label may be a field
_URL = re.compile(r"\s*(https?|ftp|file|s3|gs)://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,")


@dataclass(frozen=True)
class ImageRequest:
    """Encoded images and their parameters, as sent by the client."""

    images: tuple[object, ...]  # bytes, or the value of a JSON field, see `image_bytes`
    several: bool  # respond with a list, even for one image
    parameters: Mapping[str, object]

    def text(self, parameter: Parameter) -> str | None:
        """Return a string parameter, None if it was not sent.

        Raises:
            ParameterError: it is not a string.
        """
        value = self.parameters.get(parameter.name)
        if value is not None and not isinstance(value, str):
            raise ParameterError(parameter.name, expected="text", found=preview(value))
        return value

    def integer(self, parameter: Parameter) -> int:
        """Return an integer parameter.

        Raises:
            ParameterError: it is not an integer.
        """
        value = self.parameters.get(parameter.name, parameter.default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            return int(value)
        raise ParameterError(parameter.name, expected="an integer", found=preview(value))

    def number(self, parameter: Parameter) -> float:
        """Return a number parameter.

        Raises:
            ParameterError: it is not a number.
        """
        value = self.parameters.get(parameter.name, parameter.default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        raise ParameterError(parameter.name, expected="a number", found=preview(value))

    def labels(self, known: Collection[str]) -> tuple[str, ...] | None:
        """Return the parameter `labels`, None if it was not sent.

        Clients send a list, one of the `known` labels, or several labels separated by commas.

        Raises:
            ParameterError: it is neither a string nor a list of strings.
        """
        value = self.parameters.get(LABELS.name)
        if value is None:
            return None
        if isinstance(value, str):  # labels may contain commas: "tench, Tinca tinca"
            value = [value] if value in known else [part.strip() for part in value.split(",")]
        if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
            raise ParameterError(LABELS.name, expected="labels as text", found=preview(value))
        return tuple(value)


async def read_image_request(request: Request, parameters: Sequence[Parameter], settings: Settings) -> ImageRequest:
    """Read the images and parameters of a request, in any form that clients send.

    The images are one or several multipart fields `image`, or base64 in the JSON field `image` or `images`, or the body
    is a single image. The image format is detected from the bytes, never from a name or header. Parameters are query,
    form or JSON fields.

    Raises:
        ImageTooLargeError: the body has more than `max_body_bytes` bytes; the rest is not read.
        ParameterError: there is no image, there are too many, or a field is unknown or sent with two values.
    """
    names = tuple(parameter.name for parameter in parameters)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    images: list[object]
    fields: list[tuple[str, object]] = []
    several = False
    if content_type == "multipart/form-data":
        images, fields = await _read_form(request, settings)
        several = len(images) > 1
    elif content_type == "application/json":
        images, fields, several = await _read_json(await read_body(request, settings.max_body_bytes))
    else:
        images = [await read_body(request, settings.max_body_bytes)]
    if len(images) > settings.max_images:
        raise ParameterError("images", expected=f"at most {settings.max_images} images", found=len(images))
    if request.scope["query_string"]:
        fields = [*request.query_params.multi_items(), *fields]
    return ImageRequest(tuple(images), several, _merge_fields(fields, names))


async def _read_form(request: Request, settings: Settings) -> tuple[list[object], list[tuple[str, object]]]:
    limited = Request(request.scope, _limited_receive(request, settings.max_body_bytes))
    images: list[object] = []
    fields: list[tuple[str, object]] = []
    try:
        async with limited.form(max_files=settings.max_images + 1, max_fields=_MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if name == IMAGE and isinstance(value, UploadFile):
                    images.append(await value.read())
                elif name == IMAGE:
                    raise ParameterError(IMAGE, expected="a file", found="text; a URL or path is not fetched")
                elif isinstance(value, UploadFile):
                    raise ParameterError(name, expected=f"text, or the name {IMAGE} for an image", found="a file")
                else:
                    fields.append((name, _parse_field(value)))
    except (HTTPException, MultiPartException, UnicodeError) as error:
        expected = "images and their fields as multipart/form-data"
        found = error.detail if isinstance(error, HTTPException) else error
        raise ParameterError("body", expected=expected, found=found) from error
    if not images:
        names = ", ".join(name for name, _ in fields)[:200] or "none"
        raise ParameterError(IMAGE, expected=f"a multipart field {IMAGE!r}", found=f"the fields {names}")
    return images, fields


def _parse_field(value: str) -> object:
    """Parse a form field that may be JSON: BentoML's client sends strings in quotes, and lists."""
    if value[:1] in ('"', "["):
        try:
            return orjson.loads(value)
        except ValueError:
            pass
    return value


async def _read_json(body: bytes) -> tuple[list[object], list[tuple[str, object]], bool]:
    try:
        document = orjson.loads(body)
    except (ValueError, RecursionError) as error:
        raise ParameterError("body", expected="JSON", found=f"none: {error}") from error
    if not isinstance(document, dict) or len(document.keys() & {IMAGE, IMAGES}) != 1:
        found = f"the fields {', '.join(document)[:200] or 'none'}" if isinstance(document, dict) else preview(document)
        raise ParameterError("body", expected=f"an object with {IMAGE!r} or {IMAGES!r}", found=found)
    several = IMAGES in document
    images = document.pop(IMAGES) if several else [document.pop(IMAGE)]
    if not isinstance(images, list) or not images:
        raise ParameterError(IMAGES, expected="a list of images", found=preview(images))
    return images, list(document.items()), several


def image_bytes(image: object) -> bytes:
    """Return the encoded image: given as bytes, a memoryview, base64 or a data URL.

    Raises:
        ParameterError: it is something else, such as another URL, which is never fetched.
    """
    if isinstance(image, (bytes, memoryview)):
        return bytes(image)
    if not isinstance(image, str):
        raise ParameterError(IMAGE, expected="base64 or a data URL as text", found=preview(image))
    if _URL.match(image):
        raise ParameterError(IMAGE, expected="base64 or a data URL", found="another URL, which is not fetched")
    prefix = _DATA_URL.match(image)
    digits = "".join((image[prefix.end() :] if prefix else image).split())
    try:
        return base64.b64decode(digits, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ParameterError(IMAGE, expected="base64 or a data URL", found=f"{image[:40]!r}: {error}") from error


def _merge_fields(fields: list[tuple[str, object]], known: tuple[str, ...]) -> dict[str, object]:
    """Merge repeated fields: those of `labels` into one list; other repeated fields must be equal."""
    merged: dict[str, object] = {}
    for name, value in fields:
        if name not in known:
            expected = f"one of the parameters {', '.join(known)}"
            raise ParameterError(name[:100], expected=expected, found="an unknown one")
        if name == LABELS.name and name in merged:
            merged[name] = [*_as_list(merged[name]), *_as_list(value)]
            continue
        if merged.get(name, value) != value:
            raise ParameterError(name, expected="one value", found=f"{preview(merged[name])} and {preview(value)}")
        if value is not None:
            merged[name] = value
    return merged


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        ImageTooLargeError: see `_limited_receive`.
        ClientDisconnect: the client disconnected before the end of the body.
    """
    receive = _limited_receive(request, max_bytes)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        parts = [body]
        while message.get("more_body", False):
            message = await receive()
            parts.append(message.get("body", b""))
        body = b"".join(parts)
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return body


def _limited_receive(request: Request, max_bytes: int) -> Receive:
    """Return the `receive` of a request, limited to `max_bytes` bytes.

    Raises:
        ImageTooLargeError: the body is larger, by its header or while it is received; the rest is not read.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise ImageTooLargeError(limit=max_bytes, unit="bytes", found=declared)
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise ImageTooLargeError(limit=max_bytes, unit="bytes", found="more")
        return message

    return receive
