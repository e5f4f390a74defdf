"""Layouts of published MLP-Mixers: Google's Flax (both), timm."""

import math
from collections.abc import Mapping
from typing import Any

from vitrine.models.published import flax
from vitrine.models.published.files import Tensors
from vitrine.models.published.layout import INCEPTION, Layout, Settings, count, same_names


def _google_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    patch_size, _, _, embed_dim = tensors["stem/kernel"].shape
    tokens = [edge for edge in tensors["MixerBlock_0/token_mixing/Dense_0/kernel"].shape if edge != 1]
    channels = [edge for edge in tensors["MixerBlock_0/channel_mixing/Dense_0/kernel"].shape if edge != 1]
    return {
        "image_size": math.isqrt(tokens[0]) * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": count(tensors, "MixerBlock_{n}/LayerNorm_0/scale"),
        "tokens_mlp_dim": tokens[-1],
        "channels_mlp_dim": channels[-1],
        "gelu": "tanh",
    }


GOOGLE = Layout(
    name="Google's MLP-Mixer (.npz)",
    architecture="mlp_mixer",
    signature=(
        "stem/kernel",
        "MixerBlock_0/token_mixing/Dense_0/kernel",
        "MixerBlock_0/channel_mixing/Dense_0/kernel",
        "head/kernel",
    ),
    prefixes=flax.PREFIXES,
    aliases=(
        # names in the first files, whose kernels have additional axes of length one
        (r"^embedding/", "stem/"),
        (r"^Mixer/encoderblock_(\d+)/", r"MixerBlock_\1/"),
        (r"/(token|channel)_mixing_phase_0/(kernel|bias)1$", r"/\1_mixing/Dense_0/\2"),
        (r"/(token|channel)_mixing_phase_0/(kernel|bias)2$", r"/\1_mixing/Dense_1/\2"),
        (r"^Mixer/encoder_norm/", "pre_head_layer_norm/"),
    ),
    rules=(
        *flax.conv("stem.proj", "stem"),
        *flax.norm("blocks.{i}.norm1", "MixerBlock_{i}/LayerNorm_0"),
        *flax.dense("blocks.{i}.mlp_tokens.fc1", "MixerBlock_{i}/token_mixing/Dense_0"),
        *flax.dense("blocks.{i}.mlp_tokens.fc2", "MixerBlock_{i}/token_mixing/Dense_1"),
        *flax.norm("blocks.{i}.norm2", "MixerBlock_{i}/LayerNorm_1"),
        *flax.dense("blocks.{i}.mlp_channels.fc1", "MixerBlock_{i}/channel_mixing/Dense_0"),
        *flax.dense("blocks.{i}.mlp_channels.fc2", "MixerBlock_{i}/channel_mixing/Dense_1"),
        *flax.norm("norm", "pre_head_layer_norm"),
        *flax.dense("head", "head"),
    ),
    settings=_google_settings,
    preprocessing={"crop_mode": "squash", **INCEPTION},
)


def _timm_settings(tensors: Tensors, config: Mapping[str, Any]) -> Settings:
    embed_dim, _, _, patch_size = tensors["stem.proj.weight"].shape
    tokens_mlp_dim, patches = tensors["blocks.0.mlp_tokens.fc1.weight"].shape
    return {
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": count(tensors, "blocks.{n}.norm1.weight"),
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": tensors["blocks.0.mlp_channels.fc1.weight"].shape[0],
    }


TIMM = Layout(
    name="timm's MLP-Mixer",
    timm_names=("mixer_",),
    architecture="mlp_mixer",
    signature=("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight", "blocks.0.mlp_channels.fc1.weight"),
    rules=(
        *same_names("stem.proj", "norm", "head", "blocks.{i}.norm1", "blocks.{i}.norm2"),
        *same_names(*(f"blocks.{{i}}.{mlp}.{fc}" for mlp in ("mlp_tokens", "mlp_channels") for fc in ("fc1", "fc2"))),
    ),
    settings=_timm_settings,
    preprocessing={"crop_pct": 0.875, "interpolation": "bicubic", **INCEPTION},
)

LAYOUTS = (GOOGLE, TIMM)
