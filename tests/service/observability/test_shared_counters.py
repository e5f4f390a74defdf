"""Counters in files that other processes read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.service.observability.shared_counters import Key, SharedCounters, read_shared_counters

BUCKETS = (1, 10, 100)
keys = st.tuples(st.sampled_from(["requests", "images"]), st.text(max_size=5))
events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), keys, st.floats(-1e6, 1e6)),
        st.tuples(st.just("set"), keys.map(lambda key: ("gauge", *key)), st.floats(-1e6, 1e6)),
        st.tuples(st.just("observe"), keys.map(lambda key: ("histogram", *key)), st.floats(0, 1000)),
    ),
    max_size=60,
)


def expected(updates: list[tuple[str, Key, float]]) -> dict[Key, list[float]]:
    numbers: dict[Key, list[float]] = {}
    for kind, key, value in updates:
        if kind == "add":
            numbers.setdefault(key, [0.0])[0] += value
        elif kind == "set":
            numbers[key] = [value]
        else:
            row = numbers.setdefault(key, [0.0] * 5)
            row[sum(value > bound for bound in BUCKETS)] += 1
            row[-1] += value
    return numbers


def apply(counters: SharedCounters, updates: list[tuple[str, Key, float]]) -> None:
    for kind, key, value in updates:
        if kind == "observe":
            counters.observe(key, value, BUCKETS)
        else:
            getattr(counters, kind)(key, value)


@given(events)
def test_numbers_match_a_reference(updates: list[tuple[str, Key, float]]) -> None:
    counters = SharedCounters()
    apply(counters, updates)
    assert counters.read() == expected(updates)


@given(events)
def test_other_processes_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, updates: list[tuple[str, Key, float]]
) -> None:
    folder = tmp_path_factory.mktemp("counters")
    apply(SharedCounters(folder), updates)
    assert read_shared_counters(folder) == {os.getpid(): expected(updates)}


@pytest.mark.parametrize("in_files", [True, False])
def test_there_is_room_for_any_number_of_keys(in_files: bool, tmp_path: Path) -> None:
    counters = SharedCounters(tmp_path if in_files else None)
    for number in range(10_000):
        counters.add(("count", str(number)), number)
    assert counters.read() == {("count", str(number)): [number] for number in range(10_000)}
    if in_files:
        assert read_shared_counters(tmp_path)[os.getpid()] == counters.read()


def test_the_counts_of_a_killed_process_are_kept(root: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from vitrine.service.observability.shared_counters import SharedCounters
counters = SharedCounters(Path({str(tmp_path)!r}))
for _ in range(1000):
    counters.add(("requests", "/classify"), 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root)
    assert process.wait(60) == -signal.SIGKILL
    assert read_shared_counters(tmp_path) == {process.pid: {("requests", "/classify"): [1000]}}
