"""The state that the routes of both transports share while a process serves."""

import asyncio
import os
import time
from dataclasses import dataclass

from starlette.requests import Request

from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Task
from vitrine.bundle.repository import Repository
from vitrine.service.access import Keys
from vitrine.service.errors import ClientDisconnectedError, ForbiddenError, OverloadedError
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.rate_limit import RateLimit
from vitrine.service.runtime.model_control import ModelControl
from vitrine.service.runtime.scheduler import Scheduler
from vitrine.service.runtime.workers import Workers
from vitrine.service.settings import Settings

_POLL_SECONDS = 0.05  # timer interval until the request is watched for a disconnect


@dataclass(frozen=True)
class Serving:
    """Settings, models, scheduler, API keys and rate limit of a worker."""

    settings: Settings
    repository: Repository
    scheduler: Scheduler
    control: ModelControl
    keys: Keys
    limit: RateLimit
    workers: Workers | None = None  # None: there is only this one

    def find_trouble(self) -> str:
        """Return what only a restart can mend; empty if nothing is.

        That is a computing thread that is busy with one batch for `stuck_seconds` or longer, or a silent worker.
        """
        if self.scheduler.longest_running() >= self.settings.stuck_seconds:
            return f"worker {os.getpid()}: a computing thread is stuck"
        if self.workers is not None and self.workers.silent:
            return f"worker {', '.join(map(str, self.workers.silent))}: stopped, or its event loop hangs"
        return ""

    async def admit(self, request: Request, *, task: Task | None = None, name: str | None = None) -> None:
        """Check that there is capacity for a request for a model, or any model (for a task), before its body is read.

        Raises:
            OverloadedError: see `Scheduler.check_capacity`.
        """
        if not self.scheduler.is_loaded:
            return
        bundles = self.repository.bundles.values()
        is_any = task is None and name is None
        possible = [b for b in bundles if is_any or b.manifest.task is task or b.manifest.name == name]
        size = request.headers.get("content-length", "")
        try:
            sender = get_record(request).sender
            self.scheduler.check_capacity(sender, possible, int(size[:12]) if size.isdecimal() else 0)
        except OverloadedError:
            await self.scheduler.throttle_refusal()
            raise

    async def find(
        self, reference: str | None, record: RequestRecord, *, task: Task | None = None, variant: str | None = None
    ) -> Bundle:
        """Return the bundle for a request and note it in the record.

        Args:
            reference: `name` or `name@version`; None: the default model for the task.
            variant: variant of its graph; None: the default of its manifest.

        Raises:
            UnknownModelError, ParameterError, BundleError: see `Repository.get` and `Repository.variant`.
        """
        bundle = self.repository.get(reference, task=task)
        if variant is not None:
            bundle = await asyncio.to_thread(self.repository.variant, bundle, variant)
        record.set_bundle(bundle)
        return bundle

    async def load(self, name: str, *, seconds: float) -> None:
        """Load a model, or reload it, in every worker; wait for up to `seconds`.

        Raises:
            ForbiddenError: the operator has not enabled model control.
            UnknownModelError, BundleError, WorkerError, ...: see `ModelControl.load`.
        """
        self._check_control()
        await self.control.load(name, seconds=seconds)

    async def unload(self, name: str, *, seconds: float) -> None:
        """Unload a model in every worker; wait for up to `seconds`.

        Raises:
            ForbiddenError: the operator has not enabled model control.
            UnknownModelError, WorkerError, ...: see `ModelControl.unload`.
        """
        self._check_control()
        await self.control.unload(name, seconds=seconds)

    def _check_control(self) -> None:
        if not self.settings.model_control:
            raise ForbiddenError("loading and unloading models", setting="VITRINE_MODEL_CONTROL=true")


class Deadline:
    """Cancels the `async with` block of a request on timeout or when the client disconnects.

    Most requests are so short that this costs a single timer.

    Raises:
        TimeoutError: the block took longer than `seconds`.
        ClientDisconnectedError: the client closed its connection; only detected after `body_received`.
    """

    def __init__(self, request: Request, seconds: float) -> None:
        self._receive, self._expires = request.receive, time.monotonic() + seconds
        self._body_received = self._disconnected = self._timed_out = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Deadline":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._timer = self._loop.call_later(min(_POLL_SECONDS, self.remaining), self._on_timer)
        return self

    @property
    def remaining(self) -> float:
        """Seconds until the timeout."""
        return self._expires - time.monotonic()

    def body_received(self) -> None:
        """Start to watch for a disconnect, the only message that can follow the body."""
        self._body_received = True

    def _on_timer(self) -> None:
        remaining = self.remaining
        if remaining <= 0:
            self._timed_out = True
            self._task.cancel()
            return
        if self._body_received and self._watcher is None:
            self._watcher = self._loop.create_task(self._watch_disconnect())
        delay = min(remaining, _POLL_SECONDS) if self._watcher is None else remaining
        self._timer = self._loop.call_later(delay, self._on_timer)

    async def _watch_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._disconnected = True
        self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        cancelled_here = self._timed_out or self._disconnected
        if cancelled_here and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise (TimeoutError if self._timed_out else ClientDisconnectedError) from error


def get_serving(request: Request) -> Serving:
    """Return the serving state of the request's application."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


def get_record(request: Request) -> RequestRecord:
    """Return the record of a request."""
    record = request.scope["vitrine.record"]
    assert isinstance(record, RequestRecord)
    return record
