"""`POST /explain`: where a network looks.

What an explain graph computes is one work of the scheduler, like a prediction. Occlusion is many: the image, then each
of its copies with a hidden part, so that other requests get their turn between them. None of it occupies all threads.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from vitrine.bundle.drawing import draw_explanations
from vitrine.bundle.errors import ImageError, ParameterError
from vitrine.bundle.explaining import (
    Explained,
    Method,
    Occlusion,
    Point,
    Question,
    check_question,
    default_question,
    explain_outputs,
    methods_of,
    read_explanation,
)
from vitrine.bundle.loading import Bundle
from vitrine.bundle.predictors import Classifier, Predictor, Row
from vitrine.service.errors import Error, ErrorAnswer, NotAcceptableError, preview
from vitrine.service.http import schemas
from vitrine.service.http.answers import JPEG, JSON, PNG, json_response, negotiate, picture_response
from vitrine.service.http.image_work import ImageWork
from vitrine.service.http.parameters import (
    EXPLAIN_CLASS_PARAMETERS,
    EXPLAIN_DETECTION_PARAMETERS,
    EXPLAIN_PARAMETERS,
    GRID,
    HEADS,
    LAYERS,
    MAX_DETECTIONS,
    MAX_TARGETS,
    METHOD,
    MODEL,
    OPACITY,
    TARGET,
    THRESHOLD,
    X,
    Y,
)
from vitrine.service.http.requests import ImageRequest, read_image_request
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import gather
from vitrine.service.runtime.serving import Deadline, Serving, get_record, get_serving

ALL = "all"


async def explain(request: Request) -> Response:
    """`POST /explain`."""
    serving, record = get_serving(request), get_record(request)
    media_type = negotiate(request.headers.get("accept"), (JSON, PNG, JPEG))
    await serving.admit(request)
    async with Deadline(request, serving.settings.timeout_seconds) as deadline:
        image_request = await read_image_request(request, EXPLAIN_PARAMETERS, serving.settings)
        deadline.body_received()
        started = time.monotonic()
        bundle = await serving.find(image_request.text(MODEL), record)
        if _read_method(image_request, bundle) is not Method.OCCLUSION:
            bundle = await asyncio.to_thread(serving.repository.explaining, bundle)
            record.set_bundle(bundle)
        question, opacity = _read_question(image_request, bundle), _read_opacity(image_request)
        drawn, several = media_type != JSON, image_request.several
        if several and drawn:
            raise NotAcceptableError(offered=f"{JSON} for several images", found=media_type)
        job = _Job(serving, record, bundle, question, drawn)
        results = await gather([job.run(image, several=several) for image in image_request.images])
        if drawn:
            draw = partial(draw_explanations, results[0].work.decoded, results[0].explained, question.method)
            return picture_response(await asyncio.to_thread(draw, opacity=opacity), media_type)
        milliseconds = round((time.monotonic() - started) * 1e3, 2)
        model, methods = schemas.Model.of(bundle), list(methods_of(bundle.manifest))
        if not several:
            return json_response(
                schemas.ExplainedImage(model, question.method, methods, *_answer(results[0]), milliseconds)
            )
        answers = [
            result if isinstance(result, ErrorAnswer) else schemas.ImageExplanations(*_answer(result))
            for result in results
        ]
        return json_response(schemas.ExplainedImages(model, question.method, methods, answers, milliseconds))


class _Result(NamedTuple):
    work: ImageWork
    explained: list[Explained]
    images_computed: int


def _answer(result: _Result) -> tuple[schemas.Image, list[schemas.ExplainedTarget], int]:
    return result.work.shape, list(map(schemas.ExplainedTarget.of, result.explained)), result.images_computed


@dataclass(frozen=True)
class _Job:
    """Explains images, each in works of the scheduler."""

    serving: Serving
    record: RequestRecord
    bundle: Bundle  # with the explain graph, except for occlusion
    question: Question
    draws: bool

    async def run(self, image: object, *, several: bool) -> Any:
        """Return the result for an image; of several images, the error of an invalid one instead of raising it."""
        try:
            return await (self._hide(image) if self.question.method is Method.OCCLUSION else self._look(image))
        except (ImageError, ParameterError) as error:
            if not several:
                raise
            return ErrorAnswer(Error(code=error.code, message=str(error)))

    def _work(self, image: object, to_result: Callable[[ImageWork, Row], Any]) -> ImageWork:
        max_pixels, predictor = self.serving.settings.max_pixels, self.bundle.predictor
        return ImageWork(image, max_pixels, self.record, predictor, to_result, self.draws, explains=True)

    async def _look(self, image: object) -> _Result:
        names = explain_outputs(self.bundle.manifest)

        def read(work: ImageWork, row: Row) -> list[Explained]:
            size = work.shape.width, work.shape.height
            return read_explanation(self.question, self.bundle.predictor, names, work.prepared, size, row)

        work = self._work(image, read)
        return _Result(work, await self.serving.scheduler.run(work, self.bundle, self.record), 1)

    async def _hide(self, image: object) -> _Result:
        predictor, scheduler = self.bundle.predictor, self.serving.scheduler

        def read(work: ImageWork, row: Row) -> Row:
            self.question.targets(predictor, work.prepared, row)  # raises before the network runs often
            return row

        work = self._work(image, read)
        row = await scheduler.run(work, self.bundle, self.record)
        occlusion = Occlusion(predictor, work.prepared, (work.shape.width, work.shape.height), self.question.grid)
        parts = iter(range(len(occlusion)))
        rows: dict[int, Row] = {}

        async def hide_next() -> None:
            for part in parts:
                rows[part] = await scheduler.run(_HiddenPart(occlusion, part), self.bundle, self.record)

        # No more at once than can be running: what waits behind others of the same request could be refused.
        await gather([hide_next() for _ in range(min(scheduler.limited_threads, len(occlusion)))])
        hidden_rows = [rows[part] for part in range(len(occlusion))]
        explained = await asyncio.to_thread(occlusion.read, self.question, row, hidden_rows)
        return _Result(work, explained, 1 + len(occlusion))


@dataclass(eq=False)
class _HiddenPart:
    """The work on a copy of an image with a hidden part (`scheduler.Work`)."""

    occlusion: Occlusion
    part: int
    size: int = 0
    limited: bool = True

    def cost(self) -> float:
        return 0.0

    def prepare(self) -> Any:
        return self.occlusion.hide(self.part)

    def postprocess(self, row: Row) -> Row:
        return row


def _read_method(request: ImageRequest, bundle: Bundle) -> Method:
    methods = methods_of(bundle.manifest)
    method = request.text(METHOD)
    if method is not None and method not in methods:
        raise ParameterError(METHOD.name, expected=f"one of {', '.join(methods)}", found=repr(method[:100]))
    return methods[0] if method is None else Method(method)


def _read_question(request: ImageRequest, bundle: Bundle) -> Question:
    """Read and check what is to be explained.

    Raises:
        ParameterError: a parameter is invalid, or not one of this task.
    """
    predictor = bundle.predictor
    is_classifier = isinstance(predictor, Classifier)
    known = EXPLAIN_CLASS_PARAMETERS if is_classifier else EXPLAIN_DETECTION_PARAMETERS
    for name in request.parameters:
        if name not in [parameter.name for parameter in known]:
            kind = "a classifier" if is_classifier else "a detector"
            raise ParameterError(name, expected=f"none for {kind}", found=preview(request.parameters[name]))
    changes: dict[str, Any] = {"method": _read_method(request, bundle), "target": _read_target(request, predictor)}
    if request.has(GRID):
        changes["grid"] = request.integer(GRID)
    if is_classifier:
        changes |= {"heads": request.boolean(HEADS), "layers": request.boolean(LAYERS)}
    else:
        changes |= {
            "max_targets": request.integer(MAX_TARGETS),
            "threshold": request.number(THRESHOLD),
            "max_detections": request.integer(MAX_DETECTIONS),
            "labels": request.labels(predictor.labels),
        }
        if request.has(X) or request.has(Y):
            changes["point"] = Point(request.number(X), request.number(Y))
    question = default_question(bundle.manifest, **changes)
    if request.has(GRID) and question.method is not Method.OCCLUSION:
        raise ParameterError(GRID.name, expected=f"method={Method.OCCLUSION}", found=f"method={question.method}")
    check_question(question, predictor, bundle.manifest)
    return question


def _read_target(request: ImageRequest, predictor: Predictor) -> int | None:
    value = request.parameters.get(TARGET.name)
    if isinstance(predictor, Classifier):
        if isinstance(value, str) and value in predictor.labels:
            return predictor.labels.index(value)
        expected = f"a label of the model, or a class id from 0 to {len(predictor.labels) - 1}"
    else:
        if value == ALL:
            return None
        expected = f"{ALL}, or the index of a detection"
    if value is None:
        return None
    try:
        return request.integer(TARGET)
    except ParameterError:
        raise ParameterError(TARGET.name, expected=expected, found=preview(value)) from None


def _read_opacity(request: ImageRequest) -> float:
    opacity = request.number(OPACITY)
    if not 0 <= opacity <= 1:
        raise ParameterError(OPACITY.name, expected="a number from 0 to 1", found=opacity)
    return opacity
