"""What the routes of both transports share while a process serves."""

import asyncio
import time
from dataclasses import dataclass

from starlette.requests import Request

from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Task
from vitrine.bundle.repository import Repository
from vitrine.service.access import Keys
from vitrine.service.errors import ClientDisconnectedError, ForbiddenError, OverloadedError
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.model_control import ModelControl
from vitrine.service.runtime.scheduler import Scheduler
from vitrine.service.settings import Settings

_POLL_SECONDS = 0.05  # between looks whether somebody still waits for the answer


@dataclass(frozen=True)
class Serving:
    """Settings, models, and the threads that compute."""

    settings: Settings
    repository: Repository
    scheduler: Scheduler
    control: ModelControl
    keys: Keys

    def live(self) -> bool:
        """Whether every computing thread gets on: none is at one piece of work for longer than `stuck_seconds`."""
        return self.scheduler.longest_running() < self.settings.stuck_seconds

    async def admit(self) -> None:
        """Refuse a request that would wait too long, before its body is read.

        Raises:
            OverloadedError: see `Scheduler.check_capacity`.
        """
        try:
            self.scheduler.check_capacity()
        except OverloadedError:
            await self.scheduler.throttle_refusal()
            raise

    async def find(
        self, reference: str | None, record: RequestRecord, *, task: Task | None = None, variant: str | None = None
    ) -> Bundle:
        """The bundle that answers a request.

        Args:
            reference: `name` or `name@version`; None: the first for the task.
            variant: one of its graphs; None: the one that its manifest names.

        Raises:
            UnknownModelError, ParameterError, BundleError: as `Repository.get` and `Repository.variant`.
        """
        bundle = self.repository.get(reference, task=task)
        if variant is not None:
            bundle = await asyncio.to_thread(self.repository.variant, bundle, variant)
        record.set_bundle(bundle)
        return bundle

    async def load(self, name: str) -> None:
        """Load a model, or load it again, in every worker. See `Repository.load`.

        Raises:
            ForbiddenError: the operator has not allowed it.
            UnknownModelError, BundleError: as `Repository.load`; nothing has changed then.
            WorkerError: another worker could not follow.
        """
        self._check_control()
        await self.control.load(name)

    async def unload(self, name: str) -> None:
        """Serve a model no more, in every worker. See `Repository.unload`.

        Raises:
            ForbiddenError: the operator has not allowed it.
            UnknownModelError: it is not served.
            WorkerError: another worker did not follow.
        """
        self._check_control()
        await self.control.unload(name)

    def _check_control(self) -> None:
        if not self.settings.model_control:
            raise ForbiddenError("loading and unloading models", setting="VITRINE_MODEL_CONTROL=true")


class Deadline:
    """How long a request is worked on: `async with` ends its block when time is up or the client has left.

    Most answers take so little time that nothing but one timer is ever made.

    Raises:
        TimeoutError: the block took longer than `seconds`.
        ClientDisconnectedError: the client has closed its connection; noticed from `body_received` on.
    """

    def __init__(self, request: Request, seconds: float) -> None:
        self._receive, self._expires = request.receive, time.monotonic() + seconds
        self._is_read = False
        self._left = self._late = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Deadline":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._timer = self._loop.call_later(min(_POLL_SECONDS, self._expires - time.monotonic()), self._look)
        return self

    def body_received(self) -> None:
        """From now on, what is received can only be the news that the client has left."""
        self._is_read = True

    def _look(self) -> None:
        left = self._expires - time.monotonic()
        if left <= 0:
            self._late = True
            self._task.cancel()
            return
        if self._is_read and self._watcher is None:
            self._watcher = self._loop.create_task(self._watch())
        self._timer = self._loop.call_later(min(left, _POLL_SECONDS) if self._watcher is None else left, self._look)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if (self._late or self._left) and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise (TimeoutError if self._late else ClientDisconnectedError) from error


def get_serving(request: Request) -> Serving:
    """The serving state of the application that got the request."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


def get_record(request: Request) -> RequestRecord:
    """The observation of a request."""
    record = request.scope["vitrine.record"]
    assert isinstance(record, RequestRecord)
    return record
