"""Ten times as many requests as the server can answer: it answers what it can, refuses the rest, and recovers."""

from typing import Any

from benchmarks.soak.client import wait_until_idle
from benchmarks.soak.overload import generate

SECONDS = 5.0


def test_an_overloaded_server_refuses_by_name_and_recovers(attacked: Any) -> None:
    """No figures: those are in docs/operations.md. Bounds separate a server that copes from one that does not."""
    port = int(attacked.url.rpartition(":")[2])
    result = generate(port, attacked.process.pid, factor=10, seconds=SECONDS)
    assert result.statuses.keys() <= {"200", "429", "503", "left"}, result
    assert result.goodput > 0.3 * result.capacity, result
    assert result.memory_during - result.memory_before < 200, result
    wait_until_idle(attacked.url)
    assert "Traceback" not in "".join(attacked.lines)
