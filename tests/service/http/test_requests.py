"""Reading requests: any input becomes images and parameters, or an error that the client can act on."""

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from vitrine.bundle.errors import ImageTooLargeError, ParameterError, VitrineError
from vitrine.service.http.parameters import CLASSIFY_PARAMETERS, MODEL, TOP_K
from vitrine.service.http.requests import ImageRequest, image_bytes, read_image_request
from vitrine.service.settings import Settings

SETTINGS = Settings(max_body_bytes=4096, max_images=3)


def read(body: bytes, content_type: str = "", query: str = "", chunk: int = 1000) -> ImageRequest:
    """Read a request whose body comes in chunks."""
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks]
    messages[-1]["more_body"] = False

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    headers = [(b"content-type", content_type.encode("latin-1"))] if content_type else []
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query.encode(), "headers": headers}
    return asyncio.run(read_image_request(Request(scope, receive), CLASSIFY_PARAMETERS, SETTINGS))


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
