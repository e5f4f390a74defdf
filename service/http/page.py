"""`GET /`: a page on which a person tries the models. Its files are in `page/`; they need no build step.

The page uses the public routes alone, those of its own origin.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Images are files of the visitor (blob:), never of another origin; there is no inline script or style.
PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "img-src 'self' blob:", "media-src blob:", "connect-src 'self'"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"),
    )
)


class _File(NamedTuple):
    body: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, _File]:
    """Return the files of the page by name."""
    found = {}
    for file in _FOLDER.iterdir():
        if file.suffix in _MEDIA_TYPES:
            body = file.read_bytes()
            found[file.name] = _File(body, _MEDIA_TYPES[file.suffix], f'"{hashlib.sha256(body).hexdigest()[:20]}"')
    return found


async def page(request: Request) -> Response:
    """`GET /` and `GET /page/{name}`: a file of the page, or 304 if the client has it already."""
    file = page_files().get(request.path_params.get("name", _INDEX))
    if file is None:
        raise HTTPException(404)
    headers = {
        "ETag": file.etag,
        "Cache-Control": "no-cache",  # kept, and asked for again: a newer server may have a newer page
        "Content-Security-Policy": PAGE_POLICY,
        "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)
