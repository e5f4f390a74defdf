"""Variants of exported graphs: inputs, outputs, sizes, accuracy, and the layers left in float32."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vitrine.bundle.loading import read_manifest
from vitrine.bundle.manifest import Precision
from vitrine.bundle.tolerances import GOLDEN
from vitrine.export import variants
from vitrine.export.errors import ExportError
from vitrine.export.inputs import Inputs, make_inputs
from vitrine.export.variants import MAX_OUTPUT_ERROR, make_variant, output_error, to_fp16, to_fp16_weights
from vitrine.models.training.data.layouts import load_split

INT8 = Precision.INT8_DYNAMIC, Precision.INT8_STATIC
SMALLER = tuple(precision for precision in Precision if precision is not Precision.FP32)
Case = tuple[onnx.ModelProto, list[Inputs]]


@pytest.fixture(params=["colours", "squares"])
def case(request: pytest.FixtureRequest, tiny_bundles: Path, colours: Path, squares: Path) -> Case:
    """A tiny exported graph and batches of its training images."""
    path = tiny_bundles / request.param / "1"
    manifest = read_manifest(path)
    data = load_split({"colours": colours, "squares": squares}[request.param], manifest.task, "train")
    batches = np.arange(24).reshape(3, 8).tolist()
    return onnx.load(path / "model.onnx"), [
        make_inputs([data.image(i) for i in batch], manifest.preprocessing) for batch in batches
    ]


@pytest.fixture
def classifier(tiny_bundles: Path, colours: Path) -> Case:
    manifest = read_manifest(tiny_bundles / "colours" / "1")
    data = load_split(colours, manifest.task, "train")
    inputs = [make_inputs([data.image(i) for i in range(k, 120, 5)], manifest.preprocessing) for k in range(4)]
    return onnx.load(tiny_bundles / "colours" / "1" / "model.onnx"), inputs


def answers(model: onnx.ModelProto, *batches: Inputs) -> list[list[NDArray[np.float64]]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, inputs) for inputs in batches]


def weights(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("precision", SMALLER)
def test_variant_has_the_inputs_and_outputs_of_float32(precision: Precision, case: Case) -> None:
    model, calibration = case
    before = model.SerializeToString()
    variant = make_variant(model, precision, calibration).model
    assert model.SerializeToString() == before
    onnx.checker.check_model(variant, full_check=True)
    assert list(variant.graph.input) == list(model.graph.input)
    assert list(variant.graph.output) == list(model.graph.output)
    assert output_error(answers(model, *calibration), answers(variant, *calibration)) <= MAX_OUTPUT_ERROR

    (batch,) = answers(variant, {name: values[:3] for name, values in calibration[0].items()})
    assert all(len(output) == 3 for output in batch)
    (single,) = answers(variant, {name: values[:1] for name, values in calibration[0].items()})
    assert all(len(output) == 1 for output in single)


@pytest.mark.parametrize("precision", SMALLER)
def test_the_same_graph_gives_the_same_bytes(precision: Precision, case: Case) -> None:
    model, calibration = case
    first, again = (make_variant(model, precision, calibration).model.SerializeToString() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("precision", SMALLER)
@pytest.mark.parametrize("case", ["squares"], indirect=True)
def test_padding_is_as_invisible_as_in_float32(precision: Precision, case: Case) -> None:
    model, calibration = case
    variant = make_variant(model, precision, calibration).model
    pixels = calibration[0]["pixels"][:1, :40, :56]
    alone = {"pixels": pixels, "sizes": np.array([[40, 56]])}
    padded = {
        "pixels": np.pad(pixels, ((0, 0), (0, 31), (0, 17), (0, 0)), constant_values=255),
        "sizes": alone["sizes"],
    }
    (expected, found) = answers(variant, alone, padded)
    np.testing.assert_allclose(found[0], expected[0], atol=GOLDEN[precision])
    np.testing.assert_allclose(found[2], expected[2], atol=GOLDEN[precision])


def test_large_weights_are_stored_in_float16(case: Case) -> None:
    model, _ = case
    whole, half = weights(model), weights(to_fp16_weights(model))
    large = {name for name, values in whole.items() if values.dtype == np.float32 and values.nbytes >= 1024}
    assert large
    for name in large:
        np.testing.assert_array_equal(half[f"{name}.half"], whole[name].astype(np.float16))
    assert half.keys() == (whole.keys() - large) | {f"{name}.half" for name in large}


def test_weights_beyond_float16_stay_in_float32(classifier: Case) -> None:
    model, _ = classifier
    tensor = next(t for t in model.graph.initializer if t.name == "network.pos_embed.embedding")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    np.testing.assert_array_equal(weights(to_fp16_weights(model))[tensor.name], values)


def test_fp16_computes_in_float16(case: Case) -> None:
    model, _ = case
    half = to_fp16(model)
    products = [node for node in half.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    stored = weights(half)
    used = [stored[node.input[1]] for node in products if node.input[1] in stored]
    assert used
    assert {values.dtype for values in used} == {np.dtype(np.float16)}


@pytest.mark.parametrize("precision", INT8)
def test_weights_of_eight_bits_cannot_overflow_sixteen_bit_sums(precision: Precision, case: Case) -> None:
    model, calibration = case
    stored = weights(make_variant(model, precision, calibration).model)
    rounded = [values for values in stored.values() if values.dtype == np.int8 and values.size > 1 and values.any()]
    assert max(np.abs(values.astype(int)).max() for values in rounded) == 64
    assert np.iinfo(np.int16).max >= 2 * 255 * 64
    # The only unsigned tensors are zero points of activations.
    assert not any(values.ndim for values in stored.values() if values.dtype == np.uint8)


@pytest.mark.parametrize("precision", INT8)
def test_products_of_two_activations_stay_in_float32(precision: Precision, case: Case) -> None:
    model, calibration = case
    known = weights(model)
    products = {n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] not in known}
    assert products
    variant = make_variant(model, precision, calibration).model
    rounded = {o for n in variant.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    kept = {node.name: node for node in variant.graph.node if node.op_type == "MatMul"}
    assert products <= kept.keys()
    assert not any(rounded.intersection(kept[name].input) for name in products)


@pytest.mark.parametrize("precision", INT8)
def test_a_sensitive_layer_is_found_and_left_in_float32(
    precision: Precision, classifier: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = classifier
    before = answers(model, *calibration)
    monkeypatch.setattr(variants, "MAX_OUTPUT_ERROR", 1.0)
    usual = output_error(before, answers(make_variant(model, precision, calibration).model, *calibration))

    _widen(model, "network.blocks.0.norm1", "network.blocks.0.attn.qkv/MatMul")
    reference = answers(model, *calibration)
    assert output_error(before, reference) < 1e-3  # the same network, with values that 8 bits cannot represent
    careless = make_variant(model, precision, calibration)
    assert careless.float_layers == ()
    harm = output_error(reference, answers(careless.model, *calibration))
    assert harm > 2 * usual

    monkeypatch.setattr(variants, "MAX_OUTPUT_ERROR", (usual + harm) / 2)
    careful = make_variant(model, precision, calibration)
    assert careful.float_layers == ("network.blocks.0.attn.qkv",)
    assert output_error(reference, answers(careful.model, *calibration)) <= (usual + harm) / 2


def _widen(model: onnx.ModelProto, norm: str, layer: str) -> None:
    """Multiply one output channel of `norm` by a million, and divide the corresponding weights of `layer` by it."""
    nodes = {node.name: node for node in model.graph.node}
    scale, shift, inputs = (np.ones(16, np.float32) for _ in range(3))
    scale[3] = shift[3] = inputs[3] = 1e6
    stored = weights(model)
    changes = (
        (nodes[f"{norm}/LayerNormalization"], 1, scale),
        (nodes[f"{norm}/LayerNormalization"], 2, shift),
        (nodes[layer], 1, 1 / inputs[:, None]),
    )
    for node, position, factor in changes:  # nodes may share a tensor: each gets its own copy
        values = (stored[node.input[position]] * factor).astype(np.float32)
        node.input[position] = f"{node.name}.{position}"
        model.graph.initializer.append(numpy_helper.from_array(values, node.input[position]))


@pytest.mark.parametrize("precision", INT8)
def test_output_error_with_a_single_layer_is_refused(
    precision: Precision, classifier: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = classifier
    monkeypatch.setattr(variants, "MAX_OUTPUT_ERROR", -1.0)
    expected = rf"{precision}: expected outputs within -1.0 of float32's on average, found \d\.\d+ with a single layer"
    with pytest.raises(ExportError, match=expected):
        make_variant(model, precision, calibration)


@pytest.mark.parametrize("precision", INT8)
def test_a_graph_without_weights_cannot_be_quantised(precision: Precision) -> None:
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["floats"], ["probabilities"], "softmax", axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 4])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 4])]
    graph = helper.make_graph(nodes, "weightless", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(ExportError, match=f"{precision}: expected layers with weights to quantise, found none"):
        make_variant(model, precision, [{"pixels": np.zeros((1, 4), np.uint8)}])


def test_output_error_of_a_classifier_is_the_probability_that_moved() -> None:
    reference = [[np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])]]
    found = [[np.array([[0.3, 0.5, 0.2], [1.0, 0.0, 0.0]])]]
    assert output_error(reference, reference) == 0
    assert output_error(reference, found) == pytest.approx(0.1)


def test_output_error_of_a_detector_counts_what_either_finds() -> None:
    boxes = np.zeros((1, 3, 4))
    reference = [[np.array([[0.9, 0.01, 0.01]]), np.array([[1, 0, 0]]), boxes]]
    moved = boxes.copy()
    moved[0, 0, 2] = 0.2
    assert output_error(reference, reference) == 0
    found = [[np.array([[0.8, 0.02, 0.01]]), np.array([[1, 1, 0]]), moved]]
    assert output_error(reference, found) == pytest.approx(0.3)
    assert output_error(reference, [[reference[0][0], np.array([[0, 0, 0]]), boxes]]) == 1
    invented = np.array([[0.9, 0.01, 0.51]])
    assert output_error(reference, [[invented, np.array([[1, 0, 0]]), boxes]]) == pytest.approx(0.25)
    silent = [[np.zeros((1, 3)), np.zeros((1, 3), int), boxes]]
    assert output_error(silent, silent) == 0
