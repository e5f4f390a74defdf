"""The explain graph: the served network with what it looks at, on the weights in the serving graph's file."""

from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from vitrine.export.graph import export_graph
from vitrine.models.serving import ServedClassifier, ServedDetector

_SMALLEST = 1024  # bytes of a tensor that is worth sharing


def export_explain_graph(
    module: ServedClassifier | ServedDetector, input_size: tuple[int, int], file: Path, model: Path
) -> None:
    """Write the graph of a module of `models.explaining` without the weights that `model`, beside it, already holds.

    ONNX keeps weights outside of a graph's file as a place in another one: here that is the place in the serving
    graph's own file, which stays complete in itself. `model` must not change any more.

    Args:
        input_size: as of `export.graph.export_graph`.
    """
    export_graph(module, input_size, file)
    places = _places(model)
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), tensor.raw_data
        if key in places:
            set_external_data(tensor, model.name, offset=places[key], length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
    onnx.save(graph, file)
    onnx.checker.check_model(file)


def _places(model: Path) -> dict[tuple[int, tuple[int, ...], bytes], int]:
    """Where in a file its weights lie: byte offsets by type, shape and content."""
    content = model.read_bytes()
    places, end = {}, 0
    for tensor in onnx.load(model).graph.initializer:
        if len(tensor.raw_data) >= _SMALLEST:
            offset = content.find(tensor.raw_data, end)  # protobuf writes them in this order
            assert offset >= 0
            places[tensor.data_type, tuple(tensor.dims), tensor.raw_data] = offset
            end = offset + len(tensor.raw_data)
    return places
