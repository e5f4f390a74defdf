"""Prometheus metrics: what is counted and measured, and their text at `/metrics`.

Each worker keeps its numbers in a file of the server's shared folder (`shared_counters`); any of them answers the sum.
A worker that has ended leaves its counts, not its gauges. No label holds what a client wrote.
"""

import os
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vitrine.bundle.repository import Repository
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.observability.shared_counters import Key, SharedCounters, read_shared_counters

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"  # the route of all paths that nobody answers

# The shipped networks take 2 to 60 ms on one core, large ones seconds; a request may take 30 s by default.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROCESSES = Path("/proc")

_COUNTERS = {
    "vitrine_requests": (
        "Requests answered, by route (gRPC: method), model (empty: none answered) and status (gRPC: its name).",
        ("route", "model", "version", "status"),
    ),
    "vitrine_images": ("Images that were decoded, or sent as pixels.", ("model",)),
    "vitrine_pixels": ("Pixels of these images, as they were sent.", ("model",)),
    "vitrine_rejected": ("Requests that were answered with an error, by its code.", ("reason",)),
    "vitrine_worker_starts": ("Worker processes that have become ready, those that have ended included.", ()),
}
_HISTOGRAMS = {
    "vitrine_request_seconds": (
        "From a request's headers to its answer's end.",
        ("route", "model"),
        _SECONDS,
    ),
    "vitrine_stage_seconds": (
        "Parts of the work on an image: decode, queue (waiting for a thread), inference (of its batch).",
        ("stage", "model"),
        _SECONDS,
    ),
    "vitrine_batch_images": (
        "For each image, how many were in the same call of the network.",
        ("model",),
        (1, 2, 4, 8, 16, 32, 64),
    ),
}
_GAUGES = {
    "vitrine_requests_in_flight": "Requests in work, without probes and scrapes.",
    "vitrine_queue_images": "Images that wait for a thread.",
    "vitrine_running_images": "Images (or batches) on a thread.",
}
_START_SECONDS = "vitrine_start_time_seconds"
_START_TEXT = "When the oldest living worker became ready, in seconds since the epoch."

_counters = SharedCounters()


def use_folder(folder: Path) -> None:
    """Begin to count, in a file of this process in the folder that the server's workers share."""
    global _counters
    _counters = SharedCounters(folder)
    for name in _GAUGES:
        _counters.set((name,), 0)


def worker_ready() -> None:
    """This process has loaded everything and begins to answer."""
    _counters.add(("vitrine_worker_starts",), 1)
    _counters.set((_START_SECONDS,), time.time())


def request_started(record: RequestRecord) -> None:
    """A request has come."""
    if not record.quiet:
        _counters.add(("vitrine_requests_in_flight",), 1)


def request_finished(record: RequestRecord, status: str, seconds: float) -> None:
    """Count a request that is finished."""
    add, observe = _counters.add, _counters.observe
    if not record.quiet:
        add(("vitrine_requests_in_flight",), -1)
    route, model = record.route or OTHER, record.model
    add(("vitrine_requests", route, model, record.version, status), 1)
    observe(("vitrine_request_seconds", route, model), seconds, _SECONDS)
    for stage in record.stages:
        observe(("vitrine_stage_seconds", stage.name, model), (stage.end - stage.start) / 1e9, _SECONDS)
    for images in record.batches:
        observe(("vitrine_batch_images", model), images, _HISTOGRAMS["vitrine_batch_images"][2])
    if record.sizes:
        add(("vitrine_images", model), record.images)
        add(("vitrine_pixels", model), record.pixels)
    if record.error:
        add(("vitrine_rejected", record.error), 1)


def set_queue(waiting: int, running: int) -> None:
    """How much work waits, and how much is on threads, in this process."""
    _counters.set(("vitrine_queue_images",), waiting)
    _counters.set(("vitrine_running_images",), running)


class _Counted(Collector):
    """The numbers of all workers together, gauges of the living alone."""

    def __init__(self, counts: dict[Key, list[float]], gauges: list[dict[Key, list[float]]]) -> None:
        self._counts, self._gauges = counts, gauges

    def collect(self) -> Iterator[Metric]:
        for name, (text, labels) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for (_, *values), (count,) in self._of(name):
                counter.add_metric(values, count)
            if counter.samples:
                yield counter
        for name, (text, labels, buckets) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=labels)
            bounds = [*map(str, map(float, buckets)), "+Inf"]
            for (_, *values), (*counts, total) in self._of(name):
                histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
            if histogram.samples:
                yield histogram
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text, sum(worker[name,][0] for worker in self._gauges if (name,) in worker))
        starts = [worker[_START_SECONDS,][0] for worker in self._gauges if (_START_SECONDS,) in worker]
        if starts:
            yield GaugeMetricFamily(_START_SECONDS, _START_TEXT, min(starts))

    def _of(self, name: str) -> list[tuple[Key, list[float]]]:
        return sorted((key, values) for key, values in self._counts.items() if key[0] == name)


class _Models(Collector):
    """What is served, asked when it is shown: what is unloaded is gone at once. (All workers serve the same.)"""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def collect(self) -> Iterator[Metric]:
        info = InfoMetricFamily("vitrine_model", "A served version of a model.")
        seconds = GaugeMetricFamily(
            "vitrine_model_load_seconds", "Time that loading and verifying it took.", labels=("model", "version")
        )
        for bundle, took in self._repository.load_seconds():
            manifest = bundle.manifest
            known = {"model": manifest.name, "version": manifest.version, "task": manifest.task.value}
            variant = bundle.variant.value if bundle.variant else ""
            info.add_metric([], {**known, "variant": variant, "architecture": manifest.architecture})
            seconds.add_metric([manifest.name, manifest.version], took)
        yield info
        yield seconds


class _Workers(Collector):
    """The living worker processes of this server."""

    def __init__(self, pids: set[int]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("vitrine_workers", "Living worker processes.", len(self._pids))
        if _PROCESSES.is_dir():
            memory = sum(map(_resident_bytes, self._pids))
            yield GaugeMetricFamily("vitrine_resident_memory_bytes", "Memory that the workers hold together.", memory)


def exposition(repository: Repository) -> bytes:
    """All metrics of all workers, in Prometheus' text format."""
    counters = read_shared_counters(_counters.folder) if _counters.folder else {os.getpid(): _counters.read()}
    counts: dict[Key, list[float]] = {}
    for worker in counters.values():
        for key, values in worker.items():
            before = counts.get(key)
            counts[key] = values if before is None else [a + b for a, b in zip(before, values, strict=True)]
    living = {pid: worker for pid, worker in counters.items() if pid == os.getpid() or _is_worker(pid)}
    registry = CollectorRegistry()
    registry.register(_Counted(counts, list(living.values())))
    registry.register(_Workers(set(living)))
    registry.register(_Models(repository))
    return generate_latest(registry)


def _is_worker(pid: int) -> bool:
    """Whether a process lives and has our parent: an ended worker's number may be another process' by now."""
    if not _PROCESSES.is_dir():  # not Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    try:
        state, parent = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX" and int(parent) == os.getppid()  # Z: it has ended, and nobody has noticed yet


def _resident_bytes(pid: int) -> int:
    try:
        pages = int((_PROCESSES / str(pid) / "statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it ends right now
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
