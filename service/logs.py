"""Log lines: one for each request when it is finished, and all others of the server's processes in the same form."""

import json
import logging
import sys
import time
from typing import Any, Literal

from service.observation import STAGES, Observation

LogFormat = Literal["auto", "json", "text"]

_access = logging.getLogger("bentoml.vitrine.access")
_QUIET = ("/livez", "/readyz", "/healthz", "/metrics", "/v2/health/live", "/v2/health/ready")  # at level DEBUG
_LONGEST_PATH = 200


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
            **getattr(record, "request", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def wants_json(log_format: LogFormat) -> bool:
    """Whether lines are JSON: "auto" means all that is not read on a terminal."""
    return log_format == "json" or (log_format == "auto" and not sys.stdout.isatty())


def configure(log_format: LogFormat) -> None:
    """Give BentoML's handlers, which all loggers of its processes share, the wanted format."""
    if not wants_json(log_format):
        return
    for name in (None, "bentoml", "uvicorn.error", "circus"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(JsonFormatter())


def log_request(observation: Observation, status: str, seconds: float) -> None:
    """Write the line of a finished request; nothing of the images, no key, no query."""
    level = logging.DEBUG if observation.path in _QUIET else logging.INFO
    if not _access.isEnabledFor(level):
        return
    path = observation.path[:_LONGEST_PATH].encode("unicode_escape").decode()
    milliseconds = {name: round(1000 * observation.seconds(name), 3) for name in STAGES}
    model = f"{observation.model}@{observation.version}" if observation.model else ""
    request = {
        "request_id": observation.request_id,
        "trace_id": observation.trace_id,
        "client": observation.client,
        "method": observation.method,
        "route": observation.route,
        "path": path,
        "status": status,
        "error": observation.error,
        "model": model,
        "variant": observation.variant,
        "images": observation.images,
        "milliseconds": {**milliseconds, "total": round(1000 * seconds, 3)},
        "bytes_in": observation.bytes_in,
        "bytes_out": observation.bytes_out,
    }
    text = f"{observation.method} {path} {status} {1000 * seconds:.1f} ms"
    details = " ".join(part for part in (model, observation.error, observation.request_id) if part)
    _access.log(level, "%s  %s", text, details, extra={"request": request})
