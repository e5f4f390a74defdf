"""The BentoML service: BentoML runs the processes, health checks, metrics and tracing; `service.app` has the routes."""

import bentoml

from service.app import create_app
from service.errors import ErrorShapeMiddleware


class Vitrine:
    """Image classification and object detection with vision transformers."""


# BentoML's own timeout cannot be switched off and answers in another shape: it only has to be the later one.
# Its access log decodes a request's content type as UTF-8: any other would break the answer.
vitrine = bentoml.service(
    name="vitrine",
    traffic={"timeout": 90},
    logging={"access": {"request_content_type": False}},
)(Vitrine)
vitrine.mount_asgi_app(create_app(), path="/")
vitrine.add_asgi_middleware(ErrorShapeMiddleware)
