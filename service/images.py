"""`POST /classify` and `POST /detect`: images in, labels or boxes out."""

import asyncio
import io
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from bundle.drawing import draw_detections
from bundle.errors import ImageError, ParameterError
from bundle.images import decode
from bundle.manifest import Task
from bundle.predictors import Classifier, Detection, Detector
from service.answers import (
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
from service.errors import NotAcceptableError
from service.observation import Observation
from service.parameters import (
    CLASSIFY_PARAMETERS,
    DETECT_PARAMETERS,
    MAX_DETECTIONS,
    MODEL,
    THRESHOLD,
    TOP_K,
    VARIANT,
)
from service.requests import ImageRequest, encoded, read_image_request
from service.schemas import (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    Error,
    ErrorAnswer,
    ImageClassification,
    ImageDetections,
    Model,
    class_probabilities,
    detected_objects,
    image_size,
)
from service.serving import Serving, observation_of, serving_of

CLASSIFY_FORMS = (JSON, CSV)
DETECT_FORMS = (JSON, CSV, PNG, JPEG)
_MOST_JPEG_PIXELS = 65_535  # of an edge: the format has 16 bits for it

A = TypeVar("A")


async def classify(request: Request) -> Response:
    """`POST /classify`."""
    serving, observation = serving_of(request), observation_of(request)
    form = negotiate(request.headers.get("accept"), CLASSIFY_FORMS)
    async with asyncio.timeout(serving.settings.timeout_seconds):
        asked = await read_image_request(request, CLASSIFY_PARAMETERS, serving.settings)
        reference, variant = asked.text(MODEL), asked.text(VARIANT)
        bundle = await serving.find(reference, observation, task=Task.CLASSIFICATION, variant=variant)
        classifier = cast(Classifier, bundle.predictor)
        top_k, labels = asked.integer(TOP_K), asked.labels(classifier.labels)
        classifier.check(top_k=top_k, labels=labels)

        def work(image: object) -> ImageClassification:
            with observation.stage("decode"):
                decoded = _decode(image, serving, observation)
                pixels = classifier.prepare(decoded)
            with observation.stage("inference"):
                probabilities = classifier.answer([pixels])[0]
            observation.batches.append(1)
            found = classifier.best(probabilities, top_k=top_k, labels=labels)
            return ImageClassification(image=image_size(decoded.size), predictions=class_probabilities(found))

        answers = await _each(serving, observation, asked, work)
        if form == CSV:
            return csv_response(CLASSIFICATION_COLUMNS, answers, several=asked.several)
        if asked.several:
            return json_response(Classifications(model=Model.of(bundle), results=answers))
        (answer,) = cast(list[ImageClassification], answers)
        return json_response(Classification(model=Model.of(bundle), image=answer.image, predictions=answer.predictions))


async def detect(request: Request) -> Response:
    """`POST /detect`."""
    serving, observation = serving_of(request), observation_of(request)
    form = negotiate(request.headers.get("accept"), DETECT_FORMS)
    async with asyncio.timeout(serving.settings.timeout_seconds):
        asked = await read_image_request(request, DETECT_PARAMETERS, serving.settings)
        reference, variant = asked.text(MODEL), asked.text(VARIANT)
        bundle = await serving.find(reference, observation, task=Task.DETECTION, variant=variant)
        detector = cast(Detector, bundle.predictor)
        threshold, max_detections = asked.number(THRESHOLD), asked.integer(MAX_DETECTIONS)
        labels = asked.labels(detector.labels)
        detector.check(threshold=threshold, max_detections=max_detections, labels=labels)
        if asked.several and form in (PNG, JPEG):
            raise NotAcceptableError(offered=f"{JSON}, {CSV} for several images", found=form)

        def find(image: object) -> tuple[Image.Image, list[Detection]]:
            with observation.stage("decode"):
                decoded = _decode(image, serving, observation)
                prepared = detector.prepare(decoded)
            with observation.stage("inference"):
                (found,) = detector.answer(
                    [prepared], threshold=threshold, max_detections=max_detections, labels=labels
                )
            observation.batches.append(1)
            return decoded, found

        def work(image: object) -> ImageDetections:
            decoded, found = find(image)
            return ImageDetections(image=image_size(decoded.size), detections=detected_objects(found))

        def draw(image: object) -> Response:
            drawn, buffer = draw_detections(*find(image)), io.BytesIO()
            if form == JPEG and max(drawn.size) > _MOST_JPEG_PIXELS:
                raise NotAcceptableError(offered=f"{JSON}, {CSV}, {PNG} for so large an image", found=form)
            drawn.save(buffer, "PNG") if form == PNG else drawn.save(buffer, "JPEG", quality=90)
            return Response(buffer.getvalue(), media_type=form)

        if form in (PNG, JPEG):
            return await serving.scheduler.run(partial(draw, asked.images[0]), observation)
        answers = await _each(serving, observation, asked, work)
        if form == CSV:
            return csv_response(DETECTION_COLUMNS, answers, several=asked.several)
        if asked.several:
            return json_response(DetectionsOfSeveral(model=Model.of(bundle), results=answers))
        (answer,) = cast(list[ImageDetections], answers)
        return json_response(Detections(model=Model.of(bundle), image=answer.image, detections=answer.detections))


def _decode(image: object, serving: Serving, observation: Observation) -> Image.Image:
    decoded = decode(encoded(image), max_pixels=serving.settings.max_pixels)
    observation.saw(decoded.width * decoded.height)
    return decoded


async def _each(
    serving: Serving, observation: Observation, asked: ImageRequest, work: Callable[[object], A]
) -> list[A | ErrorAnswer]:
    """The answers to all images, in their order; of several, those that are no good are answered by their error."""

    def answer(image: object) -> A | ErrorAnswer:
        try:
            return work(image)
        except (ImageError, ParameterError) as error:
            if not asked.several:
                raise
            return ErrorAnswer(error=Error(code=error.code, message=str(error)))

    return await serving.scheduler.run_all([partial(answer, image) for image in asked.images], observation)
