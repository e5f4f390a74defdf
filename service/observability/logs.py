"""Logging: one line per finished request, and all other lines of the server's processes in the same format."""

import asyncio
import json
import logging
import sys
import threading
import time
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Any

import orjson

from vitrine.bundle.errors import printable
from vitrine.service.observability.request_record import STAGES, RequestRecord, current_record
from vitrine.service.settings import LogFormat

_log = logging.getLogger("bentoml.vitrine")
_access = logging.getLogger("bentoml.vitrine.access")
_MAX_PATH, _MAX_METHOD = 200, 20
_FLUSH_SECONDS, _MAX_BUFFERED = 0.1, 32  # flushing more lines at once would delay a response

_buffer: list[tuple[RequestRecord, str, float, float]] = []  # finished requests that are not logged yet


class TextFormatter(logging.Formatter):
    """Format a log record as one line of text; only tracebacks, which are indented, add others."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))


class JsonFormatter(logging.Formatter):
    """Format a log record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        request = getattr(record, "request", None)
        in_progress = current_record.get()
        if request is not None:
            line |= request
        elif in_progress is not None:
            line |= {"request_id": in_progress.request_id, "trace_id": in_progress.trace_id}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return _to_ascii(orjson.dumps(line, default=str).decode())
        except TypeError:  # a lone surrogate
            return _to_ascii(json.dumps(line, default=str))


def _to_ascii(text: str) -> str:
    """Escape the non-ASCII characters of JSON, and DEL, so that none can end or forge a line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text).replace("\x7f", "\\u007f")


def wants_json(log_format: LogFormat) -> bool:
    """Whether log lines are JSON; "auto" means JSON unless stdout is a terminal."""
    return log_format == "json" or (log_format == "auto" and not sys.stdout.isatty())


def configure(log_format: LogFormat, *, probes: bool = False) -> None:
    """Set the format of BentoML's handlers, which all loggers of its processes share.

    BentoML has configured logging before it imports the service, in the workers and in the process that starts them.

    Args:
        log_format: see `wants_json`.
        probes: also log probes and scrapes.
    """
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            # BentoML's configuration disables existing loggers, including asyncio's "exception was never retrieved".
            logger.disabled = False
    logging.getLogger("uvicorn.access").propagate = False  # uvicorn would log query strings at level DEBUG
    if probes:  # BentoML's own debug mode would send tracebacks to clients
        _access.setLevel(logging.DEBUG)
    for name in (None, "bentoml", "uvicorn.error", "circus"):
        for handler in logging.getLogger(name).handlers:
            if wants_json(log_format):
                handler.setFormatter(JsonFormatter())
                handler.filters.clear()  # BentoML's filter looks up the fields of its own format
            elif handler.formatter is not None:
                handler.setFormatter(TextFormatter(handler.formatter._fmt, handler.formatter.datefmt))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda uncaught: _log_uncaught(
        uncaught.exc_type, uncaught.exc_value or uncaught.exc_type(), uncaught.exc_traceback
    )


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Log an uncaught exception, which Python would print unformatted."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    elif not issubclass(kind, SystemExit):
        _log.critical("uncaught %s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def log_request(record: RequestRecord, status: str, seconds: float) -> None:
    """Log a finished request, together with the others of the same tenth of a second.

    Logging each on its own would take a fifth of a request's event loop time, and as many system calls.
    """
    if not _access.isEnabledFor(_level(record)):
        return
    _buffer.append((record, status, seconds, time.time()))
    if len(_buffer) == 1:
        asyncio.get_running_loop().call_later(_FLUSH_SECONDS, flush_requests)
    elif len(_buffer) >= _MAX_BUFFERED:
        flush_requests()


def flush_requests() -> None:
    """Write the lines of all buffered requests."""
    requests, _buffer[:] = _buffer[:], []
    records = [_log_record(*request) for request in requests]
    for handler in logging.getLogger("bentoml").handlers:
        if not isinstance(handler, logging.StreamHandler):
            continue
        lines = [handler.format(record) + handler.terminator for record in records if handler.filter(record)]
        # Where lines cannot be written (a full disk, a closed pipe), requests are answered nevertheless.
        with handler.lock or nullcontext(), suppress(OSError, ValueError):
            handler.stream.write("".join(lines))
            handler.flush()


def _level(record: RequestRecord) -> int:
    return logging.DEBUG if record.quiet else logging.INFO


def _log_record(record: RequestRecord, status: str, seconds: float, ended: float) -> logging.LogRecord:
    """Make a request's log record, without image data, API keys and the query string."""
    method = printable(record.method[:_MAX_METHOD])
    path = record.path[:_MAX_PATH].encode("unicode_escape").decode()  # escapes control characters, too
    stages = {name: round(1000 * record.seconds(name), 3) for name in STAGES} if record.stages else {}
    request = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "client": record.client,
        "key": record.key,
        "method": method,
        "route": record.route,
        "path": path,
        "status": status,
        "error": record.error,
        "model": record.model,
        "version": record.version,
        "variant": record.variant,
        "images": record.images,
        "milliseconds": {**stages, "total": round(1000 * seconds, 3)},
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
    }
    durations = ", ".join(f"{name} {stage:.1f}" for name, stage in stages.items())
    text = f"{method} {path} {status} {1000 * seconds:.1f} ms{f' ({durations})' if durations else ''}"
    model = f"{record.model}@{record.version}" if record.model else ""
    key = f"key={record.key}" if record.key else ""
    details = " ".join(part for part in (model, record.error, key, record.request_id) if part)
    level = _level(record)
    return logging.makeLogRecord(
        {
            "name": _access.name,
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": f"{text}  {details}",
            "args": None,
            "created": ended,
            "msecs": 1000 * (ended % 1),
            "request": request,
        }
    )
