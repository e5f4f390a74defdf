"""The Open Inference Protocol (KServe v2), independent of the transport.

A model takes either its own tensors (`pixels`, for a detector also `sizes`; see the manifest) or `image`, BYTES[n]:
encoded images, which are decoded and resized as for `/classify` and `/detect`. The outputs are those of the graph;
boxes are normalized to the image (for `pixels`: to the valid region). The images of a batch run in parallel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vitrine import __version__
from vitrine.bundle.errors import ImageTooLargeError, ParameterError
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Identity, TensorSpec
from vitrine.bundle.predictors import Classifier, PreparedImage, Row
from vitrine.service.errors import preview
from vitrine.service.http.image_work import ImageWork
from vitrine.service.http.json_body import LongText, Numbers
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import Work
from vitrine.service.runtime.serving import Serving

SERVER_METADATA: dict[str, Any] = {
    "name": "vitrine",
    "version": __version__,
    "extensions": [
        "binary_tensor_data",
        "classification",
        "model_repository",
        "model_repository(unload_dependents)",
    ],
}
IMAGE = "image"
MAX_TENSORS = 100  # inputs, and outputs, of a request
DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}


@dataclass(frozen=True)
class UndecodedElements:
    """BYTES as sent by the client. They are decoded after their number has been checked."""

    elements: object  # memoryview of lengths and bytes; or unchecked, expected a list of bytes or base64 strings


@dataclass(frozen=True)
class Tensor:
    """An input or output tensor."""

    name: str
    datatype: str  # of the protocol
    shape: tuple[int, ...]
    data: NDArray[np.generic] | Sequence[bytes] | UndecodedElements


@dataclass(frozen=True)
class RequestedOutput:
    """An output requested by the client."""

    name: str
    classification: int = 0  # number of top classes, as BYTES "score:index:label" (Triton's extension); 0: the tensor
    binary: bool = False  # HTTP only


@dataclass(frozen=True)
class InferenceRequest:
    """An inference request."""

    reference: str  # `name` or `name@version`
    inputs: Sequence[Tensor]
    outputs: Sequence[RequestedOutput] = ()  # empty: all
    id: str = ""
    variant: str | None = None


@dataclass(frozen=True)
class InferenceResponse:
    """An inference response."""

    bundle: Bundle
    outputs: Sequence[Tensor]
    id: str = ""


def model_reference(name: str, version: str) -> str:
    """Return the reference that `Repository.get` takes; an empty version means the highest."""
    return f"{name}@{version}" if version else name


def model_metadata(serving: Serving, reference: str) -> dict[str, Any]:
    """Return the metadata of a served model, with the fields of the protocol; a length of -1 stands for any.

    Raises:
        UnknownModelError: there is no model of that name and version.
    """
    manifest = serving.repository.get(reference).manifest
    return {
        "name": manifest.name,
        "versions": [bundle.manifest.version for bundle in serving.repository.versions(manifest.name)],
        "platform": "onnxruntime_onnx",
        "inputs": [
            *(_input_metadata(spec, manifest) for spec in manifest.inputs),
            {"name": IMAGE, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [*map(_tensor_metadata, manifest.outputs)],
    }


def _input_metadata(spec: TensorSpec, manifest: Identity) -> dict[str, Any]:
    """Return the metadata of an input; a classifier's pixels are served at one size, even if its graph takes any."""
    metadata = _tensor_metadata(spec)
    if spec.name == "pixels" and isinstance(manifest.preprocessing, ClassificationPreprocessing):
        metadata["shape"][1:3] = manifest.preprocessing.input_size
    return metadata


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [edge if isinstance(edge, int) else -1 for edge in spec.shape]
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}


def repository_index(serving: Serving, *, ready_only: bool) -> list[dict[str, str]]:
    """Return the state of every version of every model, with the fields of the protocol."""
    return [
        {
            "name": entry.name,
            "version": entry.version,
            "state": "READY" if entry.ready else "UNAVAILABLE",
            "reason": entry.reason,
        }
        for entry in serving.repository.index()
        if entry.ready or not ready_only
    ]


async def load_model(serving: Serving, name: str, parameters: object, *, seconds: float) -> None:
    """Load a model, see `Serving.load`.

    Raises:
        ParameterError: there are parameters, which Triton would take for the model's configuration.
    """
    if parameters:
        found = ", ".join(parameters)[:100] if isinstance(parameters, Mapping) else "others"
        raise ParameterError("parameters", expected="none: a model is configured by its bundle", found=found)
    await serving.load(name, seconds=seconds)


def check_variant(value: object) -> str | None:
    """Return the request parameter `variant`.

    Raises:
        ParameterError: it is neither missing nor a string.
    """
    if value is not None and not isinstance(value, str):
        raise ParameterError("variant", expected="text", found=preview(value))
    return value


def check_classification(value: object) -> int:
    """Return the output parameter `classification`.

    Raises:
        ParameterError: it is not a number of classes.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ParameterError("classification", expected="a number of classes", found=preview(value))
    return value


async def infer(serving: Serving, record: RequestRecord, request: InferenceRequest) -> InferenceResponse:
    """Run an inference request.

    Raises:
        UnknownModelError, BundleError: the model or variant is unknown, or its files are damaged.
        ParameterError: a tensor or an output is missing, unknown, or of another type or shape than the model's.
        ImageError: an image is invalid.
        OverloadedError: see `Scheduler.check_capacity`.
    """
    bundle = await serving.find(request.reference, record, variant=request.variant)
    requested = _requested_outputs(bundle, request.outputs)
    inputs = {tensor.name: tensor for tensor in request.inputs}
    if len(inputs) != len(request.inputs):
        raise ParameterError("inputs", expected="each name once", found=", ".join(t.name for t in request.inputs)[:200])
    if set(inputs) == {IMAGE}:
        works: Sequence[Work[Row]] = _encoded_image_works(serving, record, bundle, inputs[IMAGE])
    else:
        works = _pixel_works(serving, record, bundle, inputs)
    try:
        rows = await serving.scheduler.run_all(works, bundle, record)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        found = str(error).splitlines()[0][:300]  # such as an image size that the network's strides do not support
        raise ParameterError("inputs", expected="tensors that the network can compute with", found=found) from error
    names = [spec.name for spec in bundle.manifest.outputs]
    outputs = dict(zip(names, (np.stack(arrays) for arrays in zip(*rows, strict=True)), strict=True))
    tensors = [_output_tensor(bundle, output, outputs[output.name]) for output in requested]
    return InferenceResponse(bundle, tensors, request.id)


def _requested_outputs(bundle: Bundle, outputs: Sequence[RequestedOutput]) -> Sequence[RequestedOutput]:
    names = [spec.name for spec in bundle.manifest.outputs]
    if len({output.name for output in outputs}) != len(outputs):
        raise ParameterError("outputs", expected="each name once", found=", ".join(o.name for o in outputs)[:200])
    for output in outputs:
        if output.name not in names:
            raise ParameterError("outputs", expected=f"some of {', '.join(names)}", found=repr(output.name[:100]))
        if output.classification and not isinstance(bundle.predictor, Classifier):
            raise ParameterError("classification", expected="an output that has classes", found=output.name)
    return outputs or [RequestedOutput(name) for name in names]


@dataclass(eq=False)
class _PixelWork:
    """The work on an image that the client has already prepared (`scheduler.Work`)."""

    prepared: NDArray[np.uint8] | PreparedImage
    size: int = 0
    limited: bool = False

    def cost(self) -> float:
        return 0.0

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        return self.prepared

    def postprocess(self, row: Row) -> Row:
        return row


def _encoded_image_works(serving: Serving, record: RequestRecord, bundle: Bundle, tensor: Tensor) -> list[ImageWork]:
    if not isinstance(tensor.data, UndecodedElements):
        raise ParameterError(f"input {IMAGE}: datatype", expected="BYTES", found=tensor.datatype[:20])
    if tensor.shape[1:] not in ((), (1,)) or not tensor.shape:
        found = str(list(tensor.shape))[:100]
        raise ParameterError(f"input {IMAGE}: shape", expected="[number of images]", found=found)
    _check_count(serving, tensor.shape[0])
    images = _decode_elements(tensor.data, tensor.shape[0])
    return [
        ImageWork(image, serving.settings.max_pixels, record, bundle.predictor, lambda _, row: row) for image in images
    ]


def _pixel_works(
    serving: Serving, record: RequestRecord, bundle: Bundle, inputs: Mapping[str, Tensor]
) -> list[_PixelWork]:
    specs = bundle.manifest.inputs
    if set(inputs) != {spec.name for spec in specs}:
        expected = f"{' and '.join(spec.name for spec in specs)}, or {IMAGE} alone"
        raise ParameterError("inputs", expected=expected, found=", ".join(inputs)[:200] or "none")
    arrays = {spec.name: _to_array(inputs[spec.name], spec) for spec in specs}
    pixels = cast(NDArray[np.uint8], arrays["pixels"])
    count, height, width = pixels.shape[:3]
    _check_count(serving, count)
    preprocessing = bundle.manifest.preprocessing
    found = f"{height} x {width}"
    if isinstance(preprocessing, DetectionPreprocessing):
        longest = preprocessing.longest_edge
        if min(height, width) < 1 or max(height, width) > longest:
            expected = f"edges from 1 to {longest} pixels"
            raise ParameterError("input pixels: shape", expected=expected, found=found)
    elif (height, width) != preprocessing.input_size:
        expected = " x ".join(map(str, preprocessing.input_size))
        raise ParameterError("input pixels: shape", expected=expected, found=found)
    if height * width > serving.settings.max_pixels:
        raise ImageTooLargeError(limit=serving.settings.max_pixels, unit="pixels", found=f"{width} x {height}")
    sizes = arrays.get("sizes")
    if sizes is not None and (
        len(sizes) != count or np.any(np.less(sizes, 1)) or np.any(np.greater(sizes, [height, width]))
    ):
        expected = f"for each of {count} images a height from 1 to {height} and a width from 1 to {width}"
        raise ParameterError("input sizes", expected=expected, found=str(sizes.tolist())[:100])
    for _ in range(count):
        record.add_image(height * width)
    if sizes is None:
        return [_PixelWork(image) for image in pixels]
    # Without padding: the outputs are the same, at less cost.
    return [
        _PixelWork(PreparedImage(image[:h, :w], width=w, height=h))
        for image, (h, w) in zip(pixels, sizes.tolist(), strict=True)
    ]


def _check_count(serving: Serving, count: int) -> None:
    if not 1 <= count <= serving.settings.max_images:
        raise ParameterError("inputs", expected=f"1 to {serving.settings.max_images} images", found=count)


def _to_array(tensor: Tensor, spec: TensorSpec) -> NDArray[np.generic]:
    """Return a tensor as the array that the graph takes."""
    if tensor.datatype != spec.datatype:
        raise ParameterError(f"input {spec.name}: datatype", expected=spec.datatype, found=tensor.datatype[:20])
    fits = len(tensor.shape) == len(spec.shape) and all(
        expected in (found, -1) or isinstance(expected, str)
        for found, expected in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        expected = f"[{', '.join(map(str, spec.shape))}]"
        raise ParameterError(f"input {spec.name}: shape", expected=expected, found=str(list(tensor.shape))[:100])
    assert isinstance(tensor.data, np.ndarray)
    # Binary tensors may start at any byte of the body; ONNX Runtime needs aligned arrays.
    return np.require(tensor.data.reshape(tensor.shape), requirements="A")


def _output_tensor(bundle: Bundle, output: RequestedOutput, array: NDArray[np.generic]) -> Tensor:
    if not output.classification:
        (datatype,) = [spec.datatype for spec in bundle.manifest.outputs if spec.name == output.name]
        return Tensor(output.name, datatype, array.shape, array)
    labels = bundle.predictor.labels
    count = min(output.classification, len(labels))
    top = np.argsort(-array.astype(np.float32), axis=1, kind="stable")[:, :count]
    texts = [f"{row[i]:f}:{i}:{labels[i]}".encode() for row, order in zip(array, top, strict=True) for i in order]
    return Tensor(output.name, "BYTES", (len(array), count), texts)


def tensor_from_bytes(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> Tensor:
    """Return a tensor given in binary form; numbers are not copied.

    Numbers are little-endian, in row-major order. Each element of BYTES follows its length (four bytes, little-endian).

    Raises:
        ParameterError: the datatype is unknown, or there are too few or too many bytes.
    """
    shape = _shape(name, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, UndecodedElements(data))
    dtype = np.dtype(_dtype(name, datatype)).newbyteorder("<")
    size = math.prod(shape) * dtype.itemsize
    if size != len(data):
        raise ParameterError(f"{_input(name)}: data", expected=f"{size} bytes for its shape", found=len(data))
    return Tensor(name, datatype, shape, np.frombuffer(data, dtype))


def tensor_from_values(name: str, datatype: str, shape: Sequence[int], values: object) -> Tensor:
    """Return a tensor given as `Numbers`, or a flat or nested list of numbers (for BYTES: of strings or bytes).

    Raises:
        ParameterError: the values do not match the datatype or the shape.
    """
    shape = _shape(name, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, UndecodedElements(values))
    is_integer = _dtype(name, datatype) is not np.float32
    if isinstance(values, Numbers):
        if is_integer and not values.integers:
            raise ParameterError(f"{_input(name)}: data", expected="integers", found="float")
        return tensor_from_array(name, datatype, shape, values.array)
    try:
        # As objects: otherwise NumPy would allocate the length of the longest string for each element.
        flat = np.asarray(values, dtype=object).ravel().tolist()
    except ValueError as error:
        raise ParameterError(f"{_input(name)}: data", expected="a list of numbers", found=error) from error
    wrong_types = set(map(type, flat)) - ({int} if is_integer else {int, float})
    if wrong_types:  # NumPy would convert `true` and "1" to 1, and truncate 1.5
        found = ", ".join(sorted(wrong_type.__name__ for wrong_type in wrong_types))
        raise ParameterError(f"{_input(name)}: data", expected="integers" if is_integer else "numbers", found=found)
    try:
        return tensor_from_array(name, datatype, shape, np.array(flat, np.int64 if is_integer else np.float64))
    except OverflowError as error:
        raise ParameterError(f"{_input(name)}: data", expected=f"values of {datatype}", found=error) from error


def tensor_from_array(name: str, datatype: str, shape: Sequence[int], array: NDArray[np.generic]) -> Tensor:
    """Return a tensor given as an array of a wider type.

    Raises:
        ParameterError: the values do not match the datatype or the shape.
    """
    dtype, shape = _dtype(name, datatype), _shape(name, shape)
    if array.size != math.prod(shape):
        expected = f"{math.prod(shape)} values for its shape"
        raise ParameterError(f"{_input(name)}: data", expected=expected, found=array.size)
    if array.size and dtype is not np.float32:
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        least, most = array.min(), array.max()
        if int(least) < limits.min or int(most) > limits.max:
            expected, found = f"{limits.min} to {limits.max}", f"{least} to {most}"
            raise ParameterError(f"{_input(name)}: data", expected=expected, found=found)
    return Tensor(name, datatype, shape, array.astype(dtype).ravel())


def tensor_to_bytes(tensor: Tensor) -> bytes:
    """Return the binary form of a tensor, see `tensor_from_bytes`."""
    if isinstance(tensor.data, np.ndarray):
        return tensor.data.tobytes()
    assert not isinstance(tensor.data, UndecodedElements)
    return b"".join(len(element).to_bytes(4, "little") + element for element in tensor.data)


def _input(name: str) -> str:
    return f"input {name[:100]}"


def _dtype(name: str, datatype: str) -> type[np.generic]:
    if datatype not in DTYPES:
        expected = f"one of {', '.join((*DTYPES, 'BYTES'))}"
        raise ParameterError(f"{_input(name)}: datatype", expected=expected, found=repr(datatype[:20]))
    return DTYPES[datatype]


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) > 8 or any(not 0 <= edge < 2**31 for edge in shape):
        expected = "at most 8 lengths from 0 to 2147483647"
        raise ParameterError(f"{_input(name)}: shape", expected=expected, found=preview(list(shape)))
    return tuple(shape)


def _decode_elements(undecoded: UndecodedElements, count: int) -> list[object]:
    """Return the elements of the input `image`: slices of the memoryview, or bytes or strings."""
    data, field = undecoded.elements, f"input {IMAGE}: data"
    if not isinstance(data, memoryview):
        if not isinstance(data, list) or len(data) != count:
            found = f"{len(data)}" if isinstance(data, list) else preview(data)
            raise ParameterError(field, expected=f"a list of {count} images", found=found)
        # With shape [n, 1], each element is nested in a list.
        values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]
        for value in values:
            if not isinstance(value, (bytes, str, LongText)):
                raise ParameterError(field, expected="base64 or a data URL as text", found=preview(value))
        return values
    elements: list[object] = []
    start = 0
    while start < len(data) and len(elements) < count:
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if start + 4 > len(data) or end > len(data):
            expected = "each element after its length in four bytes"
            raise ParameterError(field, expected=expected, found=f"the end in element {len(elements)}")
        elements.append(data[start + 4 : end])
        start = end
    if start != len(data) or len(elements) != count:
        found = f"{len(elements)}, and {len(data) - start} bytes after them"
        raise ParameterError(field, expected=f"{count} images for its shape", found=found)
    return elements
