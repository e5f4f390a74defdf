"""Read the files of bundles, whatever lies in their place."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from vitrine.bundle.errors import BundleError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def open_file(file: Path, what: str = "file") -> Iterator[BufferedReader]:
    """Open a regular file for reading. Never waits, as opening a FIFO does until somebody writes to it.

    Args:
        what: what it is, for messages.

    Raises:
        BundleError: there is none, or it cannot be read, here or inside the `with` block.
    """
    try:
        _check_kind(file, file.stat())
        with open(file, "rb", opener=_open_at_once) as stream:
            _check_kind(file, os.fstat(stream.fileno()))
            yield stream
    except OSError as error:
        raise BundleError(file, "file", expected=f"a readable {what}", found=error.strerror or error) from error


def read_file(file: Path, max_bytes: int, what: str = "file") -> bytes:
    """Return the content of a regular file of at most `max_bytes`; see `open_file`.

    Raises:
        BundleError: see `open_file`, or it is larger.
    """
    with open_file(file, what) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise BundleError(file, "size", expected=f"at most {max_bytes} bytes", found=size)
        return stream.read(size)


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal.

    Raises:
        BundleError: see `open_file`.
    """
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_kind(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(file, "file", expected="a regular file", found=_KINDS.get(stat.S_IFMT(status.st_mode)))
