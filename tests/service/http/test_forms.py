"""Forms: what clients send is read, and everything else is refused at little cost."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.service.http.forms import FormError, Part, parse_form

MIB = 1024 * 1024
names = st.text(st.characters(exclude_characters='"\\\r\n\0', exclude_categories=["Cs"]), min_size=1, max_size=10)


def form(*parts: bytes, boundary: bytes = b"x") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def part(name: str, data: bytes, *headers: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"', *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read(body: bytes, boundary: bytes = b"x") -> list[Part]:
    return list(parse_form(body, boundary))


@given(st.lists(st.tuples(names, st.binary(max_size=50)), max_size=5))
def test_names_and_data_are_those_that_were_sent(fields: list[tuple[str, bytes]]) -> None:
    boundary = b"b0undary"
    fields = [(name, data) for name, data in fields if boundary not in data]
    body = form(*(part(name, data) for name, data in fields), boundary=boundary)
    assert [(found.name, bytes(found.data)) for found in read(body, boundary)] == fields


@given(st.lists(st.sampled_from([b"--x", b"--", b"\r\n", b":", b"a", b'name="b"', b"Content-Disposition: ", b"\0"])))
def test_any_bytes_are_read_or_refused(tokens: list[bytes]) -> None:
    with contextlib.suppress(FormError):
        read(b"--x\r\n" + b"".join(tokens))


def test_types_and_file_names() -> None:
    (found,) = read(form(part("image", b"x", "content-type: IMAGE/JPEG; charset=punycode")))
    assert (found.media_type, found.has_filename) == ("image/jpeg", False)
    (found,) = read(form(b'Content-Disposition: form-data; filename="a"; name=image\r\n\r\nx'))
    assert (found.name, found.media_type, found.has_filename) == ("image", "", True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no boundary at its start"),
        (b"hello --x\r\n", "no boundary at its start"),
        (b"--xx\r\n", "a boundary without a line break"),
        (b"--x  \r\n", "a boundary without a line break"),
        (b"--x\r\n" + part("a", b"1"), "an early end"),
        (form(part("a", b"1"))[:-4], "a boundary without a line break"),
        (form(b"Content-Type: text/plain\r\n\r\n1"), "Content-Disposition has no name"),
        (form(b"Content-Disposition form-data\r\n\r\n1"), "a header that has no colon"),
        (form(part("a", b"1", "X: " + "a" * 5000)), "without an end of its headers within 4096 bytes"),
        (form(part("a", b"1", "Content-Transfer-Encoding: base64")), "Content-Transfer-Encoding 'base64': send"),
        (form(*[part("a", b"1")] * 1001), "more than 1000 parts"),
        (form(b'Content-Disposition: form-data; name="\xff"\r\n\r\n1'), "text that is not UTF-8"),
    ],
)
def test_invalid_forms_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(FormError, match=message):
        read(body)


@pytest.mark.parametrize("boundary", [b"", b"x" * 257])
def test_boundaries_have_a_length(boundary: bytes) -> None:
    with pytest.raises(FormError, match="a boundary of"):
        read(form(part("a", b"1")), boundary)


@pytest.mark.parametrize("junk", [b"\r\n--y", b"\r\n--", b"\r", b"-", b"\r\n--x "])
def test_data_that_resembles_the_boundary_is_data(junk: bytes) -> None:
    data = junk * (3 * MIB // len(junk))
    (found,) = read(form(part("a", data), boundary=b"x123"), b"x123")
    assert found.data == data


def test_a_boundary_across_windows_is_found() -> None:
    for length in range(MIB - 40, MIB + 5):
        first, second = read(form(part("a", bytes(length)), part("b", b"1")))
        assert (len(first.data), second.name) == (length, "b")
