"""What is known of one request while it is answered: the one source of its log line, metrics, spans and headers."""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bundle.loading import Bundle

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
STAGES = ("decode", "queue", "inference")


class Stage(NamedTuple):
    """A part of the work: `decode` (bytes to the network's pixels), `queue` (waiting for a thread), `inference`."""

    name: str
    start: int  # nanoseconds since the epoch
    end: int


@dataclass
class Observation:
    """One request, over HTTP or gRPC. Threads may add stages at the same time."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    route: str = ""  # its template, such as /v2/models/{name}/infer or a gRPC method; never what the client wrote
    model: str = ""
    version: str = ""
    variant: str = ""
    images: int = 0
    pixels: int = 0  # of the images as they were sent, upright
    batches: list[int] = field(default_factory=list)  # images in each call of the network
    stages: list[Stage] = field(default_factory=list)
    error: str = ""  # the code of the error that was answered

    def answered_by(self, bundle: Bundle) -> None:
        """Note which bundle answers."""
        self.model, self.version = bundle.manifest.name, bundle.manifest.version
        self.variant = bundle.variant.value if bundle.variant else ""

    def add(self, name: str, start: int, end: int) -> None:
        """Note a stage that took place from `start` to `end` (nanoseconds since the epoch)."""
        self.stages.append(Stage(name, start, end))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the stage that the block is."""
        start = time.time_ns()
        try:
            yield
        finally:
            self.add(name, start, time.time_ns())

    def seconds(self, name: str) -> float:
        """The sum of the stages of that name; more than the request took where images were worked on side by side."""
        return sum(stage.end - stage.start for stage in self.stages if stage.name == name) / 1e9


class ObservationMiddleware:
    """Observes each HTTP request; its answer has `X-Request-ID` (the client's, or a new one) and `Server-Timing`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        observation = Observation(request_id=sent) if _REQUEST_ID.fullmatch(sent) else Observation()
        scope["vitrine.observation"] = observation

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = observation.request_id
                if observation.stages:
                    timing = (f"{name};dur={1000 * observation.seconds(name):.2f}" for name in STAGES)
                    headers["Server-Timing"] = ", ".join(timing)
            await send(message)

        await self.app(scope, receive, send_observed)
