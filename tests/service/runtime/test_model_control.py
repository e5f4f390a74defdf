"""Models that are loaded, replaced and unloaded while real servers of one and two workers answer."""

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import pytest

from vitrine.bundle.errors import UnknownModelError
from vitrine.bundle.repository import Repository
from vitrine.service.runtime.model_control import ModelControl

Serving = Callable[..., AbstractContextManager[tuple[str, str, Popen[str], list[str]]]]
NewVersion = Callable[[Path, str], Path]

DEADLINE = 30.0  # seconds for what has to happen at last


@pytest.fixture
def bundles(tiny_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles, tmp_path / "bundles"))


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def versions(url: str) -> list[str]:
    answer: list[str] = httpx.get(f"{url}/models/colours", timeout=60).json()["versions"]
    return answer


class Load:
    """Clients that ask all the time; `answers` is a list of (status, version)."""

    def __init__(self, url: str, image: bytes, clients: int = 3) -> None:
        self.answers: list[tuple[int, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, image)) for _ in range(clients)]

    def _ask(self, url: str, image: bytes) -> None:
        while not self._stop.is_set():  # a new connection each time: any worker may answer
            answer = httpx.post(f"{url}/classify?model=colours", content=image, timeout=60)
            self.answers.append((answer.status_code, answer.json().get("model", {}).get("version", "")))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_is_swapped_under_load_without_a_failed_request(
    workers: int, serve: Serving, bundles: Path, new_version: NewVersion, photograph: bytes
) -> None:
    environment = {"VITRINE_POLL_SECONDS": "0.1", "VITRINE_WORKERS": str(workers)}
    with serve(bundles, **environment) as (url, *_), Load(url, photograph) as load:
        until(lambda: len(load.answers) > 20)
        new_version(bundles / "colours" / "1", "2")
        until(lambda: [version for _, version in load.answers[-20:]] == ["2"] * 20)
        shutil.rmtree(bundles / "colours" / "2")
        until(lambda: [version for _, version in load.answers[-20:]] == ["1"] * 20)
    assert {status for status, _ in load.answers} == {200}


def test_a_broken_new_version_is_refused_and_the_old_one_keeps_answering(
    serve: Serving, bundles: Path, new_version: NewVersion, photograph: bytes
) -> None:
    with serve(bundles, VITRINE_POLL_SECONDS="0.1") as (url, _, _, lines), Load(url, photograph, clients=1) as load:
        source = bundles / "colours" / "1"
        broken = new_version(source, "2")
        (broken / "golden.npz").unlink()
        until(lambda: any("refused: " in line and "golden.npz" in line for line in lines))
        assert versions(url) == ["1"]
        shutil.copy(source / "golden.npz", broken)
        until(lambda: versions(url) == ["1", "2"])
    assert {status for status, _ in load.answers} == {200}
    assert len([line for line in lines if "refused: " in line and "golden.npz" in line]) <= 2  # half-removed at most


def index(url: str) -> dict[str, str]:
    answer = httpx.post(f"{url}/v2/repository/index").json()
    return {f"{entry['name']}@{entry['version']}": entry["state"] for entry in answer}


def test_two_workers_agree_as_soon_as_a_load_or_unload_is_answered(
    serve: Serving, bundles: Path, new_version: NewVersion
) -> None:
    with serve(bundles, VITRINE_WORKERS="2", VITRINE_MODEL_CONTROL="true") as (url, *_):
        new_version(bundles / "colours" / "1", "2")
        assert httpx.post(f"{url}/v2/repository/models/colours/load", timeout=60).status_code == 200
        assert {tuple(versions(url)) for _ in range(20)} == {("1", "2")}
        assert httpx.post(f"{url}/v2/repository/models/colours/unload", timeout=60).status_code == 200
        assert {httpx.get(f"{url}/models/colours", timeout=60).status_code for _ in range(20)} == {404}
        assert {index(url)["colours@2"] for _ in range(20)} == {"UNAVAILABLE"}
        assert httpx.post(f"{url}/v2/repository/models/colours/load", timeout=60).status_code == 200
        assert {tuple(versions(url)) for _ in range(20)} == {("1", "2")}


def test_a_worker_that_is_started_again_knows_what_was_unloaded(
    serve: Serving, bundles: Path, photograph: bytes
) -> None:
    with serve(bundles, VITRINE_WORKERS="2", VITRINE_MODEL_CONTROL="true") as (url, _, process, lines):
        assert httpx.post(f"{url}/v2/repository/models/colours/unload", timeout=60).status_code == 200
        ready = sum("ready:" in line for line in lines)
        victim = psutil.Process(process.pid).children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: sum("ready:" in line for line in lines) > ready)
        assert {httpx.get(f"{url}/models/colours", timeout=60).status_code for _ in range(20)} == {404}
        assert (
            httpx.post(f"{url}/v2/repository/models/colours/load", timeout=60).status_code == 200
        )  # the dead are not waited for
        assert {tuple(versions(url)) for _ in range(20)} == {("1",)}


def test_an_answer_in_work_is_finished_although_its_model_is_unloaded(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_MODEL_CONTROL="true") as (url, *_):
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/classify", content=bright(255), timeout=60))
        )
        thread.start()
        until(lambda: "vitrine_requests_in_flight 1.0" in httpx.get(f"{url}/metrics").text.splitlines())
        assert httpx.post(f"{url}/v2/repository/models/slow/unload", timeout=60).status_code == 200
        assert httpx.post(f"{url}/classify", content=bright(0)).status_code == 404
        thread.join()
        assert [answer.status_code for answer in answers] == [200]


def test_loading_and_unloading_are_off_unless_the_operator_allows_them(server: str) -> None:
    for operation in ("load", "unload"):
        answer = httpx.post(f"{server}/v2/repository/models/colours/{operation}")
        assert answer.status_code == 403
        assert answer.json() == {
            "error": "loading and unloading models is disabled; VITRINE_MODEL_CONTROL=true enables it"
        }


def test_a_thread_that_is_stuck_is_seen_by_livez(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_STUCK_SECONDS="0.3") as (url, *_):
        assert httpx.get(f"{url}/livez").status_code == 200
        thread = threading.Thread(target=lambda: httpx.post(f"{url}/classify", content=bright(255), timeout=60))
        thread.start()
        until(lambda: httpx.get(f"{url}/livez").status_code == 503)
        for path in ("/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"):
            assert httpx.get(url + path).status_code == 503
        thread.join()
        until(lambda: httpx.get(f"{url}/livez").status_code == 200)


def test_a_change_that_fails_is_not_told_to_the_others(bundles: Path, tmp_path: Path) -> None:
    control = ModelControl(Repository(bundles), tmp_path / "shared")
    with pytest.raises(UnknownModelError):
        asyncio.run(control.load("cats"))
    assert not (tmp_path / "shared" / "journal").exists()
    asyncio.run(control.unload("colours"))
    assert len((tmp_path / "shared" / "journal").read_text().splitlines()) == 1
    late = Repository(bundles)
    ModelControl(late, tmp_path / "shared")
    assert list(late.bundles) == ["squares"]


def test_what_is_loaded_while_a_worker_starts_is_served_by_it_too(
    bundles: Path, tmp_path: Path, new_version: NewVersion
) -> None:
    first = ModelControl(Repository(bundles), tmp_path / "shared")
    late = Repository(bundles)  # and then
    new_version(bundles / "colours" / "1", "2")
    asyncio.run(first.load("colours"))
    asyncio.run(first.unload("squares"))
    ModelControl(late, tmp_path / "shared")
    assert [bundle.manifest.version for bundle in late.versions("colours")] == ["1", "2"]
    assert list(late.bundles) == ["colours"]
