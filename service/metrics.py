"""Prometheus metrics: what is counted and measured, and their text at `/metrics`.

The worker processes of a server write into files of one folder, which BentoML names in PROMETHEUS_MULTIPROC_DIR; any of
them answers the sum. A worker that has ended leaves its counts, not its gauges. No label holds what a client wrote.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY, Collector

from bundle.repository import Repository
from service.observation import Observation

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"  # the route of all paths that nobody answers

# The shipped networks take 2 to 60 ms on one core, large ones seconds; a request may take 30 s by default.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROCESSES = Path("/proc")

_requests = Counter(
    "vitrine_requests",
    "Requests answered, by route (gRPC: method), the model that answered (empty: none) and status (gRPC: its name).",
    ["route", "model", "version", "status"],
)
_seconds = Histogram(
    "vitrine_request_seconds", "From a request's headers to its answer's end.", ["route", "model"], buckets=_SECONDS
)
_stage_seconds = Histogram(
    "vitrine_stage_seconds",
    "Parts of the work on an image (or a batch): decode, queue (waiting for a thread), inference.",
    ["stage", "model"],
    buckets=_SECONDS,
)
_batch_images = Histogram(
    "vitrine_batch_images", "Images in one call of a network.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64)
)
_images = Counter("vitrine_images", "Images that were decoded, or sent as pixels.", ["model"])
_pixels = Counter("vitrine_pixels", "Pixels of these images, as they were sent.", ["model"])
_rejected = Counter("vitrine_rejected", "Requests that were answered with an error, by its code.", ["reason"])
_in_flight = Gauge(
    "vitrine_requests_in_flight", "Requests in work, without probes and scrapes.", multiprocess_mode="livesum"
)
_waiting = Gauge("vitrine_queue_images", "Images (or batches) that wait for a thread.", multiprocess_mode="livesum")
_running = Gauge("vitrine_running_images", "Images (or batches) on a thread.", multiprocess_mode="livesum")
_starts = Counter("vitrine_worker_starts", "Worker processes that have become ready, those that have ended included.")
_start_seconds = Gauge(
    "vitrine_start_time_seconds",
    "When the oldest living worker became ready, in seconds since the epoch.",
    multiprocess_mode="livemin",
)


def worker_ready() -> None:
    """This process has loaded everything and begins to answer."""
    _starts.inc()
    _start_seconds.set(time.time())


def began(observation: Observation) -> None:
    """A request has come."""
    if not observation.quiet:
        _in_flight.inc()


def record(observation: Observation, status: str, seconds: float) -> None:
    """Count a request that is finished."""
    if not observation.quiet:
        _in_flight.dec()
    route, model = observation.route or OTHER, observation.model
    _requests.labels(route, model, observation.version, status).inc()
    _seconds.labels(route, model).observe(seconds)
    for stage in observation.stages:
        _stage_seconds.labels(stage.name, model).observe((stage.end - stage.start) / 1e9)
    for images in observation.batches:
        _batch_images.labels(model).observe(images)
    if observation.images:
        _images.labels(model).inc(observation.images)
        _pixels.labels(model).inc(observation.pixels)
    if observation.error:
        _rejected.labels(observation.error).inc()


def queued(waiting: int, running: int) -> None:
    """How much work waits, and how much is on threads, in this process."""
    _waiting.set(waiting)
    _running.set(running)


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
    registry = CollectorRegistry()
    folder = os.environ.get(FOLDER)
    own = b""
    if folder is None:  # not under BentoML's arbiter
        own = generate_latest(REGISTRY)
        registry.register(_Workers({os.getpid()}))
    else:
        registry.register(_Workers(_forget_dead_gauges(Path(folder))))
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    registry.register(_Models(repository))
    return own + generate_latest(registry)


def _forget_dead_gauges(folder: Path) -> set[int]:
    """Remove the gauges of workers that were killed and could not do it themselves; the process ids of the others."""
    living = set()
    for file in folder.glob("gauge_live*_*.db"):
        found = re.search(r"_(\d+)\.db$", file.name)
        if found is None:
            continue
        if _is_worker(int(found[1])):
            living.add(int(found[1]))
        else:
            with suppress(FileNotFoundError):  # another worker was faster
                file.unlink()
    return living


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
