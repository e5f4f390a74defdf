"""Fixture for tests of training processes."""

import subprocess
from collections.abc import Callable

import pytest


@pytest.fixture
def read_until() -> Callable[["subprocess.Popen[str]", str], None]:
    """Wait until a process (with PYTHONUNBUFFERED=1 and a pipe as stdout) prints a line that starts with a text."""

    def wait(job: "subprocess.Popen[str]", beginning: str) -> None:
        assert job.stdout is not None
        seen = []
        for line in job.stdout:
            seen.append(line)
            if line.startswith(beginning):
                return
        pytest.fail("".join(seen) or "the process printed nothing")

    return wait
