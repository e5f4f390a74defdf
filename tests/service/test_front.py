"""The front: a path with a trailing slash is the path without it."""

import httpx
import pytest


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/models"),
        ("GET", "/models/colours"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v2"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/models/colours/ready"),
        ("POST", "/v2/repository/index"),
        ("POST", "/classify"),
        ("POST", "/detect"),
    ],
)
def test_a_trailing_slash_makes_no_difference(method: str, path: str, server: str, photograph: bytes) -> None:
    content = photograph if path in ("/classify", "/detect") else b""
    answer = httpx.request(method, f"{server}{path}/", content=content)
    assert answer.status_code == 200
    if content:
        assert answer.json() == httpx.post(server + path, content=content).json()


def test_the_route_is_counted_without_its_slash(server: str, photograph: bytes) -> None:
    assert httpx.post(f"{server}/classify/?top_k=1", content=photograph).status_code == 200
    metrics = httpx.get(f"{server}/metrics").text
    assert 'route="/classify"' in metrics
    assert 'route="/classify/"' not in metrics


def test_only_one_slash_is_dropped(server: str, photograph: bytes) -> None:
    for path in ("/classify//", "//classify"):
        answer = httpx.post(server + path, content=photograph)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert not [path for path in httpx.get(f"{server}/openapi.json").json()["paths"] if path[1:].endswith("/")]
