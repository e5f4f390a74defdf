"""A minute of coverage-guided fuzzing of each parser of a client's bytes (`fuzz.py`)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("headers", "protocol", "protobuf", "form", "json")
SECONDS = 60


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_a_parser(target: str, root: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: `make soak` installs it where it has a wheel")
    command = [sys.executable, "-m", "tests.reliability.fuzz", target, "--seconds", str(SECONDS)]
    result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=SECONDS + 120, errors="replace"
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-4000:]
    print(target, [line for line in report.splitlines() if "stat::number_of_executed_units" in line])
