"""What tests of whole training processes share."""

import subprocess
from collections.abc import Callable

import pytest


@pytest.fixture
def read_until() -> Callable[["subprocess.Popen[str]", str], None]:
    """Waits until a process (with PYTHONUNBUFFERED=1, started with a pipe) prints a line that begins with a text."""

    def wait(job: "subprocess.Popen[str]", beginning: str) -> None:
        assert job.stdout is not None
        seen = []
        for line in job.stdout:
            seen.append(line)
            if line.startswith(beginning):
                return
        pytest.fail("".join(seen) or "the process printed nothing")

    return wait
