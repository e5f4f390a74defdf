"""The explain graph: the serving graph's scores and torch's maps, with weights in the serving graph's file."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import nn

from vitrine.bundle.errors import BundleError
from vitrine.bundle.runtime import OnnxNetwork
from vitrine.export.explain import export_explain_graph
from vitrine.export.graph import export_graph
from vitrine.models.build import build_model
from vitrine.models.explaining import explained
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.network import TorchNetwork

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZE = (32, 32)
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT with a class token": ("vit", VIT),
    "BiT": ("resnetv2", {"image_size": 32, "layers": (1, 1), "width_factor": 0.5, "stem": "small"}),
    "EfficientNet": ("efficientnet", {"image_size": 32, "width_factor": 0.25, "depth_factor": 0.5}),
    "ResNet": ("resnet", {"image_size": 32, "layers": (1, 1), "width": 16}),
}
BUNDLES = "colours", "squares"  # a trained ViT with average pooling, and a trained DETR


@dataclass(frozen=True)
class Exported:
    module: ServedClassifier | ServedDetector
    model: Path
    explain: Path


@pytest.fixture(scope="module")
def exported(
    classifier_run: Path, detector_run: Path, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exported]:
    """Return the explained torch module and both graphs of a network by name."""

    @functools.cache
    def export(name: str) -> Exported:
        if name in BUNDLES:
            checkpoint = load_checkpoint({"colours": classifier_run, "squares": detector_run}[name])
            preprocessing = checkpoint.read_preprocessing()
            mean, std, temperature = preprocessing.mean, preprocessing.std, checkpoint.temperature
            folder, network = tiny_bundles / name / "1", checkpoint.build()
        else:
            mean, std, temperature = MEAN, STD, 1.3
            folder, network = tmp_path_factory.mktemp("graphs"), make_network(*NETWORKS[name])
        module = explained(network, mean, std, temperature)
        assert module is not None
        module.eval()
        if name not in BUNDLES:
            export_graph(served(network, mean, std, temperature), SIZE, folder / "model.onnx")
            export_explain_graph(module, SIZE, folder / "explain.onnx", folder / "model.onnx")
        return Exported(module, folder / "model.onnx", folder / "explain.onnx")

    return export


def make_network(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A network with random weights large enough for distinct outputs."""
    torch.manual_seed(0)
    network = build_model(architecture, settings, 40)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network


def make_inputs(network: OnnxNetwork) -> dict[str, np.ndarray]:
    """Three images; for a detector, padded ones of different sizes."""
    edges, inputs = network.inputs[0].shape[1:3], {}
    if "height" in edges:  # it takes any size
        edges = (57, 131)
    if len(network.inputs) > 1:
        inputs["sizes"] = np.array([[57, 131], [40, 83], [57, 31]])
    inputs["pixels"] = np.random.default_rng(0).integers(0, 256, (3, *edges, 3), dtype=np.uint8)
    return inputs


@pytest.mark.parametrize("name", [*NETWORKS, *BUNDLES])
def test_explain_graph_agrees_with_the_serving_graph_and_torch(name: str, exported: Callable[[str], Exported]) -> None:
    graphs = exported(name)
    network = OnnxNetwork(graphs.explain)
    inputs = make_inputs(network)
    found = network(**inputs)
    for output, expected in zip(found, OnnxNetwork(graphs.model)(**inputs), strict=False):
        np.testing.assert_allclose(output, expected, atol=1e-5)
    for output, expected in zip(found, TorchNetwork(graphs.module, torch.device("cpu"))(**inputs), strict=True):
        assert np.ptp(expected) > 1e-4
        np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("name", [*NETWORKS, *BUNDLES])
def test_the_weights_lie_in_the_serving_graphs_file(name: str, exported: Callable[[str], Exported]) -> None:
    graphs = exported(name)
    content, without = graphs.model.read_bytes(), graphs.explain.read_bytes()
    for tensor in onnx.load(graphs.model).graph.initializer:
        assert not uses_external_data(tensor)
        assert len(tensor.raw_data) < 1024 or tensor.raw_data not in without
    whole = {tensor.name: tensor.raw_data for tensor in onnx.load(graphs.explain).graph.initializer}
    shared = 0
    for tensor in onnx.load(graphs.explain, load_external_data=False).graph.initializer:
        if uses_external_data(tensor):
            place = ExternalDataInfo(tensor)
            assert place.location == "model.onnx"
            assert content[place.offset : place.offset + place.length] == whole[tensor.name]
            shared += place.length
    assert shared > 0.8 * sum(map(len, whole.values()))  # the rest is small


def test_without_the_serving_graph_it_does_not_load(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    alone = tmp_path / "explain.onnx"
    alone.write_bytes(exported("squares").explain.read_bytes())
    with pytest.raises(BundleError, match="graph"):
        OnnxNetwork(alone)


def test_the_maps_axes_have_names_and_lengths(exported: Callable[[str], Exported]) -> None:
    def shapes(name: str) -> dict[str, tuple[int | str, ...]]:
        return {spec.name: spec.shape for spec in OnnxNetwork(exported(name).explain).outputs}

    assert shapes("ViT with a class token") == {
        "probabilities": ("batch", 40),
        "attention": ("batch", 2, 2, 4, 4),
        "rollout": ("batch", 4, 4),
        "layers": ("batch", 2, 40),
    }
    assert shapes("BiT") == {"probabilities": ("batch", 40), "activation": ("batch", 40, "rows", "columns")}
    assert shapes("squares") == {
        "scores": ("batch", 8),
        "class_ids": ("batch", 8),
        "boxes": ("batch", 8, 4),
        "cross_attention": ("batch", 8, "rows", "columns"),
        "encoder_attention": ("batch", "rows", "columns", "rows", "columns"),
    }
