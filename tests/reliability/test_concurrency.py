"""Many different requests at the same time, over both transports, are answered as if each were alone."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks.soak.client import Client, encode_form, encode_request, wait_until_idle
from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import load_bundle
from vitrine.bundle.predictors import Predictor
from vitrine.bundle.tolerances import PARITY

Serving = Callable[..., AbstractContextManager[Any]]
IN_FLIGHT = 64
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def patient(serve: Serving, two_bundles: Path) -> Iterator[Any]:
    """A server that refuses nobody, however slow the machine is."""
    with serve(two_bundles, VITRINE_MAX_WAIT_SECONDS="600", VITRINE_TIMEOUT_SECONDS="60") as server:
        yield server


def make_picture(number: int) -> bytes:
    """A picture like no other: its size, format and pixels depend on the number."""
    random = np.random.default_rng(number)
    width, height = (int(edge) for edge in random.integers(16, 80, 2))
    noise = random.integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, ("PNG", "JPEG", "WEBP")[number % 3])
    return buffer.getvalue()


def alone(predictor: Predictor, picture: bytes) -> list[np.ndarray[Any, Any]]:
    """What one thread computes for one picture."""
    prepared = predictor.prepare(decode_for(picture, predictor.preprocessing))
    return [np.asarray(output) for output in predictor.infer([prepared])[0]]  # type: ignore[list-item]


class Ways:
    """The ways to ask, each of which returns the outputs of the network for a picture."""

    def __init__(self, port: int, channel: grpc.aio.Channel) -> None:
        self._client = Client(port)
        self._infer = channel.unary_unary(
            INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    async def classify_body(self, picture: bytes) -> list[Any]:
        return await self._classify(encode_request("POST", "/classify?model=vit-cifar10&top_k=10", picture))

    async def classify_form(self, picture: bytes) -> list[Any]:
        body, content_type = encode_form(picture, model="vit-cifar10", top_k="10")
        return await self._classify(encode_request("POST", "/classify", body, Content_Type=content_type))

    async def _classify(self, request: bytes) -> list[Any]:
        predictions = await self._document(request)
        entries = sorted(predictions["predictions"], key=lambda entry: int(entry["class_id"]))
        return [[entry["probability"] for entry in entries]]

    async def detect(self, picture: bytes) -> list[Any]:
        document = await self._document(encode_request("POST", "/detect?threshold=0", picture))
        found = document["detections"]
        size = document["image"]["width"], document["image"]["height"]
        boxes = [np.array(list(entry["box"].values())) / (*size, *size) for entry in found]
        return [[entry["score"] for entry in found], [entry["class_id"] for entry in found], boxes]

    async def protocol_http(self, picture: bytes) -> list[Any]:
        data = len(picture).to_bytes(4, "little") + picture
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        head = orjson.dumps({"inputs": [tensor]})
        length = str(len(head))
        path = "/v2/models/vit-cifar10/infer"
        document = await self._document(
            encode_request("POST", path, head + data, Inference_Header_Content_Length=length)
        )
        return [output["data"] for output in document["outputs"]]

    async def protocol_grpc(self, picture: bytes) -> list[Any]:
        request = service_pb2.ModelInferRequest(model_name="vit-cifar10")
        request.inputs.add(name="image", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(picture).to_bytes(4, "little") + picture)
        answer = await self._infer(request, timeout=120)
        return [np.frombuffer(raw, "<f4") for raw in answer.raw_output_contents]

    async def _document(self, request: bytes) -> Any:
        answer = await self._client.ask(request)
        assert answer.status == 200, answer.body
        return answer.json()

    def close(self) -> None:
        self._client.close()


def check(found: list[Any], expected: list[np.ndarray[Any, Any]]) -> None:
    """Equal within what a batch may change; detections may change places with others of nearly their score."""
    if len(expected) == 3:  # a detector's scores, class ids and boxes
        order = np.argsort(-expected[0], kind="stable")
        rows = np.column_stack([expected[0], expected[1], expected[2]])[order]
        answers = np.column_stack([found[0], found[1], np.array(found[2])])
        np.testing.assert_allclose(answers[:, 0], rows[:, 0], atol=PARITY)
        distances = np.abs(answers[:, None] - rows[None]).max(axis=2)
        assert distances.min(axis=1).max() < PARITY
    else:
        np.testing.assert_allclose(np.ravel(found[0]), expected[0], atol=PARITY)


async def compare(server: Any, count: int, bundles: Path) -> None:
    classifier, detector = (
        load_bundle(bundles / name / "1", threads=1).predictor for name in ("vit-cifar10", "detr-bccd")
    )
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        ways = Ways(int(server.url.rpartition(":")[2]), channel)
        often: list[Callable[[bytes], Awaitable[list[Any]]]]
        often = [ways.classify_body, ways.classify_form, ways.protocol_http, ways.protocol_grpc]
        every = [*often, *often, ways.detect]
        numbers, answers = iter(range(count)), {}

        async def ask() -> None:
            for number in numbers:
                answers[number] = await every[number % len(every)](make_picture(number))

        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(ask())
        ways.close()
    for number, found in answers.items():
        predictor = detector if len(found) == 3 else classifier
        check(found, alone(predictor, make_picture(number)))
    assert len(answers) == count
    wait_until_idle(server.url)


def test_three_hundred_requests_are_answered_as_if_alone(patient: Any, two_bundles: Path) -> None:
    asyncio.run(compare(patient, 300, two_bundles))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_are_answered_as_if_alone(patient: Any, two_bundles: Path) -> None:
    asyncio.run(compare(patient, 10_000, two_bundles))
