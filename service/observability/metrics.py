"""Prometheus metrics and their exposition at `/metrics`.

Each worker keeps its numbers in a file of the server's shared folder (`shared_counters`); any worker returns the sum.
The counters of a worker that has ended are kept, its gauges are not. No label value is client input.
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
from vitrine.service.observability.shared_counters import (
    ENDED,
    Key,
    Numbers,
    SharedCounters,
    add_up,
    add_up_ended,
    read_shared_counters,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"  # `route` of unknown paths

# The shipped networks take 2 to 60 ms on one core, large ones seconds; the default timeout of a request is 30 s.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROCESSES = Path("/proc")

_COUNTERS = {
    "vitrine_requests": (
        "Requests by route (gRPC: method), model (empty: none) and status (gRPC: its name).",
        ("route", "model", "version", "status"),
    ),
    "vitrine_images": ("Images that were decoded, or sent as pixels.", ("model",)),
    "vitrine_pixels": ("Pixels of these images, as sent.", ("model",)),
    "vitrine_rejected": ("Requests that failed, by error code.", ("reason",)),
    "vitrine_worker_starts": ("Worker processes that became ready, including those that have ended.", ()),
}
_HISTOGRAMS = {
    "vitrine_request_seconds": (
        "Duration of a request, from its headers to the end of the response.",
        ("route", "model"),
        _SECONDS,
    ),
    "vitrine_stage_seconds": (
        "Duration of the stages of an image: decode, queue (waiting for a thread), inference (of its batch).",
        ("stage", "model"),
        _SECONDS,
    ),
    "vitrine_batch_images": (
        "Batch size of each image's network call.",
        ("model",),
        (1, 2, 4, 8, 16, 32, 64),
    ),
    "vitrine_event_loop_stall_seconds": (
        "For how long the event loop stood still, measured 100 times per second.",
        (),
        _SECONDS,
    ),
}
_GAUGES = {
    "vitrine_requests_in_flight": "Requests in progress, without probes and scrapes.",
    "vitrine_queue_images": "Images waiting for a thread.",
    "vitrine_running_images": "Images (or batches) running on a thread.",
}
_LONGEST_STALL = "vitrine_event_loop_longest_stall_seconds"
_LONGEST_STALL_TEXT = "Longest stall of a worker's event loop in the last 30 to 60 seconds."
_START_SECONDS = "vitrine_start_time_seconds"
_START_TEXT = "Time when the oldest living worker became ready, in seconds since the epoch."

_counters = SharedCounters()


def use_folder(folder: Path) -> None:
    """Start counting, in a file of this process in the folder shared by the server's workers."""
    global _counters
    add_up_ended(folder)
    _counters = SharedCounters(folder)
    for name in _GAUGES:
        _counters.set((name,), 0)


def worker_ready() -> None:
    """Count this worker as started."""
    _counters.add(("vitrine_worker_starts",), 1)
    _counters.set((_START_SECONDS,), time.time())


def request_started(record: RequestRecord) -> None:
    """Count a request as in flight."""
    if not record.quiet:
        _counters.add(("vitrine_requests_in_flight",), 1)


def request_finished(record: RequestRecord, status: str, seconds: float) -> None:
    """Count a finished request."""
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


def count_rejected(reason: str) -> None:
    """Count the rejection of what did not become a request."""
    _counters.add(("vitrine_rejected", reason), 1)


def set_queue(waiting: int, running: int) -> None:
    """Set the number of waiting and of running images of this process."""
    _counters.set(("vitrine_queue_images",), waiting)
    _counters.set(("vitrine_running_images",), running)


def observe_stall(seconds: float, longest: float) -> None:
    """Count a stall of the event loop, and set the longest one of late."""
    _counters.observe(("vitrine_event_loop_stall_seconds",), seconds, _SECONDS)
    _counters.set((_LONGEST_STALL,), longest)


class _CountersCollector(Collector):
    """The counters of all workers, and the gauges of the living ones."""

    def __init__(self, counts: Numbers, gauges: list[Numbers]) -> None:
        self._counts, self._gauges = counts, gauges

    def collect(self) -> Iterator[Metric]:
        for name, (text, labels) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for (_, *values), (count,) in self._series(name, len(labels), 1):
                counter.add_metric(values, count)
            if counter.samples:
                yield counter
        for name, (text, labels, buckets) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=labels)
            bounds = [*map(str, map(float, buckets)), "+Inf"]
            for (_, *values), (*counts, total) in self._series(name, len(labels), len(buckets) + 2):
                histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
            if histogram.samples:
                yield histogram
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text, sum(worker[name,][0] for worker in self._gauges if (name,) in worker))
        stalls = [worker[_LONGEST_STALL,][0] for worker in self._gauges if (_LONGEST_STALL,) in worker]
        if stalls:
            yield GaugeMetricFamily(_LONGEST_STALL, _LONGEST_STALL_TEXT, max(stalls))
        starts = [worker[_START_SECONDS,][0] for worker in self._gauges if (_START_SECONDS,) in worker]
        if starts:
            yield GaugeMetricFamily(_START_SECONDS, _START_TEXT, min(starts))

    def _series(self, name: str, labels: int, numbers: int) -> list[tuple[Key, list[float]]]:
        """Return the series of a metric; those of another shape are from a damaged file."""
        shape = 1 + labels, numbers
        return sorted(
            (key, values) for key, values in self._counts.items() if key[0] == name and (len(key), len(values)) == shape
        )


class _ModelsCollector(Collector):
    """The served models at the time of the scrape. (All workers serve the same.)"""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def collect(self) -> Iterator[Metric]:
        info = InfoMetricFamily("vitrine_model", "A served version of a model.")
        seconds = GaugeMetricFamily(
            "vitrine_model_load_seconds", "Time taken to load and verify it.", labels=("model", "version")
        )
        for bundle, load_seconds in self._repository.load_seconds():
            manifest = bundle.manifest
            labels = {"model": manifest.name, "version": manifest.version, "task": manifest.task.value}
            variant = bundle.variant.value if bundle.variant else ""
            info.add_metric([], {**labels, "variant": variant, "architecture": manifest.architecture})
            seconds.add_metric([manifest.name, manifest.version], load_seconds)
        yield info
        yield seconds


class _WorkersCollector(Collector):
    """The living worker processes of this server."""

    def __init__(self, pids: set[int]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("vitrine_workers", "Living worker processes.", len(self._pids))
        if _PROCESSES.is_dir():
            memory = sum(map(_resident_bytes, self._pids))
            yield GaugeMetricFamily("vitrine_resident_memory_bytes", "Total resident memory of the workers.", memory)


def exposition(repository: Repository) -> bytes:
    """Return all metrics of all workers, in Prometheus' text format."""
    counters = read_shared_counters(_counters.folder) if _counters.folder else {}
    counters[os.getpid()] = _counters.read()
    counts = add_up(counters.values())
    living = {pid: worker for pid, worker in counters.items() if pid != ENDED}
    registry = CollectorRegistry()
    registry.register(_CountersCollector(counts, list(living.values())))
    registry.register(_WorkersCollector(set(living)))
    registry.register(_ModelsCollector(repository))
    return generate_latest(registry)


def _resident_bytes(pid: int) -> int:
    try:
        pages = int((_PROCESSES / str(pid) / "statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
