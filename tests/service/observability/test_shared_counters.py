"""Counters in files that other processes read."""

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrine.service.observability.shared_counters import (
    ENDED,
    Key,
    SharedCounters,
    add_up,
    add_up_ended,
    read_shared_counters,
)

BUCKETS = (1, 10, 100)
REQUESTS = ("requests", "/classify")
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


def worker_that_ended(folder: Path, pid: int, count: int) -> Path:
    """Write the file of a process that has ended, whose id may be in use again."""
    elsewhere = Path(tempfile.mkdtemp(dir=folder.parent))  # a reader must not see it under its present name
    SharedCounters(elsewhere).add(REQUESTS, count)
    (made,) = elsewhere.iterdir()
    random_part = made.name.rpartition("-")[2]
    return made.rename(folder / f"{pid}-1-{random_part}")


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
    assert read_shared_counters(folder) == {os.getpid(): expected(updates), ENDED: {}}


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
    counters.add({REQUESTS}, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root)
    assert process.wait(60) == -signal.SIGKILL
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [1000]}}
    add_up_ended(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ended.counters"]
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [1000]}}


def test_the_space_of_a_file_is_allocated(tmp_path: Path) -> None:
    SharedCounters(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= file.stat().st_size > 0


def test_a_process_with_a_used_id_counts_anew_and_keeps_the_counts_of_the_other(tmp_path: Path) -> None:
    worker_that_ended(tmp_path, os.getpid(), 5)
    SharedCounters(tmp_path).add(REQUESTS, 1)
    assert read_shared_counters(tmp_path) == {os.getpid(): {REQUESTS: [1]}, ENDED: {REQUESTS: [5]}}


def test_many_ended_processes_leave_one_file(tmp_path: Path) -> None:
    for number in range(50):
        worker_that_ended(tmp_path, 1 + number % 7, number)
        if number % 3 == 0:
            add_up_ended(tmp_path)
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [sum(range(50))]}}
    add_up_ended(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [sum(range(50))]}}


def test_a_crash_between_adding_up_and_removing_does_not_double_counts(tmp_path: Path) -> None:
    file = worker_that_ended(tmp_path, 1, 5)
    content = file.read_bytes()
    add_up_ended(tmp_path)
    for _ in range(3):
        file.write_bytes(content)  # as if it had not been removed yet
        assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [5]}}
        add_up_ended(tmp_path)
    worker_that_ended(tmp_path, 1, 2)
    add_up_ended(tmp_path)
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [7]}}


def test_a_reader_never_misses_or_doubles_counts_that_are_being_added_up(tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[float] = []

    def read() -> None:
        while not stop.is_set():
            counts = add_up(read_shared_counters(tmp_path).values())
            seen.append(counts.get(REQUESTS, [0.0])[0])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(200):
            worker_that_ended(tmp_path, 1, 1)
            add_up_ended(tmp_path)
    finally:
        stop.set()
        reader.join(30)
    assert seen == sorted(seen)
    assert add_up(read_shared_counters(tmp_path).values()) == {REQUESTS: [200]}


def test_without_space_counting_goes_on_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counters = SharedCounters(tmp_path)
    counters.add(("early",), 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            for number in range(10_000):
                counters.add(("late", str(number)), 1)
            counters.add(("early",), 1)
        add_up_ended(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(counters.read()) == 10_001
    assert len(caplog.records) == 1
    assert "counting in memory" in caplog.text
    assert read_shared_counters(tmp_path)[os.getpid()]["early",] == [2]  # what had space is still shared


@pytest.mark.parametrize("fault", ["missing", "a file"])
def test_without_a_folder_counting_goes_on_in_memory(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if fault == "a file":
        folder.touch()
    add_up_ended(folder)
    counters = SharedCounters(folder)
    counters.add(REQUESTS, 3)
    assert counters.read() == {REQUESTS: [3]}
    assert read_shared_counters(folder) == {ENDED: {}}


def test_a_full_disk_keeps_the_files_of_ended_processes(tmp_path: Path) -> None:
    worker_that_ended(tmp_path, 1, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        add_up_ended(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_shared_counters(tmp_path) == {ENDED: {REQUESTS: [5]}}


@given(events, st.randoms(use_true_random=False), st.sampled_from(["cut", "noise", "flipped", "swapped"]))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_are_read_as_far_as_they_are_whole(
    tmp_path_factory: pytest.TempPathFactory,
    updates: list[tuple[str, Key, float]],
    chance: random.Random,
    damage: str,
) -> None:
    folder = tmp_path_factory.mktemp("counters")
    apply(SharedCounters(folder), updates)
    (file,) = folder.iterdir()
    whole = bytearray(file.read_bytes())
    end = min(len(whole), 4000)
    if damage == "cut":
        whole = whole[: chance.randrange(end)]
    elif damage == "noise":
        whole[:end] = chance.randbytes(end)
    elif damage == "flipped":
        for _ in range(20):
            whole[chance.randrange(end)] ^= 1 << chance.randrange(8)
    else:
        at = chance.randrange(0, end, 8)
        whole[at:end] = whole[: end - at]
    ended = folder / "ended.counters"
    ended.write_bytes(whole)
    file.write_bytes(whole)
    counters = read_shared_counters(folder)
    assert all(isinstance(part, str) for numbers in counters.values() for key in numbers for part in key)
    if damage == "cut":
        numbers, reference = counters.get(os.getpid(), {}), expected(updates)
        assert all(numbers[key] == reference[key] for key in numbers)
    add_up_ended(folder)
