"""Models come, go and break, and workers are killed and stopped, while two workers answer requests.

Each operation has its set of outcomes, see `operations`, and the log has no traceback. In the end, all workers serve
the same, as the folders and the operations imply.
"""

import asyncio
import fcntl
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2 as pb

from benchmarks.soak.client import Answer, Client, encode_request, wait_until, wait_until_idle

Serving = Callable[..., AbstractContextManager[Any]]
Operation = Callable[[], Awaitable[object]]  # returns a status of HTTP or a code of gRPC
SETTINGS = {
    "VITRINE_WORKERS": "2",
    "VITRINE_THREADS": "1",
    "VITRINE_POLL_SECONDS": "0.2",
    "VITRINE_MODEL_CONTROL": "true",
    "VITRINE_MAX_WAIT_SECONDS": "60",  # also on a machine that is busy otherwise
    "VITRINE_TIMEOUT_SECONDS": "60",
    "VITRINE_LOG_FORMAT": "json",
}
SECONDS = 3.0  # until a change is given up, if workers are stopped
FAULTS = {**SETTINGS, "VITRINE_TIMEOUT_SECONDS": str(SECONDS)}
WAIT = 60.0  # seconds
LOST = "lost"  # the connection was cut: a worker was killed
GRPC_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]  # each channel has a connection of its own


def repository_path(model: str, operation: str) -> str:
    return f"/v2/repository/models/{model}/{operation}"


def matches(found: dict[str, str], expected: dict[str, str]) -> bool:
    """Whether both have the same keys, and each value found contains the one expected."""
    return found.keys() == expected.keys() and all(expected[key] in found[key] for key in found)


class Requests:
    """Requests to a server, each over a new connection, so that it may reach any worker."""

    def __init__(self, server: Any, frog: bytes) -> None:
        self.bodies: dict[object, object] = {}  # of the last answer of each status, to explain unexpected ones
        self.server, self.frog, self.client = server, frog, Client(int(server.url.rpartition(":")[2]))

    async def http(self, method: str, path: str, body: bytes = b"") -> Answer:
        return await self.client.ask(encode_request(method, path, body, Connection="close"), timeout=WAIT)

    async def status(self, method: str, path: str, body: bytes = b"") -> object:
        try:
            answer = await self.http(method, path, body)
            self.bodies[answer.status] = answer.body
            return answer.status
        except (ConnectionError, asyncio.IncompleteReadError):
            return LOST

    async def call(self, method: str, request: Any) -> bytes:
        async with grpc.aio.insecure_channel(self.server.grpc, GRPC_OPTIONS) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            answer: bytes = await call(request.SerializeToString(), timeout=WAIT)
            return answer

    async def code(self, method: str, request: Any) -> object:
        try:
            await self.call(method, request)
        except grpc.aio.AioRpcError as error:
            self.bodies[error.code().name] = error.details()
            return error.code().name
        return "OK"

    async def change(self, model: str, operation: str) -> None:
        """Load or unload a model in all workers, which may be too slow for that at first."""
        end = time.monotonic() + WAIT
        answer = await self.http("POST", repository_path(model, operation))
        while answer.status in (503, 504) and time.monotonic() < end:
            error = answer.json()["error"]
            assert "found nothing after" in error or "found another worker" in error or "may still take effect" in error
            answer = await self.http("POST", repository_path(model, operation))
            if answer.status == 404 and operation == "unload":  # it has taken effect
                return
        assert answer.status == 200, answer.body

    def operations(self) -> dict[str, tuple[Operation, set[object]]]:
        """Operations by name, and their outcomes while models change but no worker is hurt.

        503 of a reload: a version is broken, or being changed; of the second version: a worker could not load it in
        time before it was removed.
        """

        def get(path: str) -> Operation:
            return lambda: self.status("GET", path)

        def post(path: str, body: bytes = b"") -> Operation:
            return lambda: self.status("POST", path, body)

        def infer(model: str, version: str = "") -> Operation:
            request = pb.ModelInferRequest(model_name=model, model_version=version)
            request.inputs.add(name="image", datatype="BYTES", shape=[1])
            request.raw_input_contents.append(len(self.frog).to_bytes(4, "little") + self.frog)
            return lambda: self.code("ModelInfer", request)

        def change(method: str, model: str) -> Operation:
            return lambda: self.code(method, getattr(pb, f"{method}Request")(model_name=model))

        return {
            "newest version": (post("/classify?model=vit-cifar10", self.frog), {200}),
            "first version": (post("/classify?model=vit-cifar10@1", self.frog), {200}),
            "second version": (post("/classify?model=vit-cifar10@2", self.frog), {200, 404, 503}),
            "broken version": (post("/classify?model=vit-cifar10@3", self.frog), {404}),
            "unloaded at times": (post("/detect", self.frog), {200, 404}),
            "manifest": (get("/models/vit-cifar10"), {200}),
            "models": (get("/models"), {200}),
            "ready": (get("/v2/models/vit-cifar10/versions/2/ready"), {200, 404, 503}),
            "index": (post("/v2/repository/index"), {200}),
            "reload": (post(repository_path("vit-cifar10", "load")), {200, 503}),
            "load": (post(repository_path("detr-bccd", "load")), {200}),
            "load nothing": (post(repository_path("cats", "load")), {404}),
            "unload": (post(repository_path("detr-bccd", "unload")), {200, 404}),
            "unload nothing": (post(repository_path("cats", "unload")), {404}),
            "gRPC: newest version": (infer("vit-cifar10"), {"OK"}),
            "gRPC: second version": (infer("vit-cifar10", "2"), {"OK", "NOT_FOUND", "UNAVAILABLE"}),
            "gRPC: unloaded at times": (infer("detr-bccd"), {"OK", "NOT_FOUND"}),
            "gRPC: index": (lambda: self.code("RepositoryIndex", pb.RepositoryIndexRequest()), {"OK"}),
            "gRPC: load": (change("RepositoryModelLoad", "detr-bccd"), {"OK"}),
            "gRPC: unload": (change("RepositoryModelUnload", "detr-bccd"), {"OK", "NOT_FOUND"}),
        }

    async def states(self, models: Sequence[str]) -> list[dict[str, str]]:
        """State or reason of each version ("name@version") of the models, for several connections.

        The system spreads connections of gRPC over the workers.
        """
        answers = await asyncio.gather(*(self.call("RepositoryIndex", pb.RepositoryIndexRequest()) for _ in range(12)))
        indices = (pb.RepositoryIndexResponse.FromString(answer).models for answer in answers)
        return [
            {f"{entry.name}@{entry.version}": entry.reason or entry.state for entry in index if entry.name in models}
            for index in indices
        ]

    async def until_all(self, expected: dict[str, str]) -> None:
        """Wait until the versions of these models have these states, or such a reason, in all workers."""
        models, end = [name.partition("@")[0] for name in expected], time.monotonic() + WAIT
        while True:
            found = await self.states(models)
            if all(matches(states, expected) for states in found):
                return
            assert time.monotonic() < end, (expected, found)
            await asyncio.sleep(0.05)

    @contextmanager
    def repeated(
        self, group: asyncio.TaskGroup, seen: dict[str, Counter[object]], extra: set[object]
    ) -> Iterator[None]:
        """Repeat all operations until the end of the block; count their outcomes in `seen`.

        Args:
            extra: further outcomes that are allowed.
        """
        done = asyncio.Event()

        async def repeat(name: str, operation: Operation, allowed: set[object]) -> None:
            outcomes = seen.setdefault(name, Counter())
            while not done.is_set():
                outcome = await operation()
                assert outcome in allowed | extra, (name, outcome, self.bodies[outcome])
                outcomes[outcome] += 1
                await asyncio.sleep(0.02)

        for name, (operation, allowed) in self.operations().items():
            group.create_task(repeat(name, operation, allowed))
        yield
        done.set()


def add_version(model: Path, version: str) -> None:
    """Add a version at once, as `vitrine export` does, or put it in place of one that is there."""
    hidden, old, target = model / f".{version}", model / f".old-{version}", model / version
    shutil.copytree(model / "1", hidden)
    manifest = json.loads((hidden / "manifest.json").read_text())
    (hidden / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
    if target.exists():
        target.rename(old)
    hidden.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def add_broken_version(model: Path, version: str) -> None:
    shutil.copytree(model / "1", model / f".{version}")
    (model / f".{version}" / "model.onnx").write_bytes(b"no graph")
    (model / f".{version}").rename(model / version)


def remove_version(model: Path, version: str) -> None:
    (model / version).rename(model / f".{version}")
    shutil.rmtree(model / f".{version}")


READY, UNLOADED = "READY", "unloaded"
CHANGED = "refused: "  # the changed folder, also by a worker that had not loaded it before the change
VIT = "vit-cifar10"
FIRST, SECOND, THIRD = (f"{VIT}@{version}" for version in "123")
CHANGES: list[tuple[Callable[[Path], object], dict[str, str]]] = [  # to the folder of a model, and what follows
    (lambda model: add_version(model, "2"), {FIRST: READY, SECOND: READY}),
    (lambda model: os.truncate(model / "2" / "model.onnx", 1000), {FIRST: READY, SECOND: CHANGED}),
    (lambda model: add_broken_version(model, "3"), {FIRST: READY, SECOND: CHANGED, THIRD: "name, version: expected"}),
    (lambda model: add_version(model, "2"), {FIRST: READY, SECOND: READY, THIRD: "name, version: expected"}),
    (lambda model: remove_version(model, "3"), {FIRST: READY, SECOND: READY}),
    (lambda model: remove_version(model, "2"), {FIRST: READY}),
]


async def stress(requests: Requests, model: Path, seconds: float) -> dict[str, Counter[object]]:
    seen: dict[str, Counter[object]] = {}
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        with requests.repeated(group, seen, set()):
            for change, expected in itertools.cycle(CHANGES):
                await asyncio.to_thread(change, model)
                await requests.until_all(expected)
                if time.monotonic() > end and len(expected) == 1:
                    break
    return seen


@pytest.fixture
def bundles(root: Path, tmp_path: Path) -> Path:
    for name in (VIT, "detr-bccd"):
        shutil.copytree(root / "bundles" / name, tmp_path / "bundles" / name)
    return tmp_path / "bundles"


def check_log(server: Any) -> None:
    wait_until_idle(server.url)
    for line in server.lines:
        assert "Traceback" not in line
        assert '"status":"500"' not in line.replace(" ", "")


@pytest.mark.parametrize("seconds", [3, pytest.param(180, marks=pytest.mark.soak)])
def test_every_operation_has_its_outcomes_while_models_change(
    seconds: float, serve: Serving, root: Path, bundles: Path
) -> None:
    with serve(bundles, **SETTINGS) as server:
        requests = Requests(server, (root / "examples" / "frog.jpg").read_bytes())

        async def run() -> dict[str, Counter[object]]:
            seen = await stress(requests, bundles / VIT, seconds)
            assert await requests.status("POST", repository_path("detr-bccd", "load")) == 200
            await requests.until_all({FIRST: READY, "detr-bccd@1": READY})
            return seen

        seen = asyncio.run(run())
        check_log(server)
    print({name: dict(outcomes) for name, outcomes in seen.items()})
    for name, outcomes in (("second version", {200, 404}), ("gRPC: second version", {"OK", "NOT_FOUND"})):
        assert outcomes <= seen[name].keys()


class Workers:
    """The worker processes of a server."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.until_all_are_ready(2)
        self.shared = Path(self.all[0].environ()["_VITRINE_SHARED"])

    @property
    def all(self) -> list[psutil.Process]:
        children = psutil.Process(self.server.process.pid).children()
        return [child for child in children if "_bentoml_impl.worker.service" in child.cmdline()]

    @property
    def ready(self) -> int:
        """How many workers have become ready so far."""
        return sum('"ready:' in line for line in self.server.lines)

    def until_all_are_ready(self, started: int) -> None:
        wait_until(lambda: self.ready >= started, f"{started} workers", WAIT)

    def stop_one(self) -> psutil.Process:
        """Stop a worker while it does not hold the lock on the state."""
        for worker in itertools.cycle(self.all):
            worker.suspend()
            lock = os.open(self.shared, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                worker.resume()
                continue
            finally:
                os.close(lock)
            return worker
        raise AssertionError


async def kill_in_the_middle_of_a_change(requests: Requests, workers: Workers, model: Path) -> None:
    """While a new worker starts, a broken version is added."""
    ready = workers.ready
    os.utime(model / "1" / "manifest.json")
    change = asyncio.create_task(requests.status("POST", repository_path(VIT, "load")))
    await asyncio.sleep(0.05)
    workers.all[0].kill()
    await asyncio.to_thread(add_broken_version, model, "3")
    assert await change in {200, 503, LOST}
    await asyncio.to_thread(workers.until_all_are_ready, ready + 1)
    await requests.until_all({FIRST: READY, THIRD: "name, version: expected", "detr-bccd@1": READY})
    await asyncio.to_thread(remove_version, model, "3")
    await requests.until_all({FIRST: READY, "detr-bccd@1": READY})


async def stop_during_a_change(requests: Requests, workers: Workers) -> None:
    stopped = await asyncio.to_thread(workers.stop_one)
    start = time.monotonic()
    answer = await requests.http("POST", repository_path("detr-bccd", "unload"))
    message = f"expected it to follow the change, found nothing after {SECONDS:.1f} s; it tries again"
    assert (answer.status, answer.json()["error"]) == (503, f"worker {stopped.pid}: {message}")
    assert time.monotonic() - start < 10 * SECONDS
    assert await requests.status("POST", "/detect", requests.frog) == 404
    stopped.resume()
    await requests.until_all({FIRST: READY, "detr-bccd@1": UNLOADED})


async def kill_all_while_files_are_damaged(requests: Requests, workers: Workers, model: Path) -> None:
    """What was unloaded stays so, and can be loaded."""
    ready, graph = workers.ready, model / "1" / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(b"no graph")
    for worker in workers.all:
        worker.kill()
    await asyncio.to_thread(workers.until_all_are_ready, ready + 2)
    await requests.until_all({FIRST: "model.onnx: size: expected", "detr-bccd@1": UNLOADED})
    answer = await requests.http("POST", "/classify", requests.frog)
    assert (answer.status, answer.json()["error"]["code"]) == (503, "invalid_bundle")
    assert "model.onnx: size: expected" in answer.json()["error"]["message"]
    assert await requests.status("GET", f"/v2/models/{VIT}/ready") == 503
    ready_answer = await requests.call("ModelReady", pb.ModelReadyRequest(name=VIT))
    assert not pb.ModelReadyResponse.FromString(ready_answer).ready
    assert await requests.status("POST", repository_path(VIT, "load")) == 503
    await requests.change("detr-bccd", "load")
    assert await requests.status("POST", "/detect", requests.frog) == 200
    graph.write_bytes(content)
    await requests.until_all({FIRST: READY, "detr-bccd@1": READY})
    assert await requests.status("POST", "/classify", requests.frog) == 200


async def hold_the_state(requests: Requests, workers: Workers) -> None:
    """As a worker does that is stopped in the middle of a change."""
    lock = os.open(workers.shared, os.O_RDONLY)
    await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
    answer = await requests.http("POST", repository_path(VIT, "unload"))
    assert answer.status == 504
    assert answer.json()["error"].endswith("found it unfinished; it may still take effect")
    os.close(lock)
    await requests.until_all({FIRST: UNLOADED, "detr-bccd@1": READY})
    await requests.change(VIT, "load")


@pytest.mark.soak
def test_workers_agree_after_every_fault(serve: Serving, root: Path, bundles: Path) -> None:
    with serve(bundles, **FAULTS) as server:
        requests, workers = Requests(server, (root / "examples" / "frog.jpg").read_bytes()), Workers(server)

        async def run() -> None:
            await kill_in_the_middle_of_a_change(requests, workers, bundles / VIT)
            await stop_during_a_change(requests, workers)
            await kill_all_while_files_are_damaged(requests, workers, bundles / VIT)
            await hold_the_state(requests, workers)

        asyncio.run(run())
        check_log(server)


@pytest.mark.soak
def test_every_operation_has_its_outcomes_while_workers_are_killed_and_stopped(
    serve: Serving, root: Path, bundles: Path
) -> None:
    with serve(bundles, **FAULTS) as server:
        requests, workers = Requests(server, (root / "examples" / "frog.jpg").read_bytes()), Workers(server)

        async def run() -> dict[str, Counter[object]]:
            seen: dict[str, Counter[object]] = {}
            end = time.monotonic() + 180
            async with asyncio.TaskGroup() as group:
                with requests.repeated(group, seen, {LOST, 503, 504, "UNAVAILABLE", "DEADLINE_EXCEEDED"}):
                    for number in itertools.count():
                        (change, _), ready = CHANGES[number % len(CHANGES)], workers.ready
                        await asyncio.to_thread(change, bundles / VIT)
                        if number % 2:
                            workers.all[number // 2 % 2].kill()
                            await asyncio.to_thread(workers.until_all_are_ready, ready + 1)
                        else:
                            stopped = workers.all[number // 2 % 2]
                            stopped.suspend()
                            await asyncio.sleep(1.5 * SECONDS if number % 4 else 0.5)
                            stopped.resume()
                        if time.monotonic() > end and number % len(CHANGES) == len(CHANGES) - 1:
                            break
            assert await requests.status("POST", repository_path("detr-bccd", "load")) == 200
            await requests.until_all({FIRST: READY, "detr-bccd@1": READY})
            return seen

        seen = asyncio.run(run())
        check_log(server)
    print({name: dict(outcomes) for name, outcomes in seen.items()})
