"""The watchdog sees when the event loop stands still."""

import asyncio
import time

import pytest

from vitrine.service.observability import metrics
from vitrine.service.observability.shared_counters import SharedCounters
from vitrine.service.observability.watchdog import watch_event_loop

STALL = ("vitrine_event_loop_stall_seconds",)
LONGEST = ("vitrine_event_loop_longest_stall_seconds",)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> SharedCounters:
    counters = SharedCounters()
    monkeypatch.setattr(metrics, "_counters", counters)
    return counters


def test_a_stall_is_counted_and_the_longest_one_stays(counters: SharedCounters) -> None:
    async def scenario() -> None:
        watchdog = asyncio.create_task(watch_event_loop())
        async with asyncio.timeout(30):
            while STALL not in counters.read():
                await asyncio.sleep(0)
            time.sleep(0.3)  # the fault: it blocks the event loop
            while counters.read()[LONGEST][0] < 0.2:
                await asyncio.sleep(0)
            count = sum(counters.read()[STALL][:-1])
            while sum(counters.read()[STALL][:-1]) < count + 3:
                await asyncio.sleep(0)
        watchdog.cancel()
        await asyncio.gather(watchdog, return_exceptions=True)

    asyncio.run(scenario())
    assert counters.read()[LONGEST][0] >= 0.2
    assert sum(counters.read()[STALL][:-1]) >= 4


def test_the_longest_stall_is_forgotten_after_two_windows(
    counters: SharedCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrine.service.observability.watchdog._WINDOW", 0.02)

    async def scenario() -> None:
        watchdog = asyncio.create_task(watch_event_loop())
        async with asyncio.timeout(30):
            await asyncio.sleep(0)
            time.sleep(0.5)  # the fault: it blocks the event loop
            while LONGEST not in counters.read():
                await asyncio.sleep(0)
            while counters.read()[LONGEST][0] >= 0.4:
                await asyncio.sleep(0)
        watchdog.cancel()
        await asyncio.gather(watchdog, return_exceptions=True)

    asyncio.run(scenario())
