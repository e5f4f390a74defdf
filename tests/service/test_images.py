"""`POST /classify` and `POST /detect` over HTTP, with real photographs in every form that clients send."""

import io
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bundle.images import decode
from bundle.loading import load_bundle
from bundle.predictors import Classifier, Detector


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image must be turned by 90 degrees clockwise
    return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def palette_with_transparency(image: Image.Image) -> bytes:
    palette = image.quantize(64)
    return saved(palette, "PNG", transparency=3)


def sixteen_bits(image: Image.Image) -> bytes:
    return saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: saved(image, "JPEG"),
    "progressive jpeg": lambda image: saved(image, "JPEG", progressive=True),
    "png": lambda image: saved(image, "PNG"),
    "webp": lambda image: saved(image, "WEBP"),
    "gif": lambda image: saved(image, "GIF"),
    "bmp": lambda image: saved(image, "BMP"),
    "tiff": lambda image: saved(image, "TIFF"),
    "rotated by exif": rotated_by_exif,
    "grey jpeg": lambda image: saved(image.convert("L"), "JPEG"),
    "cmyk jpeg": lambda image: saved(image.convert("CMYK"), "JPEG"),
    "palette with transparency": palette_with_transparency,
    "16-bit png": sixteen_bits,
    "rgba png": lambda image: saved(image.convert("RGBA"), "PNG"),
    "1-bit png": lambda image: saved(image.convert("1"), "PNG"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_photograph_is_answered_as_the_predictor_answers(
    form: str, server: str, tiny_bundles: Path, photograph: bytes
) -> None:
    data = FORMS[form](decode(photograph))
    classifier = load_bundle(tiny_bundles / "colours" / "1").predictor
    detector = load_bundle(tiny_bundles / "squares" / "1").predictor
    assert isinstance(classifier, Classifier)
    assert isinstance(detector, Detector)

    classified = httpx.post(f"{server}/classify", files={"image": ("a", data)})
    detected = httpx.post(f"{server}/detect", files={"image": ("a", data)}, data={"threshold": "0"})

    assert (classified.status_code, detected.status_code) == (200, 200), classified.text + detected.text
    assert classified.json()["image"] == detected.json()["image"] == {"width": 640, "height": 480}
    expected = classifier.classify(decode(data))
    assert [entry["label"] for entry in classified.json()["predictions"]] == [entry.label for entry in expected]
    probabilities = [entry["probability"] for entry in classified.json()["predictions"]]
    assert probabilities == pytest.approx([entry.probability for entry in expected], abs=1e-6)
    objects = detector.detect(decode(data), threshold=0)
    assert [entry["score"] for entry in detected.json()["detections"]] == pytest.approx(
        [entry.score for entry in objects], abs=1e-6
    )
    assert detected.json()["detections"][0]["box"] == pytest.approx(vars(objects[0].box), abs=1e-3)


def test_a_rotated_photograph_is_answered_like_the_upright_one(server: str, photograph: bytes) -> None:
    upright = httpx.post(f"{server}/classify", content=photograph).json()
    turned = httpx.post(f"{server}/classify", content=rotated_by_exif(decode(photograph))).json()
    for a, b in zip(upright["predictions"], turned["predictions"], strict=True):
        assert a["label"] == b["label"]
        assert a["probability"] == pytest.approx(b["probability"], abs=0.02)  # it was compressed once more


@pytest.mark.parametrize("route", ["classify", "detect"])
@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_the_raw_body_is_answered_like_the_multipart_field(
    route: str, content_type: str, server: str, photograph: bytes
) -> None:
    multipart = httpx.post(f"{server}/{route}", files={"image": ("a.jpg", photograph)})
    raw = httpx.post(f"{server}/{route}", content=photograph, headers={"Content-Type": content_type})
    assert raw.status_code == 200
    assert raw.json() == multipart.json()


def test_classify_answers_the_documented_shape(server: str, photograph: bytes) -> None:
    answer = httpx.post(f"{server}/classify", content=photograph).json()
    assert answer["model"] == {"name": "colours", "version": "1", "variant": "fp32"}
    assert len(answer["predictions"]) == 3  # fewer labels than the default top_k of 5
    assert sum(entry["probability"] for entry in answer["predictions"]) == pytest.approx(1, abs=1e-5)
    assert all(entry.keys() == {"label", "class_id", "probability"} for entry in answer["predictions"])


def test_parameters_may_be_form_or_query_fields(server: str, photograph: bytes) -> None:
    form = httpx.post(f"{server}/classify", files={"image": photograph}, data={"top_k": "1", "model": "colours"})
    query = httpx.post(f"{server}/classify?top_k=1&model=colours", content=photograph)
    both = httpx.post(
        f"{server}/classify?top_k=1", files={"image": photograph}, data={"top_k": "1", "model": "colours"}
    )
    assert form.json() == query.json() == both.json()
    assert len(form.json()["predictions"]) == 1


def test_threshold_and_max_detections(server: str, photograph: bytes) -> None:
    def detections(query: str) -> list[dict[str, float]]:
        answer: list[dict[str, float]] = httpx.post(f"{server}/detect?{query}", content=photograph).json()["detections"]
        return answer

    everything = detections("threshold=0")
    assert len(everything) == 8  # the queries of the tiny network
    scores = [entry["score"] for entry in everything]
    assert scores == sorted(scores, reverse=True)
    assert detections("threshold=0&max_detections=3") == everything[:3]
    assert detections(f"threshold={scores[4]}") == [entry for entry in everything if entry["score"] >= scores[4]]
    assert detections("threshold=1") == []


@pytest.mark.parametrize(
    ("route", "query", "message"),
    [
        ("classify", "top_k=0", "top_k: expected an integer of at least 1, found 0"),
        ("classify", "top_k=many", "top_k: expected an integer, found 'many'"),
        ("classify", "top_k=1_0", "top_k: expected an integer, found '1_0'"),
        ("classify", "topk=3", "topk: expected one of the parameters model, top_k, found an unknown one"),
        ("classify", "top_k=1&top_k=2", "top_k: expected one value, found '1' and '2'"),
        ("detect", "threshold=1.5", "threshold: expected a number from 0 to 1, found 1.5"),
        ("detect", "threshold=nan", "threshold: expected a number from 0 to 1, found nan"),
        ("detect", "threshold=high", "threshold: expected a number, found 'high'"),
        ("detect", "max_detections=-1", "max_detections: expected an integer of at least 1, found -1"),
    ],
)
def test_a_bad_parameter_is_400(route: str, query: str, message: str, server: str, photograph: bytes) -> None:
    answer = httpx.post(f"{server}/{route}?{query}", content=photograph)
    assert answer.status_code == 400
    assert answer.json() == {"error": {"code": "invalid_parameter", "message": message}}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "undecodable_image"),
        (b"just text", 415, "unsupported_image_type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image_type"),
        (b"\x89PNG\r\n\x1a\n", 422, "undecodable_image"),
        (b"\xff\xd8\xff\xe0" + bytes(1000), 422, "undecodable_image"),
        (b"RIFF\x00\x00\x00\x00WAVE", 415, "unsupported_image_type"),
        (b"RIFF\x00\x00\x00\x00WEBP", 422, "undecodable_image"),
    ],
)
@pytest.mark.parametrize("route", ["classify", "detect"])
def test_what_is_no_image_is_never_500(route: str, body: bytes, status: int, code: str, server: str) -> None:
    for answer in (
        httpx.post(f"{server}/{route}", content=body),
        httpx.post(f"{server}/{route}", files={"image": ("a.jpg", body, "image/jpeg")}),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
        assert answer.json().keys() == {"error"}


def test_a_truncated_photograph_is_422(server: str, photograph: bytes) -> None:
    answer = httpx.post(f"{server}/detect", content=photograph[: len(photograph) // 2])
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "undecodable_image"


def test_too_many_pixels_are_413(server: str) -> None:
    data = saved(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 100_000
    answer = httpx.post(f"{server}/classify", content=data)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("chunked", [False, True])
def test_too_many_bytes_are_413(chunked: bool, server: str) -> None:
    data = bytes(21 * 1024 * 1024)
    content = (data[i : i + 65536] for i in range(0, len(data), 65536)) if chunked else data
    try:
        answer = httpx.post(f"{server}/classify", content=content)
    except httpx.WriteError:  # the answer came, and the connection closed, before everything was sent
        return
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_an_unknown_model_is_404(server: str, photograph: bytes) -> None:
    answer = httpx.post(f"{server}/classify?model=squares", content=photograph)  # there, but a detector
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "code": "unknown_model",
        "message": "no image-classification model named 'squares' here; available: colours",
    }


@pytest.mark.parametrize(
    "request_body",
    [
        {"files": {"picture": ("a.jpg", b"x")}},
        {"files": {"image": (None, "http://127.0.0.1/cat.jpg")}},
        {"files": [("image", ("a", b"x")), ("image", ("b", b"y"))]},
        {"content": b"no boundary here", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\xff\r\n--x--\r\n',
            "headers": {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"},
        },
    ],
    ids=["no image", "a URL", "two images", "not multipart", "no boundary", "strange charset"],
)
def test_a_wrong_multipart_body_is_400(request_body: dict[str, object], server: str) -> None:
    answer = httpx.post(f"{server}/classify", **request_body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_parameter"


def test_many_requests_at_once_are_all_answered_right(server: str, photograph: bytes) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as client:
        answers = list(pool.map(lambda _: client.post(f"{server}/detect", content=photograph), range(64)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
