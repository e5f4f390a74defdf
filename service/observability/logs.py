"""Log lines: one for each request when it is finished, and all others of the server's processes in the same form."""

import asyncio
import json
import logging
import sys
import threading
import time
from contextlib import nullcontext
from types import TracebackType
from typing import Any, TextIO

import orjson

from vitrine.service.observability.request_record import STAGES, RequestRecord, current
from vitrine.service.settings import LogFormat

_log = logging.getLogger("bentoml.vitrine")
_access = logging.getLogger("bentoml.vitrine.access")
_MAX_PATH, _MAX_METHOD = 200, 20
_TOGETHER_SECONDS, _MAX_TOGETHER = 0.1, 32  # more would keep an answer waiting

_finished: list[tuple[RequestRecord, str, float, float]] = []  # requests without a line yet, when they ended


class JsonFormatter(logging.Formatter):
    """A record as one JSON object on one line."""

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
        answered = current.get()
        if request is not None:
            line |= request
        elif answered is not None:  # logged while a request was answered
            line |= {"request_id": answered.request_id, "trace_id": answered.trace_id}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return _escaped(orjson.dumps(line, default=str).decode())
        except TypeError:  # half a character
            return json.dumps(line, default=str)


def _escaped(text: str) -> str:
    """JSON in ASCII: no sign in it can end or forge a line."""
    if text.isascii():
        return text
    return "".join(sign if sign.isascii() else json.dumps(sign)[1:-1] for sign in text)


def wants_json(log_format: LogFormat) -> bool:
    """Whether lines are JSON: "auto" means all that is not read on a terminal."""
    return log_format == "json" or (log_format == "auto" and not sys.stdout.isatty())


def configure(log_format: LogFormat, *, probes: bool = False) -> None:
    """Give BentoML's handlers, which all loggers of its processes share, the wanted format.

    Args:
        log_format: see `wants_json`.
        probes: write the lines of probes and scrapes, too.

    BentoML has configured logging before it imports the service, in the workers and in the process that starts them.
    """
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            # Its configuration switches off whatever was there before, asyncio's "exception was never retrieved" too.
            logger.disabled = False
    logging.getLogger("uvicorn.access").propagate = False  # uvicorn would write query strings at level DEBUG
    if probes:  # BentoML's own debug mode would show clients tracebacks
        _access.setLevel(logging.DEBUG)
    if not wants_json(log_format):
        return
    for name in (None, "bentoml", "uvicorn.error", "circus"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(JsonFormatter())
            handler.filters.clear()  # BentoML's looks up what its own format shows
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda uncaught: _log_uncaught(
        uncaught.exc_type, uncaught.exc_value or uncaught.exc_type(), uncaught.exc_traceback
    )


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python would print as it is."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    elif not issubclass(kind, SystemExit):
        _log.critical("uncaught %s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def log_request(record: RequestRecord, status: str, seconds: float) -> None:
    """Write the line of a finished request, with others of the same tenth of a second.

    One by one they would take a fifth of the event loop's time for a request, and as many calls of the system.
    """
    if not _access.isEnabledFor(_level(record)):
        return
    _finished.append((record, status, seconds, time.time()))
    if len(_finished) == 1:
        asyncio.get_running_loop().call_later(_TOGETHER_SECONDS, write_lines)
    elif len(_finished) >= _MAX_TOGETHER:
        write_lines()


def write_lines() -> None:
    """Write the lines of all requests that have finished."""
    records = [_log_record(*finished) for finished in _finished]
    _finished.clear()
    for handler in _log_handlers():
        passing = [record for record in records if handler.filter(record)]
        with handler.lock or nullcontext():
            handler.stream.write("".join(handler.format(record) + handler.terminator for record in passing))
            handler.flush()


def _log_handlers() -> list["logging.StreamHandler[TextIO]"]:
    """Those of all lines of ours: BentoML's."""
    return [handler for handler in logging.getLogger("bentoml").handlers if isinstance(handler, logging.StreamHandler)]


def _level(record: RequestRecord) -> int:
    return logging.DEBUG if record.quiet else logging.INFO


def _log_record(record: RequestRecord, status: str, seconds: float, ended: float) -> logging.LogRecord:
    """Of a request; nothing of the images, no key, no query."""
    method = record.method[:_MAX_METHOD]
    path = record.path[:_MAX_PATH].encode("unicode_escape").decode()  # of control characters as of all others
    stages = {name: round(1000 * record.seconds(name), 3) for name in STAGES} if record.stages else {}
    request = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "client": record.client,
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
    spent = ", ".join(f"{name} {stage:.1f}" for name, stage in stages.items())
    text = f"{method} {path} {status} {1000 * seconds:.1f} ms{f' ({spent})' if spent else ''}"
    model = f"{record.model}@{record.version}" if record.model else ""
    details = " ".join(part for part in (model, record.error, record.request_id) if part)
    known = {"msg": f"{text}  {details}", "args": None, "created": ended, "msecs": 1000 * (ended % 1)}
    named = {"name": _access.name, "levelno": _level(record), "request": request}
    return logging.makeLogRecord({**named, "levelname": logging.getLevelName(_level(record)), **known})
