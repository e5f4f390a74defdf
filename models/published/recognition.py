"""Recognise the layout of a weights file by its keys, never by its name."""

import re
from pathlib import Path

from vitrine.models.published import detr, efficientnet, mlp_mixer, resnetv2, vit
from vitrine.models.published.errors import UnknownLayoutError, UnsupportedNetworkError
from vitrine.models.published.files import Tensors
from vitrine.models.published.layout import Layout

LAYOUTS = (*vit.LAYOUTS, *mlp_mixer.LAYOUTS, *resnetv2.LAYOUTS, *efficientnet.LAYOUTS, *detr.LAYOUTS)

# Networks that share most of their keys with a supported one, but compute something else.
UNSUPPORTED_NETWORKS = (
    (r"MAPHead_\d|(^|\.)attn_pool\.", "a ViT with attention pooling (a MAP head, as SigLIP's)"),
    (r"conv_root/kernel|gn_root/", "big_vision's BiT, which normalises after each convolution (or a hybrid with it)"),
    (r"sampling_offsets", "a Deformable DETR"),
    (r"ca_qcontent_proj|ref_point_head|refpoint_embed", "a Conditional or DAB-DETR"),
    (r"transformer\.encoder\.norm\.", "a DETR trained with pre_norm"),
    (r"row_embed\.weight|row_embeddings\.weight", "a DETR with learned positions"),
    (r"dist_token|distillation_token|head_dist\.", "a distilled DeiT"),
    (r"relative_position_bias_table", "a transformer with relative positions (Swin, BEiT)"),
    (r"(^|\.)fc_norm\.", "a ViT that averages its patches with an unused class token (as MAE's fine-tuned ones)"),
    (r"\.ls1\.|\.gamma_1$|lambda1$", "a ViT with layer scale (as DINOv2 and DeiT III)"),
    (r"register_tokens|reg_token", "a ViT with register tokens"),
    (r"\._se_reduce\.|\.se\.conv_reduce\.", "an EfficientNet with squeeze-and-excitation (B0 to B8)"),
    (r"(^|\.)visual\.|^vision_model\.", "the image tower of CLIP"),
    (r"(^|\.)norm_pre\.|\.q_norm\.|(^|\.)rope", "a ViT with further norms or rotary positions"),
    (r"^stages\.\d+\.blocks\.\d+\.norm1\.running_mean", "a ResNetV2 with batch norm"),
)


def recognise(tensors: Tensors, file: Path) -> tuple[Layout, Tensors]:
    """Return the layout of a file, and its tensors under the names in the layout's rules.

    Raises:
        UnsupportedNetworkError: the file holds a network that is not supported.
        UnknownLayoutError: its keys match no supported layout.
    """
    for pattern, network in UNSUPPORTED_NETWORKS:
        key = next((key for key in tensors if re.search(pattern, key)), None)
        if key is not None:
            raise UnsupportedNetworkError(file, network=network, key=key)
    for layout in LAYOUTS:
        prefix = layout.find_prefix(tensors)
        if prefix is not None:
            return layout, layout.canonical(tensors, prefix)
    nearest = max(LAYOUTS, key=lambda layout: layout.known_share(tensors))
    missing = [key for key in nearest.signature if key not in nearest.canonical(tensors, "")]
    raise UnknownLayoutError(file, keys=sorted(tensors), nearest=nearest.name, missing=missing)
