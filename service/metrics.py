"""Prometheus metrics: what is counted and measured, and their text at `/metrics`.

The worker processes of a server write into files of one folder, which BentoML names in PROMETHEUS_MULTIPROC_DIR; any of
them answers the sum. A worker that has ended leaves its counts, not its gauges. No label holds what a client wrote.
"""

import os
import re
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

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

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
_in_flight = Gauge("vitrine_requests_in_flight", "Requests in work.", multiprocess_mode="livesum")
_waiting = Gauge("vitrine_queue_images", "Images (or batches) that wait for a thread.", multiprocess_mode="livesum")
_running = Gauge("vitrine_running_images", "Images (or batches) on a thread.", multiprocess_mode="livesum")


def began() -> None:
    """A request has come."""
    _in_flight.inc()


def record(observation: Observation, status: str, seconds: float) -> None:
    """Count a request that is finished."""
    _in_flight.dec()
    route, model = observation.route or "other", observation.model
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


def exposition(repository: Repository) -> bytes:
    """All metrics of all workers, in Prometheus' text format."""
    registry = CollectorRegistry()
    folder = os.environ.get(FOLDER)
    if folder is not None:
        _forget_dead_gauges(Path(folder))
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    registry.register(_Models(repository))
    own = b"" if folder is not None else generate_latest(REGISTRY)
    return own + generate_latest(registry)


def _forget_dead_gauges(folder: Path) -> None:
    """A worker that was killed could not take its gauges with it."""
    for file in folder.glob("gauge_live*_*.db"):
        found = re.search(r"_(\d+)\.db$", file.name)
        if found and not Path(f"/proc/{found[1]}").exists() and Path("/proc/self").exists():
            with suppress(FileNotFoundError):  # another worker was faster
                file.unlink()
