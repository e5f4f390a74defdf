"""The shape of the project: what lies where, and that serving lives without torch (import rules: `make check`)."""

import ast
import subprocess
from pathlib import Path

import pytest

PACKAGES = ("bundle", "export", "models", "models/published", "models/training", "service")
PROBE = """
import importlib.util, sys
for name in ("torch", "onnx", "scipy", "pycocotools"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed where it must not be"
import service.service, vitrine
assert not {"models", "export"} & set(sys.modules), "the service imports what only training needs"
"""


def test_the_service_imports_without_torch(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    assert python.exists(), "run the tests by `make test`: it makes the serving environment"
    result = subprocess.run([str(python), "-c", PROBE], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_package_init_files_hold_a_docstring_only(package: str, root: Path) -> None:
    module = ast.parse((root / package / "__init__.py").read_text())
    assert len(module.body) == 1
    assert ast.get_docstring(module)


# Exercised by the tests of what uses them: every error is raised there, every limit met, the loop trains on both
# objectives.
TESTED_ELSEWHERE = {"errors.py", "objectives.py", "tolerances.py"}
WITHOUT_MODULE = {"anywhere.py"}  # other runtimes run what export writes


@pytest.mark.parametrize("package", ["bundle", "export", "models", "models/published", "models/training"])
def test_every_module_has_its_test(package: str, root: Path) -> None:
    modules = {path.name for path in (root / package).glob("*.py")} - {"__init__.py"} - TESTED_ELSEWHERE
    tests = {path.name.removeprefix("test_") for path in (root / "tests" / package).glob("test_*.py")}
    assert tests - WITHOUT_MODULE == modules


def test_tests_mirror_the_packages(root: Path) -> None:
    for test in (root / "tests").rglob("test_*.py"):
        package = test.parent.relative_to(root / "tests")
        assert (root / package).is_dir()


def test_one_lock_feeds_makefile_dockerfile_and_bentofile(root: Path) -> None:
    for reader in ("Makefile", "Dockerfile", "bentofile.yaml"):
        assert "requirements/serve.txt" in (root / reader).read_text()
    lock = (root / "requirements" / "serve.txt").read_text()
    assert "torch" not in lock
    assert "torch==2.13.0" in (root / "requirements" / "train.txt").read_text().splitlines()
