"""The wheels: one importable name, and a server that runs outside of any checkout."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of vitrine-bundles and vitrine-serving, built from a copy as `make wheels` builds them."""
    folder = tmp_path_factory.mktemp("wheels")
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=root, capture_output=True, check=True)
    pack = subprocess.run(["tar", "-c", "-T", "-"], cwd=root, input=files.stdout, capture_output=True, check=False)
    subprocess.run(["tar", "-x", "-C", folder], input=pack.stdout, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist"]
    subprocess.run([*command, ".", "./deploy/vitrine-bundles"], cwd=folder, check=True)
    return sorted((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def installed(wheels: list[Path], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel of vitrine-serving and what serving needs."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([root / ".venv" / "bin" / "python", "-m", "venv", "--without-pip", folder], check=True)
    python, (serving_packages,) = folder / "bin" / "python", (root / ".venv").glob("lib/python*/site-packages")
    (packages,) = folder.glob("lib/python*/site-packages")
    # Its modules, but not the editable Vitrine in it: path files are not read in a folder that a path file names.
    (packages / "serving.pth").write_text(str(serving_packages))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, wheels[1]], check=True)
    return python


def test_a_wheel_holds_one_importable_name(wheels: list[Path]) -> None:
    assert [wheel.name.partition("-")[0] for wheel in wheels] == ["vitrine_bundles", "vitrine_serving"]
    for wheel, name in zip(wheels, ("vitrine_bundles", "vitrine"), strict=True):
        names = {entry.partition("/")[0] for entry in zipfile.ZipFile(wheel).namelist()}
        assert {entry for entry in names if not entry.endswith(".dist-info")} == {name}


def test_the_wheel_holds_every_module(wheels: list[Path], root: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheels[1]).namelist() if name.endswith((".py", ".tsv", ".jinja"))}
    packages = ("batch", "bundle", "export", "models", "service")
    files = [file for package in packages for file in (root / package).rglob("*.*") if "__pycache__" not in str(file)]
    ours = {f"vitrine/{file.relative_to(root)}" for file in files if file.suffix in (".py", ".tsv", ".jinja")}
    assert packed == ours | {f"vitrine/{name}.py" for name in ("__init__", "__main__", "cli")}


def test_the_installed_server_runs_beside_modules_of_the_same_names(
    installed: Path, serve: Serving, root: Path, tmp_path: Path
) -> None:
    """A project has a `service/`, `models/` and modules that ours import, too."""
    for package in ("service", "models", "bundle", "vitrine"):
        (tmp_path / package).mkdir()
    for name in ("service/__init__", "models/__init__", "bundle/__init__", "numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the project')")
    program, key = (installed.parent / "vitrine",), "a-key-of-a-test-0123456789"
    with serve(root / "bundles", program=program, cwd=tmp_path, VITRINE_API_KEYS=key) as running:
        image = (root / "examples" / "frog.jpg").read_bytes()
        url, headers = f"{running.url}/classify?model=vit-cifar10", {"X-API-Key": key}
        answer = httpx.post(url, content=image, headers=headers).json()
        assert answer["predictions"][0]["label"] == "frog"


def test_the_installed_command_line(
    installed: Path, wheels: list[Path], free_ports: tuple[str, ...], tmp_path: Path
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        command = [installed, "-m", "vitrine", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    assert run("--version") == (0, f"vitrine {wheels[1].name.split('-')[1]}\n")
    missing = "expected bundles, found none in bundles; `pip install vitrine-bundles` installs some"
    status, printed = run("serve", *free_ports)
    assert (status, len(printed.splitlines())) == (1, 1)
    assert missing in printed
    install = [sys.executable, "-m", "pip", "--python", installed, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, wheels[0]], check=True)
    status, printed = run("bundles")
    assert (status, len(printed.splitlines())) == (0, 7)
    assert str(installed.parent.parent / "lib") in printed
