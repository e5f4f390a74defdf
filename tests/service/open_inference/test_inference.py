"""Inference requests without a transport: parsing, validation and inference with real bundles."""

import asyncio
import base64
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ImageTooLargeError, ParameterError, VitrineError
from vitrine.bundle.images import decode
from vitrine.bundle.repository import Repository
from vitrine.service.access import Keys
from vitrine.service.errors import STATUS, error_response, preview
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.open_inference.http import parse
from vitrine.service.open_inference.inference import (
    InferenceRequest,
    InferenceResponse,
    RequestedOutput,
    Tensor,
    infer,
    tensor_from_array,
    tensor_from_bytes,
    tensor_from_values,
    tensor_to_bytes,
)
from vitrine.service.rate_limit import RateLimit
from vitrine.service.runtime.model_control import ModelControl
from vitrine.service.runtime.scheduler import Scheduler
from vitrine.service.runtime.serving import Serving
from vitrine.service.settings import Settings

MODEL = "colours"


@pytest.fixture(scope="module")
def serving(tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The serving state, without a transport."""
    repository = Repository(tiny_bundles)
    shared = tmp_path_factory.mktemp("shared")
    control = ModelControl(repository, shared)
    scheduler = Scheduler(2, 64)
    limits = Settings(max_images=4, max_pixels=6000)
    yield Serving(limits, repository, scheduler, control, Keys(()), RateLimit(0, shared))
    scheduler.close()
    control.close()


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def examples() -> list[bytes]:
    """Two encoded images of noise, one landscape and one portrait."""
    random = np.random.default_rng(0)
    return [png(random.integers(0, 256, size, np.uint8)) for size in ((60, 96, 3), (96, 60, 3))]


def run(serving: Serving, request: InferenceRequest, record: RequestRecord | None = None) -> InferenceResponse:
    return asyncio.run(infer(serving, record or RequestRecord(), request))


def check_error(error: VitrineError) -> None:
    """Check that the error becomes a 4xx response with a short message."""
    assert 0 < len(str(error)) < 1000
    scope = {"type": "http", "path": "/v2/models/x/infer"}
    response = error_response(scope, STATUS[type(error)], error.code, str(error))
    assert 400 <= response.status_code < 500
    assert json.loads(response.body).keys() == {"error"}


def binary(name: str, array: NDArray[np.generic]) -> Tensor:
    datatype = {"u1": "UINT8", "i8": "INT64"}[array.dtype.str[1:]]
    return tensor_from_bytes(name, datatype, array.shape, memoryview(array.tobytes()))


def images(*encoded: bytes) -> Tensor:
    content = b"".join(struct.pack("<I", len(image)) + image for image in encoded)
    return tensor_from_bytes("image", "BYTES", [len(encoded)], memoryview(content))


NAMES = ["inputs", "outputs", "parameters", "name", "datatype", "shape", "data", "id", "binary_data_size", "variant"]
NAMES += ["binary_data", "binary_data_output", "classification", "pixels", "image", "probabilities", "sizes"]
DATATYPES = ["UINT8", "INT64", "FP32", "BYTES", "FP64", "BOOL", ""]

any_text = st.sampled_from([*NAMES, *DATATYPES]) | st.text(st.characters(), max_size=8)  # includes lone surrogates
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=10,
)
entries = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["pixels", "image", "sizes"]) | documents,
        "datatype": st.sampled_from(DATATYPES) | documents,
        "shape": st.lists(st.integers(-1, 20), max_size=5) | documents,
    },
    optional={
        "data": st.lists(st.integers(-1, 256) | st.floats() | any_text, max_size=12) | documents,
        "parameters": st.dictionaries(st.just("binary_data_size"), st.integers(-1, 40), max_size=1) | documents,
    },
)
requested = st.fixed_dictionaries(
    {"name": st.sampled_from(["probabilities", "scores"]) | documents},
    optional={"parameters": st.dictionaries(any_text, documents, max_size=2)},
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(entries, max_size=3) | documents},
    optional={
        "id": any_text | documents,
        "parameters": st.dictionaries(any_text, documents, max_size=2) | documents,
        "outputs": st.lists(requested, max_size=2) | documents,
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests | documents, st.binary(max_size=40), st.sampled_from([MODEL, "squares", "colours@1", "", "@", "x@y"]))
def test_any_document_is_handled_or_refused(serving: Serving, document: object, tail: bytes, model: str) -> None:
    head = json.dumps(document).encode()
    try:
        request, _ = parse(model, head + tail, str(len(head)))
        run(serving, request)
    except VitrineError as error:
        check_error(error)


@settings(deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 250).map(str) | st.text(max_size=6))
def test_any_body_and_header_are_read_or_refused(body: bytes, header: str | None) -> None:
    try:
        parse(MODEL, body, header)
    except VitrineError as error:
        check_error(error)


@pytest.mark.parametrize("depth", [50, 500, 900, 950, 980, 990, 2000, 100_000])
@pytest.mark.parametrize(
    "form",
    [
        "%s",
        '{"inputs": %s}',
        '{"id": %s, "inputs": []}',
        '{"parameters": {"variant": %s}, "inputs": []}',
        '{"inputs": [{"name": %s}]}',
        '{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": %s}]}',
        '{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1], "data": %s}]}',
        '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [%s]}]}',
    ],
)
def test_deep_nesting_is_refused_with_a_message(serving: Serving, depth: int, form: str) -> None:
    body = (form % ("[" * depth + "]" * depth)).encode()
    with pytest.raises(ParameterError) as caught:
        run(serving, parse(MODEL, body, None)[0])
    check_error(caught.value)


def test_a_header_length_of_many_digits_is_refused() -> None:
    with pytest.raises(ParameterError, match="Inference-Header-Content-Length: expected 0 to 2, found '999"):
        parse(MODEL, b"{}", "9" * 5000)


def test_one_long_string_among_many_values_takes_little_memory() -> None:
    values: list[object] = ["x" * 10_000_000, *[""] * 100_000]
    with pytest.raises(ParameterError, match="input pixels: data: expected integers, found str"):
        tensor_from_values("pixels", "UINT8", [len(values)], values)


def test_elements_beyond_the_shape_are_not_read(serving: Serving) -> None:
    many = tensor_from_bytes("image", "BYTES", [1], memoryview(bytes(20_000_000)))  # five million empty elements
    with pytest.raises(ParameterError, match="expected 1 images for its shape, found 1, and 19999996 bytes after them"):
        run(serving, InferenceRequest(MODEL, [many]))
    with pytest.raises(ParameterError, match="inputs: expected 1 to 4 images, found 5000000"):
        run(serving, InferenceRequest(MODEL, [tensor_from_bytes("image", "BYTES", [5_000_000], memoryview(b""))]))


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
arrays = st.tuples(st.sampled_from([("UINT8", 0, 255), ("INT64", -(2**63), 2**63 - 1)]), shapes).flatmap(
    lambda kind: st.lists(st.integers(*kind[0][1:]), min_size=math.prod(kind[1]), max_size=math.prod(kind[1])).map(
        lambda values: (kind[0][0], np.array(values, {"UINT8": np.uint8, "INT64": np.int64}[kind[0][0]]), kind[1])
    )
)


@given(arrays, st.integers(0, 7))
def test_all_representations_of_a_tensor_are_equal(
    drawn: tuple[str, NDArray[Any], tuple[int, ...]], offset: int
) -> None:
    datatype, flat, shape = drawn
    body = memoryview(bytes(offset) + flat.tobytes())[offset:]
    forms = [
        tensor_from_bytes("x", datatype, shape, body),
        tensor_from_values("x", datatype, shape, flat.tolist()),
        tensor_from_values("x", datatype, shape, flat.reshape(shape).tolist()),
        tensor_from_array("x", datatype, shape, flat.astype(np.int64)),
    ]
    for tensor in forms:
        assert isinstance(tensor.data, np.ndarray)
        assert (tensor.shape, tensor.data.dtype) == (shape, flat.dtype)
        np.testing.assert_array_equal(tensor.data, flat)
        assert tensor_to_bytes(tensor) == flat.tobytes()


@pytest.mark.parametrize(
    ("datatype", "values", "message"),
    [
        ("UINT8", [0, 256], "expected 0 to 255, found 0 to 256"),
        ("UINT8", [-1, 0], "expected 0 to 255, found -1 to 0"),
        ("INT64", [2**63, 0], "expected values of INT64, found"),
        ("UINT8", [1.0, 2], "expected integers, found float"),
        ("UINT8", [True, "1"], "expected integers, found bool, str"),
        ("UINT8", [[1], [2, 3]], "expected integers, found list"),
        ("UINT8", {"0": 1}, "expected integers, found dict"),
        ("UINT8", None, "expected integers, found NoneType"),
        ("FP32", ["1", 2], "expected numbers, found str"),
        ("FP32", [10**400, 2], "expected values of FP32, found"),
        ("UINT8", [1, 2, 3], "expected 2 values for its shape, found 3"),
    ],
)
def test_values_of_another_type_are_refused(datatype: str, values: object, message: str) -> None:
    with pytest.raises(ParameterError, match=f"^input x: data: {message}"):
        tensor_from_values("x", datatype, [2], values)


def test_a_binary_tensor_is_not_copied() -> None:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8)
    entry = {"name": "pixels", "datatype": "UINT8", "shape": [1, 16, 16, 3], "parameters": {"binary_data_size": 768}}
    head = json.dumps({"inputs": [entry]}).encode()
    body = head + pixels.tobytes()
    request, _ = parse(MODEL, body, str(len(head)))
    (tensor,) = request.inputs
    assert isinstance(tensor.data, np.ndarray)
    assert np.shares_memory(tensor.data, np.frombuffer(body, np.uint8))


def test_all_representations_of_images_get_the_predictors_outputs(serving: Serving, examples: list[bytes]) -> None:
    predictor: Any = serving.repository.get(MODEL).predictor
    expected = predictor.probabilities([decode(image) for image in examples])
    texts = [base64.b64encode(image).decode() for image in examples]
    forms = [
        images(*examples),
        tensor_from_values("image", "BYTES", [2], texts),
        tensor_from_values("image", "BYTES", [2, 1], [[text] for text in texts]),
        tensor_from_values("image", "BYTES", [2], [f"data:image/png;base64,{text}" for text in texts]),
        tensor_from_values("image", "BYTES", [2], examples),
    ]
    for form in forms:
        record = RequestRecord()
        (output,) = run(serving, InferenceRequest("colours@1", [form]), record).outputs
        assert (output.name, output.datatype, output.shape) == ("probabilities", "FP32", (2, 3))
        np.testing.assert_allclose(output.data, expected, atol=1e-6)
        assert (record.images, record.pixels, record.batches) == (2, 96 * 60 + 60 * 96, [1, 1])
        assert {stage.name for stage in record.stages} == {"queue", "decode", "inference"}


def test_one_invalid_image_fails_the_request(serving: Serving, examples: list[bytes]) -> None:
    with pytest.raises(VitrineError, match="image: cannot be decoded: it is empty") as caught:
        run(serving, InferenceRequest(MODEL, [images(examples[0], b"", examples[1])]))
    check_error(caught.value)


def test_int64_tensors_may_be_unaligned(serving: Serving) -> None:
    random = np.random.default_rng(0)
    pixels, sizes = random.integers(0, 256, (2, 64, 80, 3), np.uint8), np.array([[64, 80], [60, 70]])
    network = serving.repository.get("squares").predictor.network
    expected = network(pixels=pixels, sizes=sizes)
    for offset in range(8):
        body = memoryview(bytes(offset) + sizes.tobytes())[offset:]
        request = InferenceRequest(
            "squares", [binary("pixels", pixels), tensor_from_bytes("sizes", "INT64", [2, 2], body)]
        )
        for output, array in zip(run(serving, request).outputs, expected, strict=True):
            np.testing.assert_allclose(output.data, array, atol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 96), st.data())
def test_detector_pixels_of_any_size_are_handled_or_refused(
    serving: Serving, count: int, height: int, width: int, data: st.DataObject
) -> None:
    sizes = np.array([[data.draw(st.integers(0, height + 1)), data.draw(st.integers(1, width))] for _ in range(count)])
    pixels = np.zeros((count, height, width, 3), np.uint8)
    try:
        outputs = run(serving, InferenceRequest("squares", [binary("pixels", pixels), binary("sizes", sizes)])).outputs
    except VitrineError as error:
        check_error(error)
        return
    assert [tensor.shape for tensor in outputs] == [(count, 8), (count, 8), (count, 8, 4)]
    assert all(np.isfinite(np.asarray(tensor.data)).all() for tensor in outputs)


def test_limits_apply_to_tensors(serving: Serving) -> None:
    with pytest.raises(ParameterError, match="inputs: expected 1 to 4 images, found 5"):
        run(serving, InferenceRequest(MODEL, [binary("pixels", np.zeros((5, 16, 16, 3), np.uint8))]))
    pixels, sizes = np.zeros((1, 90, 90, 3), np.uint8), np.array([[90, 90]])
    with pytest.raises(ImageTooLargeError, match="at most 6000 pixels are accepted, found 90 x 90"):
        run(serving, InferenceRequest("squares", [binary("pixels", pixels), binary("sizes", sizes)]))
    with pytest.raises(ImageTooLargeError, match="at most 6000 pixels are accepted, found 90 x 90"):
        run(serving, InferenceRequest("squares", [images(png(pixels[0]))]))


def test_outputs_have_the_requested_order(serving: Serving, examples: list[bytes]) -> None:
    request = InferenceRequest(
        "squares", [images(*examples)], [RequestedOutput("boxes"), RequestedOutput("scores")], id="a"
    )
    result = run(serving, request)
    assert [(tensor.name, tensor.shape) for tensor in result.outputs] == [
        ("boxes", (2, 8, 4)),
        ("scores", (2, 8)),
    ]
    assert result.id == "a"


@given(documents)
def test_previews_are_short(document: object) -> None:
    assert len(preview(document)) < 800
