"""The Open Inference Protocol (KServe v2) without a transport: what its requests mean and how they are answered.

A model takes either its own tensors (`pixels`, of a detector also `sizes`; see the manifest) or `image`, BYTES[n]:
encoded images, which are decoded and resized as those of `/classify` and `/detect` are. The outputs are those of the
graph; boxes are normalised to the image (of `pixels`: to the valid region). The rows of a batch are computed side by
side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from vitrine.bundle.errors import ImageTooLargeError, ParameterError
from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import Bundle
from vitrine.bundle.manifest import DetectionPreprocessing, TensorSpec
from vitrine.bundle.predictors import Classifier, PreparedImage, Row
from vitrine.service.errors import preview
from vitrine.service.http.requests import encoded
from vitrine.service.observability.request_record import RequestRecord
from vitrine.service.runtime.scheduler import Work
from vitrine.service.runtime.serving import Serving

SERVER = "vitrine"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "model_repository(unload_dependents)")
IMAGE = "image"
DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}


@dataclass(frozen=True)
class UndecodedElements:
    """BYTES as a client sent them. They are read once it is known how many there may be."""

    elements: object  # a memoryview of lengths and bytes, or what should be a list: of bytes, or of base64 text


@dataclass(frozen=True)
class Tensor:
    """An input or output."""

    name: str
    datatype: str  # KServe's
    shape: tuple[int, ...]
    data: NDArray[np.generic] | Sequence[bytes] | UndecodedElements


@dataclass(frozen=True)
class RequestedOutput:
    """An output that the client names."""

    name: str
    classification: int = 0  # above 0: the best classes as BYTES "score:index:label" (Triton's extension)
    binary: bool = False  # of HTTP


@dataclass(frozen=True)
class InferenceRequest:
    """What a client asks a model."""

    reference: str  # `name` or `name@version`
    inputs: Sequence[Tensor]
    outputs: Sequence[RequestedOutput] = ()  # none: all
    id: str = ""
    variant: str | None = None


@dataclass(frozen=True)
class InferenceResponse:
    """What the model answers."""

    bundle: Bundle
    outputs: Sequence[Tensor]
    id: str = ""


@dataclass(frozen=True)
class ModelMetadata:
    """What a client has to know to ask a model; -1 stands for any length."""

    name: str
    versions: Sequence[str]
    inputs: Sequence[Tensor]  # without data
    outputs: Sequence[Tensor]


def reference(name: str, number: str) -> str:
    """A model's name and version as `Repository.get` takes them; without a version the highest is meant."""
    return f"{name}@{number}" if number else name


def model_metadata(serving: Serving, model: str) -> ModelMetadata:
    """The metadata of a served model.

    Raises:
        UnknownModelError: there is none of that name and version.
    """
    bundle = serving.repository.get(model)
    manifest = bundle.manifest
    versions = [other.manifest.version for other in serving.repository.versions(manifest.name)]
    inputs, outputs = ([_described(spec) for spec in specs] for specs in (manifest.inputs, manifest.outputs))
    return ModelMetadata(manifest.name, versions, [*inputs, Tensor(IMAGE, "BYTES", (-1,), [])], outputs)


def _described(spec: TensorSpec) -> Tensor:
    return Tensor(spec.name, spec.datatype, tuple(edge if isinstance(edge, int) else -1 for edge in spec.shape), [])


async def infer(serving: Serving, record: RequestRecord, request: InferenceRequest) -> InferenceResponse:
    """Answer an inference request.

    Raises:
        UnknownModelError, BundleError: no model can answer it.
        ParameterError: a tensor or an output is missing, unknown, or of another type or shape than the model's.
        ImageError: an image cannot be used.
        OverloadedError: too much is waiting.
    """
    bundle = await serving.find(request.reference, record, variant=request.variant)
    requested = _requested_outputs(bundle, request.outputs)
    inputs = {tensor.name: tensor for tensor in request.inputs}
    if len(inputs) != len(request.inputs):
        raise ParameterError("inputs", expected="each name once", found=", ".join(t.name for t in request.inputs)[:200])
    if set(inputs) == {IMAGE}:
        works: Sequence[Work[Row]] = _encoded_images(serving, record, bundle, inputs[IMAGE])
    else:
        works = _pixels(serving, record, bundle, inputs)
    try:
        rows = await serving.scheduler.run_all(works, bundle, record)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        found = str(error).splitlines()[0][:300]  # a size, say, that the network's strides do not take
        raise ParameterError("inputs", expected="tensors that the network can compute with", found=found) from error
    names = [spec.name for spec in bundle.manifest.outputs]
    outputs = dict(zip(names, (np.stack(arrays) for arrays in zip(*rows, strict=True)), strict=True))
    tensors = [_output(bundle, output, outputs[output.name]) for output in requested]
    return InferenceResponse(bundle, tensors, request.id)


def _requested_outputs(bundle: Bundle, wanted: Sequence[RequestedOutput]) -> Sequence[RequestedOutput]:
    known = [spec.name for spec in bundle.manifest.outputs]
    if len({output.name for output in wanted}) != len(wanted):
        raise ParameterError("outputs", expected="each name once", found=", ".join(w.name for w in wanted)[:200])
    for output in wanted:
        if output.name not in known:
            raise ParameterError("outputs", expected=f"some of {', '.join(known)}", found=repr(output.name[:100]))
        if output.classification and not isinstance(bundle.predictor, Classifier):
            raise ParameterError("classification", expected="an output that has classes", found=output.name)
    return wanted or [RequestedOutput(name) for name in known]


@dataclass(eq=False)
class _EncodedImage:
    """An image that is to be decoded (`scheduler.Work`)."""

    sent: object  # a memoryview, or see `requests.encoded`
    serving: Serving
    record: RequestRecord
    bundle: Bundle

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        with self.record.stage("decode"):
            data = bytes(self.sent) if isinstance(self.sent, memoryview) else encoded(self.sent)
            predictor = self.bundle.predictor
            decoded = decode_for(data, predictor.preprocessing, max_pixels=self.serving.settings.max_pixels)
            self.record.add_image(decoded.width * decoded.height)
            return predictor.prepare(decoded)

    def finish(self, row: Row) -> Row:
        return row


@dataclass(eq=False)
class _Pixels:
    """An image that a client has prepared itself (`scheduler.Work`)."""

    prepared: NDArray[np.uint8] | PreparedImage

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        return self.prepared

    def finish(self, row: Row) -> Row:
        return row


def _encoded_images(serving: Serving, record: RequestRecord, bundle: Bundle, tensor: Tensor) -> list[_EncodedImage]:
    if not isinstance(tensor.data, UndecodedElements):
        raise ParameterError(f"input {IMAGE}: datatype", expected="BYTES", found=tensor.datatype[:20])
    if tensor.shape[1:] not in ((), (1,)) or not tensor.shape:
        found = str(list(tensor.shape))[:100]
        raise ParameterError(f"input {IMAGE}: shape", expected="[number of images]", found=found)
    _check_count(serving, tensor.shape[0])
    images = _elements(tensor.data, tensor.shape[0])
    return [_EncodedImage(image, serving, record, bundle) for image in images]


def _pixels(serving: Serving, record: RequestRecord, bundle: Bundle, inputs: Mapping[str, Tensor]) -> list[_Pixels]:
    specs = bundle.manifest.inputs
    if set(inputs) != {spec.name for spec in specs}:
        expected = f"{' and '.join(spec.name for spec in specs)}, or {IMAGE} alone"
        raise ParameterError("inputs", expected=expected, found=", ".join(inputs)[:200] or "none")
    arrays = {spec.name: _checked(inputs[spec.name], spec) for spec in specs}
    pixels = cast(NDArray[np.uint8], arrays["pixels"])
    count, height, width = pixels.shape[:3]
    _check_count(serving, count)
    preprocessing = bundle.manifest.preprocessing
    longest = preprocessing.longest_edge if isinstance(preprocessing, DetectionPreprocessing) else max(height, width)
    if min(height, width) < 1 or max(height, width) > longest:
        expected = f"edges from 1 to {longest} pixels"
        raise ParameterError("input pixels: shape", expected=expected, found=f"{height} x {width}")
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
        return [_Pixels(image) for image in pixels]
    # Each without its padding: the answers are the same, for less work.
    return [
        _Pixels(PreparedImage(image[:h, :w], width=w, height=h))
        for image, (h, w) in zip(pixels, sizes.tolist(), strict=True)
    ]


def _check_count(serving: Serving, count: int) -> None:
    if not 1 <= count <= serving.settings.max_images:
        raise ParameterError("inputs", expected=f"1 to {serving.settings.max_images} images", found=count)


def _checked(tensor: Tensor, spec: TensorSpec) -> NDArray[np.generic]:
    """A tensor as the array that the graph takes."""
    if tensor.datatype != spec.datatype:
        raise ParameterError(f"input {spec.name}: datatype", expected=spec.datatype, found=tensor.datatype[:20])
    fits = len(tensor.shape) == len(spec.shape) and all(
        wanted in (found, -1) or isinstance(wanted, str) for found, wanted in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        expected = f"[{', '.join(map(str, spec.shape))}]"
        raise ParameterError(f"input {spec.name}: shape", expected=expected, found=str(list(tensor.shape))[:100])
    assert isinstance(tensor.data, np.ndarray)
    # Numbers of eight bytes may begin anywhere in a body; the runtime expects them where the processor does.
    return np.require(tensor.data.reshape(tensor.shape), requirements="A")


def _output(bundle: Bundle, output: RequestedOutput, array: NDArray[np.generic]) -> Tensor:
    if not output.classification:
        (datatype,) = [spec.datatype for spec in bundle.manifest.outputs if spec.name == output.name]
        return Tensor(output.name, datatype, array.shape, array)
    labels = bundle.predictor.labels
    count = min(output.classification, len(labels))
    best = np.argsort(-array.astype(np.float32), axis=1, kind="stable")[:, :count]
    texts = [f"{row[i]:f}:{i}:{labels[i]}".encode() for row, order in zip(array, best, strict=True) for i in order]
    return Tensor(output.name, "BYTES", (len(array), count), texts)


def tensor_from_bytes(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> Tensor:
    """A tensor in binary form: numbers little-endian in row-major order; of BYTES each element after its length
    (four bytes, little-endian). Numbers are not copied.

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
    """A tensor of a list of numbers (of BYTES: of texts or bytes), flat or nested.

    Raises:
        ParameterError: they are not of the datatype or the shape.
    """
    shape = _shape(name, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, UndecodedElements(values))
    whole = _dtype(name, datatype) is not np.float32
    try:
        # As objects: NumPy would make room for the longest text as many times as there are elements.
        flat = np.asarray(values, dtype=object).ravel().tolist()
    except ValueError as error:
        raise ParameterError(f"{_input(name)}: data", expected="a list of numbers", found=error) from error
    kinds = set(map(type, flat)) - ({int} if whole else {int, float})
    if kinds:  # `true` would be taken for 1, "1" for 1, and 1.5 cut off
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ParameterError(f"{_input(name)}: data", expected="integers" if whole else "numbers", found=found)
    try:
        return tensor_from_array(name, datatype, shape, np.array(flat, np.int64 if whole else np.float64))
    except OverflowError as error:
        raise ParameterError(f"{_input(name)}: data", expected=f"values of {datatype}", found=error) from error


def tensor_from_array(name: str, datatype: str, shape: Sequence[int], array: NDArray[np.generic]) -> Tensor:
    """A tensor of numbers of some wider type.

    Raises:
        ParameterError: they are not of the datatype or the shape.
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
    """A tensor in binary form, see `tensor_from_bytes`."""
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


def _elements(undecoded: UndecodedElements, count: int) -> list[object]:
    """The elements of the input `image`: parts of the memoryview, or bytes or text."""
    data, field = undecoded.elements, f"input {IMAGE}: data"
    if not isinstance(data, memoryview):
        if not isinstance(data, list) or len(data) != count:
            found = f"{len(data)}" if isinstance(data, list) else preview(data)
            raise ParameterError(field, expected=f"a list of {count} images", found=found)
        # of the shape [n, 1] each stands in a list of its own
        values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]
        for value in values:
            if not isinstance(value, (bytes, str)):
                raise ParameterError(field, expected="base64 or a data URL as text", found=preview(value))
        return values
    elements: list[object] = []
    start = 0
    while start < len(data) and len(elements) < count:
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if start + 4 > len(data) or end > len(data):
            expected = "each element after its length in four bytes"
            raise ParameterError(field, expected=expected, found=f"an end in element {len(elements)}")
        elements.append(data[start + 4 : end])
        start = end
    if start != len(data) or len(elements) != count:
        found = f"{len(elements)}, and {len(data) - start} bytes after them"
        raise ParameterError(field, expected=f"{count} images for its shape", found=found)
    return elements
