"""Imported DETRs, and ResNets imported as backbones, compute the same as the published networks.

Compared with a public implementation: Hugging Face's (transformers, also at full size). Compared with a network written
here, of torch's own layers, that takes the published names by a strict `load_state_dict`: facebookresearch's (with
torch.nn.MultiheadAttention and sequences first), and torchvision's and timm's ResNet.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from vitrine.models.build import VARIANTS
from vitrine.models.detr import Detr
from vitrine.models.published.errors import ImportSettingError, MismatchError
from vitrine.models.serving import ServedDetector
from vitrine.models.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("forward_only")

Import, Agree, Randomise = Callable[..., Checkpoint], Callable[..., None], Callable[..., nn.Module]
Save, HuggingFace = Callable[..., Path], Callable[..., Any]

DIM, HEADS, HIDDEN, QUERIES, CLASSES = 16, 2, 24, 7, 5
BOX_SPREAD = 0.02  # in fractions of an image
WIDTH = 8  # of the backbone's first convolution

transformers.logging.set_verbosity_error()

# The networks as they are published -----------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """Batch norm with four buffers, without num_batches_tracked."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            cast(Tensor, getattr(self, name)) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)


class PublishedUnit(nn.Module):
    """torchvision's BasicBlock (two convolutions) and Bottleneck (three), with their names."""

    def __init__(
        self, inputs: int, channels: int, bottleneck: bool, stride: int, dilation: int, norm: type[nn.Module]
    ) -> None:
        super().__init__()
        outputs = 4 * channels if bottleneck else channels
        spatial = {"padding": dilation, "dilation": dilation, "bias": False}
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
            self.conv2 = nn.Conv2d(channels, channels, 3, stride, **spatial)
            self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
            self.bn3 = norm(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, channels, 3, stride, **spatial)
            self.conv2 = nn.Conv2d(channels, channels, 3, **spatial)
        self.bn1, self.bn2 = norm(channels), norm(channels)
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.bottleneck:
            out = self.bn3(self.conv3(out.relu()))
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return (out + shortcut).relu()


class PublishedResNet(nn.Module):
    """torchvision's ResNet with its names; `dilated` is its replace_stride_with_dilation for the last stage."""

    def __init__(
        self,
        layers: tuple[int, ...],
        bottleneck: bool,
        width: int = WIDTH,
        norm: type[nn.Module] = nn.BatchNorm2d,
        dilated: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        channels = width
        for index, depth in enumerate(layers):
            units = []
            for i in range(depth):
                instead = dilated and index == 3
                stride = 2 if i == 0 and index > 0 and not instead else 1
                dilation = 2 if instead and i > 0 else 1
                units.append(PublishedUnit(channels, width * 2**index, bottleneck, stride, dilation, norm))
                channels = width * 2**index * (4 if bottleneck else 1)
            self.add_module(f"layer{index + 1}", nn.Sequential(*units))
        self.num_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for index in range(4):
            x = getattr(self, f"layer{index + 1}")(x)
        return x


class Backbone(nn.Module):
    def __init__(self, body: PublishedResNet) -> None:
        super().__init__()
        self.body = body


class PublishedLayer(nn.Module):
    """A post-norm layer of DETR's transformer, of the decoder if it attends to a memory."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS)
        self.linear1, self.linear2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        if decoder:
            self.multihead_attn = nn.MultiheadAttention(DIM, HEADS)
            self.norm3 = nn.LayerNorm(DIM)

    def encode(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self.self_attn(placed, placed, x, key_padding_mask=padding)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))

    def decode(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        placed = x + queries
        x = self.norm1(x + self.self_attn(placed, placed, x)[0])
        seen = self.multihead_attn(x + queries, memory + positions, memory, key_padding_mask=padding)[0]
        x = self.norm2(x + seen)
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Layers(nn.Module):
    def __init__(self, count: int, decoder: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PublishedLayer(decoder) for _ in range(count))
        if decoder:
            self.norm = nn.LayerNorm(DIM)


class PublishedTransformer(nn.Module):
    def __init__(self, encoder_layers: int, decoder_layers: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Layers(encoder_layers, False), Layers(decoder_layers, True)


class PublishedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, width) for width in (DIM, DIM, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(second(first(x).relu()).relu())


def sine_positions(hidden: Tensor) -> Tensor:
    """Normalised sine encoding [B, D, h, w] of the unmasked cells, y before x."""
    frequencies = 10000 ** (2 * (torch.arange(DIM // 2) // 2) / (DIM // 2))
    encoded = []
    for axis in (1, 2):
        place = (~hidden).cumsum(axis, dtype=torch.float32)
        place = place / (place.select(axis, -1).unsqueeze(axis) + 1e-6) * 2 * math.pi
        angles = place[..., None] / frequencies
        even_odd = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
        encoded.append(even_odd.flatten(3))
    return torch.cat(encoded, dim=3).permute(0, 3, 1, 2)


class PublishedDetr(nn.Module):
    """facebookresearch's DETR with its names."""

    def __init__(
        self,
        rows: int = CLASSES + 1,
        layers: tuple[int, ...] = (1, 2, 1, 1),
        bottleneck: bool = True,
        dilated: bool = False,
        depth: tuple[int, int] = (2, 3),
    ) -> None:
        super().__init__()
        body = PublishedResNet(layers, bottleneck, norm=FrozenNorm, dilated=dilated)
        self.backbone = nn.ModuleList([Backbone(body)])
        self.input_proj = nn.Conv2d(body.num_channels, DIM, 1)
        self.transformer = PublishedTransformer(*depth)
        self.query_embed = nn.Embedding(QUERIES, DIM)
        self.class_embed = nn.Linear(DIM, rows)
        self.bbox_embed = PublishedMlp()

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, rows] and boxes [B, N, 4] of images [B, 3, H, W], zero outside their `sizes`."""
        hidden = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.bool)
        for row, (height, width) in zip(hidden, sizes.tolist(), strict=True):
            row[:height, :width] = False
        features = cast(Backbone, self.backbone[0]).body(pixels)
        hidden = F.interpolate(hidden[None].float(), size=features.shape[-2:])[0].bool()
        positions = sine_positions(hidden).flatten(2).permute(2, 0, 1)
        memory = self.input_proj(features).flatten(2).permute(2, 0, 1)
        padding = hidden.flatten(1)
        for layer in self.transformer.encoder.layers:
            memory = cast(PublishedLayer, layer).encode(memory, positions, padding)
        queries = self.query_embed.weight[:, None].repeat(1, len(pixels), 1)
        x = torch.zeros_like(queries)
        for layer in self.transformer.decoder.layers:
            x = cast(PublishedLayer, layer).decode(x, queries, memory, positions, padding)
        x = self.transformer.decoder.norm(x).transpose(0, 1)
        return self.class_embed(x), self.bbox_embed(x).sigmoid()


# Comparing ------------------------------------------------------------------------------------------------------------


def batch(*sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Noisy patchwork images of these heights and widths, padded with zeros, and their sizes."""
    height, width = (max(edges) for edges in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(pixels, sizes, strict=True):
        patchwork = F.interpolate(2 * torch.randn(1, 3, 5, 5), size=(h, w))[0]
        image[:, :h, :w] = patchwork + torch.randn(3, h, w)
    return pixels, torch.tensor(sizes)


def settle(network: nn.Module, forward: Callable[[], object]) -> None:
    """Makes a random ResNet similar to a trained one: activations neither vanish nor amplify rounding errors.

    Every batch norm takes the statistics of its inputs, and units add little to their shortcuts.
    """

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        cast(Tensor, module.running_mean).copy_(mean)
        cast(Tensor, module.running_var).copy_(variance)

    state = network.state_dict()
    thirds = [key for key in state if re.search(r"(bn3|layer\.2\.normalization)\.weight$", key)]
    seconds = [key for key in state if re.search(r"(\.bn2|layer\.1\.normalization)\.weight$", key)]
    for key in thirds or seconds:
        state[key].mul_(0.3)
    hooks = [m.register_forward_pre_hook(take) for m in network.modules() if hasattr(m, "running_var")]
    forward()
    for hook in hooks:
        hook.remove()


def enliven(network: nn.Module, last: list[nn.Linear], projection: nn.Conv2d, forward: Callable[[], object]) -> None:
    """Makes the outputs differ between positions and queries, which stacked random layers would make alike.

    The backbone's norms take the statistics of their inputs, attention is sharpened, and the outputs of the feature
    projection and of the last layers are standardised.
    """
    settle(network, forward)
    for name, parameter in network.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(2)
        elif name.endswith("in_proj_weight"):
            parameter[: 2 * DIM].mul_(2)
        elif "decoder" in name and name.endswith("bias"):  # shared by all queries
            parameter.mul_(0.3)
    for layer in (projection, *last):
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        forward()
        hook.remove()
        output = seen[0].movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)  # [channels, ...]
        std, mean = torch.std_mean(output, dim=1)
        layer.weight.div_(std.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.sub_(mean).div_(std)


def answers(network: nn.Module, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    out = network(pixels, sizes)
    return out["pred_logits"], out["pred_boxes"]


def compare(
    what: str,
    run: Checkpoint,
    published: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    agree: Agree,
    size: tuple[int, int] = (96, 133),
    order: list[int] | None = None,
) -> None:
    """Compares single images without padding, and a padded batch with and without the published padding behaviour.

    Args:
        size: height and width of the larger images.
        order: published class ids in the order of ours.
    """
    network = cast(Detr, run.build())
    order = list(range(network.class_embed.out_features)) if order is None else order
    alone = [batch(size), batch((size[1], size[0])), batch(size)]
    found = [torch.cat(part) for part in zip(*(answers(network, *one) for one in alone), strict=True)]
    expected = [torch.cat(part) for part in zip(*(published(*one) for one in alone), strict=True)]
    agree(f"{what}: logits of images alone", found[0], expected[0][..., order])
    agree(f"{what}: boxes of images alone", found[1], expected[1], spread=BOX_SPREAD)

    padded = batch(size, (size[0] - 33, size[1] - 50), (size[0] - 3, size[1] - 1))
    logits, boxes = published(*padded)
    own_logits, _ = answers(network, *padded)
    assert (own_logits - logits[..., order]).abs().max() > 1e-3
    network.published_padding = True
    found_logits, found_boxes = answers(network, *padded)
    agree(f"{what}: logits of a padded batch", found_logits, logits[..., order])
    agree(f"{what}: boxes of a padded batch", found_boxes, boxes, spread=BOX_SPREAD)


Facebook = Callable[..., PublishedDetr]


@pytest.fixture
def facebook(randomise: Randomise) -> Facebook:
    def make(**shape: Any) -> PublishedDetr:
        network = PublishedDetr(**shape)
        randomise(network)
        network.query_embed.weight.normal_(0, 2)
        example = batch(*[(96, 133)] * 4)
        last = cast(nn.Linear, network.bbox_embed.layers[-1])
        enliven(network, [network.class_embed, last], network.input_proj, lambda: network(*example))
        for faint in (network.input_proj, network.transformer.encoder.layers[0].self_attn.out_proj):
            faint.weight.mul_(0.03)  # so that the epsilon of the encoder's first norm matters
            faint.bias.mul_(0.03)
        return network

    return make


# facebookresearch -----------------------------------------------------------------------------------------------------

ARGUMENTS = argparse.Namespace(
    nheads=HEADS,
    dilation=False,
    position_embedding="sine",
    hidden_dim=DIM,
    lr_drop=200,
    masks=False,
    device="cuda",
    coco_path="/data",
    frozen_weights=None,
)
BASIC: dict[str, Any] = {"layers": (2, 1, 1, 2), "bottleneck": False}
FACEBOOK: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "in model, with args": ({}, lambda state: {"model": state, "args": ARGUMENTS, "epoch": 299}, "pth"),
    "in model": ({}, lambda state: {"model": state}, "pth"),
    "plain": ({}, dict, "pth"),
    "safetensors": ({}, dict, "safetensors"),
    "behind module.": ({}, lambda state: {f"module.{key}": tensor for key, tensor in state.items()}, "pth"),
    "basic blocks": (BASIC, dict, "pth"),
    "one layer each": ({"depth": (1, 1)}, dict, "pth"),
}


@pytest.mark.parametrize("variant", FACEBOOK)
def test_facebook_detr(variant: str, facebook: Facebook, import_file: Import, agree: Agree) -> None:
    shape, published, form = FACEBOOK[variant]
    network = facebook(**shape)
    changes = [] if "args" in variant else [f"num_heads={HEADS}"]
    run = import_file(published(network.state_dict()), CLASSES, form=form, changes=changes)
    assert run.settings["num_heads"] == HEADS
    assert run.settings["unused_classes"] == 0
    compare(f"facebookresearch DETR, {variant}", run, network, agree)


def test_facebook_detr_of_unknown_width_asks_for_the_number_of_heads(facebook: Facebook, import_file: Import) -> None:
    with pytest.raises(ImportSettingError, match="num_heads: cannot be inferred from the file"):
        import_file(facebook().state_dict(), CLASSES, form="pth")


def test_dilation_in_the_arguments_gives_dc5(facebook: Facebook, import_file: Import, agree: Agree) -> None:
    network = facebook(layers=(1, 1, 1, 2), dilated=True)
    arguments = argparse.Namespace(**{**vars(ARGUMENTS), "dilation": True})
    run = import_file({"model": network.state_dict(), "args": arguments}, CLASSES, form="pth")
    assert run.settings["dilation"] is True
    assert cast(Detr, run.build()).backbone.config.stride == 16
    compare("facebookresearch DETR, dc5 by args", run, network, agree)


def test_variant_makes_dc5_of_the_same_keys(facebook: Facebook, import_file: Import, agree: Agree) -> None:
    layers = (3, 4, 6, 3)  # as the variant says
    network = facebook(layers=layers, dilated=True)
    plain = PublishedDetr(layers=layers)
    plain.load_state_dict(network.state_dict(), strict=True)
    shape = VARIANTS["detr_resnet50_dc5"][1]
    assert shape["dilation"] is True
    options = {"form": "pth", "changes": [f"num_heads={HEADS}"]}
    dilated = import_file({"model": network.state_dict()}, CLASSES, variant="detr_resnet50_dc5", **options)
    undilated = import_file({"model": network.state_dict()}, CLASSES, **options)
    compare("facebookresearch DETR, dc5 by --variant", dilated, network, agree)
    compare("facebookresearch DETR, the same file without --variant", undilated, plain.eval(), agree)
    pixels, sizes = batch((96, 133))
    assert (answers(dilated.build(), pixels, sizes)[0] - answers(undilated.build(), pixels, sizes)[0]).abs().max() > 0.1


def test_learned_positions_in_the_arguments_are_refused(facebook: Facebook, import_file: Import) -> None:
    arguments = argparse.Namespace(**{**vars(ARGUMENTS), "position_embedding": "learned"})
    with pytest.raises(ImportSettingError, match="position_embedding: expected 'sine', found 'learned'"):
        import_file({"model": facebook().state_dict(), "args": arguments}, CLASSES, form="pth")


# COCO's classes -------------------------------------------------------------------------------------------------------

# Unused category ids, and 0, which is not one.
HOLES = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def test_cocos_holes_are_unused_classes_that_take_part_in_the_softmax(
    facebook: Facebook, import_file: Import, agree: Agree
) -> None:
    network = facebook(rows=92)
    run = import_file({"model": network.state_dict(), "args": ARGUMENTS}, form="pth")
    things = [id_ for id_ in range(91) if id_ not in HOLES]
    assert len(run.labels) == len(things) == 80
    assert run.labels[0] == "person"
    assert run.labels[-1] == "toothbrush"
    assert run.settings["unused_classes"] == 11
    compare("facebookresearch DETR, 91 COCO ids", run, network, agree, order=[*things, *HOLES, 91])

    detector = ServedDetector(cast(Detr, run.build()), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.randint(0, 256, (1, 64, 90, 3), dtype=torch.uint8)
    sizes = torch.tensor([[64, 90]])
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    logits, _ = network(((pixels / 255 - mean) / std).permute(0, 3, 1, 2), sizes)
    of_things = logits.softmax(dim=-1)[..., things]
    scores, class_ids, _ = detector(pixels, sizes)
    agree("facebookresearch DETR, scores of the 80 labels", scores, of_things.max(dim=-1).values, spread=0.01)
    assert torch.equal(class_ids, of_things.argmax(dim=-1))
    assert logits.softmax(dim=-1)[..., HOLES].max() > 1e-3


@pytest.mark.parametrize("labels", [None, "coco"])
def test_a_panoptic_file_gives_its_detection_part(
    labels: str | None, facebook: Facebook, import_file: Import, agree: Agree
) -> None:
    network = facebook(rows=251)
    state = {f"detr.{key}": tensor for key, tensor in network.state_dict().items()}
    state |= {
        "bbox_attention.q_linear.weight": torch.zeros(DIM, DIM),
        "bbox_attention.k_linear.bias": torch.zeros(DIM),
        "mask_head.lay1.weight": torch.zeros(DIM, DIM, 3, 3),
        "mask_head.gn1.bias": torch.zeros(DIM),
        "mask_head.adapter1.weight": torch.zeros(DIM, DIM, 1, 1),
    }
    run = import_file({"model": state, "args": ARGUMENTS}, form="pth", labels=labels)
    things = [id_ for id_ in range(91) if id_ not in HOLES]
    rest = [id_ for id_ in range(250) if id_ not in things]
    assert len(run.labels) == 80
    assert run.settings["unused_classes"] == 170
    compare("facebookresearch DETR, panoptic", run, network, agree, order=[*things, *rest, 250])


def test_labels_must_be_as_many_as_the_classes(facebook: Facebook, import_file: Import) -> None:
    with pytest.raises(ImportSettingError, match="expected 5, one for each class of the head, found 6"):
        import_file({"model": facebook().state_dict(), "args": ARGUMENTS}, 6, form="pth")


def test_reset_head_keeps_everything_but_the_classes(facebook: Facebook, import_file: Import, agree: Agree) -> None:
    network = facebook(rows=92)
    run = import_file({"model": network.state_dict(), "args": ARGUMENTS}, 3, form="pth", reset_head=True)
    assert run.origin is not None
    assert run.origin.untrained == ["class_embed"]
    assert run.settings["unused_classes"] == 0
    pixels, sizes = batch((96, 133), (96, 133))
    logits, boxes = answers(run.build(), pixels, sizes)
    assert logits.shape[-1] == 4
    agree("facebookresearch DETR, boxes with a new head", boxes, network(pixels, sizes)[1], spread=BOX_SPREAD)


def test_tensors_of_another_detr_are_named(facebook: Facebook, import_file: Import) -> None:
    state = facebook().state_dict()
    del state["bbox_embed.layers.1.weight"]
    state["backbone.0.body.layer2.0.bn3.running_var"] = torch.ones(3)
    state["reference.weight"] = torch.zeros(2)
    with pytest.raises(MismatchError) as caught:
        import_file(state, CLASSES, form="pth", changes=[f"num_heads={HEADS}"])
    message = str(caught.value)
    assert "missing in the file: bbox_embed.layers.1.weight" in message
    assert "unexpected in the file: reference.weight" in message
    assert "backbone.0.body.layer2.0.bn3.running_var: expected shape (64,), found (3,)" in message


# A backbone alone -----------------------------------------------------------------------------------------------------

SMALL_TRANSFORMER = [
    "embed_dim=16",
    "num_heads=2",
    "feedforward_dim=16",
    "encoder_layers=1",
    "decoder_layers=1",
    "num_queries=4",
]
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_initialises_the_backbone_of_a_new_detr(
    name: str, form: str, randomise: Randomise, import_file: Import, agree: Agree
) -> None:
    layers, bottleneck = RESNETS[name]
    network = randomise(PublishedResNet(layers, bottleneck))
    pixels, sizes = batch((96, 133), (96, 133), (96, 133))
    settle(network, lambda: network(pixels))
    state = network.state_dict() | {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    assert "layer1.0.bn1.num_batches_tracked" in state
    run = import_file(state, CLASSES, form=form, changes=SMALL_TRANSFORMER)
    assert run.settings["backbone_layers"] == list(layers)
    assert run.settings["backbone_norm"] == "frozen"
    assert run.labels == [f"thing {i}" for i in range(CLASSES)]
    assert run.origin is not None
    rest = ["bbox_embed", "class_embed", "decoder", "decoder_norm", "encoder", "input_proj", "query_embed"]
    assert run.origin.untrained == rest
    detr = cast(Detr, run.build())
    agree(f"torchvision ResNet, {name}, {form}", detr.backbone(pixels)[-1], network(pixels))
    assert detr(pixels, sizes)["pred_logits"].shape == (3, 4, CLASSES + 1)


def test_a_resnet18_at_full_width_gives_the_small_detr(randomise: Randomise, import_file: Import, agree: Agree) -> None:
    network = randomise(PublishedResNet((2, 2, 2, 2), False, width=64))
    run = import_file(network.state_dict(), CLASSES, form="pth")
    small = VARIANTS["detr_small"][1]
    assert {key: run.settings[key] for key in ("encoder_layers", "decoder_layers", "feedforward_dim")} == {
        key: small[key] for key in ("encoder_layers", "decoder_layers", "feedforward_dim")
    }
    pixels, _ = batch((96, 128), (96, 128))
    agree("torchvision ResNet, resnet18 at full width", cast(Detr, run.build()).backbone(pixels)[-1], network(pixels))


def test_a_new_detr_needs_labels(randomise: Randomise, import_file: Import) -> None:
    state = randomise(PublishedResNet((1, 1, 1, 1), False)).state_dict()
    with pytest.raises(ImportSettingError, match="a new head needs --labels"):
        import_file(state, form="pth")


# Hugging Face ---------------------------------------------------------------------------------------------------------


def hugging_face_config(backbone: dict[str, Any] | None = None, **settings: Any) -> transformers.DetrConfig:
    resnet = transformers.ResNetConfig(out_features=["stage4"], **(backbone or {}))
    return transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=resnet, backbone=None, **settings
    )


BOTTLENECK = {
    "embedding_size": 8,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 2, 1, 1],
    "layer_type": "bottleneck",
}
BASIC_BLOCKS = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [2, 1, 1, 2], "layer_type": "basic"}
TINY: dict[str, Any] = {
    "d_model": DIM,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
}


@pytest.fixture
def hugging_face(randomise: Randomise) -> HuggingFace:
    def make(config: transformers.DetrConfig) -> Any:
        network: Any = randomise(transformers.DetrForObjectDetection(config))
        network.model.query_position_embeddings.weight.normal_(0, 2)
        example = batch(*[(96, 133)] * 4)
        last = [network.class_labels_classifier, network.bbox_predictor.layers[-1]]
        enliven(network, last, network.model.input_projection, lambda: public(network)(*example))
        return network

    return make


def public(network: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def forward(pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.int64)
        for row, (height, width) in zip(mask, sizes.tolist(), strict=True):
            row[:height, :width] = 1
        out = network(pixel_values=pixels, pixel_mask=mask)
        return out.logits, out.pred_boxes

    return forward


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize(
    ("shape", "backbone", "settings"),
    [
        ("bottleneck", BOTTLENECK, {}),
        ("basic blocks", BASIC_BLOCKS, {}),
        ("one layer each", BASIC_BLOCKS, {"encoder_layers": 1, "decoder_layers": 1}),
        ("four heads", BASIC_BLOCKS, {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
        ("width 32", BOTTLENECK, {"d_model": 32, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_queries": 12}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hugging_face_detr(
    shape: str,
    backbone: dict[str, Any],
    settings: dict[str, Any],
    names: str,
    hugging_face: HuggingFace,
    import_file: Import,
    agree: Agree,
) -> None:
    network = hugging_face(hugging_face_config(backbone, **{**TINY, **settings}))
    run = import_file(network, CLASSES, names=names)
    compare(f"Hugging Face DETR, {names} names, {shape}", run, public(network), agree)


def test_hugging_face_ignores_dilation_of_its_own_resnet(
    hugging_face: HuggingFace, import_file: Import, agree: Agree
) -> None:
    network = hugging_face(hugging_face_config({**BASIC_BLOCKS}, **TINY, dilation=True))
    assert network.config.dilation is True
    run = import_file(network, CLASSES)
    compare("Hugging Face DETR, dilation beside its own ResNet", run, public(network), agree)


def test_hugging_face_detr_without_its_config_needs_what_the_shapes_do_not_tell(
    hugging_face: HuggingFace, save_pretrained: Save, import_file: Import, agree: Agree
) -> None:
    network = hugging_face(hugging_face_config(BASIC_BLOCKS, **TINY))
    source = save_pretrained(network, "new")
    (source / "config.json").unlink()
    with pytest.raises(ImportSettingError, match="num_heads: cannot be inferred from the file"):
        import_file(source, CLASSES)
    run = import_file(source, CLASSES, changes=[f"num_heads={HEADS}"])
    compare("Hugging Face DETR, new names, no config.json", run, public(network), agree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_embedding_type": "learned"}, "a DETR with learned positions|position_embedding_type"),
        ({"activation_function": "gelu"}, "activation_function: expected 'relu', found 'gelu'"),
        ({"decoder_attention_heads": 4}, "attention heads: expected one number for both parts"),
    ],
)
def test_hugging_face_detr_of_another_kind_is_refused(
    settings: dict[str, Any], message: str, hugging_face: HuggingFace, save_pretrained: Save, import_file: Import
) -> None:
    source = save_pretrained(hugging_face(hugging_face_config(BASIC_BLOCKS, **{**TINY, **settings})))
    with pytest.raises(Exception, match=message):
        import_file(source, CLASSES)


def test_hugging_face_labels_and_preprocessing_are_used(
    hugging_face: HuggingFace, save_pretrained: Save, import_file: Import, agree: Agree
) -> None:
    names = ["N/A", "cat", "N/A", "dog", "cow"]
    settings = {**TINY, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    del settings["num_labels"]
    network = hugging_face(hugging_face_config(BASIC_BLOCKS, **settings))
    source = save_pretrained(network)
    document = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"shortest_edge": 64, "longest_edge": 96},
    }
    (source / "preprocessor_config.json").write_text(json.dumps(document))
    run = import_file(source)
    assert run.labels == ["cat", "dog", "cow"]
    assert run.settings["unused_classes"] == 2
    assert run.preprocessing["shortest_edge"] == 64
    assert run.preprocessing["longest_edge"] == 96
    assert run.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert run.preprocessing["std"] == [0.4, 0.5, 0.6]
    compare("Hugging Face DETR, id2label with holes", run, public(network), agree, order=[1, 3, 4, 0, 2, 5])


@pytest.mark.parametrize("names", ["old", "new"])
def test_hugging_face_detr_resnet50_at_full_size(
    names: str, hugging_face: HuggingFace, import_file: Import, agree: Agree
) -> None:
    network = hugging_face(hugging_face_config(num_labels=91))
    run = import_file(network, names=names)
    things = [id_ for id_ in range(91) if id_ not in HOLES]
    compare(
        f"Hugging Face DETR, ResNet-50 at full size, {names} names",
        run,
        public(network),
        agree,
        size=(160, 233),
        order=[*things, *HOLES, 91],
    )
