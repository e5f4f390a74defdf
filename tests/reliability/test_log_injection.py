"""No client can forge, split or colour a line of the log, in either format and over either transport."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.soak.client import wait_until
from tests.reliability.test_smuggling import converse, port_of

Serving = Callable[..., AbstractContextManager[Any]]
FORGED = "FORGED 2026-01-01"
ATTACKS = (
    f"GET /a%0d%0a{FORGED.replace(' ', '%20')} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    f"GET /a%0a%1b[2J%1b[31m{FORGED.replace(' ', '%20')} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    b"GET /a%e2%80%a8FORGED%c2%85%c2%9b31m%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a\xe2\x80\xa8FORGED\xc2\x85\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v2/models/%22,%22level%22:%22error%22,%22a%22:%22 HTTP/1.1\r\nHost: a\r\n\r\n",
    f"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Request-ID: {FORGED}\x1b[31m\r\n\r\n".encode(),
    b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Request-ID: a\rFORGED\r\n\r\n",
    b'GET /v2 HTTP/1.1\r\nHost: a\r\nX-Request-ID: ","FORGED":"\r\nTraceparent: FORGED\x1b\r\n\r\n',
    b"GET /v2 HTTP/1.1\r\nHost: FORGED\x1b[31m\r\nUser-Agent: FORGED\x1b\r\nX-Forwarded-For: FORGED\r\n\r\n",
    b"POST /classify?model=a%0aFORGED HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    b"POST /classify?%0aFORGED%1b=1 HTTP/1.1\r\nHost: a\r\nContent-Type: a\x1bFORGED\r\nContent-Length: 1\r\n\r\nx",
    b"\x16\x03\x01\x1b[31mFORGED\r\n\r\n",
    b"FORGED\x1b[31m /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
)


async def call(server: Any) -> None:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        for metadata in ((("x-request-id", FORGED),), (("user-agent", FORGED),), (("traceparent", FORGED),)):
            for message in (b"", b"\n\x0ca\n" + FORGED[:10].encode()):  # a model's name with a line break
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, metadata=metadata)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_client_writes_into_the_log(log_format: str, serve: Serving, two_bundles: Path) -> None:
    with serve(two_bundles, VITRINE_LOG_FORMAT=log_format) as server:
        start = len(server.lines)
        for attack in ATTACKS:
            closing = attack.replace(b"Host: ", b"Connection: close\r\nHost: ", 1)
            converse(port_of(server.url), closing, seconds=1)
        asyncio.run(call(server))
        converse(port_of(server.url), b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Request-ID: last\r\nConnection: close\r\n\r\n")
        wait_until(lambda: "last" in "".join(server.lines[start:]), "the last request in the log")
        lines = server.lines[start:]
    assert len(lines) <= len(ATTACKS) + 20
    for line in lines:
        text = line.removesuffix("\n")
        assert text.isprintable(), line
        assert not text.startswith("FORGED")
        assert len(text) < 2_000
        if log_format == "json":
            assert json.loads(text)["level"] != "error"
