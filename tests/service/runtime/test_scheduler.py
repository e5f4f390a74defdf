"""The scheduler on its own: running, queueing, batching and refusing."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from vitrine.bundle.predictors import Classifier, Detector, Predictor, PreparedImage, Row
from vitrine.bundle.profile import ExecutionProfile
from vitrine.service.errors import OverloadedError
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import Scheduler

CHANNELS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SQUARE = ClassificationPreprocessing(input_size=(1, 1), **CHANNELS)


@dataclass
class Doubling:
    """A network that doubles its input and records its batches."""

    poison: int = -1  # a value that raises an error
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        values = inputs["pixels"].reshape(len(inputs["pixels"]), -1)[:, :1].astype(np.int64)
        self.batches.append(values.ravel().tolist())
        if self.poison in values:
            raise RuntimeError(f"cannot compute with {self.poison}")
        return [2 * values]


def bundle_of(network: Doubling | Predictor, seconds: float = 0.001, **profile: Any) -> Bundle:
    predictor = Classifier(network, SQUARE, ["a"]) if isinstance(network, Doubling) else network
    execution_profile = ExecutionProfile(seconds, **profile)
    return Bundle(None, predictor, Path("nowhere"), profile=execution_profile)  # type: ignore[arg-type]


class Value:
    """Work on an image of one pixel."""

    size = 0

    def __init__(
        self, value: int, before: Callable[[], object] = lambda: None, *, seconds: float = 0.0, limited: bool = False
    ) -> None:
        self.value, self.before, self.seconds, self.limited = value, before, seconds, limited

    def cost(self) -> float:
        return self.seconds

    def prepare(self) -> NDArray[np.uint8]:
        self.before()
        return np.full((1, 1, 3), self.value, np.uint8)

    def postprocess(self, row: Row) -> int:
        return int(row[0][0])


class Blocked(Value):
    """Work that signals its start and blocks until it may end."""

    def __init__(self, value: int = 1) -> None:
        self.started, self.may_end = threading.Event(), threading.Event()
        super().__init__(value, self._wait)

    def _wait(self) -> None:
        self.started.set()
        assert self.may_end.wait(30)


def fail() -> None:
    raise ValueError("no")


@contextmanager
def scheduling(threads: int = 1, max_queue: int = 64, max_wait: float = 60) -> Iterator[Scheduler]:
    scheduler = Scheduler(threads, max_queue, max_wait)
    try:
        yield scheduler
    finally:
        scheduler.close()
        assert (scheduler.waiting, scheduler.running) == (0, 0)


async def occupied(scheduler: Scheduler, bundle: Bundle) -> tuple[Blocked, asyncio.Future[int]]:
    """Occupy a thread until the returned work may end."""
    work = Blocked()
    result = asyncio.ensure_future(scheduler.run(work, bundle, RequestRecord()))
    await asyncio.to_thread(work.started.wait, 30)
    return work, result


def start_all(*runs: Coroutine[Any, Any, int]) -> list[asyncio.Future[int]]:
    return [asyncio.ensure_future(run) for run in runs]


def test_work_waits_for_a_thread_and_its_wait_is_recorded() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling())
        first, result = await occupied(scheduler, bundle)
        assert (scheduler.running, scheduler.waiting) == (1, 0)
        assert scheduler.longest_running() > 0
        record = RequestRecord()
        (second,) = start_all(scheduler.run(Value(2), bundle, record))
        await asyncio.sleep(0)
        assert (scheduler.running, scheduler.waiting) == (1, 1)
        with pytest.raises(OverloadedError, match=r"1 images are waiting, about .* try again later"):
            await scheduler.run(Value(3), bundle, RequestRecord())
        first.may_end.set()
        assert (await result, await second) == (2, 4)
        assert (scheduler.running, scheduler.waiting, scheduler.longest_running()) == (0, 0, 0.0)
        assert [stage.name for stage in record.stages] == ["queue", "inference"]
        queue, inference = record.stages
        assert 0 < queue.end - queue.start < 30e9
        assert queue.end <= inference.start <= inference.end
        assert record.batches == [1]

    with scheduling(max_queue=1) as scheduler:
        asyncio.run(scenario(scheduler))


def test_an_image_that_would_wait_too_long_is_refused_with_retry_after() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        slow = bundle_of(Doubling(), 3.0)
        first, result = await occupied(scheduler, slow)
        waiting = start_all(scheduler.run(Value(2), slow, RequestRecord()))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            scheduler.check_capacity("", [slow])
        assert refused.value.retry_after >= 3
        first.may_end.set()
        await asyncio.gather(result, *waiting)
        scheduler.check_capacity("", [slow])

    with scheduling(max_wait=1.0) as scheduler:
        asyncio.run(scenario(scheduler))


def test_a_lone_image_is_never_refused_however_slow_the_network_is() -> None:
    slow = bundle_of(Doubling(), 1e6)
    with scheduling(max_wait=0.001) as scheduler:
        assert asyncio.run(scheduler.run(Value(2), slow, RequestRecord())) == 4


def test_refusals_are_throttled_with_a_bounded_delay() -> None:
    async def scenario(scheduler: Scheduler) -> list[int]:
        order: list[int] = []

        async def refuse(number: int) -> None:
            await scheduler.throttle_refusal()
            order.append(number)

        await asyncio.wait_for(asyncio.gather(*(refuse(number) for number in range(400))), 30)
        return order

    with scheduling() as scheduler:
        assert sorted(asyncio.run(scenario(scheduler))) == list(range(400))


def test_cancelled_work_leaves_the_queue_and_never_runs() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        network = Doubling()
        bundle = bundle_of(network)
        first, result = await occupied(scheduler, bundle)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await scheduler.run(Value(2), bundle, RequestRecord())
        assert scheduler.waiting == 0
        (last,) = start_all(scheduler.run(Value(3), bundle, RequestRecord()))
        first.may_end.set()
        assert (await result, await last) == (2, 6)
        assert network.batches == [[1], [3]]

    with scheduling(max_queue=1) as scheduler:
        asyncio.run(scenario(scheduler))


@pytest.mark.parametrize("closed", [False, True], ids=["stands still", "closed"])
def test_a_stopped_event_loop_does_not_block_the_results_of_another(closed: bool) -> None:
    with scheduling() as scheduler, asyncio.Runner() as runner:
        bundle = bundle_of(Doubling())
        work, _ = runner.run(occupied(scheduler, bundle))
        if closed:
            runner.close()
        work.may_end.set()
        assert asyncio.run(asyncio.wait_for(scheduler.run(Value(2), bundle, RequestRecord()), 30)) == 4


@pytest.mark.parametrize("broken", [Value(1, fail), Value(7)], ids=["image", "network"])
def test_an_error_is_raised_to_the_caller_and_the_thread_survives(broken: Value) -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling(poison=7))
        with pytest.raises((ValueError, RuntimeError), match=r"no|cannot compute with 7"):
            await scheduler.run(broken, bundle, RequestRecord())
        assert await scheduler.run(Value(2), bundle, RequestRecord()) == 4
        assert scheduler.running == 0

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_if_one_work_of_several_fails_the_others_leave_the_queue() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling())
        assert await scheduler.run_all([Value(1), Value(2)], bundle, RequestRecord()) == [2, 4]
        with pytest.raises(ValueError, match="no"):
            await scheduler.run_all([Value(1, fail), *[Value(2)] * 5], bundle, RequestRecord())

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_small_networks_run_the_queue_as_one_batch_and_each_job_gets_its_own_row() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        network, other = Doubling(), Doubling()
        bundle = bundle_of(network, batch=4)
        first, result = await occupied(scheduler, bundle)
        records = [RequestRecord() for _ in range(6)]
        waiting = start_all(
            *(scheduler.run(Value(2 + i), bundle, record) for i, record in enumerate(records)),
            scheduler.run(Value(9), bundle_of(other, batch=4), RequestRecord()),
        )
        await asyncio.sleep(0)
        first.may_end.set()
        assert await asyncio.gather(*waiting) == [4, 6, 8, 10, 12, 14, 18]
        assert await result == 2
        assert network.batches == [[1], [2, 3, 4, 5], [6, 7]]
        assert other.batches == [[9]]
        assert [record.batches for record in records] == [[4]] * 4 + [[2]] * 2

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_in_a_batch_only_the_invalid_image_fails() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        network = Doubling(poison=7)
        bundle = bundle_of(network, batch=8)
        first, result = await occupied(scheduler, bundle)
        works = [Value(2), Value(3, fail), Value(7), Value(4)]
        waiting = start_all(*(scheduler.run(work, bundle, RequestRecord()) for work in works))
        await asyncio.sleep(0)
        first.may_end.set()
        good, undecoded, poisoned, last = await asyncio.gather(*waiting, return_exceptions=True)
        assert (await result, good, last) == (2, 4, 8)
        assert isinstance(undecoded, ValueError)
        assert isinstance(poisoned, RuntimeError)
        assert network.batches == [[1], [2, 7, 4], [2], [7], [4]]

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_threads_share_the_queue() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        network = Doubling()
        bundle = bundle_of(network, batch=8)
        busy = [await occupied(scheduler, bundle) for _ in range(2)]
        waiting = start_all(*(scheduler.run(Value(2 + i), bundle, RequestRecord()) for i in range(4)))
        await asyncio.sleep(0)
        for work, _ in busy:
            work.may_end.set()
        await asyncio.gather(*waiting, *(result for _, result in busy))
        assert sorted(map(len, network.batches)) == [1, 1, 1, 1, 2]  # half of four, half of two, and the rest

    with scheduling(threads=2) as scheduler:
        asyncio.run(scenario(scheduler))


def test_images_of_different_sizes_run_in_separate_batches() -> None:
    shapes: list[tuple[int, ...]] = []

    def network(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        shapes.append(inputs["pixels"].shape)
        return [np.zeros((len(inputs["pixels"]), 1))] * 3

    class Picture(Value):
        def prepare(self) -> PreparedImage:  # type: ignore[override]
            self.before()
            return PreparedImage(np.zeros((self.value, 64, 3), np.uint8), 64, self.value)

    async def scenario(scheduler: Scheduler) -> None:
        preprocessing = DetectionPreprocessing(shortest_edge=64, longest_edge=640, **CHANNELS)
        bundle = bundle_of(Detector(network, preprocessing, ["a"]), batch=8)
        first, result = await occupied(scheduler, bundle_of(Doubling()))
        waiting = start_all(*(scheduler.run(Picture(h), bundle, RequestRecord()) for h in (64, 600, 60, 610)))
        await asyncio.sleep(0)
        first.may_end.set()
        await asyncio.gather(result, *waiting)
        assert shapes == [(2, 64, 64, 3), (2, 610, 64, 3)]

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_a_lone_image_runs_on_all_cores_and_parallel_ones_on_one_each() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        narrow, wide = Doubling(), Doubling()
        bundle = bundle_of(narrow, all_cores=Classifier(wide, SQUARE, ["a"]))
        for value in (1, 2, 3):
            await scheduler.run(Value(value), bundle, RequestRecord())
        assert (narrow.batches, wide.batches) == ([], [[1], [2], [3]])
        work, result = await occupied(scheduler, bundle)
        (parallel,) = start_all(scheduler.run(Value(4), bundle, RequestRecord()))
        assert await parallel == 8
        work.may_end.set()
        await result
        assert ([4] in narrow.batches, [4] in wide.batches) == (True, False)

    with scheduling(threads=2) as scheduler:
        asyncio.run(scenario(scheduler))


class FailsLate(Value):
    def postprocess(self, row: Row) -> int:
        raise ParameterError("top_k", expected="more", found="less")


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", ["prepared", "computed", "postprocessed", "cancelled", "timed out", "answered"])
def test_an_ended_image_is_freed_at_once_without_the_garbage_collector(kind: str, images: int) -> None:
    async def scenario(scheduler: Scheduler) -> list[weakref.ref[Value]]:
        bundle = bundle_of(Doubling(poison=7))
        make: dict[str, Callable[[], Value]] = {
            "prepared": lambda: Value(1, fail),
            "computed": lambda: Value(7),
            "postprocessed": lambda: FailsLate(1),
        }
        works = [make.get(kind, lambda: Value(1))() for _ in range(images)]
        references = [weakref.ref(work) for work in works]
        if kind in ("cancelled", "timed out"):
            first, result = await occupied(scheduler, bundle)
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(0.01 if kind == "timed out" else None):
                    task = asyncio.ensure_future(scheduler.run_all(works, bundle, RequestRecord()))
                    asyncio.get_running_loop().call_later(0.01, task.cancel)
                    await task
            first.may_end.set()
            await result
            del task, first, result
        else:
            with suppress(ValueError, RuntimeError, ParameterError):
                await scheduler.run_all(works, bundle, RequestRecord())
        del works, make
        await scheduler.run(Value(1), bundle, RequestRecord())  # what was cancelled has left the loop and the thread
        return references

    gc.collect()
    gc.disable()
    try:
        with scheduling() as scheduler:
            alive = [reference() for reference in asyncio.run(scenario(scheduler))]
    finally:
        gc.enable()
    assert alive == [None] * images


def test_the_error_of_a_bug_keeps_its_traceback_as_text() -> None:
    with scheduling() as scheduler, pytest.raises(ValueError, match="no") as caught:
        asyncio.run(scheduler.run(Value(1, fail), bundle_of(Doubling()), RequestRecord()))
    assert "in fail" in "".join(caught.value.__notes__)


def test_a_small_image_passes_the_large_ones_of_the_same_sender() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        order: list[str] = []
        bundle = bundle_of(Doubling())
        first, result = await occupied(scheduler, bundle)

        def noting(name: str, seconds: float) -> Value:
            return Value(1, lambda: order.append(name), seconds=seconds)

        waiting = start_all(
            *(scheduler.run(noting("bomb", 2.0), bundle, RequestRecord()) for _ in range(3)),  # looks small
            *(scheduler.run(noting("of many", 0.0), bundle, RequestRecord(), images=16) for _ in range(3)),
            *(scheduler.run(noting("small", 0.0), bundle, RequestRecord()) for _ in range(3)),
        )
        await asyncio.sleep(0)
        first.may_end.set()
        await asyncio.gather(result, *waiting)
        assert order == ["small"] * 3 + ["of many"] * 3 + ["bomb"] * 3

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_pictures_leave_a_thread_for_other_work() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling())
        pictures = [Blocked(), Blocked(), Blocked()]
        for picture in pictures:
            picture.limited = True
        results = start_all(*(scheduler.run(picture, bundle, RequestRecord()) for picture in pictures))
        for _ in range(3):
            assert await asyncio.wait_for(scheduler.run(Value(2), bundle, RequestRecord()), 30) == 4
        assert (scheduler.running, scheduler.waiting) == (1, 2)
        for picture in pictures:
            picture.may_end.set()
        assert await asyncio.wait_for(asyncio.gather(*results), 30) == [2, 2, 2]

    with scheduling(threads=2) as scheduler:
        asyncio.run(scenario(scheduler))


def test_a_sender_that_fills_the_queue_leaves_room_for_others() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling())
        first, result = await occupied(scheduler, bundle)
        greedy = start_all(*(scheduler.run(Value(1), bundle, RequestRecord(key="greedy")) for _ in range(8)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            scheduler.check_capacity("greedy", [bundle])
        with pytest.raises(OverloadedError):
            await scheduler.run(Value(1), bundle, RequestRecord(key="greedy"))
        scheduler.check_capacity("modest", [bundle])
        (modest,) = start_all(scheduler.run(Value(3), bundle, RequestRecord(key="modest")))
        await asyncio.sleep(0)
        first.may_end.set()
        assert await modest == 6
        await asyncio.gather(result, *greedy)

    with scheduling(max_queue=8) as scheduler:
        asyncio.run(scenario(scheduler))


def test_a_refusal_after_a_storm_of_refusals_waits_no_longer_than_its_turn() -> None:
    async def scenario(scheduler: Scheduler) -> float:
        storm = [asyncio.ensure_future(scheduler.throttle_refusal()) for _ in range(5000)]
        await asyncio.wait_for(asyncio.gather(*storm), 30)
        await asyncio.sleep(0.1)  # the turns of the storm have passed
        start = time.monotonic()
        await scheduler.throttle_refusal()
        return time.monotonic() - start

    with scheduling() as scheduler:
        assert asyncio.run(scenario(scheduler)) < 0.5  # not a second, as each of the storm


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("waiting", [1, 3])
def test_the_expected_wait_is_that_of_the_whole_queue_on_all_threads(threads: int, waiting: int) -> None:
    """Before anything was measured, an image is expected to take one and a half times as long as at load."""

    async def scenario(scheduler: Scheduler) -> None:
        slow = bundle_of(Doubling(), 40.0)
        busy = [await occupied(scheduler, slow) for _ in range(threads)]
        results = start_all(*(scheduler.run(Value(2), slow, RequestRecord()) for _ in range(waiting)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            scheduler.check_capacity("", [slow])
        assert 0 <= refused.value.retry_after - 60 * waiting / threads <= 1
        assert f"{waiting} images are waiting" in str(refused.value)
        for work, _ in busy:
            work.may_end.set()
        await asyncio.gather(*results, *(result for _, result in busy))
        scheduler.check_capacity("", [slow])

    with scheduling(threads=threads, max_queue=waiting, max_wait=60 * waiting / threads) as scheduler:
        asyncio.run(scenario(scheduler))


def test_the_expected_wait_follows_what_images_take() -> None:
    """By a twentieth of the difference with each batch."""

    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling(), 1000.0)
        for _ in range(40):
            await scheduler.run(Value(1), bundle, RequestRecord())
        first, result = await occupied(scheduler, bundle)
        (waiting,) = start_all(scheduler.run(Value(2), bundle, RequestRecord()))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            scheduler.check_capacity("", [bundle])
        assert refused.value.retry_after == pytest.approx(1000 * 1.5 * 0.95**40, abs=5)
        first.may_end.set()
        await asyncio.gather(result, waiting)

    with scheduling(max_wait=1.0) as scheduler:
        asyncio.run(scenario(scheduler))


def test_a_network_that_is_slower_than_at_load_makes_the_queue_longer() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Lasting(0.02), 0.001)
        for refused in (False, True):  # at first, an image is expected to take 1.5 ms
            first, result = await occupied(scheduler, bundle)
            (waiting,) = start_all(scheduler.run(Value(2), bundle, RequestRecord()))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError) if refused else nullcontext():
                scheduler.check_capacity("", [bundle])
            first.may_end.set()
            await asyncio.gather(result, waiting)
            for _ in range(5):
                await scheduler.run(Value(1), bundle, RequestRecord())

    with scheduling(max_wait=0.003) as scheduler:
        asyncio.run(scenario(scheduler))


def test_neither_expensive_nor_broken_images_change_what_others_are_expected_to_take() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling(), 10.0)

        async def expected_seconds() -> int:
            first, result = await occupied(scheduler, bundle)
            (waiting,) = start_all(scheduler.run(Value(2), bundle, RequestRecord()))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError) as refused:
                scheduler.check_capacity("", [bundle])
            first.may_end.set()
            await asyncio.gather(result, waiting)
            return refused.value.retry_after

        before = await expected_seconds()
        for _ in range(50):
            with pytest.raises(ValueError, match="no"):
                await scheduler.run(Value(1, fail), bundle, RequestRecord())
        assert await expected_seconds() == pytest.approx(before, abs=3)
        cheap = bundle_of(Doubling(), 0.0)
        for _ in range(50):  # small files that hold large images, as their headers tell
            await scheduler.run(Value(1, partial(time.sleep, 0.01), seconds=0.01), cheap, RequestRecord())
        assert await expected_seconds() <= 2 * before

    with scheduling(max_wait=1.0) as scheduler:
        asyncio.run(scenario(scheduler))


class NoMemory(RequestRecord):
    def add_stage(self, name: str, start: int, end: int) -> None:
        raise MemoryError


def test_a_thread_outlives_an_error_in_the_handling_of_another() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = bundle_of(Doubling())
        for _ in range(3):
            with pytest.raises(MemoryError):
                await scheduler.run(Value(1), bundle, NoMemory())
        assert await scheduler.run(Value(2), bundle, RequestRecord()) == 4
        assert scheduler.longest_running() == 0

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_networks_that_were_not_measured_are_served() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        bundle = replace(bundle_of(Doubling()), profile=None)
        for value in (1, 2, 3):
            assert await asyncio.wait_for(scheduler.run(Value(value), bundle, RequestRecord()), 30) == 2 * value

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


def test_capacity_is_checked_for_similar_requests_of_the_same_sender() -> None:
    """Similar: of the same model, and of at most twice or at least half the cost, as far as the size tells."""

    async def scenario(scheduler: Scheduler) -> None:
        bundle, other = bundle_of(Doubling(), 1.0), bundle_of(Doubling(), 1.0)
        unmeasured = replace(other, profile=None)
        first, result = await occupied(scheduler, bundle)
        waiting = start_all(*(scheduler.run(Value(1), bundle, RequestRecord(key="one")) for _ in range(4)))
        await asyncio.sleep(0)
        byte = 10e-9  # seconds
        for sender, bundles, size, is_refused in (
            ("one", [bundle], 0, True),
            ("one", [bundle], int(0.9 / byte), True),  # 2 s
            ("one", [bundle], int(3 / byte), False),  # 4 s
            ("one", [other, bundle], 0, True),
            ("one", [bundle, unmeasured], 0, False),  # it may be for a network of no cost
            ("one", [other], 0, False),
            ("one", [], 0, False),
            ("other", [bundle], 0, False),
        ):
            with pytest.raises(OverloadedError) if is_refused else nullcontext():
                scheduler.check_capacity(sender, bundles, size)
        first.may_end.set()
        await asyncio.gather(result, *waiting)

    with scheduling(max_queue=4) as scheduler:
        asyncio.run(scenario(scheduler))


def test_at_most_200_requests_are_refused_per_second() -> None:
    async def scenario(scheduler: Scheduler) -> tuple[float, float]:
        start = time.monotonic()
        await scheduler.throttle_refusal()  # a lone one does not wait
        await asyncio.gather(*(scheduler.throttle_refusal() for _ in range(100)))
        few = time.monotonic() - start
        await asyncio.wait_for(asyncio.gather(*(scheduler.throttle_refusal() for _ in range(10_000))), 30)
        return few, time.monotonic() - start

    with scheduling() as scheduler:
        few, many = asyncio.run(scenario(scheduler))
    assert few >= 0.5
    assert many < 20  # without a bound, 50


def test_the_oldest_batch_has_run_for_longest() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        assert (scheduler.longest_running(), scheduler.started) == (0, 0)
        before = time.monotonic()
        bundle = bundle_of(Doubling())
        busy = [await occupied(scheduler, bundle)]
        started = time.monotonic()
        busy.append(await occupied(scheduler, bundle))
        earliest = time.monotonic() - started
        assert earliest <= scheduler.longest_running() <= time.monotonic() - before
        assert (scheduler.running, scheduler.started) == (2, 2)
        for work, _ in busy:
            work.may_end.set()
        await asyncio.gather(*(result for _, result in busy))
        assert (scheduler.longest_running(), scheduler.running, scheduler.started) == (0, 0, 2)

    with scheduling(threads=2) as scheduler:
        asyncio.run(scenario(scheduler))


def test_closing_finishes_what_runs_and_cancels_what_waits() -> None:
    async def scenario() -> None:
        scheduler, network = Scheduler(1, 64), Doubling()
        first, result = await occupied(scheduler, bundle_of(network))
        waiting = start_all(*(scheduler.run(Value(2), bundle_of(network), RequestRecord()) for _ in range(3)))
        await asyncio.sleep(0)
        timer = threading.Timer(0.1, first.may_end.set)
        timer.start()
        scheduler.close()
        assert (scheduler.waiting, scheduler.running) == (0, 0)
        assert await result == 2
        cancelled = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
        assert [type(error) for error in cancelled] == [asyncio.CancelledError] * 3
        assert network.batches == [[1]]

    asyncio.run(scenario())


@pytest.mark.parametrize("limited", [False, True])
def test_a_single_thread_does_all_kinds_of_work(limited: bool) -> None:
    with scheduling() as scheduler:
        work = Value(2, limited=limited)
        assert asyncio.run(asyncio.wait_for(scheduler.run(work, bundle_of(Doubling()), RequestRecord()), 30)) == 4


def run_alone(bundle: Bundle, images: int) -> None:
    """Run images one after the other."""

    async def scenario(scheduler: Scheduler) -> None:
        for _ in range(images):
            await scheduler.run(Value(1), bundle, RequestRecord())

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))


class Lasting(Doubling):
    """A network whose calls take so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            pass
        return super().__call__(**inputs)


@pytest.mark.parametrize(("seconds", "batch"), [(0.0, 8), (0.03, 1)])
def test_a_network_that_was_loaded_under_load_is_measured_while_it_serves(seconds: float, batch: int) -> None:
    """Calls of less than 15 ms are batched; at load this one seemed to take a second."""
    bundle = bundle_of(Lasting(seconds), 1.0, batch=8)
    run_alone(bundle, 5)
    assert bundle.profile is not None
    assert bundle.profile.batch == batch


@pytest.mark.parametrize(("one_core", "all_cores"), [(0.0, 0.1), (0.1, 0.0)])
def test_lone_images_run_in_the_way_that_takes_less(one_core: float, all_cores: float) -> None:
    narrow, wide = Lasting(one_core), Lasting(all_cores)
    run_alone(bundle_of(narrow, 0.05, all_cores=Classifier(wide, SQUARE, ["a"])), 3)
    assert (len(narrow.batches), len(wide.batches)) == ((2, 1) if one_core < all_cores else (0, 3))


def test_the_latency_of_parallel_images_is_not_that_of_a_lone_one() -> None:
    async def scenario(scheduler: Scheduler) -> None:
        narrow, wide = Doubling(), Lasting(0.02)
        bundle = bundle_of(narrow, 0.3, all_cores=Classifier(wide, SQUARE, ["a"]))
        await scheduler.run(Value(1), bundle, RequestRecord())
        work, result = await occupied(scheduler, bundle)
        await scheduler.run(Value(2), bundle, RequestRecord())
        work.may_end.set()
        await result
        await asyncio.sleep(0.4)  # more than an image takes: the next one is alone
        await scheduler.run(Value(3), bundle, RequestRecord())
        assert (narrow.batches, wide.batches) == ([[2], [1]], [[1], [3]])

    with scheduling(threads=2) as scheduler:
        asyncio.run(scenario(scheduler))


def test_images_that_were_not_alone_lately_run_on_one_core() -> None:
    """For as long as an image takes, since clients in parallel may alternate."""

    async def scenario(scheduler: Scheduler) -> None:
        narrow, wide = Doubling(), Doubling()
        bundle = bundle_of(narrow, 1000.0, all_cores=Classifier(wide, SQUARE, ["a"]))
        assert await scheduler.run_all([Value(1), Value(2)], bundle, RequestRecord()) == [2, 4]
        before = len(wide.batches)
        await scheduler.run(Value(3), bundle, RequestRecord())
        assert (narrow.batches[-1], len(wide.batches)) == ([3], before)

    with scheduling(max_wait=1e6) as scheduler:
        asyncio.run(scenario(scheduler))


def test_errors_that_a_client_can_understand_carry_no_traceback() -> None:
    for work in (FailsLate(1), Value(1, lambda: FailsLate(1).postprocess(()))):
        with scheduling() as scheduler, pytest.raises(ParameterError) as caught:
            asyncio.run(scheduler.run(work, bundle_of(Doubling()), RequestRecord()))
        assert not hasattr(caught.value, "__notes__")
        assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([(64, 64), (1, 1)], [2]),
        ([(64, 64), (65, 64)], [1, 1]),
        ([(64, 64), (64, 65)], [1, 1]),
        ([(128, 65), (65, 128), (64, 128)], [1, 2]),
    ],
)
def test_sizes_that_round_up_to_the_same_64_pixels_are_batched(
    sizes: list[tuple[int, int]], batches: list[int]
) -> None:
    found: list[int] = []

    def network(**inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        found.append(len(inputs["pixels"]))
        return [np.zeros((len(inputs["pixels"]), 1))] * 3

    class Picture(Value):
        def prepare(self) -> PreparedImage:  # type: ignore[override]
            height, width = sizes[self.value]
            return PreparedImage(np.zeros((height, width, 3), np.uint8), width, height)

    async def scenario(scheduler: Scheduler) -> None:
        preprocessing = DetectionPreprocessing(shortest_edge=64, longest_edge=640, **CHANNELS)
        bundle = bundle_of(Detector(network, preprocessing, ["a"]), batch=8)
        first, result = await occupied(scheduler, bundle_of(Doubling()))
        waiting = start_all(*(scheduler.run(Picture(i), bundle, RequestRecord()) for i in range(len(sizes))))
        await asyncio.sleep(0)
        first.may_end.set()
        await asyncio.gather(result, *waiting)
        assert found == batches

    with scheduling() as scheduler:
        asyncio.run(scenario(scheduler))
