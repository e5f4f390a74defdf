"""Reading requests: any input becomes images and parameters, or an error that the client can act on."""

import asyncio
import base64
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from vitrine.bundle.errors import ImageTooLargeError, ParameterError, VitrineError
from vitrine.service.http.json_body import LongText
from vitrine.service.http.parameters import CLASSIFY_PARAMETERS, MODEL, THRESHOLD, TOP_K
from vitrine.service.http.requests import ImageRequest, image_bytes, read_image_request
from vitrine.service.settings import Settings

SETTINGS = Settings(max_body_bytes=4096, max_images=3)


def read(
    body: bytes, content_type: str = "", query: str = "", chunk: int = 1000, settings: Settings = SETTINGS
) -> ImageRequest:
    """Read a request whose body comes in chunks."""
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks]
    messages[-1]["more_body"] = False

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    headers = [(b"content-type", content_type.encode("latin-1"))] if content_type else []
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query.encode(), "headers": headers}
    return asyncio.run(read_image_request(Request(scope, receive), CLASSIFY_PARAMETERS, settings))


@contextmanager
def readable_errors() -> Iterator[None]:
    caught = None
    try:
        yield
    except VitrineError as error:
        caught = error
    assert caught is None or 0 < len(str(caught)) < 1000


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["image", "images", "model", "top_k", "labels"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(documents)
def test_any_json_is_read_or_refused(document: object) -> None:
    with readable_errors():
        request = read(json.dumps(document).encode(), "application/json")
        for image in request.images:
            image_bytes(image)
        request.integer(TOP_K)
        request.labels(["a"])


@pytest.mark.parametrize("name", ["top_k", "labels", "model", "image", "images"])
def test_a_deeply_nested_document_is_refused(name: str) -> None:
    nested = "[" * 990 + "]" * 990
    fields = {"image": '""', name: nested}
    document = "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"
    with readable_errors():
        request = read(document.encode(), "application/json")
        request.text(MODEL)
        request.integer(TOP_K)
        request.labels(["a"])
        image_bytes(request.images[0])


@given(st.binary(max_size=300), st.sampled_from(["multipart/form-data; boundary=x", "application/json", "image/png"]))
def test_any_bytes_are_read_or_refused(body: bytes, content_type: str) -> None:
    with readable_errors():
        read(body, content_type)


@given(st.binary(max_size=300), st.integers(1, 80))
def test_base64_and_data_urls_are_decoded(data: bytes, width: int) -> None:
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + width] for i in range(0, len(text), width))
    for form in (text, wrapped, f"data:image/png;base64,{text}", f"data:;base64,{text}"):
        assert image_bytes(form) == data


@given(st.lists(st.sampled_from(["a", "b, c", "d"]), min_size=1, max_size=3), st.booleans())
def test_labels_are_read_alike_from_query_and_json(labels: list[str], as_list: bool) -> None:
    known = ("a", "b, c", "d")
    document = json.dumps({"image": "", "labels": labels if as_list or len(labels) > 1 else labels[0]})
    assert read(document.encode(), "application/json").labels(known) == tuple(labels)
    query = "&".join(f"labels={label}" for label in labels)
    assert read(b"x", query=query).labels(known) == tuple(labels)


def test_conflicting_query_and_body_parameters_are_refused() -> None:
    document = json.dumps({"image": "", "top_k": 2}).encode()
    assert read(document, "application/json").integer(TOP_K) == 2
    with pytest.raises(ParameterError, match="top_k: expected one value, found '3' and 2"):
        read(document, "application/json", "top_k=3")


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data; boundary=x"])
def test_reading_stops_when_the_body_grows_too_large(content_type: str) -> None:
    with pytest.raises(ImageTooLargeError, match="at most 4096 bytes are accepted, found more"):
        read(b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n" + bytes(10_000), content_type)


FORM = "multipart/form-data; boundary=x"
PICTURE = b'--x\r\nContent-Disposition: form-data; name="image"\r\n%b\r\npicture\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("content_type", "body", "refused"),  # what a client sends never chooses the code that reads it
    [
        (
            f"{FORM}; charset=punycode",
            PICTURE % b"Content-Type: image/png\r\n",
            "Content-Type: charset: expected utf-8",
        ),
        ("application/json; charset=utf-16", b"{}", "Content-Type: charset: expected utf-8"),
        (FORM, PICTURE % b"Content-Transfer-Encoding: base64\r\n", "Content-Transfer-Encoding 'base64'"),
        (FORM, PICTURE % b"", "image: expected a file, found text"),
        (FORM, PICTURE % b"Content-Type: text/plain\r\n", "image: expected a file, found text"),
        (FORM, PICTURE % b"Content-Type: image/png; charset=punycode\r\n", ""),
        (f"{FORM}; charset=UTF-8", PICTURE % b"Content-Type: image/jpeg\r\n", ""),
        (FORM, PICTURE % b"Content-Type: application/x-python-pickle\r\n", ""),
        ("application/vnd.bentoml+pickle", b"picture", ""),
        ("image/png; charset=punycode", b"picture", ""),
    ],
)
def test_a_client_chooses_no_code(content_type: str, body: bytes, refused: str) -> None:
    if refused:
        with pytest.raises(ParameterError, match=refused):
            read(body, content_type)
    else:
        assert [image_bytes(image) for image in read(body, content_type).images] == [b"picture"]


def sent(**parameters: object) -> ImageRequest:
    return ImageRequest((), False, parameters)


REFUSED = object()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3), ("3", 3), ("+3", 3), ("-03", -3), ("9" * 18, 10**18 - 1),
        ("9" * 19, REFUSED), ("", REFUSED), ("3.0", REFUSED), ("3 ", REFUSED), ("1_0", REFUSED), ("٣", REFUSED),
        (True, REFUSED), (3.0, REFUSED), (None, REFUSED), ([3], REFUSED),
    ],
)  # fmt: skip
def test_integers(value: object, expected: object) -> None:
    if expected is REFUSED:
        with pytest.raises(ParameterError, match="top_k: expected an integer, found "):
            sent(top_k=value).integer(TOP_K)
    else:
        assert sent(top_k=value).integer(TOP_K) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, 0.25), (1, 1.0), ("0.25", 0.25), (".5", 0.5), ("-1", -1.0), ("+1E-3", 0.001), ("1e+100", 1e100),
        ("inf", math.inf), ("-Inf", -math.inf), ("0" * 40, 0.0),
        ("0" * 41, REFUSED), ("1e1000", REFUSED), ("1_0", REFUSED), ("0x1", REFUSED), (".", REFUSED),
        ("1.1.1", REFUSED), ("", REFUSED), (" 1", REFUSED), ("infinity", REFUSED),
        (True, REFUSED), (None, REFUSED), ([0.5], REFUSED),
    ],
)  # fmt: skip
def test_numbers(value: object, expected: object) -> None:
    if expected is REFUSED:
        with pytest.raises(ParameterError, match="threshold: expected a number, found "):
            sent(threshold=value).number(THRESHOLD)
    else:
        found = sent(threshold=value).number(THRESHOLD)
        assert (type(found), found) == (float, expected)
    assert math.isnan(sent(threshold="NaN").number(THRESHOLD))


@pytest.mark.parametrize(("value", "expected"), [("m@1", "m@1"), (None, None), (1, REFUSED), (["m"], REFUSED)])
def test_texts(value: object, expected: object) -> None:
    if expected is REFUSED:
        with pytest.raises(ParameterError, match="model: expected text, found "):
            sent(model=value).text(MODEL)
    else:
        assert sent(model=value).text(MODEL) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None), ("a", ("a",)), ("b, c", ("b, c",)), (" a ,d", ("a", "d")), ("", ("",)), ([], ()),
        (["b, c", "a"], ("b, c", "a")), (["a"] * 30_000, ("a",) * 30_000), (",".join("a" * 30_000), ("a",) * 30_000),
        (["a"] * 30_001, REFUSED), (",".join("a" * 30_001), REFUSED),
        (1, REFUSED), (["a", 1], REFUSED), ({"a": 1}, REFUSED), (True, REFUSED),
    ],
)  # fmt: skip
def test_labels(value: object, expected: object) -> None:
    if expected is REFUSED:
        with pytest.raises(ParameterError, match=r"labels: expected (labels as text|at most 30000 labels), found "):
            sent(labels=value).labels(("a", "b, c", "d"))
    else:
        assert sent(labels=value).labels(("a", "b, c", "d")) == expected


def test_parameters_that_are_not_sent_have_their_defaults() -> None:
    request = read(b'{"image": "", "top_k": null}', "application/json")
    assert (request.integer(TOP_K), request.text(MODEL), request.labels(())) == (TOP_K.default, None, None)
    assert sent().number(THRESHOLD) == THRESHOLD.default


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form of files and, if the name ends in "=", texts."""
    body = b""
    for name, data in parts:
        filename = b"" if name.endswith("=") else b"; filename=f"
        body += b"--x\r\nContent-Disposition: form-data; name=%b%b\r\n\r\n%b\r\n" % (
            name.rstrip("=").encode(), filename, data,
        )  # fmt: skip
    return body + b"--x--\r\n"


def test_images_in_any_form() -> None:
    """A list is answered to several fields, and to `images`."""
    one, two = base64.b64encode(b"1").decode(), base64.b64encode(b"2").decode()
    for body, content_type, images, several in (
        (b"1", "", [b"1"], False),
        (b"1", "image/png", [b"1"], False),
        (form(("image", b"1")), FORM, [b"1"], False),
        (form(("image", b"1"), ("top_k=", b"3"), ("image", b"2")), f"  {FORM.upper()[:-1]}x ; y=z", [b"1", b"2"], True),
        (json.dumps({"image": one}).encode(), "application/json", [b"1"], False),
        (json.dumps({"images": [one]}).encode(), " Application/JSON ; charset=UTF8", [b"1"], True),
        (json.dumps({"images": [one, two]}).encode(), "application/json", [b"1", b"2"], True),
    ):
        request = read(body, content_type)
        assert ([image_bytes(image) for image in request.images], request.several) == (images, several)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_number_of_images_is_limited(count: int) -> None:
    forms = form(*[("image", b"1")] * count), json.dumps({"images": [""] * count}).encode()
    for body, content_type in zip(forms, (FORM, "application/json"), strict=True):
        with pytest.raises(ParameterError, match="at most 3 images, found 4") if count > 3 else nullcontext():
            assert len(read(body, content_type).images) == count


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (form(("picture", b"1")), FORM, "picture: expected text, or the name image for an image, found a file"),
        (form(("top_k=", b"1")), FORM, "image: expected a multipart field 'image', found the fields top_k"),
        (form(), FORM, "image: expected a multipart field 'image', found the fields none"),
        (form(("top_k=", b"\xff")), FORM, "body: expected images and their fields as multipart/form-data"),
        (b"{", "application/json", "body: expected JSON, found none: "),
        (b"[]", "application/json", r"body: expected an object with 'image' or 'images', found \[\]"),
        (b"{}", "application/json", "body: expected an object with 'image' or 'images', found the fields none"),
        (b'{"image": "", "images": []}', "application/json", "found the fields image, images"),
        (b'{"picture": ""}', "application/json", "found the fields picture"),
        (b'{"images": []}', "application/json", r"images: expected a list of images, found \[\]"),
        (b'{"images": ""}', "application/json", "images: expected a list of images, found ''"),
        (
            b'{"image": "", "topk": 1}',
            "application/json",
            "topk: expected one of the parameters .*top_k.*an unknown one",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(body: bytes, content_type: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        read(body, content_type)


def test_fields_of_a_form_may_be_json() -> None:
    request = read(
        form(("image", b"1"), ("model=", b'"m"'), ("labels=", b'["a", "b"]'), ("top_k=", b"[3"), ("labels=", b'"')),
        FORM,
    )
    assert request.parameters == {"model": "m", "labels": ["a", "b", '"'], "top_k": "[3"}
    assert read(form(("image", b"1"), ("model=", b"123")), FORM).text(MODEL) == "123"


def test_repeated_fields_must_agree() -> None:
    document = b'{"image": "", "model": "m", "labels": ["b", "c"]}'
    query = "model=m&labels=a&labels=a"
    assert read(document, "application/json", query).parameters == {"model": "m", "labels": ["a", "a", "b", "c"]}
    for values in (b'"n"', b"[]", b'["m"]', b"{}"):
        with pytest.raises(ParameterError, match="model: expected one value, found 'm' and "):
            read(document.replace(b'"m"', values), "application/json", query)


def test_the_size_of_what_is_not_an_image_is_limited() -> None:
    large = SETTINGS.model_copy(update={"max_body_bytes": 2**22})
    for size, refused in ((2**20, False), (2**20 + 1, True)):
        body = form(("image", b"1"), ("labels=", b"a" * 1000), ("labels=", b"b" * (size - 1000)))
        with pytest.raises(ParameterError, match="more than 1048576 bytes of text") if refused else nullcontext():
            read(body, FORM, settings=large)
    for fields, refused in ((1000, False), (1001, True)):
        query = "&".join(["labels=a"] * fields)
        with pytest.raises(ParameterError, match="query: expected at most 1000 fields") if refused else nullcontext():
            read(b"1", query=query)
    for length, refused in ((1000, False), (1001, True)):
        content_type = FORM + ";" + "a" * (length - len(FORM) - 1)
        with pytest.raises(ParameterError, match="Content-Type: expected at most 1000") if refused else nullcontext():
            read(form(("image", b"1")), content_type)


@pytest.mark.parametrize(
    "image", ["http://a/b.png", " HTTPS://a", "ftp://a", "file:///etc/passwd", "\ts3://a", "gs://a"]
)
def test_other_urls_are_named_and_not_fetched(image: str) -> None:
    with pytest.raises(ParameterError, match="image: expected base64 or a data URL, found another URL, which is not"):
        image_bytes(image)


@pytest.mark.parametrize("image", [None, 1, 0.5, True, ["aGk="], {"url": "aGk="}])
def test_an_image_is_text(image: object) -> None:
    with pytest.raises(ParameterError, match="image: expected base64 or a data URL as text, found "):
        image_bytes(image)


@pytest.mark.parametrize("image", ["a", "aGk", "aGk=a", "aGk=aGk=", "a$k=", "aGké", "data:image/png,aGk=", "data:aGk="])
def test_what_is_not_base64_is_refused_with_its_start(image: str) -> None:
    with pytest.raises(ParameterError, match=rf"image: expected base64 or a data URL, found '{re.escape(image)}'"):
        image_bytes(image)
    with pytest.raises(ParameterError) as refused:
        image_bytes("!" * 1000)
    assert "!" * 40 in str(refused.value)
    assert "!" * 41 not in str(refused.value)


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=5), st.booleans(), st.data())
@settings(max_examples=40)
def test_base64_in_pieces_is_decoded_as_a_whole(
    data: bytes, cuts: list[int], as_url: bool, choice: st.DataObject
) -> None:
    text = base64.b64encode(data)
    for _ in range(3):
        at = choice.draw(st.integers(0, len(text)))
        text = text[:at] + choice.draw(st.sampled_from([b"", b"\n", b" \t", b"\r\n", b" \t\n\r\f\v"])) + text[at:]
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    if as_url:
        pieces[0] = b"data:image/png;base64," + pieces[0]
    assert image_bytes(LongText(pieces)) == data
    with pytest.raises(ParameterError, match="expected base64"):
        image_bytes(LongText([*pieces, b"="]))
    if text.strip().endswith(b"="):
        with pytest.raises(ParameterError, match="expected base64"):
            image_bytes(LongText([*pieces, b"aGk="]))
    assert image_bytes(data) == image_bytes(memoryview(data)) == data
