"""The shape of the project: what lies where, and that serving lives without torch (import rules: `make check`)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(
    str(file.parent.relative_to(ROOT))
    for package in ("batch", "bundle", "export", "models", "service")
    for file in (ROOT / package).rglob("__init__.py")
)
PROBE = """
import importlib.util, sys
for name in ("torch", "onnx", "scipy", "pycocotools"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed where it must not be"
import vitrine.service.service, vitrine.cli
assert not {"vitrine.models", "vitrine.export"} & set(sys.modules), "the service imports what only training needs"
"""


def test_the_service_imports_without_torch(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    assert python.exists(), "run the tests by `make test`: it makes the serving environment"
    result = subprocess.run([str(python), "-c", PROBE], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != "models/training"])  # docs/api.md
def test_package_init_files_hold_a_docstring_only(package: str, root: Path) -> None:
    module = ast.parse((root / package / "__init__.py").read_text())
    assert len(module.body) == 1
    assert ast.get_docstring(module)


# Modules that the tests of their users exercise, generated code, and tests of no single module.
TESTED_ELSEWHERE = {
    "errors.py",
    "tolerances.py",
    *("app.py", "parameters.py", "paths.py", "schemas.py", "service.py"),
    "open_inference_pb2.py",
}
# Other runtimes; every operation of the OpenAPI document; the names for notebooks.
WITHOUT_MODULE = {"anywhere.py", "operations.py", "init.py"}


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != "models/training/recipes"])
def test_every_module_has_its_test(package: str, root: Path) -> None:
    modules = {path.name for path in (root / package).glob("*.py")} - {"__init__.py"} - TESTED_ELSEWHERE
    tests = {path.name.removeprefix("test_") for path in (root / "tests" / package).glob("test_*.py")}
    assert tests - WITHOUT_MODULE == modules


def test_tests_mirror_the_packages(root: Path) -> None:
    for test in (root / "tests").rglob("test_*.py"):
        package = test.parent.relative_to(root / "tests")
        assert (root / package).is_dir() or package == Path("reliability")  # the whole server, under attack


def test_one_lock_feeds_makefile_dockerfile_workflow_and_bentofile(root: Path) -> None:
    for installer in ("Makefile", "Dockerfile", ".github/workflows/ci.yml"):
        text = (root / installer).read_text()
        assert re.search(r"pip install .*--require-hashes (-r|--requirement) \S*serve\.hashes\.txt", text)
        assert not re.search(r"pip install .*serve\.txt", text)
    assert "requirements/serve.txt" in (root / "bentofile.yaml").read_text()
    lock = (root / "requirements" / "serve.txt").read_text()
    hashed = (root / "requirements" / "serve.hashes.txt").read_text()
    releases = re.findall(r"^(\S+==.*?) ((?:\\\n    --hash=sha256:[0-9a-f]{64} ?)+)$", hashed, flags=re.MULTILINE)
    assert [pin for pin, _ in releases] == [line for line in lock.splitlines() if "==" in line]
    assert "torch" not in lock
    assert "torch==2.13.0" in (root / "requirements" / "train.txt").read_text().splitlines()


def test_the_picture_of_the_floors_is_drawn_from_this_code(root: Path) -> None:
    program = "import sys; sys.path.insert(0, 'docs'); import floors; assert floors.FILE.read_text() == floors.draw()"
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run `make picture`\n{result.stderr}"
