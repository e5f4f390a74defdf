import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitrine.models.download import Checksum, DownloadError, download

NOISE = np.random.default_rng(0).bytes(300_000)
SHA256 = Checksum("sha256", hashlib.sha256(NOISE).hexdigest())


@pytest.fixture
def server(file_server: Any) -> Any:
    file_server.files["/noise"] = NOISE
    return file_server


def test_a_file_is_downloaded_once(server: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False) == tmp_path / "n"
        assert (tmp_path / "n").read_bytes() == NOISE
    assert server.asked == [("/noise", None)]
    assert os.listdir(tmp_path) == ["n"]


def test_a_broken_connection_is_resumed(server: Any, tmp_path: Path) -> None:
    server.breaks_after = 120_000
    download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False)
    assert (tmp_path / "n").read_bytes() == NOISE
    assert server.asked == [("/noise", None), ("/noise", "bytes=120000-"), ("/noise", "bytes=240000-")]


def test_a_later_attempt_resumes(server: Any, tmp_path: Path) -> None:
    (tmp_path / "n.part").write_bytes(NOISE[:1000])
    server.breaks_after = 0
    with pytest.raises(DownloadError, match=r"/noise: the connection broke; try again: the download resumes"):
        download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False)
    server.breaks_after = None
    download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False)
    assert server.asked[-1] == ("/noise", "bytes=1000-")
    assert (tmp_path / "n").read_bytes() == NOISE


def test_a_complete_download_is_only_verified(server: Any, tmp_path: Path) -> None:
    (tmp_path / "n.part").write_bytes(NOISE)
    download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False)
    assert server.asked == [("/noise", "bytes=300000-")]


def test_a_server_that_cannot_resume_starts_over(server: Any, tmp_path: Path) -> None:
    (tmp_path / "n.part").write_bytes(b"something else that is quite long" * 20_000)
    server.resumes = False
    download(f"{server.url}/noise", tmp_path / "n", SHA256, show=False)
    assert (tmp_path / "n").read_bytes() == NOISE


@pytest.mark.parametrize("digits", [SHA256.digits, SHA256.digits[:8]])
def test_a_wrong_checksum(server: Any, tmp_path: Path, digits: str) -> None:
    server.files["/noise"] = NOISE[:-1] + b"x"
    with pytest.raises(
        DownloadError, match=rf"noise: expected the SHA256 checksum {digits}, found \w{{64}}; the file was removed"
    ):
        download(f"{server.url}/noise", tmp_path / "n", Checksum("sha256", digits), show=False)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_not_there(server: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"/other: expected a file, the server answers 404 Not Found"):
        download(f"{server.url}/other", tmp_path / "n", None, show=False)
    assert os.listdir(tmp_path) == []


def test_an_unreachable_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(
            DownloadError, match=r"127\.0\.0\.1:\d+ cannot be reached: .*refused; is this computer online"
        ):
            download(url, tmp_path / "n", None, show=False)
