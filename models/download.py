"""Download files: with progress, from where an earlier attempt ended, verified by their published hash."""

import errno
import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from vitrine.bundle.errors import VitrineError

_TIMEOUT = 30  # seconds without data
_BLOCK = 2**20  # bytes read at a time


class DownloadError(VitrineError):
    """A file cannot be downloaded, or is not the published one."""

    code = "download_failed"


class Checksum(NamedTuple):
    """A published hash, or its first digits."""

    algorithm: str  # of hashlib: "md5", "sha256"
    digits: str  # hexadecimal

    def matches(self, file: Path) -> bool:
        """Whether the file has this hash."""
        return self.of(file).startswith(self.digits)

    def of(self, file: Path) -> str:
        """Return the hash of a file by this algorithm."""
        with file.open("rb") as content:
            return hashlib.file_digest(content, self.algorithm).hexdigest()


def download(url: str, file: Path, checksum: Checksum | None, *, show: bool) -> Path:
    """Download a file unless it is there; retry as long as each attempt makes progress.

    What has been received is kept beside it as `NAME.part`, and the next attempt resumes from there.

    Args:
        show: whether to show progress, on a terminal.

    Returns:
        `file`, which is written as a whole.

    Raises:
        DownloadError: it cannot be downloaded, or has another hash; then it is removed.
        OSError: it cannot be written.
    """
    if file.exists():
        return file
    part = file.with_name(f"{file.name}.part")
    with tqdm(desc=file.name, unit="B", unit_scale=True, leave=False, disable=None if show else True) as bar:
        before = -1
        while not _receive(url, part, bar):
            if part.stat().st_size <= before:
                raise DownloadError(f"{url}: the connection broke; try again: the download resumes")
            before = part.stat().st_size
    if checksum is not None and not checksum.matches(part):
        found = checksum.of(part)
        part.unlink()
        expected = f"the {checksum.algorithm.upper()} checksum {checksum.digits}"
        raise DownloadError(f"{url}: expected {expected}, found {found}; the file was removed")
    return part.replace(file)


def _receive(url: str, part: Path, bar: "tqdm[None]") -> bool:
    """Append the missing bytes of a file; return whether it is complete."""
    received = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        url, headers={"User-Agent": "vitrine", **({"Range": f"bytes={received}-"} if received else {})}
    )
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and received:
            return True
        raise DownloadError(f"{url}: expected a file, the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        cause = getattr(reason, "strerror", None) or reason
        raise DownloadError(f"{urlsplit(url).netloc} cannot be reached: {cause}; is this computer online?") from error
    if response.status != http.client.PARTIAL_CONTENT:
        received = 0
    with response, part.open("ab" if received else "wb") as file:
        length = response.headers.get("Content-Length")
        total = None if length is None else received + int(length)
        if total is not None and total - received > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, "the disk is full")
        bar.total, bar.n = total, received
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException):
                return False
            if not block:
                return total is None or received == total
            file.write(block)
            file.flush()
            received += len(block)
            bar.update(len(block))
