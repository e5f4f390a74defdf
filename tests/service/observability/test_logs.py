"""Log lines of real servers."""

import errno
import io
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tritonclient.grpc
import tritonclient.utils
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitrine.service.observability import logs
from vitrine.service.observability.logs import JsonFormatter, TextFormatter, _log_record
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.settings import hash_key

Serving = Callable[..., AbstractContextManager[Any]]


def stopped(running: Any) -> str:
    running.process.terminate()
    running.process.wait(timeout=30)
    return "".join(running.lines)


def test_each_request_is_one_json_object(
    serve: Serving, tiny_bundles: Path, root: Path, photograph: bytes, tmp_path: Path
) -> None:
    key, file = "a-key-of-the-tests-1", tmp_path / "keys"
    file.write_text(f"ci {hash_key(key)}")
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json", VITRINE_API_KEYS_FILE=str(file)) as running:
        headers = {"X-API-Key": key, "X-Request-ID": "mine-1"}
        httpx.post(f"{running.url}/classify?top_k=2", content=photograph, headers=headers)
        httpx.post(f"{running.url}/detect", content=b"no image", headers={"X-API-Key": key})
        httpx.get(f"{running.url}/a%0aforged%20line?secret=1")
        httpx.get(f"{running.url}/livez")
        with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
            client.get_model_metadata("colours", headers={"x-api-key": key, "x-request-id": "mine-2"})
        printed = stopped(running)
    lines = [json.loads(line) for line in printed.splitlines()]  # all lines are objects
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    requests = [line for line in lines if "request_id" in line]
    classify, detect, forged, metadata = requests  # probes are not logged
    (documented,) = re.findall(r"```json\n(.*?)\n```", (root / "docs/observability.md").read_text(), flags=re.DOTALL)
    assert list(classify) == list(json.loads(documented))
    assert classify["milliseconds"].keys() == json.loads(documented)["milliseconds"].keys()
    assert classify["request_id"] == "mine-1"
    assert {
        key: classify[key] for key in ("method", "route", "status", "model", "version", "variant", "images", "error")
    } == {
        "method": "POST",
        "route": "/classify",
        "status": "200",
        "model": "colours",
        "version": "1",
        "variant": "fp32",
        "images": 1,
        "error": "",
    }
    assert [line["key"] for line in requests] == ["ci", "ci", "", "ci"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", metadata["client"])  # as over HTTP
    assert classify["bytes_in"] == len(photograph)
    assert classify["bytes_out"] > 50
    milliseconds = classify["milliseconds"]
    parts = milliseconds["decode"] + milliseconds["queue"] + milliseconds["inference"]
    assert 0 < parts <= milliseconds["total"]
    assert (detect["status"], detect["error"]) == ("415", "unsupported_image_type")
    assert (forged["status"], forged["route"], forged["path"]) == ("401", "", "/a\\nforged line")
    assert metadata["request_id"] == "mine-2"
    assert (metadata["method"], metadata["status"]) == ("gRPC", "OK")
    assert metadata["bytes_out"] > 50
    assert key not in printed
    assert "secret" not in printed


def test_text_lines_are_readable_and_cannot_be_forged(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="text") as running:
        httpx.post(f"{running.url}/classify", content=photograph, headers={"X-Request-ID": "mine-1"})
        httpx.get(f"{running.url}/a%0aforged%1b%5b2J{'long' * 500}", headers={"X-Request-ID": "mine-2"})
        printed = stopped(running)
    (line,) = [line for line in printed.splitlines() if "mine-1" in line]
    (forged,) = [line for line in printed.splitlines() if "mine-2" in line]
    assert "GET /a\\nforged\\x1b[2Jlong" in forged
    assert len(forged) < 500
    assert "POST /classify 200" in line
    assert "(decode " in line
    assert "colours@1" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_auto_means_json_unless_on_a_terminal(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="auto") as running:  # stdout is a pipe
        printed = stopped(running)
    assert any("ready:" in json.loads(line)["message"] for line in printed.splitlines())


@pytest.mark.parametrize("probes", [False, True])
def test_probes_are_logged_only_if_set(probes: bool, serve: Serving, tiny_bundles: Path) -> None:
    paths = {"/livez", "/readyz", "/metrics", "/v2/health/ready", "/models"}
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json", VITRINE_LOG_PROBES=str(probes)) as running:
        for path in paths:
            httpx.get(running.url + path).raise_for_status()
        printed = stopped(running)
    logged = {line["path"] for line in map(json.loads, printed.splitlines()) if "path" in line}
    assert logged == (paths if probes else {"/models"})


# Configures logging as a worker does, then logs in all ways: various loggers, a warning, and uncaught exceptions.
WORKER = """
import logging, threading, warnings
from bentoml._internal.log import configure_server_logging
configure_server_logging()
from vitrine.service.observability.logs import configure
from vitrine.service.observability.request_record import RequestRecord, current_record
configure("json")
logging.getLogger("bentoml.vitrine").info("two\\nlines")
current_record.set(RequestRecord(request_id="mine"))
for name in ("circus", "uvicorn.error", "asyncio", "elsewhere"):
    logging.getLogger(name).error("from %s", name)
try:
    {}["missing"]
except KeyError:
    logging.getLogger("uvicorn.error").exception("caught")
logging.getLogger().setLevel(logging.DEBUG)
logging.getLogger("uvicorn.access").info("with its query")
warnings.warn("careful")
thread = threading.Thread(target=lambda: {}["thread"])
thread.start()
thread.join()
{}["main"]
"""


def test_every_line_of_a_worker_is_json(root: Path) -> None:
    process = subprocess.run([sys.executable, "-c", WORKER], cwd=root, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (process.stdout + process.stderr).splitlines()]
    assert lines[0]["message"] == "two\nlines"
    assert "request_id" not in lines[0]
    assert {line["request_id"] for line in lines[1:] if line["process"] and "thread" not in line["message"]} == {"mine"}
    named = {line["logger"]: line["message"] for line in lines}
    assert {name: named[name] for name in ("circus", "asyncio", "elsewhere")} == {
        name: f"from {name}" for name in ("circus", "asyncio", "elsewhere")
    }
    assert "careful" in named["py.warnings"]
    assert "uvicorn.access" not in named
    traced = {line["message"]: line["traceback"] for line in lines if "traceback" in line}
    assert traced.keys() == {"caught", "uncaught KeyError: 'thread'", "uncaught KeyError: 'main'"}
    assert all(text.startswith("Traceback") and "\nKeyError" in text for text in traced.values())


def test_lines_about_a_killed_worker_are_json_too(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json", VITRINE_WORKERS="2") as running:
        worker = psutil.Process(running.process.pid).children()[0]
        ready = sum("ready:" in line for line in running.lines)
        worker.kill()
        deadline = time.monotonic() + 30
        while sum("ready:" in line for line in running.lines) == ready:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        printed = stopped(running)
    assert all(json.loads(line)["message"] for line in printed.splitlines())


anything = st.text(st.characters(exclude_categories=()), max_size=400)  # controls, separators, lone surrogates
HOSTILE = "\n\r\t\0\x1b[2J\x7f\x85\u2028\u2029\u202e\u2066\ufeff\ud800\U000e0001\x9b31m"
TEXT = TextFormatter("%(asctime)s %(levelname)s %(message)s")
LINE = ("method", "path", "client", "key", "route", "model", "version", "variant", "error", "request_id", "trace_id")


@given(st.fixed_dictionaries(dict.fromkeys(LINE, anything)))
@example(dict.fromkeys(LINE, HOSTILE))
@example(dict.fromkeys(LINE, HOSTILE * 500))
@settings(deadline=None)
def test_a_request_is_one_line_whatever_its_fields_hold(fields: dict[str, str]) -> None:
    record = _log_record(RequestRecord(**fields), "200", 0.1, 0.0)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["request_id"] == fields["request_id"]
    assert TEXT.format(record).isprintable()


@given(anything, anything)
@example(HOSTILE, HOSTILE)
@example("x\n2026-01-01 INFO forged", "x\n2026-01-01 INFO forged")
def test_no_message_or_traceback_can_forge_a_line(message: str, reason: str) -> None:
    """Messages name bundles, files and settings; tracebacks hold whatever a library puts into its errors."""
    try:
        raise ValueError(reason)
    except ValueError as error:
        caught = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("bentoml.vitrine", logging.ERROR, "x.py", 1, "found %s", (message,), caught)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"].startswith("found ")
    first, *others = TEXT.format(record).split("\n")
    assert first.isprintable()
    assert all(other.startswith("    ") and other.isprintable() for other in others)


SENT = [
    b"GET /a%0d%0aforged%1b%5b2J%e2%80%a8%e2%80%ae%c2%85%00%7f HTTP/1.1\r\n",
    b"GET /" + b"long" * 5000 + b" HTTP/1.1\r\n",
    b"GET /models/%0aforged%ff%fe HTTP/1.1\r\n",
    b"POST /v2/models/%0aforged%1b/infer HTTP/1.1\r\nContent-Length: 0\r\n",
    b"POST /classify?model=%0aforged%1b%5b2J HTTP/1.1\r\nContent-Length: 0\r\n",
    b"POST /classify HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 88\r\n",
    b"GET /models HTTP/1.1\r\nX-Forwarded-For: \x9b2Jforged\xc2\x85" + b"y" * 9000 + b"\r\n",
    b"GET /models HTTP/1.1\r\nX-Forwarded-For: 192.0.2.7\r\n",
    b"GET /models HTTP/1.1\r\nX-Forwarded-For: 127.0.0.1, forged\r\n",
    b"GET /models HTTP/1.1\r\nUser-Agent: \x9b2J\xe2\x80\xa8\r\ntraceparent: \x85\r\nbaggage: a=%0a\r\n",
    b"GET /models HTTP/1.1\r\nX-Request-ID: \x9b2Jforged\r\n",
    b"GET /models HTTP/1.1\r\nX-API-Key: \x9b2Jforged\r\nAuthorization: Bearer \x85\r\n",
]
FORM = b'--x\r\nContent-Disposition: form-data; name="\x1b[2J\xe2\x80\xa8"; filename="%0a"\r\n\r\n1\r\n--x--\r\n'


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_requests_are_answered_although_their_lines_cannot_be_written() -> None:
    handler, logger = logging.StreamHandler(FullDisk()), logging.getLogger("bentoml")
    logger.addHandler(handler)
    try:
        for _ in range(2):
            logs._buffer.append((RequestRecord(), "200", 0.0, 0.0))
            logs.flush_requests()
            assert not logs._buffer
    finally:
        logger.removeHandler(handler)


def test_hostile_requests_leave_one_line_each(serve: Serving, tiny_bundles: Path) -> None:
    """See also tests/reliability/test_log_injection.py."""
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json") as running:
        ready = len(running.lines)
        for number, request in enumerate(SENT):
            with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as client:
                mark = b"" if b"X-Request-ID" in request else b"X-Request-ID: mark-%d\r\n" % number
                client.sendall(request + mark + b"Host: x\r\nConnection: close\r\n\r\n" + FORM[:88].ljust(88))
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            status = int(answer.split(b" ", 2)[1])
            assert 200 <= status < 500, answer
            assert b"\x1b" not in answer.partition(b"\r\n\r\n")[0]
        with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
            for name in ("\nforged\x1b[2J", "x" * 100_000, "\u2028\u202e"):
                with pytest.raises(tritonclient.utils.InferenceServerException):
                    client.get_model_metadata(name, headers={"x-request-id": "a b~", "x-api-key": "~"})
        printed = stopped(running)
    lines = [line for line in printed.split("\n")[ready:] if line]
    requests = [line for line in map(json.loads, lines) if "path" in line]
    clients = [line["client"].rpartition(":")[0] for line in requests if line["method"] != "gRPC"]
    assert clients == ["127.0.0.1"] * 6 + ["", "192.0.2.7", ""] + ["127.0.0.1"] * 3
    assert len(requests) == len(SENT) + 3
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert not any(line.startswith("forged") for line in lines)


def test_names_on_disk_cannot_forge_lines(serve: Serving, tiny_bundles: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundles"
    shutil.copytree(tiny_bundles / "colours", root / "colours")
    with serve(root, VITRINE_POLL_SECONDS="0.1") as running:
        ready = len(running.lines)
        folder = root / "evil\nforged\x1b[2J\u202e" / "1"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        deadline = time.monotonic() + 30
        while not any("evil" in line for line in running.lines):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stopped(running)
    assert all(line.removesuffix("\n").isprintable() for line in running.lines[ready:])
    assert not any(line.startswith("forged") for line in running.lines)
