"""From an HTTP request to an image's bytes and the parameters beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from bundle.errors import ImageTooLargeError, ParameterError


@dataclass(frozen=True)
class ImageRequest:
    """One encoded image and its parameters, still as text."""

    image: bytes
    parameters: Mapping[str, str]

    def text(self, name: str) -> str | None:
        """A parameter, None if it was not sent."""
        return self.parameters.get(name)

    def integer(self, name: str, default: int) -> int:
        """A parameter as an integer.

        Raises:
            ParameterError: it is not one.
        """
        value = self.parameters.get(name)
        if value is None:
            return default
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise ParameterError(name, expected="an integer", found=repr(value[:100]))
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A parameter as a number.

        Raises:
            ParameterError: it is not one.
        """
        value = self.parameters.get(name)
        if value is None:
            return default
        try:
            return float(value)
        except ValueError:
            raise ParameterError(name, expected="a number", found=repr(value[:100])) from None


async def read_image_request(request: Request, known: tuple[str, ...], max_bytes: int) -> ImageRequest:
    """Read the image (multipart field `image`, or the body itself) and the form and query fields in `known`.

    What kind of image it is, is decided by its bytes, never by a name or a header.

    Raises:
        ImageTooLargeError: the body has more than `max_bytes` bytes; the rest is not read.
        ParameterError: there is no image, or a field is unknown or sent with two values.
    """
    limited = Request(request.scope, _limited(request, max_bytes))
    fields: list[tuple[str, str | UploadFile]] = [*request.query_params.multi_items()]
    if limited.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        try:
            async with limited.form(max_files=1, max_fields=len(known) + 1) as form:
                fields += form.multi_items()
                image = await _image_field(fields)
        except (HTTPException, UnicodeError) as error:
            wanted = "one image and its fields as multipart/form-data"
            found = error.detail if isinstance(error, HTTPException) else error
            raise ParameterError("body", expected=wanted, found=found) from error
        fields = [(name, value) for name, value in fields if name != "image"]
    else:
        image = await limited.body()
    parameters: dict[str, str] = {}
    for name, value in fields:
        if name not in known:
            raise ParameterError(name, expected=f"one of the parameters {', '.join(known)}", found="an unknown one")
        if not isinstance(value, str):
            raise ParameterError(name, expected="text", found="a file")
        if parameters.get(name, value) != value:
            raise ParameterError(name, expected="one value", found=f"{parameters[name]!r} and {value!r}")
        parameters[name] = value
    return ImageRequest(image, parameters)


async def _image_field(fields: list[tuple[str, str | UploadFile]]) -> bytes:
    images = [value for name, value in fields if name == "image"]
    if len(images) != 1:
        names = ", ".join(name for name, _ in fields) or "none"
        raise ParameterError("image", expected="one multipart field 'image'", found=f"the fields {names}")
    image = images[0]
    if not isinstance(image, UploadFile):
        raise ParameterError("image", expected="a file", found="text; a URL or path is not fetched")
    return await image.read()


def _limited(request: Request, max_bytes: int) -> Receive:
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
