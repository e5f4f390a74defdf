"""A server whose temporary folder fails it, before and while it serves."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

Serving = Callable[..., AbstractContextManager[Any]]


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


@pytest.mark.parametrize("fault", ["full", "removed"])
def test_a_server_outlives_its_temporary_folder(
    fault: str, serve: Serving, tiny_bundles: Path, photograph: bytes, small_tmpfs: Path
) -> None:
    with serve(tiny_bundles, TMPDIR=str(small_tmpfs)) as running:
        check_everything(running, photograph)
        if fault == "full":
            fill(small_tmpfs)
        else:
            for made in small_tmpfs.iterdir():
                shutil.rmtree(made)
        check_everything(running, photograph)
        assert "Traceback" not in "".join(running.lines)


def test_a_server_starts_in_a_full_temporary_folder(
    serve: Serving, tiny_bundles: Path, photograph: bytes, small_tmpfs: Path
) -> None:
    fill(small_tmpfs)
    with serve(tiny_bundles, TMPDIR=str(small_tmpfs)) as running:
        check_everything(running, photograph)


@pytest.mark.parametrize("home", ["missing", "a file"])
def test_a_server_needs_no_home(
    home: str, serve: Serving, tiny_bundles: Path, photograph: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "home"
    if home == "a file":
        folder.touch()
    with serve(tiny_bundles, HOME=str(folder), XDG_CACHE_HOME="", XDG_CONFIG_HOME="") as running:
        check_everything(running, photograph)
