"""Parse multipart/form-data (RFC 7578) from memory, without copies and without any choice that the client could make.

Names and texts are UTF-8, whatever `charset` says. Every search is a search for bytes, in windows: neither many parts,
nor long headers, nor data that resembles the boundary cost more than reading them once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

_MAX_PARTS = 1000  # each label may be one
_MAX_HEADER_BYTES = 4096  # of a part
_MAX_BOUNDARY_BYTES = 256
_WINDOW = 1024 * 1024  # bytes that one search looks at
_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")  # Content-Transfer-Encoding: those that change nothing


class FormError(ValueError):
    """The bytes are not a form that is accepted."""


@dataclass(frozen=True)
class Part:
    """A part of a form."""

    name: str
    data: memoryview  # of the body
    media_type: str  # "" without one
    has_filename: bool


def parse_form(body: bytes, boundary: bytes) -> Iterator[Part]:
    """Yield the parts of a form.

    Raises:
        FormError: the body is no such form, or has more than 1000 parts, or a part more than 4096 bytes of headers.
    """
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise FormError(f"a boundary of {len(boundary)} bytes")
    delimiter, view = b"\r\n--" + boundary, memoryview(body)
    start = body.find(delimiter[2:], 0, _MAX_HEADER_BYTES)
    if start < 0 or body[:start].strip(b"\r\n"):
        raise FormError("no boundary at its start")
    position = start + len(delimiter) - 2
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", position):
            return
        if not body.startswith(b"\r\n", position):
            raise FormError("a boundary without a line break")
        headers_end = body.find(b"\r\n\r\n", position, position + _MAX_HEADER_BYTES + 4)
        if headers_end < 0:
            raise FormError(f"a part without an end of its headers within {_MAX_HEADER_BYTES} bytes")
        end = _find(body, delimiter, headers_end + 4)
        yield _part(body[position + 2 : headers_end], view[headers_end + 4 : end])
        position = end + len(delimiter)
    if not body.startswith(b"--", position):
        raise FormError(f"more than {_MAX_PARTS} parts")


def _find(body: bytes, delimiter: bytes, start: int) -> int:
    for at in range(start, len(body), _WINDOW):
        found = body.find(delimiter, at, at + _WINDOW + len(delimiter) - 1)
        if found >= 0:
            return found
    raise FormError("an early end")


def _part(head: bytes, data: memoryview) -> Part:
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon:
            raise FormError("a part with a header that has no colon")
        headers[name.strip().lower()] = value.strip()
    encoding = headers.get(b"content-transfer-encoding", b"").lower()
    if encoding not in _ENCODINGS:
        raise FormError(f"a part with Content-Transfer-Encoding {encoding.decode('latin-1')[:40]!r}: send the bytes")
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    if b"name" not in options:
        raise FormError("a part whose Content-Disposition has no name")
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    return Part(decode(options[b"name"]), data, media_type, b"filename" in options)


def decode(data: bytes | memoryview) -> str:
    """Return a text of a form.

    Raises:
        FormError: it is not UTF-8.
    """
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormError(f"text that is not UTF-8: {error.reason}") from None
