"""Where a request ends: the server never disagrees with RFC 9112, nor with HAProxy or nginx in front of it."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.soak.client import HOST, wait_until

HIDDEN = b"GET /v2 HTTP/1.1\r\nHost: vitrine\r\nX-Request-ID: hidden\r\n\r\n"
NEXT = b"GET /v2 HTTP/1.1\r\nHost: vitrine\r\nX-Request-ID: next\r\nConnection: close\r\n\r\n"
REFUSED = {400, 413, 414, 431, 501, 505}


def post(*lines: str, body: bytes = b"", target: str = "/classify", host: str = "Host: vitrine") -> bytes:
    head = [f"POST {target} HTTP/1.1", *([host] if host else []), "X-Request-ID: first", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


CHUNKED = "Transfer-Encoding: chunked"
END = b"0\r\n\r\n"
HIDDEN_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
LENGTH = f"Content-Length: {len(HIDDEN)}"

# Requests that hide another one from whoever reads them in one of the two ways. RFC 9112 has them refused.
AMBIGUOUS = {
    "length, then chunked": post("Content-Length: 5", CHUNKED, body=END + HIDDEN),
    "chunked, then length": post(CHUNKED, "Content-Length: 5", body=END + HIDDEN),
    "length that covers more than the chunks": post(f"Content-Length: {5 + len(HIDDEN)}", CHUNKED, body=END + HIDDEN),
    "two lengths": post("Content-Length: 0", LENGTH, body=HIDDEN),
    "two lengths, the longer one first": post(LENGTH, "Content-Length: 0", body=HIDDEN),
    "a list of lengths": post(f"Content-Length: 0, {len(HIDDEN)}", body=HIDDEN),
    "length with a plus": post(f"Content-Length: +{len(HIDDEN)}", body=HIDDEN),
    "negative length": post("Content-Length: -1", body=HIDDEN),
    "hexadecimal length": post(f"Content-Length: 0x{len(HIDDEN):x}", body=HIDDEN),
    "length with a space inside": post("Content-Length: 1 0", body=HIDDEN),
    "length without digits": post("Content-Length: ", body=HIDDEN),
    "length beyond 64 bits": post("Content-Length: 18446744073709551617", body=HIDDEN),
    "unknown coding": post("Transfer-Encoding: xchunked", LENGTH, body=HIDDEN),
    "unknown coding without a length": post("Transfer-Encoding: xchunked", body=END + HIDDEN),
    "chunked is not last": post("Transfer-Encoding: chunked, identity", body=END + HIDDEN),
    "chunked on one line, identity on another": post(CHUNKED, "Transfer-Encoding: identity", body=END + HIDDEN),
    "chunked in quotes": post('Transfer-Encoding: "chunked"', LENGTH, body=HIDDEN),
    "chunked after a vertical tab": post("Transfer-Encoding: \x0bchunked", LENGTH, body=HIDDEN),
    "space before the colon of the coding": post("Transfer-Encoding : chunked", LENGTH, body=HIDDEN),
    "space before the colon of the length": post(f"Content-Length : {len(HIDDEN)}", body=HIDDEN),
    "coding in a folded line": post("X: y", " Transfer-Encoding: chunked", LENGTH, body=HIDDEN),
    "coding folded": post("Transfer-Encoding:", " chunked", LENGTH, body=END + HIDDEN),
    "space before the first field": post(" Transfer-Encoding: chunked", LENGTH, body=HIDDEN, host=""),
    "field without a colon": post("Transfer-Encoding", LENGTH, body=HIDDEN),
    "NUL in a name": post("Transfer-Encoding\0: chunked", LENGTH, body=HIDDEN),
    "NUL in a value": post("X: a\0b", LENGTH, body=HIDDEN),
    "lone CR in a value": post("X: a\rTransfer-Encoding: chunked", LENGTH, body=HIDDEN),
    "lone CR as an end of line": post(LENGTH, body=b"").replace(b"\r\n", b"\r") + HIDDEN,
    "chunk size of 17 digits": post(CHUNKED, body=b"10000000000000005\r\nhello\r\n" + END + HIDDEN),
    "negative chunk size": post(CHUNKED, body=b"-5\r\nhello\r\n" + END + HIDDEN),
    "chunk size with 0x": post(CHUNKED, body=b"0x5\r\nhello\r\n" + END + HIDDEN),
    "space before the chunk size": post(CHUNKED, body=b" 5\r\nhello\r\n" + END + HIDDEN),
    "no chunk size": post(CHUNKED, body=b"\r\nhello\r\n" + END + HIDDEN),
    "chunk longer than its size": post(CHUNKED, body=b"3\r\nhello\r\n" + END + HIDDEN),
    "chunk that ends with LF": post(CHUNKED, body=b"5\r\nhello\n" + END + HIDDEN),
    "chunk extension that ends with LF": post(CHUNKED, body=b"5;a\nhello\r\n" + END + HIDDEN),
    "chunk size that ends with CR": post(CHUNKED, body=b"5\rhello\r\n" + END + HIDDEN),
    "chunked in HTTP/1.0": post(CHUNKED, LENGTH, body=HIDDEN).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "no host": post(LENGTH, body=HIDDEN, host=""),
    "two hosts": post("Host: other", LENGTH, body=HIDDEN),
    "host with a path": post(LENGTH, body=HIDDEN, host="Host: vitrine/v2"),
    "host with a space": post(LENGTH, body=HIDDEN, host="Host: a b"),
    "tab in the first line": post(LENGTH, body=HIDDEN).replace(b"POST ", b"POST\t", 1),
    "HTTP/1.10": post(LENGTH, body=HIDDEN).replace(b"HTTP/1.1", b"HTTP/1.10", 1),
}

# Requests with one meaning: the first one is answered, then the next one.
CLEAR = {
    "length": post(LENGTH, body=HIDDEN),
    "chunked": post(CHUNKED, body=HIDDEN_CHUNK),
    "coding in capitals": post("Transfer-Encoding: CHUNKED", body=HIDDEN_CHUNK),
    "two spaces before the coding": post("Transfer-Encoding:  chunked", body=HIDDEN_CHUNK),
    "tab before the coding": post("Transfer-Encoding:\tchunked", body=HIDDEN_CHUNK),
    "chunk extension": post(CHUNKED, body=HIDDEN_CHUNK.replace(b"\r\n", b";name=value\r\n", 1)),
    "leading zeros": post(CHUNKED, body=b"000" + HIDDEN_CHUNK),
    "absolute form": post(LENGTH, body=HIDDEN, target="http://vitrine/classify"),
    "empty line before": b"\r\n" + post(LENGTH, body=HIDDEN),
    "GET with a body": post(LENGTH, body=HIDDEN, target="/v2").replace(b"POST", b"GET", 1),
}


# Requests that RFC 9112 lets a server refuse, or understand in one way.
EITHER = {
    "no version": post(LENGTH, body=HIDDEN).replace(b" HTTP/1.1", b"", 1),
    "HTTP/2.0": post(LENGTH, body=HIDDEN).replace(b"HTTP/1.1", b"HTTP/2.0", 1),
    "two spaces in the first line": post(LENGTH, body=HIDDEN).replace(b"POST ", b"POST  ", 1),
    "two lengths that are equal": post(LENGTH, LENGTH, body=HIDDEN),
    "trailer with a length": post(CHUNKED, body=HIDDEN_CHUNK[:-2] + b"Content-Length: 50\r\n\r\n"),
    "LF as ends of lines": post(LENGTH).replace(b"\r\n", b"\n") + HIDDEN,
    "space after the chunk size": post(CHUNKED, body=HIDDEN_CHUNK.replace(b"\r\n", b" \r\n", 1)),
    "chunked twice": post("Transfer-Encoding: chunked, chunked", body=HIDDEN_CHUNK),
    "an empty coding": post("Transfer-Encoding: , chunked", body=HIDDEN_CHUNK),
}


class Seen(NamedTuple):
    """A response, and which request it belongs to."""

    status: int
    request_id: str


def converse(port: int, sent: bytes, seconds: float = 3.0) -> list[Seen]:
    """Send bytes and read until the server closes the connection or falls silent."""
    received = b""
    with socket.create_connection((HOST, port), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            while part := connection.recv(65536):
                received += part
        except (ConnectionError, TimeoutError):
            pass
    return list(split(received))


def split(received: bytes) -> Iterator[Seen]:
    """The responses in a stream."""
    while received:
        if not received.startswith(b"HTTP/"):  # nginx's answer to HTTP/0.9
            yield Seen(400, "")
            return
        head, _, received = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", len(received)))
        if headers.get("transfer-encoding") == "chunked":  # through a proxy
            length = received.index(b"0\r\n\r\n") + 5
        received = received[length:]
        yield Seen(int(status.split()[1]), headers.get("x-request-id", ""))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_an_ambiguous_request_is_refused_and_nothing_after_it_is_read(case: str, attacked: Any) -> None:
    seen = converse(port_of(attacked.url), AMBIGUOUS[case] + NEXT)
    assert len(seen) == 1, seen
    assert seen[0].status in REFUSED, seen


@pytest.mark.parametrize("case", CLEAR)
def test_a_clear_request_ends_where_it_says(case: str, attacked: Any) -> None:
    seen = converse(port_of(attacked.url), CLEAR[case] + NEXT)
    assert [answer.request_id for answer in seen] == ["first", "next"]
    assert seen[1].status == 200


@pytest.mark.parametrize("case", EITHER)
def test_an_odd_request_has_one_meaning_or_none(case: str, attacked: Any) -> None:
    seen = converse(port_of(attacked.url), EITHER[case] + NEXT)
    refused = len(seen) <= 1 and all(answer.status in REFUSED for answer in seen)
    assert refused or [answer.request_id for answer in seen] in (["first"], ["first", "next"])


HAPROXY = """
global
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    option http-keep-alive
    {option}
    http-reuse always
frontend front
    bind {host}:{port}
    default_backend back
backend back
    server vitrine {host}:{server}
"""
NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 100; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream back {{ server {host}:{server}; keepalive 2; }}
    server {{
        listen {host}:{port};
        {option}
        location / {{
            proxy_pass http://back;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""
PROXIES = {
    "haproxy": ("haproxy", HAPROXY, ""),
    "haproxy, lenient": ("haproxy", HAPROXY, "option accept-invalid-http-request"),
    "nginx": ("nginx", NGINX, ""),
    "nginx, unbuffered": ("nginx", NGINX, "proxy_request_buffering off; ignore_invalid_headers off;"),
}


@contextmanager
def proxy(name: str, server: int, folder: Path) -> Iterator[int]:
    """A proxy that keeps its connections to the server; yields its port."""
    program, template, option = PROXIES[name]
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    config = folder / "proxy.conf"
    config.write_text(template.format(host=HOST, port=port, server=server, folder=folder, option=option))
    arguments = ["-f", config] if program == "haproxy" else ["-p", folder, "-c", config]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen([program, *map(str, arguments)], stdout=output, stderr=output)
    try:
        wait_until(lambda: process.poll() is not None or _listens(port), f"{program} to listen", 20)
        assert process.poll() is None, (folder / "output").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", PROXIES)
def test_no_request_is_smuggled_past_a_proxy(name: str, attacked: Any, tmp_path: Path) -> None:
    """Others on the proxy's kept connections get their own answers, and no hidden request reaches the server."""
    if shutil.which(PROXIES[name][0]) is None:
        pytest.skip(f"{PROXIES[name][0]} is not installed")
    with proxy(name, port_of(attacked.url), tmp_path) as port:
        for number, (case, request) in enumerate({**AMBIGUOUS, **EITHER, **CLEAR}.items()):
            start = len(attacked.lines)
            seen = converse(port, request, seconds=1)
            for turn in range(3):  # kept connections are used again
                victim = f"victim-{number}-{turn}"
                (answer,) = converse(port, NEXT.replace(b"next", victim.encode()))
                assert answer == Seen(200, victim), (case, seen)
            _until_logged(attacked, start, victim)
            served = [json.loads(line).get("request_id") for line in attacked.lines[start:] if line.startswith("{")]
            assert served.count("hidden") == [answer.request_id for answer in seen].count("hidden"), (case, seen)


def _until_logged(server: Any, start: int, request_id: str) -> None:
    deadline = time.monotonic() + 10
    while not any(request_id in line for line in server.lines[start:]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
