"""Log lines of real servers."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc

Serving = Callable[..., AbstractContextManager[Any]]


def stopped(running: Any) -> str:
    running.process.terminate()
    running.process.wait(timeout=30)
    return "".join(running.lines)


def test_each_request_is_one_json_object(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
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
    lines = [json.loads(line) for line in printed.splitlines()]  # every line is an object
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    requests = [line for line in lines if "request_id" in line]
    classify, detect, forged, metadata = requests  # health is not logged
    assert classify["request_id"] == "mine-1"
    assert {key: classify[key] for key in ("method", "route", "status", "model", "variant", "images", "error")} == {
        "method": "POST",
        "route": "/classify",
        "status": "200",
        "model": "colours@1",
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
    assert key not in printed
    assert "secret" not in printed


def test_a_person_reads_text(serve: Serving, tiny_bundles: Path, photograph: bytes) -> None:
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="text") as running:
        httpx.post(f"{running.url}/classify", content=photograph, headers={"X-Request-ID": "mine-1"})
        printed = stopped(running)
    (line,) = [line for line in printed.splitlines() if "mine-1" in line]
    assert "POST /classify 200" in line
    assert "colours@1" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_what_is_not_read_on_a_terminal_is_json(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_LOG_FORMAT="auto") as running:  # its output is a pipe
        printed = stopped(running)
    assert any("ready:" in json.loads(line)["message"] for line in printed.splitlines())


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("ä", False), ("", False)],
)
def test_a_request_id_is_passed_on_if_it_is_harmless(sent: str, kept: bool, server: str) -> None:
    for path in ("/models", "/nowhere", "/livez"):
        answer = httpx.get(server + path, headers={"X-Request-ID": sent.encode()})
        assert (answer.headers["x-request-id"] == sent) == kept
        assert len(answer.headers["x-request-id"]) >= 5


def test_server_timing_is_on_answers_and_errors(server: str, photograph: bytes) -> None:
    for content, status in ((photograph, 200), (b"no image", 415)):
        answer = httpx.post(f"{server}/classify", content=content)
        assert answer.status_code == status
        parts = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
        assert parts.keys() == {"decode", "queue", "inference"}
        assert float(parts["decode"]) > 0
        assert (float(parts["inference"]) > 0) == (status == 200)
    assert "server-timing" not in httpx.get(f"{server}/models").headers
