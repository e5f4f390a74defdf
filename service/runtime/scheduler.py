"""Who computes when: images wait in one bounded queue for as many threads as there are cores.

A thread takes an image, decodes it, runs the network on one core and makes the answer: images side by side have the
highest throughput, and a bad one fails alone. Of a network that is so small that the call itself counts, a thread takes
its share of those that wait and runs them as one batch. An image that is alone on the machine is run on all cores.
Which of this pays for a network is its `bundle.profile`.
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

_BUCKET = 64  # pixels: in a batch, images whose edges end in the same bucket share their padding
_LOOKAHEAD = 64  # images at the front of the queue among which a batch is looked for
_REFUSALS_PER_SECOND = 200  # a second; who comes back at once would keep the event loop from everything else
_MAX_REFUSAL_DELAY = 1.0  # seconds
_SLOWDOWN, _SLOWDOWN_DECAY = (
    1.5,
    0.95,
)  # at first: of real work compared with `ExecutionProfile.seconds`; how much of it is kept each time
_UNMEASURED = ExecutionProfile(0.0)


class Work(Protocol[T_co]):
    """One image of a request; both methods are called on a computing thread."""

    def prepare(self) -> Any:
        """The image as the network's predictor takes it (`Predictor.prepare`). What it raises is the answer."""

    def finish(self, row: Row) -> T_co:
        """The answer, from what the network says of it."""


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
    """Threads that compute, and the queue before them.

    Work that nobody waits for any more leaves the queue; work that has begun is finished.
    """

    def __init__(self, threads: int, max_queue: int, max_wait_seconds: float = math.inf) -> None:
        """Args: how many images are in work at once, how many may wait, and for how long, as far as can be told."""
        self._max_queue, self._max_wait = max_queue, max_wait_seconds
        self._queue: deque[_Job] = deque()
        self._arrivals: SimpleQueue[bool] = SimpleQueue()  # True for each job; False: end
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # by number of the call, when it began (monotonic seconds)
        self._numbers = 0
        self._last_shared = -math.inf  # when there was last more than one image in work (monotonic seconds)
        self._backlog = 0.0  # seconds on one core that all that waits takes, by `ExecutionProfile.seconds`
        self._slowdown = _SLOWDOWN
        self._next_refusal = 0.0
        self._finished: deque[_Finished] = deque()  # what the event loop has not seen yet
        self._notified_loop: asyncio.AbstractEventLoop | None = None  # it has been told to look
        self._threads = [threading.Thread(target=self._worker, name=f"image-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Images, or batches of them, on a thread."""
        return len(self._running)

    def longest_running(self) -> float:
        """For how many seconds the oldest piece of running work has been running; 0 where there is none."""
        with self._lock:
            begun = min(self._running.values(), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    def check_capacity(self) -> None:
        """Refuse an image that would wait too long, before anything is done for it.

        Raises:
            OverloadedError: the queue is full, or takes too long.
        """
        waiting = len(self._queue)
        seconds = self._backlog * self._slowdown / len(self._threads)
        if waiting >= self._max_queue or (waiting and seconds > self._max_wait):
            raise OverloadedError(waiting, seconds)

    async def throttle_refusal(self) -> None:
        """Return when it is time to refuse one more request: at once, unless there are very many."""
        now = time.monotonic()
        self._next_refusal = max(self._next_refusal, now) + 1 / _REFUSALS_PER_SECOND
        delay = min(self._next_refusal - now - 1 / _REFUSALS_PER_SECOND, _MAX_REFUSAL_DELAY)
        if delay > 0:
            await asyncio.sleep(delay)

    async def run(self, work: Work[T], bundle: Bundle, record: RequestRecord) -> T:
        """What `work` makes of the image once a thread was free for it, or what it raises.

        The observation gets the stages `queue` and `inference`, and the size of the batch.

        Raises:
            OverloadedError: see `check_capacity`.
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
                    self._remove(job)
            raise

    async def run_all(self, works: Iterable[Work[T]], bundle: Bundle, record: RequestRecord) -> list[T]:
        """What `run` returns for each of `works`, in their order. If one raises, the others leave the queue.

        Raises:
            OverloadedError: see `check_capacity`.
        """
        return await gather([self.run(work, bundle, record) for work in works])

    def close(self) -> None:
        """Finish what has begun and drop what waits."""
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
                self._numbers += 1
                number = self._numbers
                if jobs:
                    self._running[number] = begun = time.monotonic()
            if not jobs:  # they were given up, or went along with others
                continue
            try:
                finished = self._process(jobs)
            finally:
                with self._lock:
                    del self._running[number]
            expected = sum(job.profile.seconds for job in jobs)
            if expected:
                slowdown = (time.monotonic() - begun) / expected
                self._slowdown = _SLOWDOWN_DECAY * self._slowdown + (1 - _SLOWDOWN_DECAY) * slowdown
            self._finished += finished
            loop = jobs[0].future.get_loop()
            if self._notified_loop is not loop:
                self._notified_loop = loop
                with contextlib.suppress(RuntimeError):  # it has ended, and nobody waits
                    loop.call_soon_threadsafe(self._set_results)

    def _set_results(self) -> None:
        """On the event loop: give the answers to who waits for them."""
        self._notified_loop = None  # first: what comes from here on is told anew
        while self._finished:
            job, answer, error = self._finished.popleft()
            if job.future.done():  # nobody waits any more
                continue
            if error is None:
                job.future.set_result(answer)
            else:
                job.future.set_exception(error)

    def _next_batch(self) -> list[_Job]:
        """The next image, and those that are run with it; called with the lock held."""
        if not self._queue:
            return []
        first = self._queue.popleft()
        share = math.ceil((1 + len(self._queue)) / len(self._threads))
        most = min(first.profile.batch, share)
        jobs = [first]
        if most > 1:
            front = islice(self._queue, _LOOKAHEAD)
            jobs += islice((job for job in front if job.bundle is first.bundle), most - 1)
            for job in jobs[1:]:
                self._queue.remove(job)
        for job in jobs:
            self._remove(job)
        return jobs

    def _remove(self, job: _Job) -> None:
        self._backlog = self._backlog - job.profile.seconds if self._queue else 0.0  # no sum of roundings

    def _process(self, jobs: Sequence[_Job]) -> "list[_Finished]":
        began = time.time_ns()
        finished: list[_Finished] = []
        ready = []
        for job in jobs:
            job.record.add_stage("queue", job.submitted, began)
            try:
                job.prepared = job.work.prepare()
            except Exception as error:
                finished.append((job, None, error))
            else:
                ready.append(job)
        if len(ready) == 1:
            return finished + self._infer(ready)
        for _, alike in groupby(sorted(ready, key=_size), key=_size):
            finished += self._infer(list(alike))
        return finished

    def _infer(self, jobs: Sequence[_Job]) -> "list[_Finished]":
        bundle, profile = jobs[0].bundle, jobs[0].profile
        alone = len(jobs) == 1 and profile.all_cores is not None and self._is_alone(profile)
        all_cores = alone and profile.prefers_all_cores()
        predictor = profile.all_cores if all_cores and profile.all_cores is not None else bundle.predictor
        start = time.time_ns()
        try:
            rows = predictor.rows([job.prepared for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], None, error)]
            return [finished for job in jobs for finished in self._infer([job])]  # so that it fails alone
        end = time.time_ns()
        if not all_cores:
            profile.record_latency((end - start) / 1e9 / len(jobs))
        if alone and self._is_alone(profile):  # still
            profile.record_lone_latency((end - start) / 1e9, all_cores=all_cores)
        finished: list[_Finished] = []
        for job, row in zip(jobs, rows, strict=True):
            job.record.add_stage("inference", start, end)
            job.record.batches.append(len(jobs))
            try:
                finished.append((job, job.work.finish(row), None))
            except Exception as error:
                finished.append((job, None, error))
        return finished

    def _is_alone(self, profile: ExecutionProfile) -> bool:
        """Whether there is no other image, and was none for as long as one takes: clients that take turns meet."""
        with self._lock:
            return (
                len(self._running) == 1 and not self._queue and time.monotonic() - self._last_shared > profile.seconds
            )


_Finished = tuple[_Job, object, Exception | None]


def _size(job: _Job) -> tuple[int, int]:
    """Equal of images that run together."""
    if isinstance(job.prepared, PreparedImage):
        height, width = job.prepared.pixels.shape[:2]
        return math.ceil(height / _BUCKET), math.ceil(width / _BUCKET)
    return 0, 0


async def gather(awaitables: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in their order. If one raises, the others are cancelled, and that is raised."""
    if len(awaitables) == 1:
        return [await awaitables[0]]
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:  # nobody will read the others
        for task in tasks:
            task.cancel()
        raise
