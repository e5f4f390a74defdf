"""The scheduler by itself: what runs, what waits, what is refused."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from service.errors import OverloadedError
from service.observation import Observation
from service.scheduler import Scheduler


def blocked() -> tuple[Callable[[], str], threading.Event, threading.Event]:
    """Work that says that it has begun and ends when it may."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert may_end.wait(30)
        return "done"

    return work, begun, may_end


def test_work_waits_for_a_thread_and_its_wait_is_observed() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(threads=1, max_queue=1)
        work, begun, may_end = blocked()
        first = asyncio.ensure_future(scheduler.run(work, Observation()))
        await asyncio.to_thread(begun.wait, 30)
        assert (scheduler.running, scheduler.waiting) == (1, 0)
        assert scheduler.longest() > 0
        observation = Observation()
        second = asyncio.ensure_future(scheduler.run(lambda: "second", observation))
        await asyncio.sleep(0)
        assert (scheduler.running, scheduler.waiting) == (1, 1)
        with pytest.raises(OverloadedError, match="1 images wait already; try again later"):
            await scheduler.run(lambda: "third", Observation())
        may_end.set()
        assert (await first, await second) == ("done", "second")
        assert (scheduler.running, scheduler.waiting, scheduler.longest()) == (0, 0, 0.0)
        (queue,) = observation.stages
        assert queue.name == "queue"
        assert 0 < queue.end - queue.start < 30e9
        scheduler.close()

    asyncio.run(scenario())


def test_what_is_given_up_leaves_the_queue_and_is_never_done() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(threads=1, max_queue=1)
        work, begun, may_end = blocked()
        first = asyncio.ensure_future(scheduler.run(work, Observation()))
        await asyncio.to_thread(begun.wait, 30)
        done: list[str] = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await scheduler.run(lambda: done.append("given up"), Observation())
        assert scheduler.waiting == 0
        last = asyncio.ensure_future(scheduler.run(lambda: done.append("last"), Observation()))
        may_end.set()
        await asyncio.gather(first, last)
        assert done == ["last"]
        scheduler.close()

    asyncio.run(scenario())


def test_an_error_reaches_who_asked_and_the_thread_goes_on() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(threads=1, max_queue=1)

        def fail() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await scheduler.run(fail, Observation())
        assert await scheduler.run(lambda: 1, Observation()) == 1
        assert scheduler.running == 0
        scheduler.close()

    asyncio.run(scenario())


def test_of_several_pieces_of_work_one_that_fails_takes_the_waiting_ones_along() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(threads=1, max_queue=8)

        def fail() -> None:
            raise ValueError("no")

        assert await scheduler.run_all([lambda: 1, lambda: 2], Observation()) == [1, 2]
        with pytest.raises(ValueError, match="no"):
            await scheduler.run_all([fail, *[lambda: None] * 5], Observation())
        scheduler.close()
        assert (scheduler.waiting, scheduler.running) == (0, 0)

    asyncio.run(scenario())
