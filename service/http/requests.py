"""Read the images and parameters of an HTTP request."""

import binascii
import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from vitrine.bundle.errors import ParameterError
from vitrine.service.errors import preview
from vitrine.service.http.bodies import off_loop, read_body
from vitrine.service.http.forms import FormError, decode, parse_form
from vitrine.service.http.json_body import LongText, NotJsonError, loads
from vitrine.service.http.parameters import LABELS, Parameter
from vitrine.service.settings import Settings

IMAGE, IMAGES = "image", "images"
FORM, JSON = "multipart/form-data", "application/json"
_MAX_QUERY_FIELDS = 1000  # each label may be a field
_MAX_LABELS = 30_000
_MAX_TEXT_BYTES = 1024 * 1024  # of all fields of a form
_MAX_CONTENT_TYPE = 1000  # characters
_WHITE_SPACE = b" \t\n\r\f\v"
_URL = re.compile(r"\s*(https?|ftp|file|s3|gs)://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,")


@dataclass(frozen=True)
class ImageRequest:
    """Encoded images and their parameters, as sent by the client."""

    images: tuple[object, ...]  # bytes, or the value of a JSON field, see `image_bytes`
    several: bool  # respond with a list, even for one image
    parameters: Mapping[str, object]

    def has(self, parameter: Parameter) -> bool:
        """Whether the client sent a parameter."""
        return parameter.name in self.parameters

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
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?|nan|[+-]?inf", value.lower()):
            with contextlib.suppress(ValueError):
                return float(value)
        raise ParameterError(parameter.name, expected="a number", found=preview(value))

    def boolean(self, parameter: Parameter) -> bool:
        """Return a boolean parameter.

        Raises:
            ParameterError: it is neither true nor false.
        """
        value = self.parameters.get(parameter.name, parameter.default)
        known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in known):
            return known[value if isinstance(value, bool) else value.lower()]
        raise ParameterError(parameter.name, expected="true or false", found=preview(value))

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
            value = [value] if value in known else [part.strip() for part in value.split(",", _MAX_LABELS)]
        if isinstance(value, list) and len(value) > _MAX_LABELS:
            raise ParameterError(LABELS.name, expected=f"at most {_MAX_LABELS} labels", found="more")
        if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
            raise ParameterError(LABELS.name, expected="labels as text", found=preview(value))
        return tuple(value)


async def read_image_request(request: Request, parameters: Sequence[Parameter], settings: Settings) -> ImageRequest:
    """Read the images and parameters of a request, in any form that clients send.

    The images are one or several multipart fields `image`, or base64 in the JSON field `image` or `images`, or the body
    is a single image. The image format is detected from the bytes, never from a name or header. Parameters are query,
    form or JSON fields, in UTF-8.

    Raises:
        ImageTooLargeError, BodiesError, ClientDisconnect: see `read_body`.
        ParameterError: there is no image, there are too many, or a field is unknown or sent with two values.
    """
    names = tuple(parameter.name for parameter in parameters)
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    options = _options(content_type) if media_type in (FORM, JSON) else {}
    body = await read_body(request, settings.max_body_bytes)
    images: list[object]
    fields: list[tuple[str, object]] = []
    several = False
    if media_type == FORM:
        images, fields = await off_loop(len(body), _parse_form, body, options.get(b"boundary", b""))
        several = len(images) > 1
    elif media_type == JSON:
        images, fields, several = await off_loop(len(body), _parse_json, body)
    else:
        images = [body]
    if len(images) > settings.max_images:
        raise ParameterError("images", expected=f"at most {settings.max_images} images", found=len(images))
    if query := request.scope["query_string"]:
        if query.count(b"&") >= _MAX_QUERY_FIELDS:
            raise ParameterError("query", expected=f"at most {_MAX_QUERY_FIELDS} fields", found="more")
        fields = [*request.query_params.multi_items(), *fields]
    return ImageRequest(tuple(images), several, _merge_fields(fields, names))


def _options(content_type: str) -> dict[bytes, bytes]:
    """Return the parameters of a Content-Type.

    Raises:
        ParameterError: it is very long, or names another charset than UTF-8: clients do not choose the decoder.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise ParameterError(
            "Content-Type", expected=f"at most {_MAX_CONTENT_TYPE} characters", found=len(content_type)
        )
    _, options = parse_options_header(content_type)
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise ParameterError("Content-Type: charset", expected="utf-8", found=repr(charset[:40]))
    return options


def _parse_form(body: bytes, boundary: bytes) -> tuple[list[object], list[tuple[str, object]]]:
    images: list[object] = []
    fields: list[tuple[str, object]] = []
    text_bytes = 0
    try:
        for part in parse_form(body, boundary):
            is_text = not part.has_filename and (part.media_type or "text/plain").startswith("text/")
            if part.name == IMAGE and is_text:
                raise ParameterError(IMAGE, expected="a file", found="text; a URL or path is not fetched")
            if part.name == IMAGE:
                images.append(part.data)
                continue
            if part.has_filename:
                expected = f"text, or the name {IMAGE} for an image"
                raise ParameterError(part.name[:100], expected=expected, found="a file")
            text_bytes += len(part.data)
            if text_bytes > _MAX_TEXT_BYTES:
                raise FormError(f"more than {_MAX_TEXT_BYTES} bytes of text")
            fields.append((part.name, _parse_field(decode(part.data))))
    except FormError as error:
        raise ParameterError("body", expected="images and their fields as multipart/form-data", found=error) from None
    if not images:
        names = ", ".join(name for name, _ in fields)[:200] or "none"
        raise ParameterError(IMAGE, expected=f"a multipart field {IMAGE!r}", found=f"the fields {names}")
    return images, fields


def _parse_field(value: str) -> object:
    """Parse a form field that may be JSON: BentoML's client sends strings in quotes, and lists."""
    if value[:1] in ('"', "["):
        with contextlib.suppress(NotJsonError):
            return loads(value.encode())
    return value


def _parse_json(body: bytes) -> tuple[list[object], list[tuple[str, object]], bool]:
    try:
        document = loads(body)
    except NotJsonError as error:
        raise ParameterError("body", expected="JSON", found=f"none: {error}") from None
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
    if not isinstance(image, (str, LongText)):
        raise ParameterError(IMAGE, expected="base64 or a data URL as text", found=preview(image))
    pieces = [image] if isinstance(image, str) else [piece.decode() for piece in image.pieces]
    if _URL.match(pieces[0]):
        raise ParameterError(IMAGE, expected="base64 or a data URL", found="another URL, which is not fetched")
    start = pieces[0][:40]
    if prefix := _DATA_URL.match(pieces[0]):
        pieces[0] = pieces[0][prefix.end() :]
    try:
        return _decode_base64(pieces)
    except ValueError as error:
        raise ParameterError(IMAGE, expected="base64 or a data URL", found=f"{start!r}: {error}") from None


def _decode_base64(pieces: Sequence[str]) -> bytes:
    """Decode base64 that may be wrapped at any width, piece by piece: each one holds Python's lock for a millisecond.

    Raises:
        ValueError: it is not base64.
    """
    decoded, rest, padded = [], b"", False
    for number, piece in enumerate(pieces, 1):
        digits = rest + piece.encode("ascii")
        if any(character in digits for character in _WHITE_SPACE):
            digits = digits.translate(None, _WHITE_SPACE)
        whole = len(digits) if number == len(pieces) else len(digits) // 4 * 4
        if padded and digits:
            raise binascii.Error("Excess data after padding")
        decoded.append(binascii.a2b_base64(digits[:whole], strict_mode=True))
        padded, rest = padded or digits[:whole].endswith(b"="), digits[whole:]
    return b"".join(decoded)


def _merge_fields(fields: list[tuple[str, object]], known: tuple[str, ...]) -> dict[str, object]:
    """Merge repeated fields: those of `labels` into one list; other repeated fields must be equal."""
    merged: dict[str, object] = {}
    for name, value in fields:
        if name not in known:
            expected = f"one of the parameters {', '.join(known)}"
            raise ParameterError(name[:100], expected=expected, found="an unknown one")
        if name == LABELS.name and name in merged:
            labels = merged[name] = _as_list(merged[name])
            labels += _as_list(value)
            continue
        if name in merged and (isinstance(value, (list, dict)) or merged[name] != value):
            raise ParameterError(name, expected="one value", found=f"{preview(merged[name])} and {preview(value)}")
        if value is not None:
            merged[name] = value
    return merged


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
