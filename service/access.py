"""API keys, their names, and limits. Only hashes of keys are kept; keys are random, so SHA-256 is slow enough."""

import hmac
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.bundle.errors import VitrineError
from vitrine.service.errors import RateLimitedError, UnauthorizedError, vitrine_error_response
from vitrine.service.paths import METRICS, PAGE_FILES, PROBES, PROTOCOL_PROBES, STATIC_FILES
from vitrine.service.rate_limit import RateLimit
from vitrine.service.settings import KEY_HASH, MAX_KEY_NAME, hash_key, is_key_name

_log = logging.getLogger("bentoml.vitrine")

_POLL_SECONDS = 1.0  # polling interval of the key file
_LABEL_DIGITS = 8  # of the hash of a key without a name

# Probes and the pages, which ask with the key of their visitor.
_PUBLIC_PATHS = PROBES | PROTOCOL_PROBES | {"/", "/docs", "/openapi.json", "/docs.json"}


class KeysError(VitrineError):
    """An API key or a key file is invalid."""

    code = "invalid_keys"


def read_keys(file: Path) -> dict[str, str]:
    """Read a key file and return the name of each hash. One key per line: `[NAME] sha256:HASH`; `#` starts a comment.

    Raises:
        KeysError: the file cannot be read, or a line has no hash or an invalid name.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{file}: expected a readable file of keys, found {error}") from error
    names = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place, hashed = f"{file}: line {number}", words[-1].lower()
        if len(words) > 2 or not KEY_HASH.fullmatch(hashed):  # never show the line: it may hold a key
            hint = "`vitrine key` makes a key and its line, `printf %s KEY | sha256sum` hashes a key that you have"
            raise KeysError(f"{place}: expected [NAME] sha256:HASH, found something else; {hint}")
        name = words[0] if len(words) == 2 else label(hashed)
        if not is_key_name(name) or hash_key(name) == hashed:  # names are logged, keys must not be
            raise KeysError(
                f"{place}: expected a name of at most {MAX_KEY_NAME} printable characters, found a longer one, "
                "others, a hash or the key itself"
            )
        names[hashed] = name
    return names


def label(hashed: str) -> str:
    """Return what stands for a key without a name: the first digits of its hash."""
    return hashed.removeprefix("sha256:")[:_LABEL_DIGITS]


class Keys:
    """The accepted API keys; the key file is read again when it changes."""

    def __init__(self, hashes: Sequence[str], file: Path | None = None) -> None:
        """Accept the keys with these hashes, and those in `file`.

        Raises:
            KeysError: the file is invalid.
        """
        self._fixed, self._file = {hashed: label(hashed) for hashed in hashes}, file
        self._reload_lock = threading.Lock()
        self._file_state = None if file is None else _file_state(file)
        self._last_poll = 0.0
        self._names: Mapping[str, str] = self._fixed if file is None else self._fixed | read_keys(file)

    @property
    def needed(self) -> bool:
        """Whether requests need a key: keys or a key file, even an empty one, are set."""
        return bool(self._fixed) or self._file is not None

    def check(self, authorization: str | None, x_api_key: str | None) -> str:
        """Check the key of a request, sent as `Authorization: Bearer KEY` or `X-API-Key: KEY`, and return its name.

        The name is empty if no key is needed.

        Raises:
            UnauthorizedError: there is no key, or only unknown ones.
        """
        if not self.needed:
            return ""
        self._refresh()
        scheme, _, bearer = (authorization or "").partition(" ")
        sent = [bearer.strip() if scheme.lower() == "bearer" else "", (x_api_key or "").strip()]
        hashes = [hash_key(key).encode() for key in sent if key]  # one of the two may be meant for a proxy in front
        if not hashes:
            raise UnauthorizedError(found="none")
        # Compare with every key, each in constant time, so that the timing reveals nothing.
        known = self._names.items()
        matches = [name for one in hashes for other, name in known if hmac.compare_digest(one, other.encode())]
        if not matches:
            raise UnauthorizedError(found="an unknown one")
        return matches[0]

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
                in_file = read_keys(self._file)
                self._names = self._fixed | in_file
                _log.info("API keys: %d in %s", len(in_file), self._file)
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
    """Reject HTTP requests without a valid key, or beyond the limit, before their body is read; not on public paths."""

    def __init__(self, app: ASGIApp, keys: Keys, limit: RateLimit, metrics_need_key: bool) -> None:
        self.app, self.keys, self.limit, self.metrics_need_key = app, keys, limit, metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not self._is_public(scope["path"]):
            try:
                self._check(scope)
            except (UnauthorizedError, RateLimitedError) as error:
                await vitrine_error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        name = ""
        if self.keys.needed:
            headers = Headers(scope=scope)
            name = self.keys.check(headers.get("authorization"), headers.get("x-api-key"))
        record = scope.get("vitrine.record")  # WebSockets have none, and are refused anyway
        if record is not None:
            record.key = name
            self.limit.check(record.sender)

    def _is_public(self, path: str) -> bool:
        if path == METRICS:
            return not self.metrics_need_key
        return path in _PUBLIC_PATHS or (path.startswith((PAGE_FILES, STATIC_FILES)) and ".." not in path)
