"""What the routes of both transports share while a process serves."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from bundle.loading import Bundle
from bundle.manifest import Task
from bundle.repository import Repository
from service.access import Keys
from service.control import Control
from service.errors import ForbiddenError
from service.observation import Observation
from service.scheduler import Scheduler
from service.settings import Settings


@dataclass(frozen=True)
class Serving:
    """Settings, models, and the threads that compute."""

    settings: Settings
    repository: Repository
    scheduler: Scheduler
    control: Control
    keys: Keys

    def live(self) -> bool:
        """Whether every computing thread gets on: none is at one piece of work for longer than `stuck_seconds`."""
        return self.scheduler.longest() < self.settings.stuck_seconds

    async def find(
        self, reference: str | None, observation: Observation, *, task: Task | None = None, variant: str | None = None
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
        observation.answered_by(bundle)
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


def serving_of(request: Request) -> Serving:
    """The serving state of the application that got the request."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


def observation_of(request: Request) -> Observation:
    """The observation of a request."""
    observation = request.scope["vitrine.observation"]
    assert isinstance(observation, Observation)
    return observation
