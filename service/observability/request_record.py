"""The record of a request in progress: the single source of its log line, metrics, spans and headers."""

import ipaddress
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from vitrine.bundle.loading import Bundle
from vitrine.service.paths import METRICS, PROBES, PROTOCOL_PROBES

STAGES = ("decode", "queue", "inference")
GRPC = "gRPC"  # `method` of gRPC calls
# Requested by machines every few seconds: counted, but not logged (except at level DEBUG), traced or shown in flight.
QUIET_PATHS = PROBES | PROTOCOL_PROBES | {METRICS}


class Stage(NamedTuple):
    """A stage of the work: `decode` (bytes to the network's pixels), `queue` (waiting for a thread), `inference`."""

    name: str
    start: int  # nanoseconds of the monotonic clock
    end: int


def client_network(host: str) -> str:
    """Return what a client cannot choose freely: its IPv4 address, or the network (/64) of its IPv6 address."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


@dataclass
class RequestRecord:
    """A request over HTTP or gRPC. Adding images and stages is thread-safe."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    path: str = ""  # as sent by the client
    client: str = ""  # address and port
    key: str = ""  # name of the API key that the client sent; never the key itself
    route: str = ""  # path template, such as /v2/models/{name}/infer, or gRPC method; never client input
    model: str = ""
    version: str = ""
    variant: str = ""
    sizes: list[int] = field(default_factory=list)  # of each image as sent, in pixels
    batches: list[int] = field(default_factory=list)  # batch size of each image's network call
    stages: list[Stage] = field(default_factory=list)
    status: str = ""  # HTTP status, or name of the gRPC status; empty before the response starts
    error: str = ""  # code of the error sent to the client
    bytes_in: int = 0
    bytes_out: int = 0
    trace_id: str = ""  # empty: not traced

    @property
    def quiet(self) -> bool:
        """Whether the request is a probe or a scrape."""
        return self.path in QUIET_PATHS

    @property
    def sender(self) -> str:
        """Whose request this is, for shares and limits: the name of the API key, else the client's network."""
        return self.key or client_network(self.client.rpartition(":")[0])

    @property
    def images(self) -> int:
        """Number of images that were decoded, or sent as pixels."""
        return len(self.sizes)

    @property
    def pixels(self) -> int:
        """Total number of pixels of the images."""
        return sum(self.sizes)

    def add_image(self, pixels: int) -> None:
        """Add an image. (Appending to a list is thread-safe, incrementing a counter is not.)"""
        self.sizes.append(pixels)

    def set_bundle(self, bundle: Bundle) -> None:
        """Set the model, version and variant."""
        self.model, self.version = bundle.manifest.name, bundle.manifest.version
        self.variant = bundle.variant.value if bundle.variant else ""

    def add_stage(self, name: str, start: int, end: int) -> None:
        """Add a stage from `start` to `end` (nanoseconds of the monotonic clock)."""
        self.stages.append(Stage(name, start, end))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block as a stage."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.add_stage(name, start, time.monotonic_ns())

    def seconds(self, name: str) -> float:
        """Total duration of the stages `name`; may exceed the request's, as images are processed in parallel."""
        return sum(stage.end - stage.start for stage in self.stages if stage.name == name) / 1e9


# The request of the running task; its id is in all lines that the task logs.
current_record: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)
