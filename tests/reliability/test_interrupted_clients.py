"""Clients that cancel, time out, send nonsense or vanish, at every stage of a call; and a server that is stopped."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from benchmarks.soak.attacks import leave, reset_rapidly
from benchmarks.soak.client import Client, encode_request, read_metrics, wait_until, wait_until_idle
from benchmarks.soak.processes import usage

Serving = Callable[..., AbstractContextManager[Any]]
INFER = "/inference.GRPCInferenceService/ModelInfer"
STAGES = ("before", "queue", "inference", "answer")
NARROW = {"VITRINE_THREADS": "1", "VITRINE_MAX_WAIT_SECONDS": "60", "VITRINE_LOG_FORMAT": "json"}
IMAGES = 24  # of a long call: about half a second on one thread


@pytest.fixture(scope="module")
def narrow(serve: Serving, two_bundles: Path) -> Iterator[Any]:
    """A server with one thread, so that a long call makes others wait."""
    with serve(two_bundles, **NARROW) as server:
        yield server


def infer_request(picture: bytes, images: int = 1, model: str = "detr-bccd") -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="BYTES", shape=[images])
    request.raw_input_contents.append((len(picture).to_bytes(4, "little") + picture) * images)
    message: bytes = request.SerializeToString()
    return message


def open_call(channel: grpc.aio.Channel, timeout: float | None = 60) -> Any:
    """A call whose message is written later, or never: on the wire the same as a unary one."""
    return channel.stream_unary(INFER)(timeout=timeout)


async def send(call: Any, message: bytes) -> None:
    await call.write(message)
    await call.done_writing()


def port_of(server: Any) -> int:
    return int(server.url.rpartition(":")[2])


async def until_gauge(server: Any, name: str) -> None:
    await asyncio.to_thread(wait_until, lambda: read_metrics(server.url)[name] > 0, f"{name} > 0")


async def reach(stage: str, server: Any, channel: grpc.aio.Channel, photograph: bytes, timeout: float | None) -> Any:
    """A call that has come to a stage, and stays in it for a while."""
    if stage == "queue":
        await send(open_call(channel), infer_request(photograph, IMAGES))  # occupies the thread
        await until_gauge(server, "vitrine_running_images")
    call = open_call(channel, timeout)
    if stage != "before":
        await send(call, infer_request(photograph, 1 if stage == "answer" else IMAGES))
    if stage == "queue":
        await until_gauge(server, "vitrine_queue_images")
    elif stage == "inference":
        await until_gauge(server, "vitrine_running_images")
    elif stage == "answer":
        await call.initial_metadata()
    return call


async def ended(call: Any) -> grpc.StatusCode:
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancelled_call_leaves_nothing_behind(stage: str, narrow: Any, photograph: bytes) -> None:
    async def cancel() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(narrow.grpc) as channel:
            call = await reach(stage, narrow, channel, photograph, None)
            call.cancel()
            return await ended(call)

    code = asyncio.run(cancel())
    assert code is grpc.StatusCode.CANCELLED or (stage == "answer" and code is grpc.StatusCode.OK)
    wait_until_idle(narrow.url)


@pytest.mark.parametrize("stage", STAGES)
def test_a_call_that_times_out_leaves_nothing_behind(stage: str, narrow: Any, photograph: bytes) -> None:
    async def time_out() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(narrow.grpc) as channel:
            return await ended(await reach(stage, narrow, channel, photograph, 0.4))

    code = asyncio.run(time_out())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED or (stage == "answer" and code is grpc.StatusCode.OK)
    wait_until_idle(narrow.url)


ERRORS = {
    "no protobuf": (b"\xff" * 20, grpc.StatusCode.INVALID_ARGUMENT),
    "half a message": (infer_request(b"x" * 100)[:50], grpc.StatusCode.INVALID_ARGUMENT),
    "no model": (infer_request(b"x", model="cats"), grpc.StatusCode.NOT_FOUND),
    "no image": (infer_request(b"x"), grpc.StatusCode.INVALID_ARGUMENT),
    "broken image": (infer_request(b"\x89PNG\r\n\x1a\n"), grpc.StatusCode.INVALID_ARGUMENT),
    "too large": (bytes(21 * 1024 * 1024), grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_has_its_code_and_leaves_nothing_behind(error: str, narrow: Any) -> None:
    message, expected = ERRORS[error]

    async def fail() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(narrow.grpc) as channel:
            call = open_call(channel)
            await send(call, message)
            return await ended(call)

    assert asyncio.run(fail()) is expected
    wait_until_idle(narrow.url)


async def reset(port: int, streams: int, photograph: bytes) -> list[grpc.StatusCode]:
    """Reset streams on four connections; return how the calls of another client end meanwhile."""
    small, message = infer_request(b"x", model="vit-cifar10"), infer_request(photograph, model="vit-cifar10")
    attacks = asyncio.gather(
        *(reset_rapidly(port, INFER, request, streams // 4) for request in (small, small, small[:30], b""))
    )
    codes = []
    while not attacks.done() or not codes:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(INFER)(message, timeout=60)
            codes.append(await ended(call))
    assert await attacks == [0] * 4, "the server has closed connections"
    return codes


def check_resets(server: Any, streams: int, photograph: bytes) -> None:
    """Check that calls of others are answered while streams are reset, and that nothing is left of these."""
    port = int(server.grpc.rpartition(":")[2])
    asyncio.run(reset(port, streams, photograph))  # as many as wait at once take memory once
    wait_until_idle(server.url)
    before = usage(server.process.pid)
    assert set(asyncio.run(reset(port, streams, photograph))) == {grpc.StatusCode.OK}
    wait_until_idle(server.url)
    after = usage(server.process.pid)
    assert after.memory - before.memory < 48
    assert after.files - before.files < 20


def test_streams_that_are_reset_at_once_leave_nothing_behind(narrow: Any, photograph: bytes) -> None:
    check_resets(narrow, 2_000, photograph)


@pytest.mark.soak
def test_ten_thousand_streams_that_are_reset_at_once(narrow: Any, photograph: bytes) -> None:
    check_resets(narrow, 10_000, photograph)


def vanish(server: Any, count: int, photograph: bytes) -> None:
    """Clients that vanish in the middle of their body, of the wait and of the answer."""
    port = port_of(server)
    whole = encode_request("POST", "/detect", photograph, Accept="image/png")
    expected = asyncio.run(Client(port).ask(whole))
    assert expected.status == 200
    for sent, read in ((whole[: len(whole) // 2], 0), (whole[:-1], 0), (whole, 0), (whole, 1000)):
        for _ in range(3):
            asyncio.run(leave(port, sent, read=read))
    wait_until_idle(server.url)
    before = usage(server.process.pid)
    for number in range(count):
        sent, read = ((whole[: number * 97 % len(whole)], 0), (whole, 0), (whole, 1 + number * 997 % 100_000))[
            number % 3
        ]
        asyncio.run(leave(port, sent, read=read))
    wait_until_idle(server.url)
    after = usage(server.process.pid)
    assert asyncio.run(Client(port).ask(whole)).body == expected.body
    assert after.memory - before.memory < 48
    assert after.files - before.files < 20


def test_clients_that_vanish_leave_nothing_behind(narrow: Any, photograph: bytes) -> None:
    vanish(narrow, 30, photograph)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_thousand_clients_that_vanish(narrow: Any, photograph: bytes) -> None:
    vanish(narrow, 3_000, photograph)


def test_no_interruption_was_logged_as_an_error(narrow: Any) -> None:
    """The last test on this server."""
    log = "".join(narrow.lines)
    assert "Traceback" not in log
    assert '"level":"error"' not in log


def test_calls_in_progress_are_answered_when_the_server_is_stopped(
    serve: Serving, two_bundles: Path, photograph: bytes
) -> None:
    with serve(two_bundles, **NARROW) as server:

        async def stop() -> list[grpc.StatusCode]:
            async with grpc.aio.insecure_channel(server.grpc) as channel:
                calls = [await reach("inference", server, channel, photograph, 60)]
                calls.append(open_call(channel))
                await send(calls[1], infer_request(photograph))
                await until_gauge(server, "vitrine_queue_images")
                server.process.send_signal(signal.SIGTERM)
                return [await ended(call) for call in calls]

        assert asyncio.run(stop()) == [grpc.StatusCode.OK] * 2
        assert server.process.wait(timeout=40) == 0
    assert "Traceback" not in "".join(server.lines)
