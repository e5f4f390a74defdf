"""Small images that ask for much work end soon, within the documented memory, and with the right error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bombs import BOMBS, Cost

from vitrine.bundle.headers import BASE_BYTES, MAX_BYTES_PER_PIXEL
from vitrine.bundle.images import MAX_PIXELS

SECONDS = 20  # far more than any bomb takes, and far less than one without limits
MEMORY = MAX_BYTES_PER_PIXEL * MAX_PIXELS + BASE_BYTES


def costs(names: list[str]) -> list[Cost]:
    script = str(Path(__file__).with_name("bombs.py"))
    result = subprocess.run(
        [sys.executable, script, *names], capture_output=True, text=True, timeout=SECONDS * len(names), check=True
    )
    return [Cost(*json.loads(line)) for line in result.stdout.splitlines()]


def check(names: list[str]) -> None:
    found = costs(names)
    assert [cost.name for cost in found] == names
    assert [cost for cost in found if cost.outcome not in BOMBS[cost.name].outcomes] == []
    assert [cost for cost in found if cost.seconds > SECONDS] == []
    assert [cost for cost in found if cost.memory > MEMORY] == []
    assert [cost for cost in found if cost.size > 20 * 2**20] == []


@pytest.mark.parametrize("form", sorted({name.split("/")[0] for name in BOMBS}))
def test_bombs_of_each_format(form: str) -> None:
    check([name for name, bomb in BOMBS.items() if name.startswith(f"{form}/") and not bomb.slow])


@pytest.mark.soak
def test_bombs_that_take_seconds() -> None:
    check([name for name, bomb in BOMBS.items() if bomb.slow])
