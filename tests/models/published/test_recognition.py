"""Layouts are recognised by their keys; errors name unsupported networks, and the nearest layout of unknown files."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitrine.models.published.errors import UnknownLayoutError, UnsupportedNetworkError
from vitrine.models.published.files import open_weights
from vitrine.models.published.layout import Layout
from vitrine.models.published.recognition import UNSUPPORTED_NETWORKS, recognise

DETR_KEYS = (
    "query_embed.weight",
    "input_proj.weight",
    "backbone.0.body.conv1.weight",
    "transformer.encoder.layers.0.self_attn.in_proj_weight",
)
VIT_KEYS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
FLAX_KEYS = ("embedding/kernel", "Transformer/encoder_norm/scale", "head/kernel")


def recognised(file: Path) -> Layout:
    layout, _ = recognise(open_weights(file).tensors, file)
    return layout


NEIGHBOURS = {
    "SigLIP": ("attention pooling", ("params/img/MAPHead_0/probe", *(f"params/img/{key}" for key in FLAX_KEYS))),
    "SigLIP's tower alone": ("attention pooling", ("MAPHead_0/probe", *FLAX_KEYS)),
    "SigLIP by timm": ("attention pooling", ("attn_pool.latent", "attn_pool.q.weight", *VIT_KEYS)),
    "big_vision's BiT": (
        "big_vision's BiT",
        ("conv_root/kernel", "gn_root/scale", "gn_root/bias", "block1/unit1/conv1/kernel", "head/kernel"),
    ),
    "R50+ViT": ("a hybrid", ("conv_root/kernel", "gn_root/scale", "cls", *FLAX_KEYS)),
    "Deformable DETR": (
        "a Deformable DETR",
        ("transformer.encoder.layers.0.self_attn.sampling_offsets.weight", "query_embed.weight"),
    ),
    "Hugging Face's Deformable DETR": (
        "a Deformable DETR",
        ("model.encoder.layers.0.self_attn.sampling_offsets.weight", "model.query_position_embeddings.weight"),
    ),
    "Conditional DETR": ("a Conditional", ("transformer.decoder.layers.0.ca_qcontent_proj.weight", *DETR_KEYS)),
    "Conditional DETR's points": ("a Conditional", ("transformer.decoder.ref_point_head.layers.0.weight", *DETR_KEYS)),
    "DAB-DETR": ("DAB-DETR", ("refpoint_embed.weight", "transformer.encoder.layers.0.self_attn.in_proj_weight")),
    "pre-norm DETR": ("pre_norm", (*DETR_KEYS, "transformer.encoder.norm.weight", "transformer.encoder.norm.bias")),
    "DETR with learned positions": ("learned positions", (*DETR_KEYS, "backbone.1.row_embed.weight")),
    "Hugging Face's DETR with learned positions": (
        "learned positions",
        ("model.backbone.position_embedding.row_embeddings.weight", "model.query_position_embeddings.weight"),
    ),
    "distilled DeiT": ("a distilled DeiT", ("dist_token", "head_dist.weight", "head_dist.bias", *VIT_KEYS)),
    "Hugging Face's distilled DeiT": ("a distilled DeiT", ("deit.embeddings.distillation_token",)),
    "Swin": ("Swin, BEiT", ("layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight")),
    "Hugging Face's Swin": (
        "Swin, BEiT",
        ("swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",),
    ),
    "BEiT": ("Swin, BEiT", ("blocks.0.attn.relative_position_bias_table", "blocks.0.attn.qkv.weight", "cls_token")),
    "MAE's fine-tuned ViT": ("averages its patches", ("fc_norm.weight", "fc_norm.bias", *VIT_KEYS)),
    "wrapped MAE": ("averages its patches", ("module.fc_norm.weight", *(f"module.{key}" for key in VIT_KEYS))),
    "DINOv2": ("layer scale", ("blocks.0.ls1.gamma", "blocks.0.ls2.gamma", "mask_token", *VIT_KEYS)),
    "DeiT III": ("layer scale", ("blocks.0.gamma_1", "blocks.0.gamma_2", *VIT_KEYS)),
    "Hugging Face's DINOv2": ("layer scale", ("dinov2.encoder.layer.0.layer_scale1.lambda1",)),
    "ViT with registers": ("register tokens", ("reg_token", *VIT_KEYS)),
    "Meta's ViT with registers": ("register tokens", ("register_tokens", *VIT_KEYS)),
    "OpenAI's CLIP": ("the image tower of CLIP", ("visual.class_embedding", "visual.conv1.weight", "logit_scale")),
    "Hugging Face's CLIP": ("the image tower of CLIP", ("vision_model.embeddings.class_embedding", "logit_scale")),
    "CLIP by timm": ("further norms", ("norm_pre.weight", "norm_pre.bias", *VIT_KEYS)),
    "ViT-22B's norms": ("further norms", ("blocks.0.attn.q_norm.weight", *VIT_KEYS)),
    "DINOv3": ("rotary positions", ("rope_embed.periods", *VIT_KEYS)),
    "Google's EfficientNet-B0": ("squeeze-and-excitation", ("_conv_stem.weight", "_blocks.0._se_reduce.weight")),
    "timm's EfficientNet-B0": ("squeeze-and-excitation", ("conv_stem.weight", "blocks.0.0.se.conv_reduce.weight")),
    "ResNetV2 with batch norm": (
        "a ResNetV2 with batch norm",
        ("stages.0.blocks.0.norm1.running_mean", "stem.conv.weight", "stages.0.blocks.0.norm1.weight", "norm.weight"),
    ),
}


@pytest.mark.parametrize(("network", "keys"), NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_unsupported_networks_are_named(network: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "vit.safetensors")
    with pytest.raises(UnsupportedNetworkError, match=re.escape(network)) as error:
        recognised(tmp_path / "vit.safetensors")
    assert any(f"(key {key})" in str(error.value) for key in keys)


def test_every_unsupported_network_is_tested() -> None:
    cases = [network for network, _ in NEIGHBOURS.values()]
    assert [name for _, name in UNSUPPORTED_NETWORKS if not any(case in name for case in cases)] == []
    for pattern, _ in UNSUPPORTED_NETWORKS:
        for part in re.split(r"\|(?![^(]*\))", pattern):
            keys = [key for _, keys in NEIGHBOURS.values() for key in keys]
            assert any(re.search(part, key) for key in keys), part


@pytest.mark.parametrize(
    ("lacking", "nearest"),
    [("pos_embed", "timm's ViT"), ("patch_embed.proj.weight", "timm's ViT"), ("blocks.0.mlp.fc1.weight", "timm's ViT")],
)
def test_an_unknown_file_names_the_nearest_layout_and_what_it_lacks(lacking: str, nearest: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1) for key in VIT_KEYS if key != lacking}, tmp_path / "m.safetensors")
    with pytest.raises(UnknownLayoutError, match=f"the nearest known layout, {nearest}, also has {lacking}"):
        recognised(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("keys", "nearest", "lacking"),
    [
        (DETR_KEYS[1:], "facebookresearch's DETR", "query_embed.weight"),
        (("embedding/kernel", "cls", "head/kernel", "head/bias"), "Google's ViT", "Transformer/encoder_norm/scale"),
        (("stem/kernel", "stem/bias", "MixerBlock_0/LayerNorm_0/scale"), "Google's MLP-Mixer", "head/kernel"),
        (("resnet/root_block/standardized_conv2d/kernel",), "Google's BiT", "resnet/block1/unit01/a"),
        (("vit.layernorm.weight", "vit.embeddings.cls_token"), "Hugging Face's ViT", "vit.embeddings.patch_embeddings"),
        (("conv1.weight", "bn1.weight", "layer1.0.conv1.weight"), "torchvision's or timm's ResNet", "bn1.running_mean"),
        (("class_token", "encoder.ln.weight", "heads.head.bias"), "torchvision's ViT", "encoder.pos_embedding"),
    ],
)
def test_the_nearest_layout(keys: tuple[str, ...], nearest: str, lacking: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "vit.safetensors")
    with pytest.raises(UnknownLayoutError, match=f"nearest known layout, {nearest}") as error:
        recognised(tmp_path / "vit.safetensors")
    assert lacking in str(error.value)
