"""Who computes when: images wait in one bounded queue for as many threads as there are cores.

A thread takes an image, decodes it, runs the network on one core and makes the answer: images side by side have the
highest throughput, and a bad one fails alone. Of a network that is so small that the call itself counts, a thread takes
its share of those that wait and runs them as one batch. An image that is alone on the machine is run on all cores.
Which of this pays for a network is its `bundle.pace`.
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
from vitrine.bundle.pace import Pace
from vitrine.bundle.predictors import PreparedImage, Row
from vitrine.service.errors import OverloadedError
from vitrine.service.observability.request_record import Observation

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_BUCKET = 64  # pixels: in a batch, images whose edges end in the same bucket share their padding
_LOOK = 64  # images at the front of the queue among which a batch is looked for
_REFUSALS = 200  # a second; who comes back at once would keep the event loop from everything else
_LONGEST_REFUSAL = 1.0  # seconds
_SLOWNESS, _MEMORY = 1.5, 0.95  # at first: of real work compared with `Pace.seconds`; how much of it is kept each time
_UNMEASURED = Pace(0.0)


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
    pace: Pace
    observation: Observation
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
        self._coming: SimpleQueue[bool] = SimpleQueue()  # True for each job; False: end
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # by number of the call, when it began (monotonic seconds)
        self._numbers = 0
        self._crowded = -math.inf  # when there was last more than one image in work (monotonic seconds)
        self._backlog = 0.0  # seconds on one core that all that waits takes, by `Pace.seconds`
        self._slowness = _SLOWNESS
        self._next_refusal = 0.0
        self._settled: deque[_Settled] = deque()  # what the event loop has not seen yet
        self._woken: asyncio.AbstractEventLoop | None = None  # it has been told to look
        self._threads = [threading.Thread(target=self._compute, name=f"image-{i}") for i in range(threads)]
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

    def longest(self) -> float:
        """For how many seconds the oldest piece of running work has been running; 0 where there is none."""
        with self._lock:
            begun = min(self._running.values(), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    def check_room(self) -> None:
        """Refuse an image that would wait too long, before anything is done for it.

        Raises:
            OverloadedError: the queue is full, or takes too long.
        """
        waiting = len(self._queue)
        seconds = self._backlog * self._slowness / len(self._threads)
        if waiting >= self._max_queue or (waiting and seconds > self._max_wait):
            raise OverloadedError(waiting, seconds)

    async def refusal(self) -> None:
        """Return when it is time to refuse one more request: at once, unless there are very many."""
        now = time.monotonic()
        self._next_refusal = max(self._next_refusal, now) + 1 / _REFUSALS
        delay = min(self._next_refusal - now - 1 / _REFUSALS, _LONGEST_REFUSAL)
        if delay > 0:
            await asyncio.sleep(delay)

    async def run(self, work: Work[T], bundle: Bundle, observation: Observation) -> T:
        """What `work` makes of the image once a thread was free for it, or what it raises.

        The observation gets the stages `queue` and `inference`, and the size of the batch.

        Raises:
            OverloadedError: see `check_room`.
        """
        self.check_room()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        job = _Job(work, bundle, bundle.pace or _UNMEASURED, observation, future, time.time_ns())
        with self._lock:
            if self._queue or self._running:
                self._crowded = time.monotonic()
            self._queue.append(job)
            self._backlog += job.pace.seconds
        self._coming.put(True)
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                if job in self._queue:
                    self._queue.remove(job)
                    self._leave(job)
            raise

    async def run_all(self, works: Iterable[Work[T]], bundle: Bundle, observation: Observation) -> list[T]:
        """What `run` returns for each of `works`, in their order. If one raises, the others leave the queue.

        Raises:
            OverloadedError: see `check_room`.
        """
        return await all_of([self.run(work, bundle, observation) for work in works])

    def close(self) -> None:
        """Finish what has begun and drop what waits."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
        for _ in self._threads:
            self._coming.put(False)
        for thread in self._threads:
            thread.join()
        for job in dropped:
            job.future.cancel()

    def _compute(self) -> None:
        while self._coming.get():
            with self._lock:
                jobs = self._take()
                self._numbers += 1
                number = self._numbers
                if jobs:
                    self._running[number] = begun = time.monotonic()
            if not jobs:  # they were given up, or went along with others
                continue
            try:
                settled = self._answers(jobs)
            finally:
                with self._lock:
                    del self._running[number]
            expected = sum(job.pace.seconds for job in jobs)
            if expected:
                slowness = (time.monotonic() - begun) / expected
                self._slowness = _MEMORY * self._slowness + (1 - _MEMORY) * slowness
            self._settled += settled
            loop = jobs[0].future.get_loop()
            if self._woken is not loop:
                self._woken = loop
                with contextlib.suppress(RuntimeError):  # it has ended, and nobody waits
                    loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        """On the event loop: give the answers to who waits for them."""
        self._woken = None  # first: what comes from here on is told anew
        while self._settled:
            job, answer, error = self._settled.popleft()
            if job.future.done():  # nobody waits any more
                continue
            if error is None:
                job.future.set_result(answer)
            else:
                job.future.set_exception(error)

    def _take(self) -> list[_Job]:
        """The next image, and those that are run with it; called with the lock held."""
        if not self._queue:
            return []
        first = self._queue.popleft()
        share = math.ceil((1 + len(self._queue)) / len(self._threads))
        most = min(first.pace.batch, share)
        jobs = [first]
        if most > 1:
            front = islice(self._queue, _LOOK)
            jobs += islice((job for job in front if job.bundle is first.bundle), most - 1)
            for job in jobs[1:]:
                self._queue.remove(job)
        for job in jobs:
            self._leave(job)
        return jobs

    def _leave(self, job: _Job) -> None:
        self._backlog = self._backlog - job.pace.seconds if self._queue else 0.0  # no sum of roundings

    def _answers(self, jobs: Sequence[_Job]) -> "list[_Settled]":
        began = time.time_ns()
        settled: list[_Settled] = []
        ready = []
        for job in jobs:
            job.observation.add("queue", job.submitted, began)
            try:
                job.prepared = job.work.prepare()
            except Exception as error:
                settled.append((job, None, error))
            else:
                ready.append(job)
        if len(ready) == 1:
            return settled + self._run(ready)
        for _, alike in groupby(sorted(ready, key=_size), key=_size):
            settled += self._run(list(alike))
        return settled

    def _run(self, jobs: Sequence[_Job]) -> "list[_Settled]":
        bundle, pace = jobs[0].bundle, jobs[0].pace
        alone = len(jobs) == 1 and pace.wide is not None and self._is_alone(pace)
        widely = alone and pace.widely()
        predictor = pace.wide if widely and pace.wide is not None else bundle.predictor
        start = time.time_ns()
        try:
            rows = predictor.rows([job.prepared for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], None, error)]
            return [settled for job in jobs for settled in self._run([job])]  # so that it fails alone
        end = time.time_ns()
        if not widely:
            pace.ran((end - start) / 1e9 / len(jobs))
        if alone and self._is_alone(pace):  # still
            pace.took((end - start) / 1e9, widely=widely)
        settled: list[_Settled] = []
        for job, row in zip(jobs, rows, strict=True):
            job.observation.add("inference", start, end)
            job.observation.batches.append(len(jobs))
            try:
                settled.append((job, job.work.finish(row), None))
            except Exception as error:
                settled.append((job, None, error))
        return settled

    def _is_alone(self, pace: Pace) -> bool:
        """Whether there is no other image, and was none for as long as one takes: clients that take turns meet."""
        with self._lock:
            return len(self._running) == 1 and not self._queue and time.monotonic() - self._crowded > pace.seconds


_Settled = tuple[_Job, object, Exception | None]


def _size(job: _Job) -> tuple[int, int]:
    """Equal of images that run together."""
    if isinstance(job.prepared, PreparedImage):
        height, width = job.prepared.pixels.shape[:2]
        return math.ceil(height / _BUCKET), math.ceil(width / _BUCKET)
    return 0, 0


async def all_of(awaitables: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
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
