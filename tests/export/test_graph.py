"""The ONNX graph: the contract's tensors, torch's outputs for any size and padding, torch's names."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vitrine.bundle.images import pad_and_stack
from vitrine.bundle.loading import read_manifest
from vitrine.bundle.runtime import OnnxNetwork
from vitrine.export.graph import export_graph, fuse_transformer, write_metadata
from vitrine.models.build import build_model
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.network import TorchNetwork

pytestmark = pytest.mark.slow

TINY_DETR = {
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 16,
    "num_queries": 7,
    "backbone_width": 8,
}
TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_MIXER = {"patch_size": 8, "embed_dim": 32, "depth": 2, "tokens_mlp_dim": 8, "channels_mlp_dim": 16}
NETWORKS: dict[str, tuple[str, dict[str, object], tuple[int, int]]] = {
    "BiT": ("resnetv2", {"image_size": 64, "layers": (1, 1), "width_factor": 0.5}, (64, 64)),
    "BiT for small images": ("resnetv2", {"image_size": 32, "layers": (1, 1), "stem": "small"}, (32, 32)),
    "post-norm ViT, not square": (
        "vit",
        {**TINY_VIT, "image_size": (32, 64), "norm": "post", "representation_size": 16, "gelu": "tanh"},
        (32, 64),
    ),
    "EfficientNet": ("efficientnet", {"image_size": (33, 64), "width_factor": 0.25, "depth_factor": 0.5}, (33, 64)),
    "ResNet": ("resnet", {"image_size": 32, "layers": (1, 1), "width": 8}, (32, 32)),
    "DETR with query boxes": (
        "detr",
        {**TINY_DETR, "backbone_layers": (1, 1), "queries": "boxes", "denoising": 2, "query_groups": 2},
        (64, 96),
    ),
    "DETR with a neck and selected queries": (
        "detr",
        {
            **{name: value for name, value in TINY_DETR.items() if name != "backbone_width"},
            "backbone": "efficientnet_lite0",
            "neck": "fusion",
            "queries": "selected",
            "scores": "sigmoid",
        },
        (64, 96),
    ),
    "EfficientNet with a ViT": (
        "efficientnet",
        {
            "image_size": 64,
            "width_factor": 0.25,
            "depth_factor": 0.5,
            "head": "vit",
            "vit_embed_dim": 16,
            "vit_num_heads": 2,
        },
        (64, 64),
    ),
    "Mixer": ("mlp_mixer", {**TINY_MIXER, "image_size": 32, "gelu": "tanh"}, (32, 32)),
    "DETR with bottlenecks, DC5": (
        "detr",
        {
            **TINY_DETR,
            "backbone_layers": (1, 1, 1, 1),
            "backbone_block": "bottleneck",
            "backbone_norm": "frozen",
            "dilation": True,
            "unused_classes": 2,
        },
        (64, 96),
    ),
}


Exported = tuple[ServedClassifier | ServedDetector, Path, tuple[int, int]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return the torch module, the graph and the traced size of a network by name."""

    @functools.cache
    def export(name: str) -> Exported:
        module, size = make_module(name)
        file = tmp_path_factory.mktemp("graphs") / "model.onnx"
        export_graph(module, size, file)
        return module, file, size

    return export


def make_module(name: str) -> tuple[ServedClassifier | ServedDetector, tuple[int, int]]:
    """A network with random weights large enough for distinct outputs, and the size to trace with."""
    architecture, settings, size = NETWORKS[name]
    torch.manual_seed(0)
    network = build_model(architecture, settings, 4).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_var.fill_(0.3)
    calibration = (1.5, 0.25) if settings.get("scores") == "sigmoid" else ()
    return served(network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), *calibration).eval(), size


@pytest.mark.parametrize("name", NETWORKS)
def test_every_architecture_agrees_in_onnx_and_torch(name: str, exported: Callable[[str], Exported]) -> None:
    module, file, (height, width) = exported(name)
    inputs = {}
    if isinstance(module, ServedDetector):
        height, width = 57, 83
        inputs["sizes"] = np.array([[57, 83], [40, 83], [57, 31]])
    inputs["pixels"] = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    expected = TorchNetwork(module, torch.device("cpu"))(**inputs)
    found = OnnxNetwork(file)(**inputs)
    assert np.ptp(expected[0]) > 0.01
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    values = {output for node in onnx.load(file).graph.node for output in node.output}
    blocks = [part for part, child in module.named_modules() if type(child).__module__ == "vitrine.models.transformer"]
    last = [part for part in blocks if part.endswith("mlp") or part.count(".") == 2]
    assert len(values.intersection(last)) >= len(last) - 2  # blocks' outputs are named after them


@pytest.mark.parametrize("name", ["BiT", "EfficientNet", "ResNet"])
def test_convolutional_classifiers_take_any_size(name: str, exported: Callable[[str], Exported]) -> None:
    module, file, _ = exported(name)
    network = OnnxNetwork(file)
    assert network.inputs[0].shape == ("batch", "height", "width", 3)
    for height, width in ((64, 64), (57, 83), (130, 32)):
        pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        (expected,), (found,) = TorchNetwork(module, torch.device("cpu"))(pixels=pixels), network(pixels=pixels)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["DETR with query boxes", "DETR with bottlenecks, DC5", "DETR with a neck and selected queries"]
)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_padded_batch_equals_single_images(name: str, batch: int, exported: Callable[[str], Exported]) -> None:
    network = OnnxNetwork(exported(name)[1])
    random = np.random.default_rng(batch)
    edges = [(97, 131), *random.integers(33, 98, (batch - 1, 2)).tolist()]  # odd sizes, and room to pad the first
    images = [random.integers(0, 256, (*edge, 3), dtype=np.uint8) for edge in edges]
    pixels, sizes = pad_and_stack([*images, np.zeros((101, 150, 3), np.uint8)])
    pixels, sizes = pixels[:-1], sizes[:-1]
    noisy = random.integers(0, 256, pixels.shape, dtype=np.uint8)
    for row, image in zip(noisy, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    together, beside_noise = network(pixels=pixels, sizes=sizes), network(pixels=noisy, sizes=sizes)
    for i, image in enumerate(images):
        alone = network(pixels=image[None], sizes=np.array([image.shape[:2]]))
        for a, b, c in zip(alone, together, beside_noise, strict=True):
            np.testing.assert_allclose(a[0], b[i], atol=1e-4)
            np.testing.assert_array_equal(b[i], c[i])


@pytest.mark.parametrize("name", ["ResNet", "EfficientNet"])
def test_batch_norm_is_folded(name: str, exported: Callable[[str], Exported], tmp_path: Path) -> None:
    module, file, size = exported(name)
    export_graph(module, size, tmp_path / "traced.onnx", optimised=False)
    folded, traced = (
        {node.op_type for node in onnx.load(path).graph.node} for path in (file, tmp_path / "traced.onnx")
    )
    assert "BatchNormalization" in traced - folded
    frozen = onnx.load(exported("DETR with bottlenecks, DC5")[1]).graph
    assert "BatchNormalization" not in {node.op_type for node in frozen.node}


def test_onnx_runtimes_own_fusions_are_written_for_comparison(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    _, file, size = exported("Mixer")
    fuse_transformer(file, tmp_path / "fused.onnx")
    assert {node.domain for node in onnx.load(tmp_path / "fused.onnx").graph.node} == {"", "com.microsoft"}
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    (found,) = OnnxNetwork(tmp_path / "fused.onnx")(pixels=np.zeros((3, *size, 3), np.uint8))
    assert found.shape == (3, 4)


def test_metadata_is_replaced_and_nothing_else(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    shutil.copy(exported("Mixer")[1], file)
    before = onnx.load(file).graph
    for text in ("one", "two"):
        write_metadata(file, {"vitrine": text})
        assert OnnxNetwork(file).metadata == {"vitrine": text}
    assert onnx.load(file).graph == before


def test_the_graph_holds_standardised_filters(exported: Callable[[str], Exported]) -> None:
    graph = onnx.load(exported("BiT")[1]).graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    filters = [values[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    assert len(filters) == 1 + 2 * 4
    for weight in filters:
        assert np.abs(weight.mean(axis=(1, 2, 3))).max() < 1e-5
        assert np.abs(weight.var(axis=(1, 2, 3)) - 1).max() < 1e-3


def test_the_graph_has_the_contracts_inputs_outputs_and_axes(tiny_bundles: Path) -> None:
    classifier = read_manifest(tiny_bundles / "colours" / "1")
    assert [(spec.name, spec.datatype, spec.shape) for spec in (*classifier.inputs, *classifier.outputs)] == [
        ("pixels", "UINT8", ("batch", 16, 16, 3)),
        ("probabilities", "FP32", ("batch", 3)),
    ]
    detector = read_manifest(tiny_bundles / "squares" / "1")
    assert [(spec.name, spec.datatype, spec.shape) for spec in (*detector.inputs, *detector.outputs)] == [
        ("pixels", "UINT8", ("batch", "height", "width", 3)),
        ("sizes", "INT64", ("batch", 2)),
        ("scores", "FP32", ("batch", 8)),
        ("class_ids", "INT64", ("batch", 8)),
        ("boxes", "FP32", ("batch", 8, 4)),
    ]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (57, 83), (120, 45)])
def test_detection_agrees_with_torch_on_any_size(
    batch: int, height: int, width: int, detector_run: Path, tiny_bundles: Path
) -> None:
    checkpoint = load_checkpoint(detector_run)
    preprocessing = checkpoint.read_preprocessing()
    module = served(checkpoint.build(), preprocessing.mean, preprocessing.std).eval()
    random = np.random.default_rng(batch)
    pixels = random.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    sizes = np.stack((random.integers(20, height + 1, batch), random.integers(20, width + 1, batch)), axis=1)
    expected = TorchNetwork(module, torch.device("cpu"))(pixels=pixels, sizes=sizes)
    found = OnnxNetwork(tiny_bundles / "squares" / "1" / "model.onnx")(pixels=pixels, sizes=sizes)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_file_names_no_path_of_the_machine_that_exported_it(tiny_bundles: Path, root: Path) -> None:
    for name in ("colours", "squares"):
        content = (tiny_bundles / name / "1" / "model.onnx").read_bytes()
        assert str(root).encode() not in content
        assert b"site-packages" not in content
