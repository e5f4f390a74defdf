"""Headers of every response."""

import httpx
import pytest


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("ä", False), ("", False)],
)
def test_a_request_id_is_kept_if_it_is_safe(sent: str, kept: bool, server: str) -> None:
    for path in ("/models", "/nowhere", "/livez"):
        response = httpx.get(server + path, headers={"X-Request-ID": sent.encode()})
        assert (response.headers["x-request-id"] == sent) == kept
        assert len(response.headers["x-request-id"]) >= 5


def test_server_timing_is_on_answers_and_errors(server: str, photograph: bytes) -> None:
    for content, status in ((photograph, 200), (b"no image", 415)):
        response = httpx.post(f"{server}/classify", content=content)
        assert response.status_code == status
        parts = dict(part.strip().split(";dur=") for part in response.headers["server-timing"].split(","))
        assert parts.keys() == {"decode", "queue", "inference"}
        assert float(parts["decode"]) > 0
        assert (float(parts["inference"]) > 0) == (status == 200)
    assert "server-timing" not in httpx.get(f"{server}/models").headers
