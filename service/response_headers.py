"""Headers of every response that protect browsers: nothing is sniffed, framed, stored or run."""

from collections.abc import Sequence

RawHeaders = Sequence[tuple[bytes, bytes]]

SECURITY_HEADERS: RawHeaders = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),  # answers are about somebody's images
)


def add_security_headers(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response with the security headers that it has not set itself."""
    names = {name for name, _ in headers}
    return [*headers, *(header for header in SECURITY_HEADERS if header[0] not in names)]
