"""The folder shared by the processes of a server."""

import tempfile
from pathlib import Path

import pytest

from vitrine.service.launch import shared_folder
from vitrine.service.settings import SettingsError


def test_a_server_without_a_writable_folder_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("_VITRINE_SHARED", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"TMPDIR: expected a folder that can be written to, found: .*nowhere"):
        shared_folder()
