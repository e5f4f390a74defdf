"""The BentoML service: BentoML runs the processes, health checks and tracing; `service.app` has the routes."""

import bentoml

from service.app import create_app
from service.errors import ErrorShapeMiddleware
from service.observation import ObservationMiddleware
from service.settings import read_settings

_settings = read_settings()
_app = create_app(_settings)


class Vitrine:
    """Image classification and object detection with vision transformers."""


# BentoML's own timeout cannot be switched off and answers in another shape: it only has to be the later one.
# Its access log decodes a request's content type as UTF-8: any other would break the answer. Its metrics have a label
# for every path that anybody asks for, without end. Ours are in `service.observation`.
vitrine = bentoml.service(
    name="vitrine",
    workers=_settings.workers,
    traffic={"timeout": 90},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)(Vitrine)
vitrine.mount_asgi_app(_app, path="/")
vitrine.add_asgi_middleware(ObservationMiddleware)
vitrine.add_asgi_middleware(ErrorShapeMiddleware)
