"""Loading, replacing and unloading models while real servers of one and two workers serve."""

import asyncio
import fcntl
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrine.bundle.errors import BundleError, UnknownModelError
from vitrine.bundle.repository import Repository
from vitrine.service.errors import UnavailableError, UnfinishedError, WorkerError
from vitrine.service.runtime.model_control import ModelControl, read_state

Serving = Callable[..., AbstractContextManager[Any]]
NewVersion = Callable[[Path, str], Path]

DEADLINE = 30.0  # seconds to wait for a condition


@pytest.fixture
def bundles(tiny_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles, tmp_path / "bundles"))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The folder that the workers share."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def versions(url: str) -> list[str]:
    response: list[str] = httpx.get(f"{url}/models/colours", timeout=60).json()["versions"]
    return response


class Load:
    """Clients that send requests continuously; `responses` is a list of (status, version)."""

    def __init__(self, url: str, image: bytes, clients: int = 3) -> None:
        self.responses: list[tuple[int, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(url, image)) for _ in range(clients)]

    def _send(self, url: str, image: bytes) -> None:
        while not self._stop.is_set():  # a new connection each time: any worker may response
            response = httpx.post(f"{url}/classify?model=colours", content=image, timeout=60)
            self.responses.append((response.status_code, response.json().get("model", {}).get("version", "")))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_model_is_swapped_under_load_without_a_failed_request(
    serve: Serving, bundles: Path, new_version: NewVersion, photograph: bytes
) -> None:
    environment = {"VITRINE_POLL_SECONDS": "0.1", "VITRINE_WORKERS": "2"}
    with serve(bundles, **environment) as (url, *_), Load(url, photograph) as load:
        wait_until(lambda: len(load.responses) > 20)
        new_version(bundles / "colours" / "1", "2")
        wait_until(lambda: [version for _, version in load.responses[-20:]] == ["2"] * 20)
        shutil.rmtree(bundles / "colours" / "2")
        wait_until(lambda: [version for _, version in load.responses[-20:]] == ["1"] * 20)
    assert {status for status, _ in load.responses} == {200}


def test_a_broken_new_version_is_refused_and_the_old_one_keeps_answering(
    serve: Serving, bundles: Path, new_version: NewVersion, photograph: bytes
) -> None:
    with serve(bundles, VITRINE_POLL_SECONDS="0.1") as (url, _, _, lines), Load(url, photograph, clients=1) as load:
        source = bundles / "colours" / "1"
        broken = new_version(source, "2")
        (broken / "golden.npz").unlink()
        wait_until(lambda: any("refused: " in line and "golden.npz" in line for line in lines))
        assert versions(url) == ["1"]
        shutil.copy(source / "golden.npz", broken)
        wait_until(lambda: versions(url) == ["1", "2"])
    assert {status for status, _ in load.responses} == {200}
    refusals = [line for line in lines if "refused: " in line and "golden.npz" in line]
    assert len(refusals) <= 2  # possibly reported again while half removed


def index(url: str) -> dict[str, str]:
    response = httpx.post(f"{url}/v2/repository/index").json()
    return {f"{entry['name']}@{entry['version']}": entry["state"] for entry in response}


def test_all_workers_have_changed_when_a_load_or_unload_returns_also_those_that_start_later(
    serve: Serving, bundles: Path, new_version: NewVersion
) -> None:
    with serve(bundles, VITRINE_WORKERS="2", VITRINE_MODEL_CONTROL="true") as (url, _, process, lines):
        new_version(bundles / "colours" / "1", "2")
        assert httpx.post(f"{url}/v2/repository/models/colours/load", timeout=60).status_code == 200
        assert {tuple(versions(url)) for _ in range(20)} == {("1", "2")}
        assert httpx.post(f"{url}/v2/repository/models/colours/unload", timeout=60).status_code == 200
        assert {httpx.get(f"{url}/models/colours", timeout=60).status_code for _ in range(20)} == {404}
        assert {index(url)["colours@2"] for _ in range(20)} == {"UNAVAILABLE"}
        wait_until(lambda: sum("ready:" in line for line in lines) == 2)
        psutil.Process(process.pid).children()[0].kill()
        wait_until(lambda: sum("ready:" in line for line in lines) == 3)
        assert {httpx.get(f"{url}/models/colours", timeout=60).status_code for _ in range(20)} == {404}
        # does not wait for the killed worker
        assert httpx.post(f"{url}/v2/repository/models/colours/load", timeout=60).status_code == 200
        assert {tuple(versions(url)) for _ in range(20)} == {("1", "2")}


def test_a_request_in_progress_finishes_although_its_model_is_unloaded(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_MODEL_CONTROL="true") as (url, *_):
        responses: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: responses.append(httpx.post(f"{url}/classify", content=bright(255), timeout=60))
        )
        thread.start()
        wait_until(lambda: "vitrine_requests_in_flight 1.0" in httpx.get(f"{url}/metrics").text.splitlines())
        assert httpx.post(f"{url}/v2/repository/models/slow/unload", timeout=60).status_code == 200
        assert httpx.post(f"{url}/classify", content=bright(0)).status_code == 404
        thread.join()
        assert [response.status_code for response in responses] == [200]


def test_loading_and_unloading_are_disabled_by_default(server: str) -> None:
    for operation in ("load", "unload"):
        response = httpx.post(f"{server}/v2/repository/models/colours/{operation}")
        assert response.status_code == 403
        assert response.json() == {
            "error": "loading and unloading models is disabled; VITRINE_MODEL_CONTROL=true enables it"
        }


def load(control: ModelControl, name: str, seconds: float = DEADLINE) -> None:
    asyncio.run(control.load(name, seconds=seconds))


def unload(control: ModelControl, name: str, seconds: float = DEADLINE) -> None:
    asyncio.run(control.unload(name, seconds=seconds))


def test_a_failed_change_is_not_published(bundles: Path, shared: Path) -> None:
    control = ModelControl(Repository(bundles), shared)
    before = (shared / "models").read_bytes()
    with pytest.raises(UnknownModelError):
        load(control, "cats")
    assert (shared / "models").read_bytes() == before
    unload(control, "colours")
    assert list(Repository(bundles, state=read_state(shared)).bundles) == ["squares"]
    control.close()


def test_a_starting_worker_follows_changes_made_meanwhile(bundles: Path, shared: Path, new_version: NewVersion) -> None:
    first = ModelControl(Repository(bundles), shared)
    late = Repository(bundles)  # loaded before the changes
    new_version(bundles / "colours" / "1", "2")
    load(first, "colours")
    unload(first, "squares")
    second = ModelControl(late, shared)
    assert [bundle.manifest.version for bundle in late.versions("colours")] == ["1", "2"]
    assert list(late.bundles) == ["colours"]
    first.close()
    second.close()


@pytest.mark.parametrize("damage", [b"", b"garbage", b"cut"])
def test_a_damaged_state_stops_nobody_and_is_written_anew(damage: bytes, bundles: Path, shared: Path) -> None:
    control = ModelControl(Repository(bundles), shared)
    unload(control, "colours")
    file = shared / "models"
    file.write_bytes(file.read_bytes()[:50] if damage == b"cut" else damage)
    assert read_state(shared) is None
    control.step()
    assert list(Repository(bundles, state=read_state(shared)).bundles) == ["squares"]
    file.unlink()
    control.step()
    late = ModelControl(Repository(bundles, state=read_state(shared)), shared)
    late.close()
    load(control, "colours")
    control.close()


def test_a_change_that_cannot_be_written_is_refused(bundles: Path, shared: Path) -> None:
    repository = Repository(bundles)
    control = ModelControl(repository, shared)
    before = (shared / "models").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UnavailableError, match="found: File too large; nothing has changed"):
            unload(control, "colours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (shared / "models").read_bytes() == before
    assert list(repository.bundles) == ["colours", "squares"]
    unload(control, "colours")
    control.close()


@contextmanager
def held(shared: Path) -> Iterator[None]:
    """Hold the lock on the state, as another worker that changes it."""
    lock = os.open(shared, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
    os.close(lock)


def test_a_worker_that_does_not_follow_is_named_and_a_dead_one_is_forgotten(
    bundles: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrine.service.runtime.model_control._LOCK_SECONDS", 0.2)
    first, second = Repository(bundles), Repository(bundles)
    control, idle = ModelControl(first, shared), ModelControl(second, shared)
    reused = shared / f"worker-{os.getpid()}-1-abc"  # an earlier process had this process id
    reused.write_text("[0, {}]")
    message = f"worker {os.getpid()}: expected it to follow the change, found nothing after 0.2 s; it tries again"
    with pytest.raises(WorkerError, match=message):
        unload(control, "colours", seconds=0.2)
    idle.step()  # as `watch` would
    assert list(second.bundles) == list(first.bundles) == ["squares"]
    idle.close()
    load(control, "colours")
    assert not reused.exists()
    with held(shared), pytest.raises(UnavailableError, match="expected to change them, found another worker"):
        unload(control, "colours")
    assert list(first.bundles) == ["colours", "squares"]
    control.close()


def test_a_change_that_takes_too_long_takes_effect_as_a_whole_later(bundles: Path, shared: Path) -> None:
    repository = Repository(bundles)
    control = ModelControl(repository, shared)
    message = r"model 'colours': expected to change it in 0\.2 s, found it unfinished; it may still take effect"
    with held(shared):
        with pytest.raises(UnfinishedError, match=message):
            unload(control, "colours", seconds=0.2)
        assert list(repository.bundles) == ["colours", "squares"]
    wait_until(lambda: list(repository.bundles) == ["squares"])
    load(control, "colours")  # after it
    state = read_state(shared)
    assert state == repository.state
    assert not state.unloaded
    control.close()


def test_a_worker_that_waits_to_make_a_change_follows_meanwhile(bundles: Path, shared: Path) -> None:
    first, second = (ModelControl(Repository(bundles), shared) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        followed = pool.submit(unload, first, "colours")
        wait_until(lambda: bool((state := read_state(shared)) and state.unloaded))
        with held(shared):
            waiting = pool.submit(unload, second, "squares")
            followed.result(DEADLINE)
        while not waiting.done():
            first.step()
        waiting.result()
    state = read_state(shared)
    assert state is not None
    assert not state.served
    for control in (first, second):
        control.close()


def test_a_change_fails_only_if_its_own_model_is_behind(bundles: Path, shared: Path) -> None:
    """Here, one worker starts while the files of another model are damaged."""
    graph = bundles / "colours" / "1" / "model.onnx"
    sound = Repository(bundles)
    control = ModelControl(sound, shared)
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    late = Repository(bundles, state=read_state(shared))
    restarted = ModelControl(late, shared)
    with ThreadPoolExecutor(1) as pool:

        def change(leader: ModelControl, follower: ModelControl, make: Callable[..., None], name: str) -> None:
            done = pool.submit(make, leader, name)
            while not done.done():
                follower.step()
            done.result()

        for leader, follower in ((control, restarted), (restarted, control)):
            for make in (unload, load):
                change(leader, follower, make, "squares")
            with pytest.raises(BundleError, match=r"colours/1/model\.onnx: size"):
                change(leader, follower, load, "colours")
        assert sound.get("colours").manifest.name == "colours"
        with pytest.raises(BundleError, match=r"colours/1/model\.onnx: size"):
            late.get("colours")
        graph.write_bytes(content)
        change(control, restarted, load, "colours")
        assert late.get("colours").manifest.name == "colours"
    for worker in (control, restarted):
        worker.close()


OPERATIONS = st.tuples(
    st.sampled_from(["load", "unload", "poll", "add", "remove", "corrupt", "restart", "damage"]),
    st.integers(0, 2),
    st.sampled_from("23"),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, max_size=10))
def test_workers_converge_after_any_interleaving(
    operations: list[tuple[str, int, str]], slow_bundle: Path, new_version: NewVersion
) -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        root = Path(shutil.copytree(slow_bundle, Path(folder) / "bundles"))
        shared, source = Path(folder) / "shared", root / "slow" / "1"
        shared.mkdir()

        def start() -> tuple[Repository, ModelControl]:
            repository = Repository(root, state=read_state(shared))
            return repository, ModelControl(repository, shared)

        def change(index: int, action: str) -> bool:
            """Whether the change succeeds; all workers follow it meanwhile."""
            request = pool.submit(load if action == "load" else unload, workers[index][1], "slow")
            while not request.done():
                for other, (_, control) in enumerate(workers):
                    if other != index:
                        control.step()
            return request.exception() is None

        workers = [start() for _ in range(3)]
        for action, index, version in operations:
            target = root / "slow" / version
            if action in ("load", "unload"):
                change(index, action)
            elif action == "poll":
                polling = ModelControl(workers[index][0], shared, poll_seconds=1e-9)
                polling.step()
                polling.close()
            elif action == "restart":
                for _, control in workers:
                    control.step()  # as `watch` would while a process starts
                workers[index][1].close()
                workers[index] = start()
            elif action == "damage":
                (shared / "models").write_bytes(b"x")
            elif action == "add" and not target.exists():
                new_version(source, version)
            elif action == "remove":
                shutil.rmtree(target, ignore_errors=True)
            elif action == "corrupt" and target.exists():
                (target / "golden.npz").write_bytes(b"x")
        for version in ("2", "3"):  # repair all
            shutil.rmtree(root / "slow" / version, ignore_errors=True)
            new_version(source, version)
        for _, control in workers:
            control.step()
        assert change(0, "load")
        for repository, control in workers:
            control.step()
            assert [bundle.manifest.version for bundle in repository.versions("slow")] == ["1", "2", "3"]
            assert repository.state == workers[0][0].state
            assert not repository.errors
            control.close()
