"""Smaller and faster variants of an exported graph: float16 weights, float16, 8-bit weights and matrix products.

Variants have the inputs and outputs of the float32 graph. The caller measures their accuracy.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from vitrine.bundle.manifest import Precision
from vitrine.bundle.runtime import CPU
from vitrine.bundle.tolerances import CONFIDENT_SCORE
from vitrine.export.errors import ExportError
from vitrine.export.inputs import Inputs

MAX_OUTPUT_ERROR = 0.02  # mean `output_error` on the calibration images above which layers are left in float32
_MIN_BYTES = 1024  # of a tensor that is stored in float16
_MAX_FLOAT16 = 65504.0
# Weights have 7 bits (`reduce_range`): the sum of two products with 8-bit activations, at most 2 x 255 x 64 = 32640,
# then fits the 16-bit accumulators of processors with AVX2 but without VNNI. 8-bit weights would saturate them and give
# wrong outputs on these machines only.
_WEIGHTS = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
# Layer outputs stay in float32: quantising them for operators that are not quantised only loses accuracy.
_OPTIONS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
_DYNAMIC = "MatMul", "Gemm"  # ONNX Runtime's integer convolution is slower on CPU than float32
_STATIC = "MatMul", "Gemm", "Conv"

Outputs = list[NDArray[Any]]
Quantise = Callable[[Sequence[str]], onnx.ModelProto]  # from the nodes to quantise to the quantised graph


@dataclass(frozen=True)
class VariantGraph:
    """A variant's graph."""

    model: onnx.ModelProto
    float_layers: tuple[str, ...] = ()  # most sensitive layers, left in float32


def make_variant(model: onnx.ModelProto, precision: Precision, calibration: Sequence[Inputs]) -> VariantGraph:
    """Return a variant of a float32 graph; `model` is not modified.

    Args:
        calibration: input batches of training images, for the 8-bit variants.

    Raises:
        ExportError: a single 8-bit layer already changes the outputs too much, or there are no layers to quantise.
    """
    if precision is Precision.FP16_WEIGHTS:
        return VariantGraph(_finished(to_fp16_weights(model)))
    if precision is Precision.FP16:
        return VariantGraph(_finished(to_fp16(model)))
    if precision is Precision.FP32:
        return VariantGraph(model)
    with tempfile.TemporaryDirectory() as folder:
        layers, quantise = _quantiser(model, precision, calibration, Path(folder))
        if not layers:
            raise ExportError(f"{precision}: expected layers with weights to quantise, found none")
        quantised, float_layers = _quantise_insensitive(model, layers, quantise, calibration, precision)
    return VariantGraph(_finished(quantised), tuple(name.rpartition("/")[0] for name in float_layers))


def to_fp16_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store weights in float16, each followed by a cast to float32, which ONNX Runtime folds at load time."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    casts = []
    for tensor in half.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < _MIN_BYTES:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > _MAX_FLOAT16:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *half.graph.node]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute in float16, for GPUs; inputs and outputs keep their types."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(half, keep_io_types=True, disable_shape_infer=True)
    del converted.graph.value_info[:]  # its types are still float32
    OnnxModel(converted).topological_sort()  # the casts come after the nodes that use them
    return converted


def output_error(reference: Sequence[Outputs], outputs: Sequence[Outputs]) -> float:
    """Mean deviation of outputs from those of float32, 0 to 1.

    For a classifier, the mean over the images of the total variation distance between the probabilities. For a
    detector, the mean over queries with a score of at least 0.05 in either: the difference of the scores plus the
    largest difference of a corner, at most 1, and 1 if the class differs.
    """
    errors = []
    for expected, found in zip(reference, outputs, strict=True):
        if len(expected) == 1:
            errors.append(np.abs(expected[0] - found[0]).sum(axis=-1) / 2)
            continue
        (scores, class_ids, boxes), (scores_, class_ids_, boxes_) = expected, found
        error = np.abs(scores - scores_) + np.abs(boxes - boxes_).max(axis=-1) + (class_ids != class_ids_)
        errors.append(error[np.maximum(scores, scores_) >= CONFIDENT_SCORE])
    values = np.concatenate(errors)
    return float(np.minimum(values, 1).mean()) if len(values) else 0.0


def _quantise_insensitive(
    model: onnx.ModelProto,
    layers: Sequence[str],
    quantise: Quantise,
    calibration: Sequence[Inputs],
    precision: Precision,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Quantise all layers, except the most sensitive ones if the outputs would change too much.

    The smallest sufficient number of float32 layers is found by doubling and bisection.
    """
    reference = _run(model, calibration)

    def without(count: int) -> tuple[onnx.ModelProto, float]:
        quantised = quantise([layer for layer in layers if layer not in ranked[:count]])
        return quantised, output_error(reference, _run(quantised, calibration))

    ranked: list[str] = []
    quantised, error = without(0)
    if error <= MAX_OUTPUT_ERROR:
        return quantised, ()
    subset = calibration[: max(1, len(calibration) // 4)]
    sensitivity = {layer: output_error(reference[: len(subset)], _run(quantise([layer]), subset)) for layer in layers}
    ranked = sorted(layers, key=lambda layer: -sensitivity[layer])
    too_few, count = 0, 1
    while (attempt := without(min(count, len(layers) - 1)))[1] > MAX_OUTPUT_ERROR:
        if count >= len(layers) - 1:
            limit = f"outputs within {MAX_OUTPUT_ERROR} of float32's on average"
            raise ExportError(f"{precision}: expected {limit}, found {attempt[1]:.3f} with a single layer in 8 bits")
        too_few, count = count, 2 * count
    enough, quantised = min(count, len(layers) - 1), attempt[0]
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        attempt = without(middle)
        if attempt[1] <= MAX_OUTPUT_ERROR:
            enough, quantised = middle, attempt[0]
        else:
            too_few = middle
    return quantised, tuple(ranked[:enough])


def _quantiser(
    model: onnx.ModelProto, precision: Precision, calibration: Sequence[Inputs], folder: Path
) -> tuple[list[str], Quantise]:
    """Return the layers that can be quantised, and the function that quantises some of them."""
    dynamic = precision is Precision.INT8_DYNAMIC
    operators = _DYNAMIC if dynamic else _STATIC
    source, file = folder / "model.onnx", folder / "quantised.onnx"
    onnx.save(model, source)

    def quantise(nodes: Sequence[str]) -> onnx.ModelProto:
        selected = {"op_types_to_quantize": list(operators), "nodes_to_quantize": list(nodes)}
        with _quiet():
            if dynamic:
                quantize_dynamic(model, file, **selected, **_WEIGHTS)
            else:
                quantize_static(
                    source,
                    file,
                    _Reader(calibration),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    calibration_cache_path=folder / "ranges.json",
                    extra_options=dict(_OPTIONS),
                    **selected,
                    **_WEIGHTS,
                )
        return onnx.load(file)

    weights = {tensor.name for tensor in model.graph.initializer}
    # Nodes that multiply activations with weights, unlike attention's products of activations.
    layers = [node.name for node in model.graph.node if node.op_type in operators and node.input[1] in weights]
    return layers, quantise


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._batches: Iterator[Inputs] = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)


def _run(model: onnx.ModelProto, batches: Sequence[Inputs]) -> list[Outputs]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(CPU))
    return [session.run(None, inputs) for inputs in batches]


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    model.producer_name, model.producer_version = "vitrine", ""
    del model.metadata_props[:]
    onnx.checker.check_model(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's warnings on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
