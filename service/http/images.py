"""`POST /classify` and `POST /detect`: predictions for images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from starlette.requests import Request
from starlette.responses import Response

from vitrine.bundle.drawing import draw_detections
from vitrine.bundle.errors import ImageError, ParameterError
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Task
from vitrine.bundle.predictors import Classifier, Predictor, Row
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
    picture_response,
)
from vitrine.service.http.image_work import ImageWork
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
from vitrine.service.http.requests import ImageRequest, read_image_request
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
    await serving.admit(request, task=route.task)
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        image_request = await read_image_request(request, route.parameters, serving.settings)
        deadline.body_received()
        reference, variant = image_request.text(MODEL), image_request.text(VARIANT)
        bundle = await serving.find(reference, record, task=route.task, variant=variant)
        postprocess = _make_postprocess(bundle.predictor, image_request)
        several, drawn = image_request.several, media_type in (PNG, JPEG)
        if several and drawn:
            raise NotAcceptableError(offered=f"{JSON}, {CSV} for several images", found=media_type)

        def to_result(work: ImageWork, row: Row) -> Any:
            predictions = postprocess(row, work.prepared)
            if drawn:
                return picture_response(draw_detections(work.decoded, predictions), media_type)
            return route.image_result(work.shape, predictions)

        images, max_pixels = image_request.images, serving.settings.max_pixels
        works = [ImageWork(image, max_pixels, record, bundle.predictor, to_result, drawn) for image in images]
        results = await gather([_run(serving, work, bundle, len(works), several=several) for work in works])
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


async def _run(serving: Serving, work: ImageWork, bundle: Bundle, images: int, *, several: bool) -> Any:
    """Run the work; with several images, return the error of an invalid one instead of raising it."""
    try:
        return await serving.scheduler.run(work, bundle, work.record, images=images)
    except (ImageError, ParameterError) as error:
        if not several:
            raise
        return ErrorAnswer(Error(code=error.code, message=str(error)))
