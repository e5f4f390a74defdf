"""What is known of one request while it is answered: the one source of its log line, metrics, spans and headers."""

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
GRPC = "gRPC"  # the method of its calls
# Asked every few seconds by machines: counted, but neither logged (except at level DEBUG), traced nor in flight.
QUIET = PROBES | PROTOCOL_PROBES | {METRICS}


class Stage(NamedTuple):
    """A part of the work: `decode` (bytes to the network's pixels), `queue` (waiting for a thread), `inference`."""

    name: str
    start: int  # nanoseconds since the epoch
    end: int


@dataclass
class RequestRecord:
    """One request, over HTTP or gRPC. Threads may add stages at the same time."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    path: str = ""  # as the client wrote it
    client: str = ""  # its address
    route: str = ""  # its template, such as /v2/models/{name}/infer or a gRPC method; never what the client wrote
    model: str = ""
    version: str = ""
    variant: str = ""
    sizes: list[int] = field(default_factory=list)  # in pixels, of each image as it was sent
    batches: list[int] = field(default_factory=list)  # images in each call of the network
    stages: list[Stage] = field(default_factory=list)
    status: str = ""  # of HTTP, or the name of gRPC's; empty before the answer begins
    error: str = ""  # the code of the error that was answered
    bytes_in: int = 0
    bytes_out: int = 0
    trace_id: str = ""  # empty where it is not traced

    @property
    def quiet(self) -> bool:
        """Whether it is a probe or a scrape."""
        return self.path in QUIET

    @property
    def images(self) -> int:
        """How many images were decoded, or sent as pixels."""
        return len(self.sizes)

    @property
    def pixels(self) -> int:
        """Their pixels together."""
        return sum(self.sizes)

    def add_image(self, pixels: int) -> None:
        """Note an image. (Threads do at the same time: a list loses none, where a counter would.)"""
        self.sizes.append(pixels)

    def set_bundle(self, bundle: Bundle) -> None:
        """Note which bundle answers."""
        self.model, self.version = bundle.manifest.name, bundle.manifest.version
        self.variant = bundle.variant.value if bundle.variant else ""

    def add_stage(self, name: str, start: int, end: int) -> None:
        """Note a stage that took place from `start` to `end` (nanoseconds since the epoch)."""
        self.stages.append(Stage(name, start, end))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the stage that the block is."""
        start = time.time_ns()
        try:
            yield
        finally:
            self.add_stage(name, start, time.time_ns())

    def seconds(self, name: str) -> float:
        """The sum of the stages of that name; more than the request took where images were worked on side by side."""
        return sum(stage.end - stage.start for stage in self.stages if stage.name == name) / 1e9


# The request that the running task answers: its id stands in every line that is logged meanwhile.
current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)
