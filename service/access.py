"""API keys. Only their SHA-256 hashes are kept; keys are random, so no slow hash is needed."""

import hmac
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.bundle.errors import VitrineError
from vitrine.service.errors import UnauthorizedError, vitrine_error_response
from vitrine.service.paths import METRICS, PROBES, PROTOCOL_PROBES, STATIC_FILES
from vitrine.service.settings import KEY_HASH, hash_key

_log = logging.getLogger("bentoml.vitrine")

_POLL_SECONDS = 1.0  # polling interval of the key file

# Probes and the OpenAPI page.
_PUBLIC_PATHS = PROBES | PROTOCOL_PROBES | {"/", "/openapi.json", "/docs.json"}


class KeysError(VitrineError):
    """An API key or a key file is invalid."""

    code = "invalid_keys"


def read_keys(file: Path) -> tuple[str, ...]:
    """Read the hashes of a key file: one per line, optionally after a name; `#` starts a comment.

    Raises:
        KeysError: the file cannot be read, or a line has no hash.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{file}: expected a readable file of keys, found {error}") from error
    hashes = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or not KEY_HASH.fullmatch(words[-1].lower()):  # never show the line: it may hold a key
            hint = "`vitrine key` makes a key and its line, `printf %s KEY | sha256sum` hashes a key that you have"
            raise KeysError(f"{file}: line {number}: expected [NAME] sha256:HASH, found something else; {hint}")
        hashes.append(words[-1].lower())
    return tuple(hashes)


class Keys:
    """The accepted API keys; the key file is read again when it changes."""

    def __init__(self, hashes: Sequence[str], file: Path | None = None) -> None:
        """Accept the keys with these hashes, and those in `file`.

        Raises:
            KeysError: the file is invalid.
        """
        self._fixed, self._file = tuple(hashes), file
        self._reload_lock = threading.Lock()
        self._file_state = None if file is None else _file_state(file)
        self._last_poll = 0.0
        self._hashes = self._fixed if file is None else self._fixed + read_keys(file)

    @property
    def needed(self) -> bool:
        """Whether requests need a key: keys or a key file, even an empty one, are set."""
        return bool(self._fixed) or self._file is not None

    def check(self, authorization: str | None, x_api_key: str | None) -> None:
        """Check the key of a request, sent as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises:
            UnauthorizedError: there is no key, or only unknown ones.
        """
        if not self.needed:
            return
        self._refresh()
        scheme, _, bearer = (authorization or "").partition(" ")
        sent = [bearer.strip() if scheme.lower() == "bearer" else "", (x_api_key or "").strip()]
        hashes = [hash_key(key) for key in sent if key]  # one of the two may be meant for a proxy in front
        if not hashes:
            raise UnauthorizedError(found="none")
        # Compare with every key, each in constant time, so that the timing reveals nothing.
        matches = [hmac.compare_digest(one.encode(), known.encode()) for one in hashes for known in self._hashes]
        if not any(matches):
            raise UnauthorizedError(found="an unknown one")

    def _refresh(self) -> None:
        if self._file is None or time.monotonic() - self._last_poll < _POLL_SECONDS:
            return
        with self._reload_lock:
            self._last_poll = time.monotonic()
            state = _file_state(self._file)
            if state == self._file_state:
                return
            self._file_state = state
            try:
                self._hashes = self._fixed + read_keys(self._file)
                _log.info("API keys: %d in %s", len(self._hashes) - len(self._fixed), self._file)
            except KeysError as error:
                _log.error("API keys not reloaded: %s", error)


def _file_state(file: Path) -> tuple[int, int, int] | None:
    """What changes with the file's content; None if it cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class AccessMiddleware:
    """Reject HTTP requests without a valid key, before their body is read; public paths need none."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics_need_key: bool) -> None:
        self.app, self.keys, self.metrics_need_key = app, keys, metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self.keys.needed and not self._is_public(scope["path"]):
            headers = Headers(scope=scope)
            try:
                self.keys.check(headers.get("authorization"), headers.get("x-api-key"))
            except UnauthorizedError as error:
                await vitrine_error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        if path == METRICS:
            return not self.metrics_need_key
        return path in _PUBLIC_PATHS or (path.startswith(STATIC_FILES) and ".." not in path)
