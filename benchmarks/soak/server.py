"""Start a server of the shipped bundles on free ports."""

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.models import ROOT
from benchmarks.soak.client import HOST

_START_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    grpc_port: int
    pid: int
    bundles: Path  # its root: a folder of its own, with copies of two of the shipped bundles
    log: Path

    @property
    def url(self) -> str:
        """Base URL of HTTP."""
        return f"http://{HOST}:{self.port}"


@contextmanager
def started(**environment: str) -> Iterator[Server]:
    """Run a server of vit-cifar10 and detr-bccd during the block, with more settings.

    Raises:
        RuntimeError: it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bundles, log = Path(folder) / "bundles", Path(folder) / "log"
        for name in ("vit-cifar10", "detr-bccd"):
            (bundles / name).mkdir(parents=True)
            (bundles / name / "1").symlink_to(ROOT / "bundles" / name / "1")
        port, grpc_port = _free_ports()
        settings = {"VITRINE_BUNDLES": str(bundles), "VITRINE_PORT": str(port), "VITRINE_GRPC_PORT": str(grpc_port)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(ROOT / ".venv" / "bin" / "python"), "-m", "vitrine", "serve"],
                cwd=ROOT,
                env={**os.environ, **settings, "VITRINE_LOG_FORMAT": "json", **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        server = Server(port, grpc_port, process.pid, bundles, log)
        try:
            _wait_until_ready(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/readyz", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server did not start: {server.log.read_text()}")
        time.sleep(0.05)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as http, socket.socket() as grpc:
        http.bind((HOST, 0))
        grpc.bind((HOST, 0))
        return http.getsockname()[1], grpc.getsockname()[1]
