"""Weights by name: from installed packages, a hub and a server on loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vitrine.models.build import VARIANTS
from vitrine.models.published.catalogue import CATALOGUE, find_weights
from vitrine.models.published.errors import ImportSettingError, UnavailableWeightsError
from vitrine.models.training.checkpoint import load_checkpoint

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(file_server: Any) -> Any:
    """With weights whose name has the beginning of their hash."""
    file_server.files[f"/a/net-{DIGEST[:8]}.pth"] = CONTENT
    return file_server


# The catalogue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_says_where_it_is_from(name: str) -> None:
    weights = CATALOGUE[name]
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert re.fullmatch(r"(pypi|timm|https):\S+", weights.source)
    assert weights.licence
    assert re.search(r"\d (%|AP)", weights.result)
    assert weights.variant is None or weights.variant in VARIANTS


def test_the_catalogue_is_listed(run_vitrine: Callable[..., str]) -> None:
    lines = run_vitrine("import", "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOGUE)
    assert all(weights.source in line for weights, line in zip(CATALOGUE.values(), lines, strict=True))


def test_paths_stay_paths(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    file.touch()
    assert find_weights(str(file)) == ("mine", file, None)
    assert find_weights(str(tmp_path / "missing.pth"))[:2] == ("missing", tmp_path / "missing.pth")


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("detr-r50").mkdir()
    assert find_weights("detr-r50").path == Path("detr-r50")


def test_an_unknown_name() -> None:
    with pytest.raises(ImportSettingError, match=r"unknown 'detr-50': did you mean 'detr-r50'\? Known: efficientnet-"):
        find_weights("detr-50")


# Packages -------------------------------------------------------------------------------------------------------------


def test_weights_in_a_package_are_those_that_were_published() -> None:
    found = find_weights("efficientnet-lite0")
    assert found.name == "efficientnet-lite0"
    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == CATALOGUE["efficientnet-lite0"].sha256


@pytest.mark.parametrize("package", ["no-such-package", "os", "."])
def test_a_package_that_is_not_installed(package: str) -> None:
    with pytest.raises(UnavailableWeightsError, match=rf"{re.escape(package)} is not installed: pip install"):
        find_weights(f"pypi:{package}/file.pth")


def test_a_package_without_the_file() -> None:
    with pytest.raises(UnavailableWeightsError, match=r"numpy: expected file\.pth in this package, found no such file"):
        find_weights("pypi:numpy/file.pth")


# Addresses ------------------------------------------------------------------------------------------------------------


def test_an_address_is_downloaded_once(server: Any, tmp_path: Path) -> None:
    for _ in range(2):
        found = find_weights(f"{server.url}/a/net-{DIGEST[:8]}.pth", cache=tmp_path, show=False)
        assert found.name == f"net-{DIGEST[:8]}"
        assert found.path.read_bytes() == CONTENT
        assert found.path.is_relative_to(tmp_path)
    assert len(server.asked) == 1


def test_addresses_do_not_share_a_file(server: Any, tmp_path: Path) -> None:
    contents = {f"/{folder}/net.pth{query}": str(query).encode() for folder in "ab" for query in ("", "?v=1", "?v=2")}
    server.files |= contents
    for place, content in contents.items():
        assert find_weights(f"{server.url}{place}", cache=tmp_path, show=False).path.read_bytes() == content


def test_the_hash_in_a_name_is_checked(server: Any, tmp_path: Path) -> None:
    server.files[f"/a/net-{DIGEST[:8]}.pth"] = CONTENT + b"!"
    with pytest.raises(UnavailableWeightsError, match=rf"expected the SHA256 checksum {DIGEST[:8]}, found"):
        find_weights(f"{server.url}/a/net-{DIGEST[:8]}.pth", cache=tmp_path, show=False)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "url", ["https://", "http:x.pth", "https://host", "https://host/", "https://host/a/..", "http:///x"]
)
def test_an_address_without_a_file(url: str, tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError, match="expected the address of a weights file, https://HOST/PATH/FILE"):
        find_weights(url, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written(server: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UnavailableWeightsError, match=r"cache/127\.0\.0\.1.*: cannot be written"):
        find_weights(f"{server.url}/a/net-{DIGEST[:8]}.pth", cache=tmp_path / "cache", show=False)


# The hub --------------------------------------------------------------------------------------------------------------


FIND = """
import sys
from vitrine.bundle.errors import VitrineError
from vitrine.models.published.catalogue import find_weights

for reference in sys.argv[1:]:
    try:
        print(reference, "is", find_weights(reference).path)
    except VitrineError as error:
        print(error)
"""


class Hub:
    """A hub on loopback, and processes that use it with a cache of their own."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self._folder = server, folder
        server.headers[""] = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40}

    def publish(self, place: str, content: bytes, digest: str | None = None) -> None:
        owner, name, file = place.split("/")
        path = f"/{owner}/{name}/resolve/main/{file}"
        etag = digest or hashlib.sha256(content).hexdigest()
        self.server.files[path] = content
        self.server.headers[path] = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40}

    def run(self, *line: str, online: bool = True) -> str:
        environment = {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self._folder / "hub"), "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, *line],
            cwd=self._folder,
            env={**os.environ, **environment, "HF_HUB_OFFLINE": str(int(not online))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def hub(file_server: Any, tmp_path: Path) -> Hub:
    return Hub(file_server, tmp_path)


@pytest.fixture
def published_vit(tmp_path: Path) -> Path:
    """Folder of a tiny ViT as transformers publishes it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog"},
    )
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    preprocessor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.slow
def test_weights_of_a_hub_are_imported_with_their_settings(hub: Hub, published_vit: Path, tmp_path: Path) -> None:
    for file in published_vit.iterdir():
        hub.publish(f"me/net/{file.name}", file.read_bytes())
    output = hub.run("-m", "vitrine", "import", "hf:me/net")
    assert "imported: runs/net  Hugging Face's ViT" in output
    assert "preprocessing is that of preprocessor_config.json" in output
    assert load_checkpoint(tmp_path / "runs" / "net").labels == ["cat", "dog"]


@pytest.mark.slow
def test_what_a_hub_answers(hub: Hub) -> None:
    hub.publish("me/net/model.safetensors", CONTENT)
    hub.publish("timm/net/pytorch_model.bin", CONTENT)
    hub.publish("me/wrong/model.safetensors", CONTENT, "d" * 64)
    hub.publish("me/settings/config.json", b"{}")
    for name in ("config.json", "model.safetensors"):
        hub.server.headers[f"/me/none/resolve/main/{name}"] = {"X-Error-Code": "RepoNotFound"}
    references = ("hf:me/net", "timm:net", "hf:me/wrong", "hf:me/settings", "hf:me/none", "hf:a/b/c")
    lines = hub.run("-c", FIND, *references).splitlines()
    assert re.match(r"hf:me/net is .*/model.safetensors", lines[0])
    assert re.match(r"timm:net is .*/pytorch_model.bin", lines[1])
    assert lines[2] == (f"hf:me/wrong: expected the SHA-256 checksum {'d' * 64}, found {DIGEST}; the file was removed")
    assert lines[3] == "hf:me/settings: expected model.safetensors or pytorch_model.bin, found neither"
    assert re.match(r"hf:me/none: config.json cannot be downloaded: \S", lines[4])
    assert re.match(r"hf:a/b/c: expected OWNER/NAME: \S", lines[5])
    assert len(lines) == len(references)
    asked = len(hub.server.asked)
    lines = hub.run("-c", FIND, "hf:me/net", "hf:me/other", online=False).splitlines()
    assert re.match(r"hf:me/net is .*/model.safetensors", lines[0])  # in the cache, which knows that it has no settings
    assert lines[1] == "hf:me/other: the hub cannot be reached; is this computer online?"
    assert len(hub.server.asked) == asked
