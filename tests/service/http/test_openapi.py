"""The OpenAPI document: valid, complete, and followed by the server."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from vitrine.service.http.openapi import openapi_document

Serving = Callable[..., AbstractContextManager[Any]]

DOCUMENT = json.loads(openapi_document())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def test_the_document_is_valid_and_names_every_route(server: str, root: Path, tmp_path: Path) -> None:
    document = httpx.get(f"{server}/openapi.json").json()
    validate(document)
    own = {"/", "/page/{name}", "/docs", "/openapi.json", "/docs.json", "/schema.json"}  # pages, and BentoML's client
    program = f"""
from pathlib import Path
from typing import Any
from vitrine.service.access import Keys
from vitrine.service.app import create_app
from vitrine.service.rate_limit import RateLimit
from vitrine.service.settings import Settings
from vitrine.service.runtime.sizing import Sizing
app = create_app(Settings(), Sizing(1, 1, ""), Keys(()), RateLimit(0, None), Path({str(tmp_path)!r}))
print("\\n".join(route.path for route in app.routes))
"""  # a separate process: one can hold a single definition of the messages, and other tests import Triton's
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    routes = set(printed.splitlines()) - own
    assert set(document["paths"]) == routes


@pytest.fixture(scope="module")
def api(serve: Serving, tiny_bundles: Path) -> Iterator[Any]:
    with serve(tiny_bundles, VITRINE_MODEL_CONTROL="true") as (url, *_):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for path, item in DOCUMENT["paths"].items() for method in item]
)
def test_responses_conform_to_the_document(method: str, path: str, api: Any) -> None:
    @given(case=api[path][method].as_strategy())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def send(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    send()


def test_the_page_shows_the_routes_in_a_browser_offline(server: str, chromium: str, tmp_path: Path) -> None:
    page = httpx.get(f"{server}/docs")
    assert "http" not in page.text.replace("http-equiv", "")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=10000"]
    shown = subprocess.run([*command, "--dump-dom", f"{server}/docs"], capture_output=True, text=True, timeout=120)
    for path in ("/classify", "/detect", "/models/{name}", "/v2/models/{name}/infer", "/metrics"):
        assert f'data-path="{path}"' in shown.stdout, shown.stderr[-2000:]
