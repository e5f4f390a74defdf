"""Files of bundles, and what may lie in their place."""

import os
import socket
from pathlib import Path

import pytest

from vitrine.bundle.errors import BundleError
from vitrine.bundle.files import hash_file, open_file, read_file

ODDITIES = ["missing", "folder", "FIFO", "socket", "device", "link in a circle", "huge"]


def put(kind: str, file: Path) -> None:
    """Put something else in the place of a file."""
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            folder = os.open(file.parent, os.O_RDONLY)  # the path of a socket is limited to 108 bytes
            listener.bind(f"/proc/self/fd/{folder}/{file.name}")
            os.close(folder)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "link in a circle":
        file.symlink_to(file.name)
    elif kind == "huge":
        with file.open("wb") as stream:
            stream.truncate(100 * 2**30)


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.timeout(20)
def test_what_is_not_a_file_of_this_size_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    put(kind, file)
    with pytest.raises(BundleError, match=f"^{file}: (file: expected a r|size: expected at most 10 bytes, found 107)"):
        read_file(file, 10)


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read_file(file, 10) == read_file(tmp_path / "link", 10) == b"0123456789"
    assert hash_file(file).startswith("84d89877f0d4041efb6bf91a16f0248f")
    with open_file(file) as stream:
        assert stream.read(2) == b"01"
    with pytest.raises(BundleError, match="size: expected at most 9 bytes, found 10"):
        read_file(file, 9)


def test_a_failure_while_reading_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    message = f"{file}: file: expected a readable file, found Input/output error"
    with pytest.raises(BundleError, match=message), open_file(file):
        raise OSError(5, "Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0)
    with pytest.raises(BundleError, match="expected a readable file, found Permission denied"):
        read_file(file, 10)
