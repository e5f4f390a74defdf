"""The explain graph: the served network with explanations as outputs, sharing the weights of the serving graph."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from vitrine.bundle.manifest import EXPLAIN_FILE, MODEL_FILE, Explanation
from vitrine.bundle.runtime import OnnxNetwork
from vitrine.export.graph import export_graph
from vitrine.models.explaining import explained
from vitrine.models.mlp_mixer import MlpMixer
from vitrine.models.serving import ServedClassifier, ServedDetector
from vitrine.models.training.checkpoint import Checkpoint

_MIN_SHARED = 1024  # bytes of a tensor


def write_explanation(
    checkpoint: Checkpoint, input_size: tuple[int, int], bundle: Path, providers: Sequence[str]
) -> Explanation | None:
    """Write the bundle's explain graph, if its network has one; return how the bundle explains its predictions."""
    preprocessing = checkpoint.read_preprocessing()
    network = checkpoint.build()
    if isinstance(network, MlpMixer):
        return Explanation(method="occlusion", patch_size=network.config.patch_size)
    module = explained(network, preprocessing.mean, preprocessing.std, checkpoint.temperature, checkpoint.offset)
    if module is None:
        return None
    file = bundle / EXPLAIN_FILE
    export_explain_graph(module.eval(), input_size, file, bundle / MODEL_FILE)
    method = "class-activation" if "activation" in module.output_names else "attention"
    return Explanation(method=method, outputs=OnnxNetwork(file, providers=providers).outputs)


def export_explain_graph(
    module: ServedClassifier | ServedDetector, input_size: tuple[int, int], file: Path, model: Path
) -> None:
    """Write the graph of a module of `models.explaining` without the weights in `model`, which is in the same folder.

    ONNX external data refers to a byte range of another file: here of the serving graph's file, which remains
    self-contained. `model` must not change afterwards.

    Args:
        input_size: as of `export.graph.export_graph`.
    """
    export_graph(module, input_size, file)
    offsets = _offsets(model)
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), tensor.raw_data
        if key in offsets:
            set_external_data(tensor, model.name, offset=offsets[key], length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
    onnx.save(graph, file)
    onnx.checker.check_model(file)


def _offsets(model: Path) -> dict[tuple[int, tuple[int, ...], bytes], int]:
    """Return the byte offsets of the weights in a file, by type, shape and content."""
    content = model.read_bytes()
    offsets, end = {}, 0
    for tensor in onnx.load(model).graph.initializer:
        if len(tensor.raw_data) >= _MIN_SHARED:
            offset = content.find(tensor.raw_data, end)  # serialised in this order
            assert offset >= 0
            offsets[tensor.data_type, tuple(tensor.dims), tensor.raw_data] = offset
            end = offset + len(tensor.raw_data)
    return offsets
