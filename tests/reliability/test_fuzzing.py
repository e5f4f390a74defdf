"""Thousands of broken pictures, sent in every way: each gets a documented answer, good ones are served meanwhile."""

import asyncio
import base64
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks.soak.client import Answer, Client, encode_form, encode_request, wait_until_idle
from benchmarks.soak.pictures import Mutator, make_pictures
from benchmarks.soak.processes import usage

SEED = 20261130
IN_FLIGHT = 8
STATUSES = {400: {"invalid_parameter"}, 413: {"too_large"}, 415: {"unsupported_image_type"}, 422: {"undecodable_image"}}
PREDICTION = {"label", "class_id", "probability"}
DETECTION = {"label", "class_id", "score", "box"}


def as_body(picture: bytes) -> bytes:
    return encode_request("POST", "/classify?model=vit-cifar10&top_k=3", picture)


def as_form(picture: bytes) -> bytes:
    body, content_type = encode_form(model="vit-cifar10", image=picture)
    return encode_request("POST", "/classify", body, Content_Type=content_type)


def as_json(picture: bytes) -> bytes:
    body = orjson.dumps({"images": [base64.b64encode(picture).decode()], "top_k": 1})
    return encode_request("POST", "/classify", body, Content_Type="application/json")


def to_detect(picture: bytes) -> bytes:
    return encode_request("POST", "/detect?threshold=0", picture)


def to_draw(picture: bytes) -> bytes:
    return encode_request("POST", "/detect", picture, Accept="image/png")


def as_tensor(picture: bytes) -> bytes:
    data = len(picture).to_bytes(4, "little") + picture
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"inputs": [tensor]})
    length = str(len(head))
    return encode_request("POST", "/v2/models/vit-cifar10/infer", head + data, Inference_Header_Content_Length=length)


def check_error(status: int, error: Any) -> None:
    assert error.keys() == {"code", "message"}
    assert error["code"] in STATUSES[status]
    assert error["message"]


def check_result(result: Any) -> None:
    assert min(result["image"].values()) > 0
    for entry in result.get("predictions", ()):
        assert entry.keys() == PREDICTION
        assert 0 <= entry["probability"] <= 1
    for entry in result.get("detections", ()):
        assert entry.keys() == DETECTION
        assert entry["box"]["x_min"] <= entry["box"]["x_max"]


def check_object(answer: Answer) -> None:
    document = answer.json()
    if answer.status == 200:
        assert document.keys() in ({"model", "image", "predictions"}, {"model", "image", "detections"})
        check_result(document)
    else:
        assert document.keys() == {"error"}
        check_error(answer.status, document["error"])


def check_list(answer: Answer) -> None:
    assert answer.status == 200
    (result,) = answer.json()["results"]
    if "error" in result:
        status = next(status for status, codes in STATUSES.items() if result["error"]["code"] in codes)
        check_error(status, result["error"])
    else:
        check_result(result)


def check_drawing(answer: Answer) -> None:
    if answer.status == 200:
        assert answer.headers["content-type"] == "image/png"
        assert answer.body.startswith(b"\x89PNG")
    else:
        check_object(answer)


def check_protocol(answer: Answer) -> None:
    document = answer.json()
    if answer.status == 200:
        (output,) = document["outputs"]
        assert sum(output["data"]) == pytest.approx(1, abs=1e-4)
    else:
        assert answer.status in STATUSES
        assert isinstance(document["error"], str)


OFTEN = ((as_body, check_object), (as_form, check_object), (as_json, check_list), (as_tensor, check_protocol))
WAYS: tuple[tuple[Callable[[bytes], bytes], Callable[[Answer], None]], ...] = (
    *OFTEN,
    (to_detect, check_object),
    *OFTEN,
    (to_draw, check_drawing),
)


async def fuzz(port: int, numbers: range, known: bytes) -> Counter[int]:
    """Send mutations on kept connections, several at a time, and a known picture after every twentieth."""
    client, mutator = Client(port), Mutator(SEED, make_pictures())
    expected = (await client.ask(as_body(known))).body
    assert json.loads(expected)["predictions"][0]["label"] == "frog"
    waiting, statuses = iter(numbers), Counter[int]()

    async def send() -> None:
        for number in waiting:
            name, picture = mutator.make(number)
            encode, check = WAYS[number // 26 % len(WAYS)]  # 26 pictures: each goes every way
            try:
                answer = await client.ask(encode(picture), timeout=60)
                check(answer)
            except BaseException as error:
                error.add_note(f"mutation {number} ({name}), {encode.__name__}")
                raise
            statuses[answer.status] += 1
            if number % 20 == 0:
                assert (await client.ask(as_body(known))).body == expected

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(send())
    client.close()
    return statuses


def run(server: Any, count: int, known: bytes) -> Counter[int]:
    """Fuzz, and look at the server afterwards: its memory, its log, and that nothing is left."""
    port, statuses = int(server.url.rpartition(":")[2]), Counter[int]()
    quarter = count // 4
    memory = []
    for start in range(0, count, quarter):
        statuses += asyncio.run(fuzz(port, range(start, start + quarter), known))
        memory.append(usage(server.process.pid).memory)
    wait_until_idle(server.url)
    assert statuses.keys() <= {200, *STATUSES}
    assert memory[-1] - memory[0] < 48, f"memory in MiB after each quarter: {memory}"
    log = "".join(server.lines)
    assert "Traceback" not in log
    ready = next(number for number, line in enumerate(server.lines) if "ready:" in line)
    for line in server.lines[ready:]:
        assert json.loads(line)["level"] != "error", line  # every line is JSON, whatever a decoder prints
    return statuses


def test_every_mutation_of_every_format_gets_a_documented_answer(attacked: Any, root: Path) -> None:
    statuses = run(attacked, 2_000, (root / "examples" / "frog.jpg").read_bytes())
    assert min(statuses[200], statuses[422]) > 200


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_thousand_mutations(attacked: Any, root: Path) -> None:
    print(run(attacked, 24_000, (root / "examples" / "frog.jpg").read_bytes()))


def test_the_same_number_is_the_same_mutation() -> None:
    pictures = make_pictures()
    one, other = Mutator(SEED, pictures), Mutator(SEED, pictures)
    assert all(one.make(number) == other.make(number) for number in itertools.islice(range(1000), 0, None, 7))
