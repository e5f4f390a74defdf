"""From a served torch module to an ONNX file with the bundle contract's inputs, outputs and dynamic axes."""

import copy
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch.export import Dim

from models.resnetv2 import fold_weight_standardisation
from models.serving import ServedClassifier, ServedDetector

OPSET = 20  # has Gelu and LayerNormalization as single nodes


def export_graph(module: ServedClassifier | ServedDetector, input_size: tuple[int, int], file: Path) -> None:
    """Trace the module and write a checked ONNX file whose batch axis (for detection also height and width) is dynamic.

    The file holds standardised filters; the module is left as it is.

    Args:
        input_size: height and width to trace with; classifiers keep it.
    """
    module = copy.deepcopy(module).eval()
    fold_weight_standardisation(module)
    height, width = input_size
    # Two images: torch.export would take a batch of one for a constant.
    pixels = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    batch = Dim("batch", min=1, max=1024)
    if isinstance(module, ServedDetector):
        arguments: tuple[torch.Tensor, ...] = (pixels, torch.tensor([[height, width]] * 2))
        axes = {0: batch, 1: Dim("height", min=32, max=4096), 2: Dim("width", min=32, max=4096)}
        dynamic_shapes = {"pixels": axes, "sizes": {0: batch}}
    else:
        arguments = (pixels,)
        dynamic_shapes = {"pixels": {0: batch}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision's operators are not there
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit._trace.TracerWarning)
        # Two of torch's own: a deprecated call in its code, and that two inputs share the axis name "batch" as we ask.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(dynamic_shapes),
            output_names=list(module.output_names),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _name_output_axes(model)
    del model.metadata_props[:]
    for node in model.graph.node:  # torch writes the exporting machine's source paths here
        del node.metadata_props[:]
        node.doc_string = ""
    model.producer_name = "vitrine"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _name_output_axes(model: onnx.ModelProto) -> None:
    """The first axis of each output is the batch; the others are known numbers."""
    for output in model.graph.output:
        dimensions = output.type.tensor_type.shape.dim
        dimensions[0].ClearField("dim_value")
        dimensions[0].dim_param = "batch"
