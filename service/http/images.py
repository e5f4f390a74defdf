"""`POST /classify` and `POST /detect`: predictions for images."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from vitrine.bundle.drawing import MAX_JPEG_EDGE, draw_detections
from vitrine.bundle.errors import ImageError, ParameterError
from vitrine.bundle.images import decode, decode_for
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Task
from vitrine.bundle.predictors import Classifier, Predictor, PreparedImage, Row
from vitrine.service.errors import Error, ErrorAnswer, NotAcceptableError
from vitrine.service.http import schemas
from vitrine.service.http.answers import (
    CLASSIFICATION_COLUMNS,
    CSV,
    DETECTION_COLUMNS,
    JPEG,
    JSON,
    PNG,
    csv_response,
    json_response,
    negotiate,
)
from vitrine.service.http.parameters import (
    CLASSIFY_PARAMETERS,
    DETECT_PARAMETERS,
    MAX_DETECTIONS,
    MODEL,
    THRESHOLD,
    TOP_K,
    VARIANT,
    Parameter,
)
from vitrine.service.http.requests import ImageRequest, image_bytes, read_image_request
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import gather
from vitrine.service.runtime.serving import Deadline, Serving, get_record, get_serving


class _ImageRoute(NamedTuple):
    """What differs between `/classify` and `/detect`."""

    task: Task
    parameters: Sequence[Parameter]
    media_types: Sequence[str]
    columns: Sequence[str]  # of the CSV table
    image_result: Callable[[schemas.Image, list[Any]], Any]  # from the predictions for an image
    single: Callable[[schemas.Model, Any], object]  # response body for one image result
    several: Callable[[schemas.Model, list[Any]], object]  # response body for a list of image results


_CLASSIFY = _ImageRoute(
    Task.CLASSIFICATION,
    CLASSIFY_PARAMETERS,
    (JSON, CSV),
    CLASSIFICATION_COLUMNS,
    schemas.ImageClassification,
    lambda model, result: schemas.Classification(model, result.image, result.predictions),
    schemas.Classifications,
)
_DETECT = _ImageRoute(
    Task.DETECTION,
    DETECT_PARAMETERS,
    (JSON, CSV, PNG, JPEG),
    DETECTION_COLUMNS,
    schemas.ImageDetections,
    lambda model, result: schemas.Detections(model, result.image, result.detections),
    schemas.DetectionsOfSeveral,
)


async def classify(request: Request) -> Response:
    """`POST /classify`."""
    return await _predict(request, _CLASSIFY)


async def detect(request: Request) -> Response:
    """`POST /detect`."""
    return await _predict(request, _DETECT)


async def _predict(request: Request, route: _ImageRoute) -> Response:
    serving, record = get_serving(request), get_record(request)
    media_type = negotiate(request.headers.get("accept"), route.media_types)
    await serving.admit()
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        image_request = await read_image_request(request, route.parameters, serving.settings)
        deadline.body_received()
        reference, variant = image_request.text(MODEL), image_request.text(VARIANT)
        bundle = await serving.find(reference, record, task=route.task, variant=variant)
        postprocess = _make_postprocess(bundle.predictor, image_request)
        several, drawn = image_request.several, media_type in (PNG, JPEG)
        if several and drawn:
            raise NotAcceptableError(offered=f"{JSON}, {CSV} for several images", found=media_type)

        def to_result(work: _ImageWork, row: Row) -> Any:
            predictions = postprocess(row, work.prepared)
            if drawn:
                return _draw(work.decoded, predictions, media_type)
            return route.image_result(work.size, predictions)

        images = image_request.images
        works = [_ImageWork(image, serving, record, bundle.predictor, to_result, drawn) for image in images]
        results = await gather([_run(work, bundle, several=several) for work in works])
        if drawn:
            return cast(Response, results[0])
        if media_type == CSV:
            return csv_response(route.columns, results, several=several)
        model = schemas.Model.of(bundle)
        return json_response(route.several(model, results) if several else route.single(model, results[0]))


def _make_postprocess(predictor: Predictor, request: ImageRequest) -> Callable[[Row, Any], list[Any]]:
    """Check the request's parameters; return a function from the network's output and prepared image to predictions.

    Raises:
        ParameterError: a parameter is invalid.
    """
    if isinstance(predictor, Classifier):
        top_k, labels = request.integer(TOP_K), request.labels(predictor.labels)
        predictor.check_parameters(top_k=top_k, labels=labels)
        return lambda row, _: predictor.postprocess(row[0], top_k=top_k, labels=labels)
    threshold, max_detections = request.number(THRESHOLD), request.integer(MAX_DETECTIONS)
    labels = request.labels(predictor.labels)
    predictor.check_parameters(threshold=threshold, max_detections=max_detections, labels=labels)
    return partial(predictor.postprocess, threshold=threshold, max_detections=max_detections, labels=labels)


@dataclass(eq=False)
class _ImageWork:
    """The work on one image of a request (`scheduler.Work`)."""

    image: object  # see `requests.image_bytes`
    serving: Serving
    record: RequestRecord
    predictor: Predictor
    to_result: "Callable[[_ImageWork, Row], Any]"
    keep_decoded: bool
    decoded: Image.Image = field(init=False)  # only with `keep_decoded`
    size: schemas.Image = field(init=False)
    prepared: NDArray[np.uint8] | PreparedImage = field(init=False)

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        with self.record.stage("decode"):
            data, max_pixels = image_bytes(self.image), self.serving.settings.max_pixels
            image = decode_for(data, self.predictor.preprocessing, max_pixels=max_pixels)
            self.record.add_image(image.width * image.height)
            self.size = schemas.Image(image.width, image.height)
            if self.keep_decoded:
                self.decoded = image.image if image.is_whole else decode(data, max_pixels=max_pixels)
            self.prepared = self.predictor.prepare(image)
        return self.prepared

    def postprocess(self, row: Row) -> Any:
        return self.to_result(self, row)


def _draw(image: Image.Image, detections: list[Any], media_type: str) -> Response:
    drawing, buffer = draw_detections(image, detections), io.BytesIO()
    if media_type == JPEG and max(drawing.size) > MAX_JPEG_EDGE:
        raise NotAcceptableError(offered=f"{JSON}, {CSV}, {PNG} for so large an image", found=media_type)
    drawing.save(buffer, "PNG") if media_type == PNG else drawing.save(buffer, "JPEG", quality=90)
    return Response(buffer.getvalue(), media_type=media_type)


async def _run(work: _ImageWork, bundle: Bundle, *, several: bool) -> Any:
    """Run the work; with several images, return the error of an invalid one instead of raising it."""
    try:
        return await work.serving.scheduler.run(work, bundle, work.record)
    except (ImageError, ParameterError) as error:
        if not several:
            raise
        return ErrorAnswer(Error(code=error.code, message=str(error)))
