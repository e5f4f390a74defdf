"""The work on an encoded image, without a server."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrine.bundle.errors import ImageError, ImageTooLargeError, UndecodableImageError
from vitrine.bundle.loading import load_bundle
from vitrine.bundle.predictors import Classifier
from vitrine.service.http.image_work import ImageWork
from vitrine.service.observability.request_record import RequestRecord

RED = Image.new("RGB", (40, 30), "red")


def encode(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def classifier(tiny_bundles: Path) -> Classifier:
    predictor = load_bundle(tiny_bundles / "colours" / "1").predictor
    assert isinstance(predictor, Classifier)
    return predictor


def work_on(image: object, predictor: Classifier, *, max_pixels: int = 10_000, draws: bool = False) -> ImageWork:
    return ImageWork(image, max_pixels, RequestRecord(), predictor, lambda _, row: row, draws)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("sent", [bytes, memoryview, lambda data: base64.b64encode(data).decode()])
@pytest.mark.parametrize("is_measured", [False, True])
def test_an_image_is_prepared_alike_in_any_form(
    form: str, sent: Any, is_measured: bool, classifier: Classifier
) -> None:
    data = encode(RED, form)
    work = work_on(sent(data), classifier)
    if is_measured:
        assert work.cost() > 0
    prepared = work.prepare()
    assert np.array_equal(prepared, work_on(data, classifier).prepare())
    assert (work.shape.width, work.shape.height, work.record.pixels) == (40, 30, 1200)
    assert [stage.name for stage in work.record.stages] == ["decode"]


def test_a_picture_is_expected_to_cost_more_than_an_answer(classifier: Classifier) -> None:
    data = encode(RED)
    assert work_on(data, classifier, draws=True).cost() > 2 * work_on(data, classifier).cost()


def test_a_picture_keeps_the_whole_image(classifier: Classifier) -> None:
    large = Image.new("RGB", (400, 300), "red")
    work = work_on(encode(large, "JPEG"), classifier, max_pixels=200_000, draws=True)
    work.prepare()
    assert work.decoded.size == (400, 300)


@pytest.mark.parametrize(
    ("image", "max_pixels", "error"),
    [(encode(RED), 1199, ImageTooLargeError), (encode(RED)[:60], 10_000, UndecodableImageError)],
)
def test_a_broken_image_fails_when_it_is_prepared(
    image: bytes, max_pixels: int, error: type[ImageError], classifier: Classifier
) -> None:
    with pytest.raises(error):
        work_on(image, classifier, max_pixels=max_pixels).prepare()
