"""The README is run: its curl lines answer what it shows, its tables hold the manifests' numbers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from vitrine.bundle.loading import find_bundles, load_bundle, read_manifest

Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def served(serve: Serving, root: Path) -> Iterator[Any]:
    with serve(root / "bundles") as running:
        yield running


@pytest.fixture(scope="module")
def shipped(served: Any) -> str:
    url: str = served.url
    return url


def curl_examples(readme: str) -> list[tuple[str, str]]:
    """Each ```sh block that begins with curl, and the ```json block after it."""
    return re.findall(r"```sh\n(curl .*?)\n```\n+```json\n(.*?)\n```", readme, flags=re.DOTALL)


def approximately(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-3, abs=5e-3) if isinstance(value, float) else value


def test_curl_lines_answer_what_the_guides_show(shipped: str, root: Path) -> None:
    guides = ("README.md", "docs/service.md", "docs/protocol.md")
    examples = [example for guide in guides for example in curl_examples((root / guide).read_text())]
    assert len(examples) == 8
    for command, answer in examples:
        shown = json.loads(answer)
        local = command.replace("http://localhost:3000", shipped)
        result = subprocess.run(["bash", "-c", local], cwd=root, capture_output=True, text=True, check=True)
        assert json.loads(result.stdout) == approximately(shown), command


def test_the_protocols_python_runs(served: Any, root: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)\n```", (root / "docs/protocol.md").read_text(), flags=re.DOTALL)
    local = program.replace("localhost:8081", served.grpc)
    for text in (local, local.replace("tritonclient.grpc", "tritonclient.http").replace(served.grpc, served.url[7:])):
        result = subprocess.run([sys.executable, "-c", text], cwd=root, capture_output=True, text=True, check=True)
        assert result.stdout.count(":frog") == 1


def test_the_results_table_holds_the_manifests_numbers(root: Path) -> None:
    readme = (root / "README.md").read_text()
    for path in find_bundles(root / "bundles"):
        manifest = read_manifest(path)
        rows = [line for line in readme.splitlines() if line.startswith(f"| [`{manifest.name}`]")]
        assert len(rows) == 1, manifest.name
        for metric in ("top1",) if "top1" in manifest.metrics.values else ("AP", "AP50"):
            assert f"{manifest.metrics.values[metric]:.1%}" in rows[0]
        assert f"{manifest.provenance.parameters:,}" in rows[0]


def test_shipped_bundles_verify(root: Path) -> None:
    names = [load_bundle(path).manifest.name for path in find_bundles(root / "bundles")]
    assert names == [
        *("bit-cifar10", "detr-bccd", "detr-voc", "imagenet"),
        *("mixer-cifar10", "vit-cifar10", "vit-imagenette"),
    ]


def test_shipped_cards_are_written_from_the_manifests(root: Path) -> None:
    from vitrine.export.model_card import model_card

    for path in find_bundles(root / "bundles"):
        assert (path / "README.md").read_text() == model_card(read_manifest(path))


def test_links_lead_somewhere(root: Path) -> None:
    for page in (root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            if target.startswith(("https://", "http://localhost")):
                continue
            file = page.parent / target if target else page
            assert file.exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, (page, target, anchor)
