"""Scheduling: images wait in one bounded queue for as many threads as there are cores.

A thread takes an image, decodes it, runs the network on one core and postprocesses the output. Parallel images give the
highest throughput, and an invalid image fails on its own. For a network so small that call overhead matters, a thread
takes its share of the queue and runs it as one batch. A lone image runs on all cores. The bundle's `ExecutionProfile`
determines which of these pay for a network.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from vitrine.bundle.loading import Bundle
from vitrine.bundle.predictors import PreparedImage, Row
from vitrine.bundle.profile import ExecutionProfile
from vitrine.service.errors import OverloadedError
from vitrine.service.observability.request_record import RequestRecord

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_BUCKET_SIZE = 64  # pixels; images whose sizes round up to the same multiple may be padded to one batch
_LOOKAHEAD = 64  # images at the front of the queue that are considered for a batch
_MAX_REFUSALS_PER_SECOND = 200  # clients that retry at once would otherwise monopolize the event loop
_MAX_REFUSAL_DELAY = 1.0  # seconds
_INITIAL_SLOWDOWN = 1.5  # measured time of an image relative to `ExecutionProfile.seconds`
_SLOWDOWN_DECAY = 0.95  # weight of the previous slowdown in the moving average
_UNMEASURED = ExecutionProfile(0.0)


class Work(Protocol[T_co]):
    """Work on one image of a request. Both methods run on a computing thread; `Scheduler.run` raises their errors."""

    def prepare(self) -> Any:
        """Return the image as `Predictor.prepare` does."""

    def postprocess(self, row: Row) -> T_co:
        """Return the result, given the network's output for the image."""


@dataclass(eq=False, slots=True)
class _Job:
    work: Work[Any]
    bundle: Bundle
    profile: ExecutionProfile
    record: RequestRecord
    future: asyncio.Future[Any]
    submitted: int  # nanoseconds since the epoch
    prepared: Any = None


class Scheduler:
    """Computing threads and their queue.

    Cancelled work leaves the queue; work that has started is finished.
    """

    def __init__(self, threads: int, max_queue: int, max_wait_seconds: float = math.inf) -> None:
        """Args: number of threads, maximum length of the queue, and maximum expected wait of an image in seconds."""
        self._max_queue, self._max_wait = max_queue, max_wait_seconds
        self._queue: deque[_Job] = deque()
        self._arrivals: SimpleQueue[bool] = SimpleQueue()  # True: a job; False: end the thread
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # start of each running batch, by its number (monotonic seconds)
        self._batch_number = 0
        self._last_shared = -math.inf  # when more than one image was last in progress (monotonic seconds)
        self._backlog = 0.0  # seconds on one core for the whole queue, by `ExecutionProfile.seconds`
        self._slowdown = _INITIAL_SLOWDOWN
        self._next_refusal = 0.0
        self._results: deque[_Result] = deque()  # not yet delivered
        self._notified_loop: asyncio.AbstractEventLoop | None = None  # has `_deliver_results` scheduled
        self._threads = [threading.Thread(target=self._worker, name=f"image-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of images, or batches of them, running on a thread."""
        return len(self._running)

    def longest_running(self) -> float:
        """Return for how many seconds the oldest running batch has been running; 0 if none is."""
        with self._lock:
            start = min(self._running.values(), default=None)
        return 0.0 if start is None else time.monotonic() - start

    def check_capacity(self) -> None:
        """Check that another image can be queued.

        Raises:
            OverloadedError: the queue is full, or its expected duration exceeds the maximum wait.
        """
        waiting = len(self._queue)
        seconds = self._backlog * self._slowdown / len(self._threads)
        if waiting >= self._max_queue or (waiting and seconds > self._max_wait):
            raise OverloadedError(waiting, seconds)

    async def throttle_refusal(self) -> None:
        """Wait until another request may be refused: not at all, unless refusals are very frequent."""
        now = time.monotonic()
        delay = min(max(self._next_refusal - now, 0.0), _MAX_REFUSAL_DELAY)
        self._next_refusal = max(self._next_refusal, now) + 1 / _MAX_REFUSALS_PER_SECOND
        if delay > 0:
            await asyncio.sleep(delay)

    async def run(self, work: Work[T], bundle: Bundle, record: RequestRecord) -> T:
        """Queue the work and return its result.

        The record gets the stages `queue` and `inference`, and the batch size.

        Raises:
            OverloadedError: see `check_capacity`.
            Exception: any error of the work or the network.
        """
        self.check_capacity()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        job = _Job(work, bundle, bundle.profile or _UNMEASURED, record, future, time.time_ns())
        with self._lock:
            if self._queue or self._running:
                self._last_shared = time.monotonic()
            self._queue.append(job)
            self._backlog += job.profile.seconds
        self._arrivals.put(True)
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                if job in self._queue:
                    self._queue.remove(job)
                    self._subtract_backlog(job)
            raise

    async def run_all(self, works: Iterable[Work[T]], bundle: Bundle, record: RequestRecord) -> list[T]:
        """Run all `works` and return their results in order. If one fails, the others leave the queue.

        Raises:
            OverloadedError, Exception: see `run`.
        """
        return await gather([self.run(work, bundle, record) for work in works])

    def close(self) -> None:
        """Finish running work, cancel queued work and end the threads."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
        for _ in self._threads:
            self._arrivals.put(False)
        for thread in self._threads:
            thread.join()
        for job in dropped:
            job.future.cancel()

    def _worker(self) -> None:
        while self._arrivals.get():
            with self._lock:
                jobs = self._next_batch()
                self._batch_number += 1
                number = self._batch_number
                if jobs:
                    self._running[number] = start = time.monotonic()
            if not jobs:  # cancelled, or taken by another batch
                continue
            try:
                results = self._process(jobs)
            finally:
                with self._lock:
                    del self._running[number]
            expected = sum(job.profile.seconds for job in jobs)
            if expected:
                slowdown = (time.monotonic() - start) / expected
                self._slowdown = _SLOWDOWN_DECAY * self._slowdown + (1 - _SLOWDOWN_DECAY) * slowdown
            self._results += results
            loop = jobs[0].future.get_loop()
            if self._notified_loop is not loop:
                self._notified_loop = loop
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._deliver_results)

    def _deliver_results(self) -> None:
        """Resolve the futures of finished jobs; runs on the event loop."""
        self._notified_loop = None  # first, so that later results schedule another call
        while self._results:
            job, result, error = self._results.popleft()
            if job.future.done():  # cancelled
                continue
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)

    def _next_batch(self) -> list[_Job]:
        """Take the next image, and those to run with it, from the queue; the caller holds the lock."""
        if not self._queue:
            return []
        first = self._queue.popleft()
        share = math.ceil((1 + len(self._queue)) / len(self._threads))
        size = min(first.profile.batch, share)
        jobs = [first]
        if size > 1:
            front = islice(self._queue, _LOOKAHEAD)
            jobs += islice((job for job in front if job.bundle is first.bundle), size - 1)
            for job in jobs[1:]:
                self._queue.remove(job)
        for job in jobs:
            self._subtract_backlog(job)
        return jobs

    def _subtract_backlog(self, job: _Job) -> None:
        self._backlog = self._backlog - job.profile.seconds if self._queue else 0.0  # drop rounding errors

    def _process(self, jobs: Sequence[_Job]) -> "list[_Result]":
        start = time.time_ns()
        results: list[_Result] = []
        ready = []
        for job in jobs:
            job.record.add_stage("queue", job.submitted, start)
            try:
                job.prepared = job.work.prepare()
            except Exception as error:
                results.append((job, None, error))
            else:
                ready.append(job)
        if len(ready) == 1:
            return results + self._infer(ready)
        for _, bucket in groupby(sorted(ready, key=_size_bucket), key=_size_bucket):
            results += self._infer(list(bucket))
        return results

    def _infer(self, jobs: Sequence[_Job]) -> "list[_Result]":
        bundle, profile = jobs[0].bundle, jobs[0].profile
        is_lone = len(jobs) == 1 and profile.all_cores is not None and self._is_lone(profile)
        all_cores = is_lone and profile.prefers_all_cores()
        predictor = profile.all_cores if all_cores and profile.all_cores is not None else bundle.predictor
        start = time.time_ns()
        try:
            rows = predictor.infer([job.prepared for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], None, error)]
            return [result for job in jobs for result in self._infer([job])]  # only the invalid image fails
        end = time.time_ns()
        if not all_cores:
            profile.record_latency((end - start) / 1e9 / len(jobs))
        if is_lone and self._is_lone(profile):  # still
            profile.record_lone_latency((end - start) / 1e9, all_cores=all_cores)
        results: list[_Result] = []
        for job, row in zip(jobs, rows, strict=True):
            job.record.add_stage("inference", start, end)
            job.record.batches.append(len(jobs))
            try:
                results.append((job, job.work.postprocess(row), None))
            except Exception as error:
                results.append((job, None, error))
        return results

    def _is_lone(self, profile: ExecutionProfile) -> bool:
        """Whether there is no other image, and was none for the duration of one: concurrent clients may alternate."""
        with self._lock:
            return (
                len(self._running) == 1 and not self._queue and time.monotonic() - self._last_shared > profile.seconds
            )


_Result = tuple[_Job, object, Exception | None]


def _size_bucket(job: _Job) -> tuple[int, int]:
    """Return the key by which images are grouped into batches."""
    if isinstance(job.prepared, PreparedImage):
        height, width = job.prepared.pixels.shape[:2]
        return math.ceil(height / _BUCKET_SIZE), math.ceil(width / _BUCKET_SIZE)
    return 0, 0


async def gather(awaitables: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all, in order. If one raises, cancel the others and raise its error."""
    if len(awaitables) == 1:
        return [await awaitables[0]]
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
