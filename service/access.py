"""API keys: who may ask. Keys are kept as SHA-256 hashes only; they are random, so that no slow hash is needed."""

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

_POLL_SECONDS = 1.0  # between looks whether the file has changed

# Probes, and the page that explains the routes.
_PUBLIC_PATHS = PROBES | PROTOCOL_PROBES | {"/", "/openapi.json", "/docs.json"}


class KeysError(VitrineError):
    """A key or a file of keys cannot be used."""

    code = "invalid_keys"


def read_keys(file: Path) -> tuple[str, ...]:
    """The hashes in a file: one a line, a name before it if wanted; `#` begins a comment.

    Raises:
        KeysError: the file cannot be read, or a line holds no hash.
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
        if len(words) > 2 or not KEY_HASH.fullmatch(words[-1].lower()):  # the line is not shown: it may hold a key
            how = "`vitrine key` makes a key and its line, `printf %s KEY | sha256sum` hashes a key that you have"
            raise KeysError(f"{file}: line {number}: expected [NAME] sha256:HASH, found something else; {how}")
        hashes.append(words[-1].lower())
    return tuple(hashes)


class Keys:
    """The keys that are accepted; those of the file are those that stand there now."""

    def __init__(self, hashes: Sequence[str], file: Path | None = None) -> None:
        """Accept keys by their hashes, and those in `file`.

        Raises:
            KeysError: the file cannot be used.
        """
        self._fixed, self._file = tuple(hashes), file
        self._reading = threading.Lock()
        self._state: object = None
        self._looked = 0.0
        self._hashes = self._fixed
        if file is not None:
            self._state = _state(file)
            self._hashes = self._fixed + read_keys(file)

    @property
    def needed(self) -> bool:
        """Whether a key is needed at all: keys are set, or a file is, even if it is empty."""
        return bool(self._fixed) or self._file is not None

    def check(self, authorization: str | None, x_api_key: str | None) -> None:
        """Let a request pass that has a known key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises:
            UnauthorizedError: it has none, or an unknown one.
        """
        if not self.needed:
            return
        self._refresh()
        scheme, _, bearer = (authorization or "").partition(" ")
        sent = [bearer.strip() if scheme.lower() == "bearer" else "", (x_api_key or "").strip()]
        given = [hash_key(key) for key in sent if key]  # the one may be meant for a proxy before this server
        if not given:
            raise UnauthorizedError(found="none")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(one.encode(), known.encode()) for one in given for known in self._hashes]
        if not any(matches):
            raise UnauthorizedError(found="an unknown one")

    def _refresh(self) -> None:
        if self._file is None or time.monotonic() - self._looked < _POLL_SECONDS:
            return
        with self._reading:
            self._looked = time.monotonic()
            state = _state(self._file)
            if state == self._state:
                return
            self._state = state
            try:
                self._hashes = self._fixed + read_keys(self._file)
                _log.info("API keys: %d in %s", len(self._hashes) - len(self._fixed), self._file)
            except KeysError as error:
                _log.error("API keys stay as they were: %s", error)


def _state(file: Path) -> object:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class AccessMiddleware:
    """Lets an HTTP request pass that has a key, or asks for what needs none; the body of others is not read."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics_need_key: bool) -> None:
        self.app, self.keys, self.metrics_need_key = app, keys, metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self.keys.needed and not self._is_open(scope["path"]):
            headers = Headers(scope=scope)
            try:
                self.keys.check(headers.get("authorization"), headers.get("x-api-key"))
            except UnauthorizedError as error:
                await vitrine_error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if path == METRICS:
            return not self.metrics_need_key
        return path in _PUBLIC_PATHS or (path.startswith(STATIC_FILES) and ".." not in path)
