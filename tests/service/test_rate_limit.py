"""The limit on requests per second: as a token bucket, for many clients, in several processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.service import rate_limit
from vitrine.service.errors import RateLimitedError
from vitrine.service.rate_limit import RateLimit
from vitrine.service.settings import SettingsError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def allowed(limit: RateLimit, client: str) -> bool:
    try:
        limit.check(client)
    except RateLimitedError:
        return False
    return True


@given(
    shared=st.booleans(),
    rate=st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0, 100.0]),
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), max_size=80),
)
def test_it_is_a_token_bucket_of_one_second(
    shared: bool, rate: float, steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_limit.time, "monotonic", clock.monotonic)
        limit = RateLimit(rate, tmp_path_factory.mktemp("rate") if shared else None)
        size = max(1.0, rate)
        tokens, filled = {"a": size, "b": size}, {"a": clock.now, "b": clock.now}
        for client, pause in steps:
            clock.now += pause / 32  # exact in binary
            tokens[client] = min(size, tokens[client] + (clock.now - filled[client]) * rate)
            filled[client] = clock.now
            expected = tokens[client] >= 1 - 1e-6
            assert allowed(limit, client) == expected
            tokens[client] -= expected


def test_a_refusal_says_when_to_come_back(tmp_path: Path) -> None:
    limit = RateLimit(0.05, tmp_path)
    limit.check("a")
    with pytest.raises(
        RateLimitedError, match=r"at most 0\.05 requests per second.*again in (20|19)\.\d\d s"
    ) as caught:
        limit.check("a")
    assert 19 <= caught.value.retry_after <= 20
    limit.check("b")


def test_zero_is_no_limit_and_makes_no_file(tmp_path: Path) -> None:
    limit = RateLimit(0, tmp_path)
    assert all(allowed(limit, "a") for _ in range(1000))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="TMPDIR: expected a folder with room for 524304 bytes, found"):
        RateLimit(1, tmp_path / "nowhere")


def test_memory_is_bounded_and_active_clients_keep_their_limit(tmp_path: Path) -> None:
    limit = RateLimit(0.001, tmp_path)
    assert sum(allowed(limit, f"early {i}") for i in range(1000)) == 1000
    assert sum(allowed(limit, f"early {i}") for i in range(1000)) == 0
    assert sum(allowed(limit, f"10.0.{i >> 8}.{i & 255}") for i in range(100_000)) >= 99_500
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 600_000
    assert file.stat().st_blocks * 512 >= 500_000  # not sparse


COUNT = """
import sys
from pathlib import Path
from vitrine.service.errors import RateLimitedError
from vitrine.service.rate_limit import RateLimit
limit, allowed = RateLimit(50 / 1e6, Path(sys.argv[1])), 0
for i in range(3000):
    try:
        limit.check(f"client {i % 1000}")
        allowed += 1
    except RateLimitedError:
        pass
print(allowed)
"""


def test_processes_count_together(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert 1000 <= sum(counts) <= 1010  # each client once; one may slip through where processes collide
    assert len(list(tmp_path.iterdir())) == 1
    start = time.monotonic()
    assert not allowed(RateLimit(50 / 1e6, tmp_path), "client 1")
    assert time.monotonic() - start < 10
