"""JSON bodies: large documents give what small ones do, or are refused; nothing takes many times its size."""

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.bundle.errors import ParameterError
from vitrine.service.http import json_body
from vitrine.service.http.json_body import LongText, NotJsonError, Numbers, loads

MIB = 1024 * 1024


@contextmanager
def tiny_slices() -> Iterator[None]:
    """What is long and what is small: a few bytes, so that short documents take the path of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "SMALL", 0)
        patch.setattr(json_body, "_SLICE", 8)
        patch.setattr(json_body, "_WINDOW", 3)
        yield


def plain(value: Any) -> Any:
    """Return a document as lists and texts."""
    if isinstance(value, Numbers):
        return [float(number) for number in value.array.tolist()]
    if isinstance(value, LongText):
        return b"".join(value.pieces).decode()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def flat(value: Any) -> Any:
    """Return a document with its lists of numbers flat."""
    if isinstance(value, dict):
        return {key: flat(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value, object).ravel().tolist()
    except ValueError:
        array = [None]
    if array and {type(number) for number in array} <= {int, float}:
        return [float(np.float32(number)) if float in set(map(type, array)) else float(number) for number in array]
    return [flat(entry) for entry in value]


numbers = st.integers(-300, 300) | st.floats(-100, 100, width=32)
tensors = st.integers(1, 4).flatmap(
    lambda n: (
        st.lists(numbers, min_size=n, max_size=n) | st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1)
    )
)
texts = st.text(st.characters(codec="ascii"), max_size=30)
documents = st.recursive(
    tensors | texts | numbers | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(documents, st.booleans())
def test_large_documents_give_what_small_ones_do(document: Any, spaces: bool) -> None:
    text = json.dumps(document, indent=1 if spaces else None).encode()
    with tiny_slices():
        assert flat(plain(loads(text))) == flat(document)


@given(st.text(st.sampled_from('[]{},:"\\1.-e truenaf\n'), max_size=60), st.booleans())
def test_what_is_no_json_is_refused_like_a_small_document(text: str, as_data: bool) -> None:
    document = (f'{{"data":[{text}]}}' if as_data else text).encode()
    with tiny_slices():
        try:
            value = loads(document)
        except (NotJsonError, ParameterError):
            return
    orjson.loads(document)  # raises if it is no JSON
    assert flat(plain(value)) == flat(orjson.loads(document))


@pytest.mark.parametrize(
    "data",
    [
        b"[1,2,,3]",
        b"[1,2,3,]",
        b"[,1,2,3]",
        b"[1 2,3,4]",
        b"[[1][2],[3]]",
        b"[1[2]]3,4,5",
        b"[1,2,3]]",
        b"[[1,2,3]",
        b"[1,2,-]",
        b"[1,2,0x1]",
        b"[1,2,NaN]",
        b"[1,2,01]",
        b"[1,2,1e]",
        b"[" * 20_000 + b"]" * 20_000,
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_invalid_lists_of_numbers_are_refused(data: bytes, long: bool) -> None:
    document = b'{"data":' + data.replace(b"2", b"2," + b"7," * 50_000 + b"2" if long else b"2") + b"}"
    with tiny_slices(), pytest.raises((NotJsonError, ParameterError)):
        loads(document)


def test_empty_lists_are_many_values_but_json() -> None:
    document = b'{"data":[' + b"[]," * 200_000 + b"[]]}"
    with pytest.raises(ParameterError, match="body: expected at most 100000 values, found more"):
        loads(document)
    assert loads(b'{"data":[' + b"[]," * 30_000 + b"[]]}") == {"data": [[]] * 30_001}


def test_types_of_numbers() -> None:
    def read(numbers: str) -> Numbers:
        value = loads(f'{{"data":[{numbers}{",1" * 40_000}]}}'.encode())["data"]
        assert isinstance(value, Numbers)
        return value

    assert (read("255").array.dtype, read("255").integers) == (np.uint8, True)
    assert (read("-1").array[0], read("256").array[0], read("-1").integers) == (-1, 256, True)
    assert (read("1.5").array[0], read("1.5").integers) == (1.5, False)
    assert read("1.0").integers is False
    assert read(str(2**63)).array[0] == 2.0**63


@pytest.mark.parametrize("text", ['\\"' * 40_000, "\\u002B" * 20_000, "a\\\\" * 40_000, "a\\/" * 40_000 + "\\n"])
def test_escapes_in_long_texts(text: str) -> None:
    document = f'{{"a": ["{text}", 1], "b": "{text}"}}'.encode()
    assert plain(loads(document)) == json.loads(document)


@pytest.mark.parametrize("text", ["a\n", "\\x", "\\u12", "\\", "é", "\\u00e9", "\x00"])
def test_invalid_long_texts_are_refused(text: str) -> None:
    for document in (f'["{text}{"a" * 70_000}"]', f'["{"a" * 70_000}{text}"]'):
        with pytest.raises((NotJsonError, ParameterError)):
            loads(document.encode())


@pytest.mark.parametrize("part", [b"1,", b"[],", b"{},", b'"",', b'"abcdefghijklmnopqrstuvwxyz",', b" " * 30])
def test_many_values_are_refused_at_little_cost(part: bytes) -> None:
    document = b'["",' + part * (3 * MIB // len(part)) + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(ParameterError, match=r"at most \d+ (values|bytes besides)"):
            loads(document)
        assert tracemalloc.get_traced_memory()[1] < 3 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [b"1", b"1.5", b"[1]", b"-1000"])
def test_numbers_take_a_small_multiple_of_their_text(number: bytes) -> None:
    document = b'{"data":[' + number + (b"," + number) * (2 * MIB // (len(number) + 1)) + b"]}"
    tracemalloc.start()
    try:
        loads(document)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(document)
    finally:
        tracemalloc.stop()
