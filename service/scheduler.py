"""Who computes when: work runs on as many threads as there are cores, and the rest waits in a bounded queue."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from service import metrics
from service.errors import OverloadedError
from service.observation import Observation

T = TypeVar("T")


class Scheduler:
    """A pool of threads, each with one image (or one batch) in work: decoding, then one single-threaded network call.

    Work that nobody waits for any more leaves the queue; work that has begun is finished.
    """

    def __init__(self, threads: int, max_queue: int) -> None:
        """Args: how many pieces of work run at once, and how many may wait."""
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "image")
        self._max_queue = max_queue
        self._counting = threading.Lock()
        self._waiting = 0
        self._running: dict[int, float] = {}  # by number, when it began (monotonic seconds)
        self._started = 0

    @property
    def waiting(self) -> int:
        """Pieces of work in the queue."""
        return self._waiting

    @property
    def running(self) -> int:
        """Pieces of work on a thread."""
        return len(self._running)

    def longest(self) -> float:
        """For how many seconds the oldest piece of running work has been running; 0 where there is none."""
        with self._counting:
            begun = min(self._running.values(), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    async def run(self, work: Callable[[], T], observation: Observation) -> T:
        """What `work` returns or raises, once a thread was free for it. The wait is the observation's stage `queue`.

        Raises:
            OverloadedError: the queue is full.
        """
        with self._counting:
            if self._waiting >= self._max_queue:
                raise OverloadedError(self._max_queue)
            self._waiting += 1
            self._show()
        submitted = time.time_ns()

        def begin() -> T:
            with self._counting:
                self._waiting -= 1
                self._started += 1
                number = self._started
                self._running[number] = time.monotonic()
                self._show()
            observation.add("queue", submitted, time.time_ns())
            try:
                return work()
            finally:
                with self._counting:
                    del self._running[number]
                    self._show()

        future = self._pool.submit(begin)
        future.add_done_callback(self._left)
        return await asyncio.wrap_future(future)

    async def run_all(self, works: Iterable[Callable[[], T]], observation: Observation) -> list[T]:
        """What each of `works` returns, in their order. If one raises, the others leave the queue, and that is raised.

        Raises:
            OverloadedError: the queue is full.
        """
        tasks = [asyncio.ensure_future(self.run(work, observation)) for work in works]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:  # nobody will read the others
            for task in tasks:
                task.cancel()
            raise

    def _left(self, future: "Future[T]") -> None:
        if future.cancelled():  # it never began
            with self._counting:
                self._waiting -= 1
                self._show()

    def _show(self) -> None:
        """Called with the lock held, so that what is shown last is what was last."""
        metrics.queued(self._waiting, self.running)

    def close(self) -> None:
        """Finish what has begun and drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)
