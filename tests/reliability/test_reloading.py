"""Models come, go and break while requests are answered by two workers: each operation has its set of statuses."""

import asyncio
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.client import Client, encode_request, wait_until_idle

Serving = Callable[..., AbstractContextManager[Any]]
SETTINGS = {
    "VITRINE_WORKERS": "2",
    "VITRINE_THREADS": "1",
    "VITRINE_POLL_SECONDS": "0.2",
    "VITRINE_MODEL_CONTROL": "true",
    "VITRINE_LOG_FORMAT": "json",
}


def operations(frog: bytes) -> list[tuple[str, bytes, set[int]]]:
    """Name, request and allowed statuses."""

    def post(path: str, body: bytes = b"") -> bytes:
        return encode_request("POST", path, body)

    return [
        ("newest version", post("/classify?model=vit-cifar10", frog), {200}),
        ("first version", post("/classify?model=vit-cifar10@1", frog), {200}),
        ("second version", post("/classify?model=vit-cifar10@2", frog), {200, 404}),
        ("broken version", post("/classify?model=vit-cifar10@3", frog), {404}),
        ("unloaded at times", post("/detect", frog), {200, 404}),
        ("manifest", encode_request("GET", "/models/vit-cifar10"), {200}),
        ("ready", encode_request("GET", "/v2/models/vit-cifar10/versions/2/ready"), {200, 404}),
        ("index", post("/v2/repository/index"), {200}),
        ("reload", post("/v2/repository/models/vit-cifar10/load"), {200, 503}),  # 503: the broken version
        ("load", post("/v2/repository/models/detr-bccd/load"), {200}),
        ("load nothing", post("/v2/repository/models/cats/load"), {404}),
        ("unload", post("/v2/repository/models/detr-bccd/unload"), {200, 404}),
        ("unload nothing", post("/v2/repository/models/cats/unload"), {404}),
    ]


def change(model: Path, number: int) -> None:
    """Add a version, add a broken one, remove both."""
    second, third = model / "2", model / "3"
    if number % 3 == 0:
        shutil.copytree(model / "1", model / ".2")
        manifest = json.loads((model / ".2" / "manifest.json").read_text())
        (model / ".2" / "manifest.json").write_text(json.dumps({**manifest, "version": "2"}))
        (model / ".2").rename(second)
    elif number % 3 == 1:
        shutil.copytree(second, model / ".3")
        (model / ".3" / "model.onnx").write_bytes(b"no graph")
        (model / ".3").rename(third)
    else:
        for version in (second, third):
            version.rename(model / ".old")
            shutil.rmtree(model / ".old")


async def stress(server: Any, bundles: Path, frog: bytes, seconds: float) -> dict[str, Counter[int]]:
    client, end = Client(int(server.url.rpartition(":")[2])), time.monotonic() + seconds
    seen: dict[str, Counter[int]] = {}
    done = asyncio.Event()

    async def repeat(name: str, request: bytes, allowed: set[int]) -> None:
        seen[name] = Counter()
        while not done.is_set():
            answer = await client.ask(request)
            assert answer.status in allowed, (name, answer.status, answer.body)
            seen[name][answer.status] += 1
            await asyncio.sleep(0.02)

    async def versions() -> set[str]:
        index = (await client.ask(encode_request("POST", "/v2/repository/index"))).json()
        return {entry["version"] for entry in index if entry["name"] == "vit-cifar10"}

    async def replace() -> None:
        for number in itertools.count():
            await asyncio.to_thread(change, bundles / "vit-cifar10", number)
            expected = ({"1", "2"}, {"1", "2", "3"}, {"1"})[number % 3]  # a broken one is listed with the reason
            async with asyncio.timeout(30):
                while await versions() != expected:
                    await asyncio.sleep(0.1)
            if time.monotonic() > end and number % 3 == 2:
                done.set()
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(replace())
        for operation in operations(frog):
            group.create_task(repeat(*operation))
    client.close()
    return seen


async def agreed_index(server: Any) -> list[Any]:
    """What the workers serve, once they agree: each connection may reach another one."""
    end = time.monotonic() + 20
    while True:
        found = []
        for _ in range(20):
            client = Client(int(server.url.rpartition(":")[2]))
            found.append((await client.ask(encode_request("POST", "/v2/repository/index"))).json())
            client.close()
        if all(index == found[0] for index in found):
            return list(found[0])
        assert time.monotonic() < end, found
        await asyncio.sleep(0.2)


def run(serve: Serving, root: Path, folder: Path, seconds: float) -> None:
    bundles = folder / "bundles"
    for name in ("vit-cifar10", "detr-bccd"):
        shutil.copytree(root / "bundles" / name, bundles / name)
    frog = (root / "examples" / "frog.jpg").read_bytes()
    with serve(bundles, **SETTINGS) as server:
        seen = asyncio.run(stress(server, bundles, frog, seconds))
        assert all(seen[name][200] for name in ("newest version", "second version", "unloaded at times"))
        assert seen["second version"][404]
        port = int(server.url.rpartition(":")[2])
        answer = asyncio.run(Client(port).ask(encode_request("POST", "/v2/repository/models/detr-bccd/load")))
        assert answer.status == 200
        versions = {(entry["name"], entry["version"]) for entry in asyncio.run(agreed_index(server))}
        assert versions >= {("vit-cifar10", "1"), ("detr-bccd", "1")}
        assert ("vit-cifar10", "3") not in versions
        wait_until_idle(server.url)
    assert "Traceback" not in "".join(server.lines)
    print({name: dict(statuses) for name, statuses in seen.items()})


def test_every_operation_has_its_statuses(serve: Serving, root: Path, tmp_path: Path) -> None:
    run(serve, root, tmp_path, 5)


@pytest.mark.soak
def test_every_operation_has_its_statuses_for_minutes(serve: Serving, root: Path, tmp_path: Path) -> None:
    run(serve, root, tmp_path, 120)
