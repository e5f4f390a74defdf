"""Layouts of published DETRs (facebookresearch, Hugging Face) and of ResNets that initialise a backbone."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vitrine.models.build import VARIANTS
from vitrine.models.published.errors import ImportSettingError
from vitrine.models.published.files import Tensors
from vitrine.models.published.layout import IMAGENET, Layout, Rule, Settings, count, rule, rules

PREPROCESSING = {"task": "object-detection", "shortest_edge": 800, "longest_edge": 1333, **IMAGENET}
_HEAD = ("class_embed.weight", "class_embed.bias")
_IGNORED = (r".*\.num_batches_tracked",)
_NORM = ("weight", "bias", "running_mean", "running_var")
# "detr." is the prefix of the detection part of a panoptic network.
_PREFIXES = {"": (), "module.": (), "detr.": (r"bbox_attention\..*", r"mask_head\..*")}


def _backbone_rules(prefix: str) -> tuple[Rule, ...]:
    """torchvision's and timm's names of a ResNet, after a prefix."""
    block = f"{prefix}layer{{i1}}.{{j}}"
    ours = "backbone.stages.{i}.{j}"
    return (
        rule("backbone.conv1.weight", f"{prefix}conv1.weight"),
        *rules("backbone.bn1", f"{prefix}bn1", parts=_NORM),
        *(
            entry
            for number in (1, 2, 3)
            for entry in (
                rule(f"{ours}.conv{number}.weight", f"{block}.conv{number}.weight"),
                *rules(f"{ours}.bn{number}", f"{block}.bn{number}", parts=_NORM),
            )
        ),
        rule(f"{ours}.downsample.0.weight", f"{block}.downsample.0.weight"),
        *rules(f"{ours}.downsample.1", f"{block}.downsample.1", parts=_NORM),
    )


def _backbone_settings(tensors: Tensors, prefix: str) -> Settings:
    layers: list[int] = []
    while blocks := count(tensors, f"{prefix}layer{{s1}}.{{n}}.conv1.weight", s1=len(layers) + 1):
        layers.append(blocks)
    return {
        "backbone_layers": layers,
        "backbone_width": tensors[f"{prefix}conv1.weight"].shape[0],
        "backbone_block": "bottleneck" if f"{prefix}layer1.0.conv3.weight" in tensors else "basic",
        "backbone_norm": "frozen",
    }


def _settings(tensors: Tensors, backbone: str, *, query: str, encoder: str, decoder: str, hidden: str) -> Settings:
    """Infer the settings from the shapes, except number of heads and dilation; `backbone` is the prefix of its keys."""
    num_queries, embed_dim = tensors[query].shape
    return {
        **_backbone_settings(tensors, backbone),
        "num_queries": num_queries,
        "embed_dim": embed_dim,
        "encoder_layers": count(tensors, encoder),
        "decoder_layers": count(tensors, decoder),
        "feedforward_dim": tensors[hidden].shape[0],
    }


# facebookresearch -----------------------------------------------------------------------------------------------------

_BODY = "backbone.0.body."


def _qkv_part(index: int) -> Callable[[Tensor], Tensor]:
    """Query, key or value part of a fused projection, [3 D, ...] -> [D, ...]."""
    return lambda fused: fused.chunk(3)[index]


def _attention(target: str, source: str) -> tuple[Rule, ...]:
    return (
        *(
            rule(f"{target}.{part}_proj.{kind}", f"{source}.in_proj_{kind}", transform=_qkv_part(index))
            for index, part in enumerate("qkv")
            for kind in ("weight", "bias")
        ),
        *rules(f"{target}.out_proj", f"{source}.out_proj"),
    )


def _facebook_settings(tensors: Tensors, arguments: Mapping[str, Any]) -> Settings:
    settings = _settings(
        tensors,
        _BODY,
        query="query_embed.weight",
        encoder="transformer.encoder.layers.{n}.norm1.weight",
        decoder="transformer.decoder.layers.{n}.norm1.weight",
        hidden="transformer.encoder.layers.0.linear1.weight",
    )
    if arguments.get("position_embedding") not in (None, "sine", "v2"):
        found = arguments["position_embedding"]
        raise ImportSettingError(f"args: position_embedding: expected 'sine', found {found!r}")
    if "nheads" in arguments:
        settings["num_heads"] = arguments["nheads"]
    if "dilation" in arguments:
        settings["dilation"] = bool(arguments["dilation"])
    return settings


_ENCODER, _DECODER = "transformer.encoder.layers.{i}", "transformer.decoder.layers.{i}"

FACEBOOK = Layout(
    name="facebookresearch's DETR",
    architecture="detr",
    signature=(
        "query_embed.weight",
        "input_proj.weight",
        "transformer.encoder.layers.0.self_attn.in_proj_weight",
        "backbone.0.body.conv1.weight",
    ),
    prefixes=_PREFIXES,
    ignored=_IGNORED,
    rules=(
        *_backbone_rules(_BODY),
        *rules("input_proj", "input_proj"),
        *_attention("encoder.{i}.self_attn", f"{_ENCODER}.self_attn"),
        *_attention("decoder.{i}.self_attn", f"{_DECODER}.self_attn"),
        *_attention("decoder.{i}.multihead_attn", f"{_DECODER}.multihead_attn"),
        *(
            entry
            for ours, theirs in (("encoder.{i}", _ENCODER), ("decoder.{i}", _DECODER))
            for part in ("linear1", "linear2", "norm1", "norm2", "norm3")
            for entry in rules(f"{ours}.{part}", f"{theirs}.{part}")
        ),
        *rules("decoder_norm", "transformer.decoder.norm"),
        rule("query_embed.weight", "query_embed.weight"),
        *rules("class_embed", "class_embed"),
        *rules("bbox_embed.layers.{i}", "bbox_embed.layers.{i}"),
    ),
    settings=_facebook_settings,
    preprocessing=PREPROCESSING,
    head=_HEAD,
)

# Hugging Face ---------------------------------------------------------------------------------------------------------

_MODEL = "model.backbone.conv_encoder.model."


def _hugging_face_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    settings = _settings(
        tensors,
        _MODEL,
        query="model.query_position_embeddings.weight",
        encoder="model.encoder.layers.{n}.self_attn_layer_norm.weight",
        decoder="model.decoder.layers.{n}.self_attn_layer_norm.weight",
        hidden="model.encoder.layers.0.fc1.weight",
    )
    backbone = config.get("backbone_config")
    backbone = backbone if isinstance(backbone, Mapping) else {}
    for section, key, expected in (
        (config, "position_embedding_type", "sine"),
        (config, "activation_function", "relu"),
        (backbone, "downsample_in_bottleneck", False),
        (backbone, "downsample_in_first_stage", False),
    ):
        if section.get(key, expected) != expected:
            raise ImportSettingError(f"config.json: {key}: expected {expected!r}, found {section[key]!r}")
    heads = {config[key] for key in ("encoder_attention_heads", "decoder_attention_heads") if key in config}
    if len(heads) > 1:
        raise ImportSettingError(f"config.json: attention heads: expected one number for both parts, found {heads}")
    if heads:
        settings["num_heads"] = heads.pop()
    if "dilation" in config and backbone.get("model_type") != "resnet":  # transformers' ResNet ignores it
        settings["dilation"] = bool(config["dilation"])
    return settings


_HF_ENCODER, _HF_DECODER = "model.encoder.layers.{i}", "model.decoder.layers.{i}"

HUGGING_FACE = Layout(
    name="Hugging Face's DETR",
    architecture="detr",
    model_type="detr",
    prefixes=_PREFIXES,
    signature=(
        "model.query_position_embeddings.weight",
        "model.input_projection.weight",
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.backbone.conv_encoder.model.conv1.weight",
    ),
    aliases=(
        # since transformers 5
        (r"^model\.backbone\.model\.", _MODEL),
        (r"^(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.", r"\1."),
        (r"\.o_proj\.", ".out_proj."),
        # transformers' ResNet; the alternative is timm's, with torchvision's names
        (r"\.model\.embedder\.embedder\.convolution\.", ".model.conv1."),
        (r"\.model\.embedder\.embedder\.normalization\.", ".model.bn1."),
        *((rf"\.model\.encoder\.stages\.{n}\.layers\.", f".model.layer{n + 1}.") for n in range(4)),
        *((rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)),
        *((rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
    ),
    ignored=_IGNORED,
    rules=(
        *_backbone_rules(_MODEL),
        *rules("input_proj", "model.input_projection"),
        *(
            entry
            for ours, theirs in (
                ("encoder.{i}.self_attn", f"{_HF_ENCODER}.self_attn"),
                ("decoder.{i}.self_attn", f"{_HF_DECODER}.self_attn"),
                ("decoder.{i}.multihead_attn", f"{_HF_DECODER}.encoder_attn"),
            )
            for part in ("q_proj", "k_proj", "v_proj", "out_proj")
            for entry in rules(f"{ours}.{part}", f"{theirs}.{part}")
        ),
        *rules("encoder.{i}.linear1", f"{_HF_ENCODER}.fc1"),
        *rules("encoder.{i}.linear2", f"{_HF_ENCODER}.fc2"),
        *rules("encoder.{i}.norm1", f"{_HF_ENCODER}.self_attn_layer_norm"),
        *rules("encoder.{i}.norm2", f"{_HF_ENCODER}.final_layer_norm"),
        *rules("decoder.{i}.linear1", f"{_HF_DECODER}.fc1"),
        *rules("decoder.{i}.linear2", f"{_HF_DECODER}.fc2"),
        *rules("decoder.{i}.norm1", f"{_HF_DECODER}.self_attn_layer_norm"),
        *rules("decoder.{i}.norm2", f"{_HF_DECODER}.encoder_attn_layer_norm"),
        *rules("decoder.{i}.norm3", f"{_HF_DECODER}.final_layer_norm"),
        *rules("decoder_norm", "model.decoder.layernorm"),
        rule("query_embed.weight", "model.query_position_embeddings.weight"),
        *rules("class_embed", "class_labels_classifier"),
        *rules("bbox_embed.layers.{i}", "bbox_predictor.layers.{i}"),
    ),
    settings=_hugging_face_settings,
    preprocessing=PREPROCESSING,
    head=_HEAD,
)

# ResNet ---------------------------------------------------------------------------------------------------------------


def _resnet_settings(tensors: Tensors, _: Mapping[str, Any]) -> Settings:
    backbone = _backbone_settings(tensors, "")
    small = backbone["backbone_block"] == "basic"
    return {**VARIANTS["detr_small" if small else "detr_resnet50"][1], "num_heads": 8, **backbone}


RESNET = Layout(
    name="torchvision's or timm's ResNet (the backbone of a new DETR)",
    architecture="detr",
    signature=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv1.weight"),
    ignored=(*_IGNORED, r"fc\.(weight|bias)"),
    rules=_backbone_rules(""),
    settings=_resnet_settings,
    preprocessing=PREPROCESSING,
    head=_HEAD,
)

LAYOUTS = (FACEBOOK, HUGGING_FACE, RESNET)
