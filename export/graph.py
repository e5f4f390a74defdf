"""Export a served torch module to ONNX with the bundle contract's inputs, outputs and dynamic axes."""

import ast
import copy
import logging
import warnings
from collections import Counter
from pathlib import Path

import onnx
import torch
from onnx import helper
from onnxscript.optimizer import remove_unused_nodes
from torch import nn
from torch.export import Dim

from vitrine.export.errors import ExportError
from vitrine.models.build import accepts_any_size
from vitrine.models.detr import Detr
from vitrine.models.efficientnet import EfficientNet, SameConv2d
from vitrine.models.resnet import thaw_frozen_norm
from vitrine.models.resnetv2 import fold_weight_standardisation
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import Checkpoint

OPSET = 20  # has Gelu and LayerNormalization as single nodes
_LARGEST_FILE = 2**31 - 2**20  # bytes of weights: protobuf's limit, less the graph
_TRACED_BLOCKS = 5, 7  # rows and columns; torch.export specialises very few
_SMALLEST, _LARGEST = 32, 4096  # pixels, of an edge that is dynamic
_SCOPES = "pkg.torch.onnx.name_scopes"  # node metadata: the modules that it was traced in, outermost first
# Pixels to blocks of n x n, after padding with zeros at the bottom and right.
_SPLIT_INTO_BLOCKS = """split (uint8[batch, height, width, 3] pixels) => (uint8[batch, rows, n, columns, n, 3] blocks) {
    images = Shape <start = 0, end = 1> (pixels)
    edges = Shape <start = 1, end = 3> (pixels)
    channels = Shape <start = 3> (pixels)
    multiple = Constant <value_ints = [%(n)d]> ()
    before = Constant <value_ints = [0, 0, 0, 0, 0]> ()
    after_channels = Constant <value_ints = [0]> ()
    negative = Neg (edges)
    behind = Mod (negative, multiple)
    pads = Concat <axis = 0> (before, behind, after_channels)
    padded = Pad (pixels, pads)
    padded_edges = Add (edges, behind)
    counts = Div (padded_edges, multiple)
    column = Constant <value_ints = [2, 1]> ()
    counts_column = Reshape (counts, column)
    block_column = Expand (multiple, column)
    interleaved = Concat <axis = 1> (counts_column, block_column)
    flat = Constant <value_ints = [-1]> ()
    split_edges = Reshape (interleaved, flat)
    shape = Concat <axis = 0> (images, split_edges, channels)
    blocks = Reshape (padded, shape)
}"""
_NAMED = nn.Linear, nn.LayerNorm, nn.GroupNorm  # in addition to the project's own modules


def served_module(run: Path, checkpoint: Checkpoint) -> ServedClassifier | ServedDetector:
    """Build the module that serves a checkpoint.

    Raises:
        ExportError: its weights are too large for an ONNX file.
    """
    network, preprocessing = checkpoint.build(), checkpoint.read_preprocessing()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _LARGEST_FILE:
        limit = "at most 2 GB, the limit of an ONNX file"
        raise ExportError(f"{run}: weights: expected {limit}, found {size / 1e9:.1f} GB")
    return served(network, preprocessing.mean, preprocessing.std, checkpoint.temperature, checkpoint.offset).eval()


def export_graph(
    module: ServedClassifier | ServedDetector, input_size: tuple[int, int], file: Path, *, optimised: bool = True
) -> None:
    """Trace the module and write a checked ONNX file with a dynamic batch axis.

    Height and width are dynamic, too, for detectors, and for convolutional classifiers, which average their features.

    Nodes are named after the torch modules that they come from, and modules' output values after the modules, so that
    both networks can be compared part by part. The module is not modified.

    Args:
        input_size: height and width of networks that take one size only, ViT and MLP-Mixer; of no effect on others.
        optimised: precompute standardised filters, fold constants and batch norm, and remove no-ops
            (`docs/decisions/0009-optimisation.md`); otherwise the graph stays as traced.
    """
    module = copy.deepcopy(module).eval()
    if optimised:
        fold_weight_standardisation(module)
        thaw_frozen_norm(module)
    # Two images: torch.export would specialise a batch of one.
    pixels = torch.zeros(2, *input_size, 3, dtype=torch.uint8)
    sizes = torch.tensor([input_size] * 2)
    batch = Dim("batch", min=1, max=1024)
    axes = {0: batch}
    if multiple := _block_size(module.network):
        rows, columns = _TRACED_BLOCKS
        pixels = torch.zeros(2, rows, multiple, columns, multiple, 3, dtype=torch.uint8)
        sizes = torch.tensor([[rows * multiple, columns * multiple]] * 2)
        module.register_forward_pre_hook(_join_blocks)
        axes |= {1: Dim("rows", min=1, max=_LARGEST // multiple), 3: Dim("columns", min=1, max=_LARGEST // multiple)}
    elif accepts_any_size(module.network):
        axes |= {1: Dim("height", min=_SMALLEST, max=_LARGEST), 2: Dim("width", min=_SMALLEST, max=_LARGEST)}
    arguments: tuple[torch.Tensor, ...] = (pixels,)
    dynamic_shapes = {"pixels": axes}
    if isinstance(module, ServedDetector):
        arguments = (pixels, sizes)
        dynamic_shapes["sizes"] = {0: batch}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit._trace.TracerWarning)
        # Two of torch's own: a deprecated call in its code, and the intended shared axis name "batch" of two inputs.
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
            optimize=optimised,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _name_after_modules(model, module)
    if multiple:
        _accept_any_edges(model, module, multiple)
    _name_output_axes(model, module)
    del model.metadata_props[:]
    for node in model.graph.node:  # torch writes source paths of this machine here
        del node.metadata_props[:]
        node.doc_string = ""
    model.producer_name = "vitrine"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def write_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Replace the ONNX file's metadata."""
    model = onnx.load(file)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)


def _block_size(network: nn.Module) -> int:
    """Return the edge of the blocks of pixels that a network is traced with; 0 to trace it with the pixels as they are.

    An EfficientNet pads by the parity of the edges, and a DETR to multiples of a stride. The sizes of all maps are
    simple multiples of a number of blocks; of any number of pixels they are terms that torch.export takes minutes for.
    """
    if isinstance(network, Detr):
        return network.edge_multiple
    if accepts_any_size(network) and isinstance(network, EfficientNet):
        return network.backbone.strides[-1]
    return 0


def _join_blocks(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Pixels [B, rows, n, columns, n, 3] -> [B, H, W, 3]."""
    blocks, *others = arguments
    return blocks.flatten(3, 4).flatten(1, 2), *others


def _accept_any_edges(model: onnx.ModelProto, module: ServedClassifier | ServedDetector, multiple: int) -> None:
    """Make a graph that was traced with blocks take pixels [B, H, W, 3] of any size, as the module does.

    A DETR sees whole blocks. An EfficientNet sees the pixels, and its strided convolutions pad themselves
    ("SAME_UPPER"), so that only its coarsest map has as many cells as there are blocks.
    """
    graph = model.graph
    graph.input[0].CopyFrom(
        helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ("batch", "height", "width", 3))
    )
    _rename_inputs(graph, "pixels", "blocks")
    if isinstance(module, ServedClassifier):
        joined = "blocks"
        while reshapes := [node for node in graph.node if node.op_type == "Reshape" and node.input[0] == joined]:
            joined = reshapes[0].output[0]
        _rename_inputs(graph, joined, "pixels")
        _pad_by_parity(graph, module)
    for index, node in enumerate(onnx.parser.parse_graph(_SPLIT_INTO_BLOCKS % {"n": multiple}).node):
        node.name = f"served/blocks/{node.op_type}_{index}"
        graph.node.insert(index, node)
    remove_unused_nodes(model)


def _pad_by_parity(graph: onnx.GraphProto, module: ServedClassifier) -> None:
    """Make an EfficientNet's strided convolutions pad themselves, by the parity of the edges."""
    producers = {output: node for node in graph.node for output in node.output}
    modules = dict(module.named_modules())
    for node in graph.node:
        part = modules.get(node.input[1].removesuffix(".weight")) if node.op_type == "Conv" else None
        if isinstance(part, SameConv2d) and part.stride != (1, 1):
            kept = [attribute for attribute in node.attribute if attribute.name not in ("pads", "auto_pad")]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("auto_pad", "SAME_UPPER")])
            padding = producers[node.input[0]]
            if padding.op_type == "Pad":
                node.input[0] = padding.input[0]


def _rename_inputs(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Make all nodes that use one value use another one."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _name_after_modules(model: onnx.ModelProto, module: nn.Module) -> None:
    modules = dict(module.named_modules())
    named = {
        name
        for name, part in modules.items()
        if name and (type(part).__module__.startswith("vitrine.models.") or isinstance(part, _NAMED))
    }
    module_outputs: dict[str, str] = {}  # module name to the output of its last node
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = [scope for scope in _scopes(node) if scope in modules]
        node.name = f"{(scopes[-1] if scopes else '') or 'served'}/{node.op_type}"
        counts[node.name] += 1
        if counts[node.name] > 1:
            node.name += f"_{counts[node.name]}"
        for scope in named.intersection(scopes):
            module_outputs[scope] = node.output[0]
    outputs = {output.name for output in model.graph.output}
    # If modules share an output, the outermost module, set last, determines its name.
    names = {value: scope for scope, value in sorted(module_outputs.items(), key=lambda item: -item[0].count("."))}
    names = {value: scope for value, scope in names.items() if value not in outputs}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)


def _scopes(node: onnx.NodeProto) -> list[str]:
    scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return ast.literal_eval(scopes[0])[:-1] if scopes else []


def _name_output_axes(model: onnx.ModelProto, module: ServedClassifier | ServedDetector) -> None:
    """Name each output's first axis "batch"; the others are fixed, or named by the module's `output_axes`."""
    for output in model.graph.output:
        first, *others = output.type.tensor_type.shape.dim
        first.ClearField("dim_value")
        first.dim_param = "batch"
        names = module.output_axes.get(output.name, ("",) * len(others))
        for dimension, name in zip(others, names, strict=True):
            if name:
                dimension.dim_param = name


def fuse_transformer(file: Path, out: Path) -> None:
    """Write the graph with ONNX Runtime's own transformer fusions (attention, layer norm, GELU and bias).

    Measured for the model card but not shipped (`docs/decisions/0009-optimisation.md`): the operators are specific to
    ONNX Runtime, and slower on the CPU.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    optimize_model(str(file), model_type="vit", num_heads=0, hidden_size=0, opt_level=0).save_model_to_file(str(out))
