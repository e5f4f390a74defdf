"""Ray Serve with one replica per core."""

import os

import ray
from model import PORT, open_session, read_image, run
from ray import serve
from starlette.requests import Request

cores = os.cpu_count() or 1


@serve.deployment(num_replicas=cores, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=32)
class Predictor:
    """Predict for one image per request."""

    def __init__(self) -> None:
        self.session = open_session(threads=1)

    async def __call__(self, request: Request) -> list:
        """Return the predictions for the image in the body."""
        return run(self.session, [read_image(await request.body())])[0]


variables = {name: os.environ[name] for name in ("MODEL", "TASK", "SIZE", "PORT")}
runtime = {"env_vars": {**variables, "PYTHONPATH": os.path.dirname(__file__)}}
ray.init(num_cpus=cores, include_dashboard=False, runtime_env=runtime, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Predictor.bind(), blocking=True)
