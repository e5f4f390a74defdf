"""`POST /classify` and `POST /detect`: images in, labels or boxes out."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from vitrine.bundle.drawing import draw_detections
from vitrine.bundle.errors import ImageError, ParameterError
from vitrine.bundle.images import decode, decode_for
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import Task
from vitrine.bundle.predictors import Classifier, Detection, Detector, Predictor, PreparedImage, Row
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
)
from vitrine.service.http.requests import encoded, read_image_request
from vitrine.service.http.schemas import (
    Classification,
    Classifications,
    Detections,
    DetectionsOfSeveral,
    ImageClassification,
    ImageDetections,
    Model,
)
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import Work, gather
from vitrine.service.runtime.serving import Deadline, Serving, get_record, get_serving

CLASSIFY_MEDIA_TYPES = (JSON, CSV)
DETECT_MEDIA_TYPES = (JSON, CSV, PNG, JPEG)
_MAX_JPEG_PIXELS = 65_535  # of an edge: the format has 16 bits for it

_UNSEEN = schemas.Image(width=0, height=0)

A = TypeVar("A")


async def classify(request: Request) -> Response:
    """`POST /classify`."""
    serving, record = get_serving(request), get_record(request)
    form = negotiate(request.headers.get("accept"), CLASSIFY_MEDIA_TYPES)
    await serving.admit()
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        asked = await read_image_request(request, CLASSIFY_PARAMETERS, serving.settings)
        deadline.body_received()
        reference, variant = asked.text(MODEL), asked.text(VARIANT)
        bundle = await serving.find(reference, record, task=Task.CLASSIFICATION, variant=variant)
        classifier = cast(Classifier, bundle.predictor)
        top_k, labels = asked.integer(TOP_K), asked.labels(classifier.labels)
        classifier.check(top_k=top_k, labels=labels)

        def classified(image: _Image[ImageClassification], row: Row) -> ImageClassification:
            return ImageClassification(image.size, classifier.best(row[0], top_k=top_k, labels=labels))

        works = [_Image(sent, serving, record, classifier, classified) for sent in asked.images]
        answers = await _each(serving, record, bundle, works, several=asked.several)
        if form == CSV:
            return csv_response(CLASSIFICATION_COLUMNS, answers, several=asked.several)
        if asked.several:
            return json_response(Classifications(Model.of(bundle), answers))
        (answer,) = cast(list[ImageClassification], answers)
        return json_response(Classification(Model.of(bundle), answer.image, answer.predictions))


async def detect(request: Request) -> Response:
    """`POST /detect`."""
    serving, record = get_serving(request), get_record(request)
    form = negotiate(request.headers.get("accept"), DETECT_MEDIA_TYPES)
    await serving.admit()
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        asked = await read_image_request(request, DETECT_PARAMETERS, serving.settings)
        deadline.body_received()
        reference, variant = asked.text(MODEL), asked.text(VARIANT)
        bundle = await serving.find(reference, record, task=Task.DETECTION, variant=variant)
        detector = cast(Detector, bundle.predictor)
        threshold, max_detections = asked.number(THRESHOLD), asked.integer(MAX_DETECTIONS)
        labels = asked.labels(detector.labels)
        detector.check(threshold=threshold, max_detections=max_detections, labels=labels)
        if asked.several and form in (PNG, JPEG):
            raise NotAcceptableError(offered=f"{JSON}, {CSV} for several images", found=form)

        def found(image: _Image[A], row: Row) -> list[Detection]:
            prepared = cast(PreparedImage, image.prepared)
            return detector.objects(row, prepared, threshold=threshold, max_detections=max_detections, labels=labels)

        def detected(image: _Image[ImageDetections], row: Row) -> ImageDetections:
            return ImageDetections(image.size, found(image, row))

        def drawn(image: _Image[Response], row: Row) -> Response:
            assert image.decoded is not None
            picture, buffer = draw_detections(image.decoded, found(image, row)), io.BytesIO()
            if form == JPEG and max(picture.size) > _MAX_JPEG_PIXELS:
                raise NotAcceptableError(offered=f"{JSON}, {CSV}, {PNG} for so large an image", found=form)
            picture.save(buffer, "PNG") if form == PNG else picture.save(buffer, "JPEG", quality=90)
            return Response(buffer.getvalue(), media_type=form)

        if form in (PNG, JPEG):
            picture = _Image(asked.images[0], serving, record, detector, drawn, keep=True)
            return await serving.scheduler.run(picture, bundle, record)
        works = [_Image(sent, serving, record, detector, detected) for sent in asked.images]
        answers = await _each(serving, record, bundle, works, several=asked.several)
        if form == CSV:
            return csv_response(DETECTION_COLUMNS, answers, several=asked.several)
        if asked.several:
            return json_response(DetectionsOfSeveral(Model.of(bundle), answers))
        (answer,) = cast(list[ImageDetections], answers)
        return json_response(Detections(Model.of(bundle), answer.image, answer.detections))


@dataclass(eq=False)
class _Image(Generic[A]):
    """An image of a request on its way through a computing thread (`scheduler.Work`)."""

    sent: object  # see `requests.encoded`
    serving: Serving
    record: RequestRecord
    predictor: Predictor
    answer: "Callable[[_Image[A], Row], A]"
    keep: bool = False  # the decoded image, to draw in it
    decoded: Image.Image | None = None
    size: schemas.Image = _UNSEEN
    prepared: NDArray[np.uint8] | PreparedImage | None = None

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        """From bytes to the network's pixels."""
        with self.record.stage("decode"):
            data, max_pixels = encoded(self.sent), self.serving.settings.max_pixels
            image = decode_for(data, self.predictor.preprocessing, max_pixels=max_pixels)
            self.record.add_image(image.width * image.height)
            self.size = schemas.Image(image.width, image.height)
            if self.keep:
                self.decoded = image.image if image.is_whole else decode(data, max_pixels=max_pixels)
            self.prepared = self.predictor.prepare(image)
        return self.prepared

    def finish(self, row: Row) -> A:
        """From what the network says to the answer."""
        return self.answer(self, row)


async def _each(
    serving: Serving, record: RequestRecord, bundle: Bundle, works: Sequence[Work[A]], *, several: bool
) -> list[A | ErrorAnswer]:
    """The answers to all images, in their order; of several, those that are no good are answered by their error."""

    async def answer(work: Work[A]) -> A | ErrorAnswer:
        try:
            return await serving.scheduler.run(work, bundle, record)
        except (ImageError, ParameterError) as error:
            if not several:
                raise
            return ErrorAnswer(Error(code=error.code, message=str(error)))

    return await gather([answer(work) for work in works])
