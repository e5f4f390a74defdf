"""Clients that misbehave on purpose: they reset what they opened, or leave in the middle of a message."""

import asyncio
import socket
import struct
from contextlib import suppress

from benchmarks.soak.client import HOST

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING = 0, 1, 3, 4, 6
_ACKNOWLEDGED, _END_HEADERS, _END_STREAM = 1, 4, 1
_CANCEL = 8
_STREAMS_PER_CONNECTION = 500
_AT_ONCE = 50
_LAST = b"the last"  # payload of a ping
_ANSWER_SECONDS = 30.0


async def leave(port: int, sent: bytes, *, read: int = 0) -> None:
    """Send bytes, read some of the answer, and reset the connection."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
    with suppress(ConnectionError, asyncio.IncompleteReadError):  # the server was first
        writer.write(sent)
        await writer.drain()
        await reader.readexactly(read)
    writer.transport.abort()


async def reset_rapidly(port: int, path: str, message: bytes, streams: int) -> int:
    """Open HTTP/2 streams with a small gRPC message and cancel each at once; wait until the server has read them all.

    Returns:
        How many of the connections the server closed before.
    """
    closed = 0
    for opened in range(0, streams, _STREAMS_PER_CONNECTION):
        closed += not await _reset(port, path, message, min(_STREAMS_PER_CONNECTION, streams - opened))
    return closed


async def _reset(port: int, path: str, message: bytes, streams: int) -> bool:
    """Return whether the server has read everything, by its answer to a last ping."""
    reader, writer = await asyncio.open_connection(HOST, port)

    async def read_until_answer() -> None:
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if payload == _LAST and flags & _ACKNOWLEDGED:
                return
            if kind in (_SETTINGS, _PING) and not flags & _ACKNOWLEDGED:
                writer.write(_frame(kind, _ACKNOWLEDGED, 0, b"" if kind == _SETTINGS else payload))

    reading = asyncio.create_task(read_until_answer())
    writer.write(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
    fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "vitrine"))
    fields += (("content-type", "application/grpc"), ("te", "trailers"))
    block = b"".join(map(_literal_field, *zip(*fields, strict=True)))
    body = b"\0" + len(message).to_bytes(4, "big") + message
    try:
        for number in range(streams):
            stream = 2 * number + 1
            writer.write(_frame(_HEADERS, _END_HEADERS, stream, block))
            writer.write(_frame(_DATA, _END_STREAM, stream, body))
            writer.write(_frame(_RESET, 0, stream, _CANCEL.to_bytes(4, "big")))
            if number % _AT_ONCE == 0:
                await writer.drain()
                await asyncio.sleep(0)
        writer.write(_frame(_PING, 0, 0, _LAST))
        await writer.drain()
        await asyncio.wait_for(reading, _ANSWER_SECONDS)
    except (ConnectionError, asyncio.IncompleteReadError):  # the server has had enough
        return False
    finally:
        reading.cancel()
        writer.transport.abort()
        await asyncio.gather(reading, return_exceptions=True)
    return True


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal_field(name: str, value: str) -> bytes:
    """A header field without indexing and Huffman code (RFC 7541, section 6.2.2)."""
    return b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in (name, value))
