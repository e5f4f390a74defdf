"""Log lines of real servers."""

import json
import re
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

Serving = Callable[..., AbstractContextManager[Any]]


def stopped(running: Any) -> str:
    running.process.terminate()
    running.process.wait(timeout=30)
    return "".join(running.lines)


def test_each_request_is_one_json_object(serve: Serving, tiny_bundles: Path, root: Path, photograph: bytes) -> None:
    key = "a-key-of-the-tests-1"
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="json", VITRINE_API_KEYS=key) as running:
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
