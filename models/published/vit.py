"""Layouts of published ViTs: timm (and DeiT), Google's Flax, Hugging Face, torchvision."""

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vitrine.models.position import sincos_2d
from vitrine.models.published import flax
from vitrine.models.published.errors import ImportSettingError
from vitrine.models.published.files import LazyTensor, Tensors
from vitrine.models.published.layout import IMAGENET, INCEPTION, Layout, Settings, count, rule, rules, same_names


def _settings(
    tensors: Tensors, *, patch: str, position: str, token: str, block: str, hidden: str, pre_logits: str = ""
) -> Settings:
    """Infer the settings from the shapes, except the number of heads.

    All names are keys of the layout, of tensors in PyTorch's axis order; `block` counts the blocks with {n}.
    """
    embed_dim, patch_size = tensors[patch].shape[0], tensors[patch].shape[-1]
    has_token = token in tensors
    side = math.isqrt(patches) if (patches := tensors[position].shape[-2] - has_token) > 0 else 0
    settings: Settings = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": count(tensors, block),
        "mlp_ratio": tensors[hidden].shape[0] / embed_dim,
        "global_pool": "token" if has_token else "avg",
    }
    if side * side == patches:
        settings["image_size"] = side * patch_size
    if pre_logits in tensors:
        settings["representation_size"] = tensors[pre_logits].shape[0]
    return settings


def with_class_slot(tensors: Tensors, position: str, token: str, patches: int | None) -> Tensors:
    """Prepend a zero for the class token to position embeddings that have none for it.

    Args:
        position, token: names of the position embeddings and of the class token.
        patches: number of patches, if known. Otherwise a square number of positions is assumed to be a grid.
    """
    if token not in tensors or position not in tensors or len(tensors[position].shape) != 3:
        return tensors
    embedding = tensors[position]
    _, positions, dim = embedding.shape
    has_slot = positions - 1 == patches
    if has_slot or (positions != patches and math.isqrt(positions) ** 2 != positions):
        return tensors

    def padded() -> Tensor:
        return torch.cat((torch.zeros(1, 1, dim), embedding.read().float()), dim=1)

    return {**tensors, position: LazyTensor((1, 1 + positions, dim), padded)}


def _num_patches(image_size: object, patch_size: int) -> int | None:
    """Number of patches of an image; None if its size is not known."""
    edges = [image_size] * 2 if isinstance(image_size, int) else image_size
    if not isinstance(edges, list) or not all(isinstance(edge, int) for edge in edges) or patch_size < 1:
        return None
    return math.prod(edge // patch_size for edge in edges)


# timm -----------------------------------------------------------------------------------------------------------------


def _timm_prepare(tensors: Tensors, context: Mapping[str, Any]) -> Tensors:
    patch = "patch_embed.proj.weight"
    if len(tensors[patch].shape) == 2:  # a linear layer in timm's oldest files
        flat = tensors[patch]
        side = math.isqrt(flat.shape[1] // 3)
        shape = (flat.shape[0], 3, side, side)
        tensors = {**tensors, patch: LazyTensor(shape, lambda: flat.read().reshape(shape))}
    patches = _num_patches(context.get("image_size"), tensors[patch].shape[-1])
    return with_class_slot(tensors, "pos_embed", "cls_token", patches)


def _timm_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    settings = _settings(
        tensors,
        patch="patch_embed.proj.weight",
        position="pos_embed",
        token="cls_token",
        block="blocks.{n}.norm1.weight",
        hidden="blocks.0.mlp.fc1.weight",
        pre_logits="pre_logits.fc.weight",
    )
    model_args = config.get("model_args")
    if isinstance(model_args, Mapping) and "num_heads" in model_args:
        settings["num_heads"] = model_args["num_heads"]
    return settings


TIMM = Layout(
    name="timm's ViT",
    timm_names=("vit_", "deit_"),
    architecture="vit",
    signature=("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"),
    rules=(
        rule("cls_token", "cls_token"),
        rule("pos_embed.embedding", "pos_embed"),
        *same_names("patch_embed.proj", "norm", "head", "blocks.{i}.norm1", "blocks.{i}.norm2"),
        *same_names("blocks.{i}.attn.qkv", "blocks.{i}.attn.proj", "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2"),
        *rules("pre_logits.0", "pre_logits.fc"),
    ),
    settings=_timm_settings,
    prepare=_timm_prepare,
    preprocessing={"crop_pct": 0.9, "interpolation": "bicubic", **INCEPTION},
)

# Google ---------------------------------------------------------------------------------------------------------------

_POSITION = "pos_embedding"
_SCANNED = "Transformer/encoderblock/"


def _google_prepare(tensors: Tensors, context: Mapping[str, Any]) -> Tensors:
    prepared: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_SCANNED):  # scanned networks stack all blocks in one tensor
            stacked = cache(tensor.read)
            for layer in range(tensor.shape[0]):
                name = f"Transformer/encoderblock_{layer}/{key.removeprefix(_SCANNED)}"
                prepared[name] = LazyTensor(tensor.shape[1:], partial(_unstack, stacked, layer))
        else:
            prepared[key] = tensor
    patch, _, _, dim = prepared["embedding/kernel"].shape
    if _POSITION not in prepared and "cls" not in prepared:
        # Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k": average pooling, and fixed positions that are
        # not in the file. These networks were trained on 224 pixels.
        side = 224 // patch
        positions = partial(sincos_2d, (side, side), dim)
        prepared[_POSITION] = LazyTensor((1, side * side, dim), positions)
    return with_class_slot(prepared, _POSITION, "cls", _num_patches(context.get("image_size"), patch))


def _unstack(stacked: Any, layer: int) -> Tensor:
    tensor: Tensor = stacked()[layer]
    return tensor


def _google_settings(tensors: Tensors, _: Mapping[str, Any]) -> Settings:
    first = "Transformer/encoderblock_0"
    patch, hidden, pre_logits = "embedding/kernel", f"{first}/MlpBlock_3/Dense_0/kernel", "pre_logits/kernel"
    transposed = {
        name: LazyTensor(tensors[name].shape[::-1], tensors[name].read)  # [out, in], [out, in, width, height]
        for name in (patch, hidden, pre_logits)
        if name in tensors
    }
    settings = _settings(
        {**tensors, **transposed},
        patch=patch,
        position=_POSITION,
        token="cls",
        block="Transformer/encoderblock_{n}/LayerNorm_0/scale",
        hidden=hidden,
        pre_logits=pre_logits,
    )
    heads = tensors[f"{first}/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
    return {**settings, "num_heads": heads, "gelu": "tanh"}


_BLOCK, _ATTENTION = "Transformer/encoderblock_{i}", "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1"

GOOGLE = Layout(
    name="Google's ViT (.npz)",
    architecture="vit",
    signature=("embedding/kernel", "Transformer/encoder_norm/scale", "head/kernel"),
    prefixes=flax.PREFIXES,
    aliases=(
        # big_vision numbers layers of each kind from zero; the rules have the numbers of the ViT paper's code.
        (r"/LayerNorm_1/", "/LayerNorm_2/"),
        (r"/MultiHeadDotProductAttention_0/", "/MultiHeadDotProductAttention_1/"),
        (r"/MlpBlock_0/", "/MlpBlock_3/"),
        (r"^Transformer/(posembed_input/)?pos_embedding$", _POSITION),
    ),
    rules=(
        *flax.conv("patch_embed.proj", "embedding"),
        rule("cls_token", "cls"),
        rule("pos_embed.embedding", _POSITION),
        *flax.norm("blocks.{i}.norm1", f"{_BLOCK}/LayerNorm_0"),
        *(
            rule(
                f"blocks.{{i}}.attn.qkv.{ours}",
                *(f"{_ATTENTION}/{part}/{theirs}" for part in ("query", "key", "value")),
                transform=flax.heads_in,
            )
            for ours, theirs in (("weight", "kernel"), ("bias", "bias"))
        ),
        rule("blocks.{i}.attn.proj.weight", f"{_ATTENTION}/out/kernel", transform=flax.heads_out),
        rule("blocks.{i}.attn.proj.bias", f"{_ATTENTION}/out/bias"),
        *flax.norm("blocks.{i}.norm2", f"{_BLOCK}/LayerNorm_2"),
        *flax.dense("blocks.{i}.mlp.fc1", f"{_BLOCK}/MlpBlock_3/Dense_0"),
        *flax.dense("blocks.{i}.mlp.fc2", f"{_BLOCK}/MlpBlock_3/Dense_1"),
        *flax.norm("norm", "Transformer/encoder_norm"),
        *flax.dense("pre_logits.0", "pre_logits"),
        *flax.dense("head", "head"),
    ),
    settings=_google_settings,
    prepare=_google_prepare,
    preprocessing={"crop_mode": "squash", **INCEPTION},
)

# Hugging Face ---------------------------------------------------------------------------------------------------------

_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def _hugging_face_prepare(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    if config.get("qkv_bias", True):
        return tensors
    biases: dict[str, LazyTensor] = {}
    for layer in range(count(tensors, "vit.encoder.layer.{n}.layernorm_before.weight")):
        for part in ("query", "key", "value"):
            name = f"vit.encoder.layer.{layer}.attention.attention.{part}"
            dim = tensors[f"{name}.weight"].shape[0]
            biases[f"{name}.bias"] = LazyTensor((dim,), partial(torch.zeros, dim))
    return {**biases, **tensors}


def _hugging_face_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    settings = _settings(
        tensors,
        patch="vit.embeddings.patch_embeddings.projection.weight",
        position="vit.embeddings.position_embeddings",
        token="vit.embeddings.cls_token",
        block="vit.encoder.layer.{n}.layernorm_before.weight",
        hidden="vit.encoder.layer.0.intermediate.dense.weight",
    )
    if "num_attention_heads" in config:
        settings["num_heads"] = config["num_attention_heads"]
    if isinstance(config.get("image_size"), list):
        settings["image_size"] = tuple(config["image_size"])
    settings["norm_eps"] = config.get("layer_norm_eps", 1e-12)
    gelu = str(config.get("hidden_act", "gelu"))
    if gelu not in _GELUS:
        raise ImportSettingError(f"config.json: hidden_act: expected one of {', '.join(_GELUS)}, found {gelu!r}")
    settings["gelu"] = _GELUS[gelu]
    return settings


_LAYER = "vit.encoder.layer.{i}"

HUGGING_FACE = Layout(
    name="Hugging Face's ViT",
    architecture="vit",
    model_type="vit",
    signature=("vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight", "vit.layernorm.weight"),
    aliases=(
        (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),  # ViTModel, without a head
        # since transformers 5
        (r"^vit\.layers\.", "vit.encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    ignored=(r"vit\.pooler\..*",),
    rules=(
        rule("cls_token", "vit.embeddings.cls_token"),
        rule("pos_embed.embedding", "vit.embeddings.position_embeddings"),
        *rules("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        *rules("blocks.{i}.norm1", f"{_LAYER}.layernorm_before"),
        *rules(
            "blocks.{i}.attn.qkv",
            *(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
            transform=lambda *parts: torch.cat(parts),
        ),
        *rules("blocks.{i}.attn.proj", f"{_LAYER}.attention.output.dense"),
        *rules("blocks.{i}.norm2", f"{_LAYER}.layernorm_after"),
        *rules("blocks.{i}.mlp.fc1", f"{_LAYER}.intermediate.dense"),
        *rules("blocks.{i}.mlp.fc2", f"{_LAYER}.output.dense"),
        *rules("norm", "vit.layernorm"),
        *rules("head", "classifier"),
    ),
    settings=_hugging_face_settings,
    prepare=_hugging_face_prepare,
    preprocessing={"crop_mode": "squash", **INCEPTION},
)

# torchvision ----------------------------------------------------------------------------------------------------------

_ENCODER_LAYER = "encoder.layers.encoder_layer_{i}"

TORCHVISION = Layout(
    name="torchvision's ViT",
    architecture="vit",
    signature=("class_token", "conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight"),
    aliases=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),  # in its first version
    rules=(
        rule("cls_token", "class_token"),
        rule("pos_embed.embedding", "encoder.pos_embedding"),
        *rules("patch_embed.proj", "conv_proj"),
        *rules("blocks.{i}.norm1", f"{_ENCODER_LAYER}.ln_1"),
        rule("blocks.{i}.attn.qkv.weight", f"{_ENCODER_LAYER}.self_attention.in_proj_weight"),
        rule("blocks.{i}.attn.qkv.bias", f"{_ENCODER_LAYER}.self_attention.in_proj_bias"),
        *rules("blocks.{i}.attn.proj", f"{_ENCODER_LAYER}.self_attention.out_proj"),
        *rules("blocks.{i}.norm2", f"{_ENCODER_LAYER}.ln_2"),
        *rules("blocks.{i}.mlp.fc1", f"{_ENCODER_LAYER}.mlp.0"),
        *rules("blocks.{i}.mlp.fc2", f"{_ENCODER_LAYER}.mlp.3"),
        *rules("norm", "encoder.ln"),
        *rules("pre_logits.0", "heads.pre_logits"),
        *rules("head", "heads.head"),
    ),
    settings=lambda tensors, _: _settings(
        tensors,
        patch="conv_proj.weight",
        position="encoder.pos_embedding",
        token="class_token",
        block="encoder.layers.encoder_layer_{n}.ln_1.weight",
        hidden="encoder.layers.encoder_layer_0.mlp.0.weight",
        pre_logits="heads.pre_logits.weight",
    ),
    preprocessing={"crop_pct": 0.875, **IMAGENET},
)

LAYOUTS = (TIMM, GOOGLE, HUGGING_FACE, TORCHVISION)
