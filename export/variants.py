"""Smaller and faster variants of an exported graph: weights in float16, all in float16, weights and sums in 8 bits.

Every variant takes and gives what the float32 graph takes and gives. What it loses is measured by who asked for it.
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
from vitrine.export.parity import Inputs

# How much the answers to the calibration images may change on average before layers are left in float32, see `damage`.
MAX_DAMAGE = 0.02
_MIN_BYTES = 1024  # of a tensor that is worth storing in float16
_LARGEST_HALF = 65504.0
# Weights have 7 bits (`reduce_range`): the products of an 8-bit activation and two of them then fit the 16-bit sums of
# processors with AVX2 and without VNNI, at most 2 x 255 x 64 = 32640. With 8 bits these saturate, and the answers are
# wrong on such machines alone.
_WEIGHTS = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
# What a layer answers goes on in float32: rounding it for what is not quantised only loses.
_OPTIONS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
_DYNAMIC = "MatMul", "Gemm"  # ONNX Runtime's integer convolution is slower on a CPU than its float32 one
_STATIC = "MatMul", "Gemm", "Conv"

Outputs = list[NDArray[Any]]
Quantise = Callable[[Sequence[str]], onnx.ModelProto]  # nodes to quantise to the quantised graph


@dataclass(frozen=True)
class VariantGraph:
    """A variant's graph."""

    model: onnx.ModelProto
    float_layers: tuple[str, ...] = ()  # left in float32, because the answers suffer most from rounding them


def make_variant(model: onnx.ModelProto, precision: Precision, calibration: Sequence[Inputs]) -> VariantGraph:
    """The variant of a float32 graph; `model` is left as it is.

    Args:
        calibration: batches of inputs made of training images, for the 8-bit variants.

    Raises:
        ExportError: 8-bit weights change the answers too much in every layer, or there are no layers to quantise.
    """
    if precision is Precision.FP16_WEIGHTS:
        return VariantGraph(_finished(store_half(model)))
    if precision is Precision.FP16:
        return VariantGraph(_finished(compute_half(model)))
    if precision is Precision.FP32:
        return VariantGraph(model)
    with tempfile.TemporaryDirectory() as folder:
        make = _dynamic if precision is Precision.INT8_DYNAMIC else _static
        layers, quantise = make(model, calibration, Path(folder))
        if not layers:
            raise ExportError(f"{precision}: expected layers with weights to quantise, found none")
        quantised, kept = _with_sensitive_layers_in_float(model, layers, quantise, calibration, precision)
    return VariantGraph(_finished(quantised), tuple(name.rpartition("/")[0] for name in kept))


def store_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights in float16, each behind a cast to float32, which ONNX Runtime does once when it loads the graph."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    casts = []
    for tensor in half.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < _MIN_BYTES:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > _LARGEST_HALF:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *half.graph.node]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half


def compute_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """All sums in float16, for GPUs; inputs and outputs stay what they are."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(half, keep_io_types=True, disable_shape_infer=True)
    del converted.graph.value_info[:]  # it still says float32
    OnnxModel(converted).topological_sort()  # the casts stand behind the nodes that use them
    return converted


def damage(reference: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """How far answers are from those of float32, 0 to 1.

    Of a classifier, the mean over the images of the total variation distance of the probabilities. Of a detector, the
    mean over the queries that have a score of at least 0.05 in either: the difference of the scores and the largest one
    of the corners, at most 1, and 1 where the class is another.
    """
    parts = []
    for wanted, given in zip(reference, found, strict=True):
        if len(wanted) == 1:
            parts.append(np.abs(wanted[0] - given[0]).sum(axis=-1) / 2)
            continue
        (scores, class_ids, boxes), (scores_, class_ids_, boxes_) = wanted, given
        apart = np.abs(scores - scores_) + np.abs(boxes - boxes_).max(axis=-1) + (class_ids != class_ids_)
        parts.append(apart[np.maximum(scores, scores_) >= CONFIDENT_SCORE])
    values = np.concatenate(parts)
    return float(np.minimum(values, 1).mean()) if len(values) else 0.0


def _with_sensitive_layers_in_float(
    model: onnx.ModelProto,
    layers: Sequence[str],
    quantise: Quantise,
    calibration: Sequence[Inputs],
    precision: Precision,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Quantise all layers if the answers bear it, else all but the fewest of those that harm them most."""
    reference = _answers(model, calibration)

    def without(count: int) -> tuple[onnx.ModelProto, float]:
        quantised = quantise([layer for layer in layers if layer not in ranked[:count]])
        return quantised, damage(reference, _answers(quantised, calibration))

    ranked: list[str] = []
    quantised, harm = without(0)
    if harm <= MAX_DAMAGE:
        return quantised, ()
    some = calibration[: max(1, len(calibration) // 4)]
    alone = {layer: damage(reference[: len(some)], _answers(quantise([layer]), some)) for layer in layers}
    ranked = sorted(layers, key=lambda layer: -alone[layer])
    too_few, count = 0, 1
    while (tried := without(min(count, len(layers) - 1)))[1] > MAX_DAMAGE:
        if count >= len(layers) - 1:
            limit = f"answers within {MAX_DAMAGE} of float32's on average"
            raise ExportError(f"{precision}: expected {limit}, found {tried[1]:.3f} with a single layer in 8 bits")
        too_few, count = count, 2 * count
    enough, quantised = min(count, len(layers) - 1), tried[0]
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        attempt, harm = without(middle)
        if harm <= MAX_DAMAGE:
            enough, quantised = middle, attempt
        else:
            too_few = middle
    return quantised, tuple(ranked[:enough])


def _dynamic(model: onnx.ModelProto, calibration: Sequence[Inputs], folder: Path) -> tuple[list[str], Quantise]:
    def quantise(nodes: Sequence[str]) -> onnx.ModelProto:
        file = folder / "dynamic.onnx"
        with _quiet():
            quantize_dynamic(
                model,
                file,
                op_types_to_quantize=list(_DYNAMIC),
                nodes_to_quantize=list(nodes),
                **_WEIGHTS,
            )
        return onnx.load(file)

    return _layers(model, _DYNAMIC), quantise


def _static(model: onnx.ModelProto, calibration: Sequence[Inputs], folder: Path) -> tuple[list[str], Quantise]:
    source = folder / "model.onnx"
    onnx.save(model, source)

    def quantise(nodes: Sequence[str]) -> onnx.ModelProto:
        file = folder / "static.onnx"
        with _quiet():
            quantize_static(
                source,
                file,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                op_types_to_quantize=list(_STATIC),
                nodes_to_quantize=list(nodes),
                calibration_cache_path=folder / "ranges.json",
                extra_options=dict(_OPTIONS),
                **_WEIGHTS,
            )
        return onnx.load(file)

    return _layers(model, _STATIC), quantise


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._batches: Iterator[Inputs] = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)


def _layers(model: onnx.ModelProto, operators: Sequence[str]) -> list[str]:
    """The nodes that multiply activations with weights, not activations with each other as attention does."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in operators and node.input[1] in weights]


def _answers(model: onnx.ModelProto, batches: Sequence[Inputs]) -> list[Outputs]:
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
    """Without the library's advice on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
