"""Scheduling: images wait in one bounded, fair queue for as many threads as there are cores.

A thread takes an image, decodes it, runs the network on one core and postprocesses the output. Parallel images give the
highest throughput, and an invalid image fails on its own. For a network so small that call overhead matters, a thread
takes its share of the queue and runs it as one batch. A lone image runs on all cores. The bundle's `ExecutionProfile`
determines which of these pay for a network.

The queue (`fair_queue`) shares the threads between senders, and between the small and the large requests of a sender.

An error leaves a thread as a value without frames: a traceback would hold the image, and be part of a reference cycle
with the future and the frame that awaits it.
"""

import asyncio
import contextlib
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, cast

from vitrine.bundle.errors import VitrineError
from vitrine.bundle.loading import Bundle
from vitrine.bundle.predictors import PreparedImage, Row
from vitrine.bundle.profile import ExecutionProfile
from vitrine.service.errors import OverloadedError
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.fair_queue import FairQueue, FlowKey, Kind

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
AnyError = TypeVar("AnyError", bound=Exception)

_BUCKET_SIZE = 64  # pixels; images whose sizes round up to the same multiple may be padded to one batch
_MAX_REFUSALS_PER_SECOND = 200  # clients that retry at once would otherwise monopolize the event loop
_MAX_REFUSAL_DELAY = 1.0  # seconds
_INITIAL_SLOWDOWN = 1.5  # measured time of an image relative to its expected cost
_MAX_SLOWDOWN = 10.0  # of an image; a single one says little
_SLOWDOWN_DECAY = 0.95  # weight of the previous slowdown in the moving average
_UNMEASURED = ExecutionProfile(0.0)
_SECONDS_PER_BYTE = 10e-9  # of an encoded photograph, to decode it at the resolution that the network needs
_SECONDS_PER_IMAGE = 1e-3  # besides its network and its bytes: Python, and handing it over


class Work(Protocol[T_co]):
    """Work on one image of a request. The methods run on a computing thread; `Scheduler.run` raises their errors."""

    @property
    def size(self) -> int:
        """Size of the encoded image in bytes; 0 if there is nothing to decode."""

    @property
    def limited(self) -> bool:
        """Whether such work may not occupy all threads: pictures and explanations."""

    def cost(self) -> float:
        """Return the expected seconds on one core besides the network, from the header of the image; cheap."""

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
    future: asyncio.Future[tuple[Any, Exception | None]]
    submitted: int  # nanoseconds of the monotonic clock
    images: int  # of the request
    flow: FlowKey
    cost: float  # expected seconds on one core
    is_measured: bool = False  # whether `flow` follows from the image's header, not only from its bytes
    prepared: Any = None


class Scheduler:
    """Computing threads and their queue.

    Cancelled work leaves the queue; work that has started is finished.
    """

    def __init__(self, threads: int, max_queue: int, max_wait_seconds: float = math.inf) -> None:
        """Args: number of threads, maximum length of the queue, and maximum expected wait of an image in seconds."""
        self._max_wait = max_wait_seconds
        self._queue: FairQueue[_Job] = FairQueue(max_queue)
        self._arrivals: SimpleQueue[bool] = SimpleQueue()  # True: a job; False: end the thread
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # start of each running batch, by its number (monotonic seconds)
        self._batch_number = 0
        self._last_shared = -math.inf  # when more than one image was last in progress (monotonic seconds)
        self._max_limited = max(1, threads - 1)  # threads for kinds that may not occupy all
        self._limited = 0  # of them, running
        self._deferred = 0  # arrivals of work that waits for one of these threads
        self._slowdown = _INITIAL_SLOWDOWN
        self._next_refusal = 0.0
        self._results: deque[_Result] = deque()  # not yet delivered
        self._notified_loop: asyncio.AbstractEventLoop | None = None  # has `_deliver_results` scheduled
        self._threads = [threading.Thread(target=self._worker, name=f"image-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def limited_threads(self) -> int:
        """Number of threads that limited work may occupy."""
        return self._max_limited

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of images, or batches of them, running on a thread."""
        return len(self._running)

    @property
    def started(self) -> int:
        """Number of images, or batches of them, that have been started since the scheduler exists."""
        return self._batch_number

    @property
    def is_loaded(self) -> bool:
        """Whether so much waits that there may be no room for another image."""
        return self._queue.is_long or (bool(self._queue) and self._seconds(self._queue.backlog) > self._max_wait)

    def longest_running(self) -> float:
        """Return for how many seconds the oldest running batch has been running; 0 if none is."""
        with self._lock:
            start = min(self._running.values(), default=None)
        return 0.0 if start is None else time.monotonic() - start

    def check_capacity(self, sender: str, bundles: Collection[Bundle], size: int = 0) -> None:
        """Check that another image of the sender can be queued, as far as can be known before its body is read.

        Args:
            bundles: those that the request may be for.
            size: bytes of the request.

        Raises:
            OverloadedError: the queue is full, or its expected duration exceeds the maximum wait.
        """
        if not bundles:
            return
        cheapest = min((bundle.profile or _UNMEASURED).seconds for bundle in bundles)
        magnitude = Kind.of(None, _SECONDS_PER_IMAGE + cheapest + size * _SECONDS_PER_BYTE).magnitude
        groups = set(map(id, bundles))
        with self._lock:
            similar = [
                key
                for key in self._queue.active()
                if key.sender == sender and key.kind.group in groups and abs(key.kind.magnitude - magnitude) <= 1
            ]
            overloads = [self._overload(key) for key in similar]
        if overloads and overloads[0] is not None and all(overloads):
            raise OverloadedError(*overloads[0])

    def _overload(self, flow: FlowKey) -> tuple[int, float] | None:
        """Return what `OverloadedError` needs if another image of the flow has no room; the caller holds the lock.

        An error in a variable of the frame that raises it would be a reference cycle, which keeps the request's body.
        """
        if not self.is_loaded:
            return None
        waiting, cost = self._queue.ahead(flow)
        seconds = self._seconds(cost)
        is_full = self._queue.is_full(flow) or (waiting > 0 and seconds > self._max_wait)
        return (len(self._queue), seconds) if is_full else None

    def _seconds(self, cost: float) -> float:
        """Return the expected time in which the threads do work of this cost."""
        return cost * self._slowdown / len(self._threads)

    async def throttle_refusal(self) -> None:
        """Wait until another request may be refused: not at all, unless refusals are very frequent."""
        now = time.monotonic()
        turn = min(max(self._next_refusal, now), now + _MAX_REFUSAL_DELAY)
        self._next_refusal = turn + 1 / _MAX_REFUSALS_PER_SECOND
        if turn > now:
            await asyncio.sleep(turn - now)

    async def run(self, work: Work[T], bundle: Bundle, record: RequestRecord, *, images: int = 1) -> T:
        """Queue the work and return its result.

        The record gets the stages `queue` and `inference`, and the batch size.

        Args:
            images: number of images of the request, which wait behind smaller requests of the same sender.

        Raises:
            OverloadedError: see `check_capacity`.
            Exception: any error of the work or the network.
        """
        future: asyncio.Future[tuple[T, Exception | None]] = asyncio.get_running_loop().create_future()
        profile = bundle.profile or _UNMEASURED
        cost = _SECONDS_PER_IMAGE + profile.seconds + work.size * _SECONDS_PER_BYTE
        flow = FlowKey(record.sender, Kind.of(id(bundle), cost * images, limited=work.limited))
        job = _Job(work, bundle, profile, record, future, time.monotonic_ns(), images, flow, cost)
        with self._lock:
            overload = self._overload(flow)
            if overload is not None:
                raise OverloadedError(*overload)
            if self._queue or self._running:
                self._last_shared = time.monotonic()
            self._queue.push(job, flow, cost)
        self._arrivals.put(True)
        try:
            result, error = await future
        except asyncio.CancelledError:
            with self._lock:
                self._queue.remove(job, job.flow)
            raise
        if error is None:
            return result
        try:
            raise error
        finally:
            del error, result, future, job, work  # the traceback refers to this frame

    async def run_all(self, works: Sequence[Work[T]], bundle: Bundle, record: RequestRecord) -> list[T]:
        """Run all `works` and return their results in order. If one fails, the others leave the queue.

        Raises:
            OverloadedError, Exception: see `run`.
        """
        return await gather([self.run(work, bundle, record, images=len(works)) for work in works])

    def close(self) -> None:
        """Finish running work, cancel queued work and end the threads."""
        dropped = []
        with self._lock:
            while (found := self._queue.pop()) is not None:
                dropped.append(found[1])
        for _ in self._threads:
            self._arrivals.put(False)
        for thread in self._threads:
            thread.join()
        for job in dropped:
            job.future.cancel()

    def _worker(self) -> None:
        while self._arrivals.get():
            jobs = self._next_batch()
            if not jobs:  # cancelled, taken by another batch, or deferred
                continue
            with self._lock:
                self._batch_number += 1
                number = self._batch_number
                self._running[number] = start = time.monotonic()
            try:
                results = self._process(jobs)
            except Exception as error:  # such as no memory to report another error
                results = [(job, None, error.with_traceback(None)) for job in jobs]
            with self._lock:
                del self._running[number]
                self._end_limited(jobs)
            if all(error is None for _, _, error in results):
                slowdown = min(_MAX_SLOWDOWN, (time.monotonic() - start) / sum(job.cost for job in jobs))
                self._slowdown = _SLOWDOWN_DECAY * self._slowdown + (1 - _SLOWDOWN_DECAY) * slowdown
            self._results += results
            loop = jobs[0].future.get_loop()
            del jobs, results  # they hold images; this thread may wait long for the next
            if self._notified_loop is not loop:
                self._notified_loop = loop
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._deliver_results)

    def _deliver_results(self) -> None:
        """Resolve the futures of finished jobs; runs on the event loop."""
        self._notified_loop = None  # first, so that later results schedule another call
        while self._results:
            job, result, error = self._results.popleft()
            if not job.future.done():  # cancelled
                job.future.set_result((result, error))

    def _next_batch(self) -> list[_Job]:
        """Take the next image, and those to run with it, from the queue."""
        first = self._next_job()
        if first is None:
            return []
        jobs = [first]
        size = min(first.profile.batch, math.ceil((1 + len(self._queue)) / len(self._threads)))
        while len(jobs) < size and (job := self._next_job(first.flow.kind)) is not None:
            jobs.append(job)
        return jobs

    def _next_job(self, kind: Kind | None = None) -> _Job | None:
        """Take the next image from the queue, of the given kind; one that costs more than expected queues again."""
        while True:
            with self._lock:
                found = self._queue.pop(lambda other: self._accepts(other) and kind in (None, other))
                if found is None:
                    self._deferred += kind is None and bool(self._queue)
                    return None
                job = found[1]
                self._limited += job.flow.kind.limited
                delays_nobody = not self._queue
            is_larger = not (job.is_measured or job.future.done()) and self._is_larger(job)
            if not job.future.done() and (delays_nobody or not is_larger):
                return job
            with self._lock:
                self._end_limited([job])
                if not job.future.done():
                    self._queue.put_back(job, found[0], job.flow, job.cost)

    @staticmethod
    def _is_larger(job: _Job) -> bool:
        """Measure the cost of an image; return whether its kind is a larger one, which is noted in the job."""
        job.is_measured = True
        try:
            job.cost = _SECONDS_PER_IMAGE + job.profile.seconds + job.work.cost()
        except Exception:  # raised again by `prepare`
            return False
        before = job.flow.kind
        kind = Kind.of(before.group, job.cost * job.images, limited=before.limited)
        job.flow = job.flow._replace(kind=kind)
        return kind.magnitude > before.magnitude

    def _accepts(self, kind: Kind) -> bool:
        return not kind.limited or self._limited < self._max_limited

    def _end_limited(self, jobs: Sequence[_Job]) -> None:
        """Free the threads that the jobs occupied, for deferred work; the caller holds the lock."""
        self._limited -= sum(job.flow.kind.limited for job in jobs)
        for _ in range(self._deferred):
            self._arrivals.put(True)
        self._deferred = 0

    def _process(self, jobs: Sequence[_Job]) -> "list[_Result]":
        start = time.monotonic_ns()
        results: list[_Result] = []
        ready = []
        for job in jobs:
            job.record.add_stage("queue", job.submitted, start)
            try:
                job.prepared = job.work.prepare()
            except Exception as error:
                results.append((job, None, without_frames(error)))
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
        start = time.monotonic_ns()
        try:
            rows = predictor.infer([job.prepared for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], None, without_frames(error))]
            return [result for job in jobs for result in self._infer([job])]  # only the invalid image fails
        end = time.monotonic_ns()
        if not all_cores:
            profile.record_latency((end - start) / 1e9, [_pixels(job) for job in jobs])
        if is_lone and self._is_lone(profile):  # still
            profile.record_lone_latency((end - start) / 1e9, _pixels(jobs[0]), all_cores=all_cores)
        results: list[_Result] = []
        for job, row in zip(jobs, rows, strict=True):
            job.record.add_stage("inference", start, end)
            job.record.batches.append(len(jobs))
            try:
                results.append((job, job.work.postprocess(row), None))
            except Exception as error:
                results.append((job, None, without_frames(error)))
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


def _pixels(job: _Job) -> int:
    """Return the number of pixels that the network gets for the image."""
    pixels = job.prepared.pixels if isinstance(job.prepared, PreparedImage) else job.prepared
    return int(pixels.shape[0] * pixels.shape[1])


def without_frames(error: AnyError) -> AnyError:
    """Remove the frames from an error, and its causes; those of a bug stay as text, for the log."""
    if not isinstance(error, VitrineError) and not hasattr(error, "__notes__"):
        error.add_note("".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


async def gather(awaitables: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all, in order. If one raises, cancel the others and raise its error."""
    if len(awaitables) == 1:
        return [await awaitables[0]]
    done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    results: list[T | None] = [None] * len(awaitables)
    unfinished = set(range(len(awaitables)))
    tasks = [
        asyncio.ensure_future(_settle(awaitable, i, results, unfinished, done))
        for i, awaitable in enumerate(awaitables)
    ]
    error = None
    try:
        error = await done
        if error is not None:
            raise error
        return cast(list[T], results)
    finally:
        for task in tasks:
            task.cancel()
        del done, results, tasks, task, error  # the traceback of the error refers to this frame


async def _settle(
    awaitable: Coroutine[Any, Any, T],
    index: int,
    results: list[T | None],
    unfinished: set[int],
    done: asyncio.Future[Exception | None],
) -> None:
    """Put the result in its place; resolve `done` with an error, or with None after the last result."""
    error = None
    try:
        results[index] = await awaitable
        unfinished.remove(index)
    except Exception as caught:
        error = without_frames(caught)
    if not done.done() and (error or not unfinished):
        done.set_result(error)
