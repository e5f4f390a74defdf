"""Servers whose files fail them: the temporary folder, the home, the whole file system, and the files of a bundle."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

Serving = Callable[..., AbstractContextManager[Any]]

DEADLINE = 60.0  # seconds
PROGRAM = ".venv/bin/python", "-m", "vitrine"
# What root may do in spite of permissions, no longer.
UNPRIVILEGED = "setpriv", "--bounding-set=-all", "--inh-caps=-all"
# Read-only everywhere but in folders that are mounts of their own; no /dev/shm.
READ_ONLY = (
    "unshare",
    "-m",
    "sh",
    "-c",
    'umount /dev/shm && mount -o remount,bind,ro /dev && mount -o remount,bind,ro / && exec "$@"',
    "sh",
)
FILES = "manifest.json", "model.onnx", "golden.npz", "explain.onnx"
KINDS = "FIFO", "device", "socket", "folder", "link in a circle", "unreadable", "empty", "cut", "huge"


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 48 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no space on the file system of a folder."""
    with (folder / "fill").open("wb", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            try:
                while stream.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def check_everything(running: Any, photograph: bytes) -> None:
    """Check that requests are answered and counted."""
    before = requests_counted(running.url)
    for _ in range(5):
        httpx.post(f"{running.url}/classify", content=photograph, timeout=30).raise_for_status()
    files = [("image", ("a", photograph))] * 3
    httpx.post(f"{running.url}/classify", files=files, timeout=30).raise_for_status()
    assert requests_counted(running.url) == before + 6
    assert httpx.get(f"{running.url}/readyz").status_code == 200


def requests_counted(url: str) -> float:
    response = httpx.get(f"{url}/metrics").raise_for_status()
    lines = [line for line in response.text.splitlines() if line.startswith("vitrine_requests_total")]
    return sum(float(line.split()[-1]) for line in lines if 'route="/classify"' in line and 'status="200"' in line)


@contextmanager
def fault(kind: str, shared: Path) -> Iterator[None]:
    """A temporary folder that is full, read-only or removed, within the block."""
    if kind == "full":
        fill(shared)
        yield
        (shared / "fill").unlink()
    elif kind == "read-only":
        subprocess.run(["mount", "--bind", shared, shared], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", shared], check=True)
        yield
        subprocess.run(["umount", "--lazy", shared], check=True)
    else:
        shutil.rmtree(shared)
        yield


def kill_worker(running: Any) -> None:
    """Kill the worker, and wait until another one serves in its place."""
    ready = sum("ready:" in line for line in running.lines)
    (worker,) = [child for child in psutil.Process(running.process.pid).children() if "worker" in str(child.cmdline())]
    worker.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE
    while sum("ready:" in line for line in running.lines) == ready:
        assert time.monotonic() < deadline, "".join(running.lines)
        time.sleep(0.02)


def change(url: str, operation: str, model: str = "colours") -> tuple[int, str]:
    response = httpx.post(f"{url}/v2/repository/models/{model}/{operation}", timeout=60)
    return response.status_code, response.json()["error"] if response.content else ""


@pytest.mark.soak
def test_a_server_outlives_its_temporary_folder(
    serve: Serving, tiny_bundles: Path, photograph: bytes, small_tmpfs: Path
) -> None:
    environment = {"TMPDIR": str(small_tmpfs), "VITRINE_MODEL_CONTROL": "true", "VITRINE_KEY_RATE": "10000"}
    with serve(tiny_bundles, **environment) as running:
        check_everything(running, photograph)
        (shared,) = small_tmpfs.glob("vitrine-*")
        for kind, found in (
            ("read-only", "Read-only file system"),
            ("full", "No space left on device"),
            ("removed", "No such file or directory"),
        ):
            with fault(kind, shared):
                check_everything(running, photograph)
                if kind == "full":
                    fill(shared)  # the server may have freed some of it
                status, error = change(running.url, "unload")
                assert (status, found in error) == (503, True)
                kill_worker(running)
                check_everything(running, photograph)
            for operation in ("unload", "load"):
                assert change(running.url, operation) == (200, "")
        assert "Traceback" not in "".join(running.lines)
    assert running.process.returncode == 0


def test_a_server_starts_in_a_full_temporary_folder_and_with_a_file_as_home(
    serve: Serving, tiny_bundles: Path, photograph: bytes, small_tmpfs: Path
) -> None:
    home = small_tmpfs / "home"
    home.touch()
    fill(small_tmpfs)
    with serve(tiny_bundles, TMPDIR=str(small_tmpfs), HOME=str(home), XDG_CACHE_HOME="", XDG_CONFIG_HOME="") as running:
        check_everything(running, photograph)


def skip_unless(*program: str) -> None:
    found = subprocess.run([*program, "true"], check=False, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"not possible here: {found.stderr.strip()}")


def test_a_server_needs_one_writable_folder(
    serve: Serving, run_refused: Callable[..., str], tiny_bundles: Path, photograph: bytes, small_tmpfs: Path
) -> None:
    skip_unless(*READ_ONLY)
    with serve(tiny_bundles, program=(*READ_ONLY, *PROGRAM), TMPDIR=str(small_tmpfs), HOME="/root") as running:
        check_everything(running, photograph)
    printed = run_refused(tiny_bundles, *READ_ONLY)
    assert printed.startswith("vitrine: TMPDIR: expected a folder that can be written to, found:")


@pytest.fixture
def run_refused(root: Path, free_ports: tuple[str, ...]) -> Callable[..., str]:
    """Run `vitrine serve` behind a program, which must end soon; return its only line."""

    def run(bundles: Path, *before: str) -> str:
        command = [*before, *PROGRAM, "serve", *free_ports]
        environment = {**os.environ, "VITRINE_BUNDLES": str(bundles)}
        ended = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE
        )
        assert (ended.returncode, ended.stdout) == (1, "")
        (line,) = ended.stderr.splitlines()
        return line

    return run


def replace(file: Path, kind: str) -> None:
    """Put something else in a file's place."""
    content = file.read_bytes()
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.open(file.parent, os.O_PATH)
            listener.bind(f"/proc/self/fd/{here}/{file.name}")  # the path itself may be too long
            os.close(here)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("device", "link in a circle"):
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(kind, content))
        if kind == "unreadable":
            file.chmod(0)
        elif kind == "huge":
            os.truncate(file, 100 * 2**30)


def restore(file: Path, original: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.copy2(original, file)


@pytest.mark.parametrize(
    "cases",
    [
        zip(("FIFO", "huge", "link in a circle", "socket"), FILES, strict=True),
        pytest.param(product(KINDS, FILES), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_whatever_lies_in_a_files_place_is_refused_at_start(
    cases: Iterable[tuple[str, str]], run_refused: Callable[..., str], tiny_bundles: Path, tmp_path: Path
) -> None:
    def start(case: tuple[str, str]) -> None:
        kind, name = case
        bundles = Path(shutil.copytree(tiny_bundles / "colours", tmp_path / kind / name / "colours")).parent
        replace(bundles / "colours" / "1" / name, kind)
        line = run_refused(bundles, *UNPRIVILEGED)
        assert line.startswith(f"vitrine: {bundles}/colours/1/{name}: ")
        assert "expected" in line

    skip_unless(*UNPRIVILEGED)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, cases))


def test_whatever_lies_in_a_files_place_is_refused_when_loading(
    serve: Serving, tiny_bundles: Path, tmp_path: Path, photograph: bytes
) -> None:
    skip_unless(*UNPRIVILEGED)
    bundles = Path(shutil.copytree(tiny_bundles, tmp_path / "bundles"))
    with serve(bundles, program=(*UNPRIVILEGED, *PROGRAM), VITRINE_MODEL_CONTROL="true", HOME="/nowhere") as running:
        before = httpx.post(f"{running.url}/classify", content=photograph, timeout=30).raise_for_status().json()
        for kind in KINDS:
            for name in FILES:
                replace(bundles / "colours" / "1" / name, kind)
                status, error = change(running.url, "load")
                assert (status, name in error, "expected" in error) == (503, True, True), (kind, error)
                answer = httpx.post(f"{running.url}/classify", content=photograph, timeout=30).raise_for_status().json()
                assert answer["predictions"] == before["predictions"]
                restore(bundles / "colours" / "1" / name, tiny_bundles / "colours" / "1" / name)
            assert change(running.url, "load") == (200, "")
        assert "Traceback" not in "".join(running.lines)


def test_collectors_of_metrics_may_hang_or_hurry(server: str, photograph: bytes) -> None:
    host, port = server.removeprefix("http://").split(":")
    hanging = [socket.create_connection((host, int(port))) for _ in range(20)]
    for connection in hanging:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 10)

    def scrape(_: int) -> int:
        return httpx.get(f"{server}/metrics", timeout=30).status_code

    with ThreadPoolExecutor(10) as pool:
        scrapes = [pool.submit(scrape, number) for number in range(100)]
        for _ in range(10):
            httpx.post(f"{server}/classify", content=photograph, timeout=30).raise_for_status()
        assert {scrape.result() for scrape in scrapes} == {200}
    for connection in hanging:
        connection.close()
