"""`POST /classify` and `POST /detect` over HTTP, with photographs in all formats that clients send."""

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vitrine.bundle.images import decode, decode_for
from vitrine.bundle.loading import load_bundle
from vitrine.bundle.manifest import Precision
from vitrine.bundle.predictors import Classifier, Detector

Serving = Callable[..., AbstractContextManager[Any]]


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


FORMATS: dict[str, Callable[[Image.Image], bytes]] = {
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
    "avif": lambda image: saved(image, "AVIF"),
    "1-bit png": lambda image: saved(image.convert("1"), "PNG"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_image_format_gets_the_predictors_outputs(
    form: str, server: str, tiny_bundles: Path, photograph: bytes
) -> None:
    data = FORMATS[form](decode(photograph))
    classifier = load_bundle(tiny_bundles / "colours" / "1").predictor
    detector = load_bundle(tiny_bundles / "squares" / "1").predictor
    assert isinstance(classifier, Classifier)
    assert isinstance(detector, Detector)

    classified = httpx.post(f"{server}/classify", files={"image": ("a", data)})
    detected = httpx.post(f"{server}/detect", files={"image": ("a", data)}, data={"threshold": "0"})

    assert (classified.status_code, detected.status_code) == (200, 200), classified.text + detected.text
    assert classified.json()["image"] == detected.json()["image"] == {"width": 640, "height": 480}
    expected = classifier.classify(decode_for(data, classifier.preprocessing))
    assert [entry["label"] for entry in classified.json()["predictions"]] == [entry.label for entry in expected]
    probabilities = [entry["probability"] for entry in classified.json()["predictions"]]
    assert probabilities == pytest.approx([entry.probability for entry in expected], abs=1e-6)
    objects = detector.detect(decode_for(data, detector.preprocessing), threshold=0)
    assert [entry["score"] for entry in detected.json()["detections"]] == pytest.approx(
        [entry.score for entry in objects], abs=1e-6
    )
    assert detected.json()["detections"][0]["box"] == pytest.approx(vars(objects[0].box), abs=1e-3)


def test_a_rotated_photograph_gets_the_predictions_of_the_upright_one(server: str, photograph: bytes) -> None:
    upright = httpx.post(f"{server}/classify", content=photograph).json()
    turned = httpx.post(f"{server}/classify", content=rotated_by_exif(decode(photograph))).json()
    for a, b in zip(upright["predictions"], turned["predictions"], strict=True):
        assert a["label"] == b["label"]
        assert a["probability"] == pytest.approx(b["probability"], abs=0.02)  # compressed a second time


@pytest.mark.parametrize("route", ["classify", "detect"])
@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_a_raw_body_is_equivalent_to_a_multipart_field(
    route: str, content_type: str, server: str, photograph: bytes
) -> None:
    multipart = httpx.post(f"{server}/{route}", files={"image": ("a.jpg", photograph)})
    raw = httpx.post(f"{server}/{route}", content=photograph, headers={"Content-Type": content_type})
    assert raw.status_code == 200
    assert raw.json() == multipart.json()


def test_classify_returns_the_documented_shape(server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/classify", content=photograph).json()
    assert response["model"] == {"name": "colours", "version": "1", "variant": "fp32"}
    assert len(response["predictions"]) == 3  # fewer labels than the default top_k of 5
    assert sum(entry["probability"] for entry in response["predictions"]) == pytest.approx(1, abs=1e-5)
    assert all(entry.keys() == {"label", "class_id", "probability"} for entry in response["predictions"])


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
        response: list[dict[str, float]] = httpx.post(f"{server}/detect?{query}", content=photograph).json()[
            "detections"
        ]
        return response

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
        (
            "classify",
            "to=3",
            "to: expected one of the parameters model, variant, labels, top_k, found an unknown one",
        ),
        ("classify", "top_k=1&top_k=2", "top_k: expected one value, found '1' and '2'"),
        ("detect", "threshold=1.5", "threshold: expected a number from 0 to 1, found 1.5"),
        ("detect", "threshold=nan", "threshold: expected a number from 0 to 1, found nan"),
        ("detect", "threshold=high", "threshold: expected a number, found 'high'"),
        ("detect", "max_detections=-1", "max_detections: expected an integer of at least 1, found -1"),
    ],
)
def test_an_invalid_parameter_is_400(route: str, query: str, message: str, server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/{route}?{query}", content=photograph)
    assert response.status_code == 400
    assert response.json() == {"error": {"code": "invalid_parameter", "message": message}}


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
def test_invalid_images_are_never_500(route: str, body: bytes, status: int, code: str, server: str) -> None:
    for response in (
        httpx.post(f"{server}/{route}", content=body),
        httpx.post(f"{server}/{route}", files={"image": ("a.jpg", body, "image/jpeg")}),
    ):
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == code
        assert response.json().keys() == {"error"}


def test_a_truncated_photograph_is_422(server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/detect", content=photograph[: len(photograph) // 2])
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "undecodable_image"


def test_too_many_pixels_are_413(server: str) -> None:
    data = saved(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 100_000
    response = httpx.post(f"{server}/classify", content=data)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("chunked", [False, True])
def test_too_many_bytes_are_413(chunked: bool, server: str) -> None:
    data = bytes(21 * 1024 * 1024)
    content = (data[i : i + 65536] for i in range(0, len(data), 65536)) if chunked else data
    try:
        response = httpx.post(f"{server}/classify", content=content)
    except httpx.WriteError:  # the response came and the connection closed before everything was sent
        return
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


def test_an_unknown_model_is_404(server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/classify?model=squares", content=photograph)  # exists, but is a detector
    assert response.status_code == 404
    assert response.json()["error"] == {
        "code": "unknown_model",
        "message": "no image-classification model named 'squares' here; available: colours",
    }


@pytest.mark.parametrize(
    "request_body",
    [
        {"files": {"picture": ("a.jpg", b"x")}},
        {"files": {"image": (None, "http://127.0.0.1/cat.jpg")}},
        {"content": b"no boundary here", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\xff\r\n--x--\r\n',
            "headers": {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"},
        },
    ],
    ids=["no image", "a URL", "not multipart", "no boundary", "strange charset"],
)
def test_an_invalid_multipart_body_is_400(request_body: dict[str, object], server: str) -> None:
    response = httpx.post(f"{server}/classify", **request_body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_parameter"


def test_parallel_requests_get_equal_responses(server: str, photograph: bytes) -> None:
    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as client:
        responses = list(pool.map(lambda _: client.post(f"{server}/detect", content=photograph), range(64)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.text for response in responses}) == 1


def test_json_is_equivalent_to_a_multipart_field(server: str, photograph: bytes) -> None:
    expected = httpx.post(f"{server}/detect", files={"image": photograph}, data={"threshold": "0"}).json()
    text = base64.b64encode(photograph).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))  # as printed by the command base64
    for image in (text, wrapped, f"data:image/jpeg;base64,{text}"):
        assert httpx.post(f"{server}/detect", json={"image": image, "threshold": 0}).json() == expected


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"image": "http://127.0.0.1/cat.jpg"}, "image: expected base64 or a data URL, found another URL, which"),
        ({"image": " HTTPS://127.0.0.1/cat.jpg"}, "image: expected base64 or a data URL, found another URL, which"),
        ({"image": "no base64!"}, "image: expected base64 or a data URL, found 'no base64!': "),
        ({"image": 3}, "image: expected base64 or a data URL as text, found 3"),
        ({"images": []}, "images: expected a list of images, found []"),
        ({"images": "abc"}, "images: expected a list of images, found 'abc'"),
        ({}, "body: expected an object with 'image' or 'images', found the fields none"),
        ({"image": "", "images": []}, "body: expected an object with 'image' or 'images', found the fields image, "),
        ([1], "body: expected an object with 'image' or 'images', found [1]"),
        ({"image": "", "top_k": True}, "top_k: expected an integer, found True"),
        ({"image": "", "top_k": [1]}, "top_k: expected an integer, found [1]"),
        ({"image": "", "model": 1}, "model: expected text, found 1"),
        ({"image": "", "labels": [1]}, "labels: expected labels as text, found [1]"),
        ({"image": "", "labels": ["pink"]}, "labels: expected some of the model's 3 labels, such as 'blue', found"),
        ({"image": "", "surprise": 1}, "surprise: expected one of the parameters model, variant, labels, top_k, "),
    ],
)
def test_an_invalid_json_document_is_400_with_a_message(document: object, message: str, server: str) -> None:
    response = httpx.post(f"{server}/classify", json=document)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


def test_malformed_json_is_400(server: str) -> None:
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        response = httpx.post(f"{server}/classify", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, body[:10]
        assert response.json()["error"]["message"].startswith("body: expected ")


def test_several_images_keep_their_order_and_only_the_invalid_one_has_an_error(server: str, photograph: bytes) -> None:
    blue = saved(Image.new("RGB", (30, 20), (30, 60, 200)), "PNG")
    for route in ("classify", "detect"):
        alone = [httpx.post(f"{server}/{route}", content=image).json() for image in (photograph, blue)]
        files = [("image", ("a", photograph)), ("image", ("b", b"no image")), ("image", ("c", blue))]
        form = httpx.post(f"{server}/{route}", files=files)
        texts = [base64.b64encode(image).decode() for image in (photograph, b"no image", blue)]
        document = httpx.post(f"{server}/{route}", json={"images": texts})
        assert form.status_code == document.status_code == 200
        assert form.json() == document.json()
        assert form.json()["model"] == alone[0]["model"]
        first, bad, last = form.json()["results"]
        assert [{"model": alone[0]["model"], **result} for result in (first, last)] == alone
        assert bad["error"]["code"] == "unsupported_image_type"


def test_a_list_of_one_image_gets_a_list(server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/classify", json={"images": [base64.b64encode(photograph).decode()]}).json()
    assert len(response["results"]) == 1


def test_more_images_than_allowed_are_400(server: str, photograph: bytes) -> None:
    for response in (
        httpx.post(f"{server}/classify", files=[("image", ("a", b"x"))] * 33),
        httpx.post(f"{server}/classify", json={"images": ["eA=="] * 33}),
    ):
        assert response.status_code == 400
    assert response.json()["error"]["message"] == "images: expected at most 32 images, found 33"


def test_labels_filter_the_predictions(server: str, photograph: bytes) -> None:
    everything = httpx.post(f"{server}/classify", content=photograph).json()["predictions"]
    wanted = [entry for entry in everything if entry["label"] in ("red", "blue")]
    for response in (
        httpx.post(f"{server}/classify?labels=red,blue", content=photograph),
        httpx.post(f"{server}/classify?labels=red&labels=blue", content=photograph),
        httpx.post(f"{server}/classify", files={"image": photograph}, data={"labels": ["blue", "red"]}),
        httpx.post(f"{server}/classify", files={"image": photograph}, data={"labels": '["blue", "red"]'}),
    ):
        assert response.json()["predictions"] == wanted
    objects = httpx.post(f"{server}/detect?threshold=0", content=photograph).json()["detections"]
    label = objects[-1]["label"]
    chosen = httpx.post(f"{server}/detect?threshold=0&max_detections=1&labels={label}", content=photograph).json()
    assert chosen["detections"] == [entry for entry in objects if entry["label"] == label][:1]


def test_a_variant_gets_its_predictors_outputs(server: str, tiny_bundles: Path, photograph: bytes) -> None:
    for name, route in (("colours", "classify"), ("squares", "detect")):
        for variant in (Precision.FP16_WEIGHTS, Precision.INT8_DYNAMIC):
            predictor = load_bundle(tiny_bundles / name / "1", variant=variant).predictor
            response = httpx.post(f"{server}/{route}?variant={variant.value}&model={name}@1", content=photograph).json()
            assert response["model"] == {"name": name, "version": "1", "variant": variant.value}
            if isinstance(predictor, Classifier):
                expected = [
                    entry.probability for entry in predictor.classify(decode_for(photograph, predictor.preprocessing))
                ]
                assert [entry["probability"] for entry in response["predictions"]] == pytest.approx(expected, abs=1e-6)
            else:
                scores = [entry.score for entry in predictor.detect(decode_for(photograph, predictor.preprocessing))]
                assert [entry["score"] for entry in response["detections"]] == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("variant=int4", 400, "variant: expected one of fp32, fp16-weights, int8-dynamic, found 'int4'"),
        ("model=colours@2", 404, "no image-classification model named 'colours@2' here; available: colours@1"),
        ("model=colours@", 404, "no image-classification model named 'colours@' here; available: colours@1"),
        ("model=@1", 404, "no image-classification model named '@1' here; available: colours"),
        ("model=", 404, "no image-classification model named '' here; available: colours"),
    ],
)
def test_an_unknown_model_or_variant_is_refused(
    query: str, status: int, message: str, server: str, photograph: bytes
) -> None:
    response = httpx.post(f"{server}/classify?{query}", content=photograph)
    assert response.status_code == status
    assert response.json()["error"]["message"] == message


def table(response: httpx.Response) -> list[dict[str, str]]:
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(response.text)))


def test_csv_has_the_values_of_the_json(server: str, photograph: bytes) -> None:
    accept = {"Accept": "text/csv"}
    predictions = httpx.post(f"{server}/classify", content=photograph).json()["predictions"]
    lines = table(httpx.post(f"{server}/classify", content=photograph, headers=accept))
    assert [(line["label"], float(line["probability"])) for line in lines] == [
        (entry["label"], entry["probability"]) for entry in predictions
    ]
    objects = httpx.post(f"{server}/detect?threshold=0", content=photograph).json()["detections"]
    lines = table(httpx.post(f"{server}/detect?threshold=0", content=photograph, headers=accept))
    assert [float(line["y_max"]) for line in lines] == [entry["box"]["y_max"] for entry in objects]
    files = [("image", ("a", photograph)), ("image", ("b", b"no image"))]
    lines = table(httpx.post(f"{server}/classify?top_k=2", files=files, headers=accept))
    assert [line["image"] for line in lines] == ["0", "0", "1"]
    assert lines[2]["error"].startswith("image: expected one of JPEG")


@pytest.mark.parametrize(
    ("accept", "form"), [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/*;q=0.9, text/html", "PNG")]
)
def test_detect_draws_the_requested_image_format(accept: str, form: str, server: str, photograph: bytes) -> None:
    response = httpx.post(f"{server}/detect?threshold=0", content=photograph, headers={"Accept": accept})
    assert response.status_code == 200
    picture = Image.open(io.BytesIO(response.content))
    assert picture.format == form
    assert response.headers["content-type"] == f"image/{form.lower()}"
    assert picture.width % 640 == 0
    difference = np.abs(np.asarray(picture.convert("RGB").resize((640, 480)), int) - np.asarray(decode(photograph)))
    assert 0 < (difference > 60).any(axis=2).mean() < 0.5  # boxes are drawn, but the photograph is still visible


@pytest.mark.parametrize(
    ("route", "accept", "images"),
    [
        ("classify", "image/png", 1),
        ("classify", "text/html", 1),
        ("detect", "application/json;q=0", 1),
        ("detect", "image/png", 2),
    ],
)
def test_an_unavailable_media_type_is_406(route: str, accept: str, images: int, server: str, photograph: bytes) -> None:
    files = [("image", ("a", photograph))] * images
    response = httpx.post(f"{server}/{route}", files=files, headers={"Accept": accept})
    assert response.status_code == 406
    assert response.json()["error"]["code"] == "not_acceptable"


@pytest.mark.parametrize(("width", "status"), [(65_500, 200), (65_501, 406), (65_535, 406)])
def test_a_picture_too_long_for_jpeg_is_406(width: int, status: int, server: str) -> None:
    body = saved(Image.new("RGB", (width, 1)), "PNG")
    response = httpx.post(f"{server}/detect", content=body, headers={"Accept": "image/jpeg"}, timeout=60)
    assert response.status_code == status


def test_requests_beyond_the_queue_get_503_with_retry_after(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_MAX_QUEUE="2", VITRINE_MAX_WAIT_SECONDS="600") as (url, *_):
        with ThreadPoolExecutor(8) as pool:
            responses = list(
                pool.map(lambda _: httpx.post(f"{url}/classify", content=bright(100), timeout=60), range(8))
            )
        statuses = Counter(response.status_code for response in responses)
        assert statuses.keys() == {200, 503}
        assert statuses[200] >= 3  # one running, two waiting
        refused = next(response for response in responses if response.status_code == 503)
        assert int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert error["code"] == "overloaded"
        assert re.fullmatch(r"2 images are waiting, about [0-9.]+ s of work; try again later", error["message"])
        assert httpx.post(f"{url}/classify", content=bright(0)).status_code == 200


def test_timed_out_requests_leave_the_queue(serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]) -> None:
    settings = {"VITRINE_MAX_QUEUE": "4", "VITRINE_MAX_WAIT_SECONDS": "600", "VITRINE_TIMEOUT_SECONDS": "0.2"}
    with serve(slow_bundle, VITRINE_THREADS="1", **settings) as (url, *_):
        with ThreadPoolExecutor(5) as pool:
            responses = list(
                pool.map(lambda _: httpx.post(f"{url}/classify", content=bright(200), timeout=60), range(5))
            )
        assert {response.status_code for response in responses} == {504}
        # the running one is finished; the waiting ones have left, otherwise four more would not fit
        with ThreadPoolExecutor(4) as pool:
            responses = list(pool.map(lambda _: httpx.post(f"{url}/classify", content=bright(0)), range(4)))
        assert 503 not in {response.status_code for response in responses}
