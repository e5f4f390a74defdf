"""The folder shared by the processes of a server, and the ports that they listen on."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from vitrine.service.launch import shared_folder
from vitrine.service.settings import SettingsError


def test_a_server_without_a_writable_folder_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("_VITRINE_SHARED", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"TMPDIR: expected a folder that can be written to, found: .*nowhere"):
        shared_folder()


def listening_ports(process: psutil.Process) -> set[int]:
    """Ports that a process and its children listen on."""
    family = [process, *process.children(recursive=True)]
    connections = [connection for member in family for connection in member.net_connections("inet")]
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_no_port_is_opened_but_the_announced_ones(running: Any) -> None:
    announced = {httpx.URL(running.url).port, int(running.grpc.rpartition(":")[2])}
    assert listening_ports(psutil.Process(running.process.pid)) == announced


def test_a_folder_too_deep_for_sockets_does_no_harm(
    serve: Callable[..., AbstractContextManager[Any]], tiny_bundles: Path, tmp_path: Path
) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    with serve(tiny_bundles, TMPDIR=str(deep)) as running:
        assert httpx.get(f"{running.url}/readyz").status_code == 200
        assert len(listening_ports(psutil.Process(running.process.pid))) == 4
