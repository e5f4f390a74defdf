"""Served networks with explanations as additional outputs after those of `models.serving`.

ViT and DETR output their attention. A convolutional network with global average pooling and a linear head outputs class
activation maps (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", eq. 2). MLP-Mixer has
neither: `bundle.explaining` occludes one patch at a time instead.

Shapes: B batch, H x W pixels, K classes, L layers, N tokens, h x w patches or cells, Q queries, M = h w.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.attention import attention_rollout
from vitrine.models.detr import Detr
from vitrine.models.efficientnet import EfficientNet
from vitrine.models.resnet_classifier import ResNetClassifier
from vitrine.models.resnetv2 import ResNetV2
from vitrine.models.serving import Channels, ServedClassifier, ServedDetector
from vitrine.models.vit import ViT


class ExplainedViT(ServedClassifier):
    """A ViT, or an EfficientNet whose head is one, with its attention."""

    output_names = ("probabilities", "attention", "rollout", "layers")

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Classify images and return the attention.

        Returns:
            probabilities [B, K]; attention [B, L, heads, h, w], from the class token to each patch in each layer
            (without a class token, the mean over the patches); rollout [B, h, w], the contribution of each patch to
            the classified state: non-negative, sums to one; layers [B, L, K], the probabilities if the state after each
            block were classified, by the same norm and head ("logit lens", nostalgebraist 2020): the last are the
            answer's.
        """
        record: list[Tensor] = []
        states: list[Tensor] = []
        x = self.normalise(pixels)
        if isinstance(self.network, EfficientNet):
            network, x = cast(ViT, self.network.head), self.network.forward_features(x)
        else:
            network = cast(ViT, self.network)
        logits = network.forward_head(network.forward_features(x, record, states))
        layers = torch.stack([self.probabilities(network.forward_head(state)) for state in states], dim=1)
        weights = torch.stack(record, dim=1)  # [B, L, heads, N, N]
        rollout = attention_rollout(record)  # [B, N, N]
        if network.cls_token is not None:
            weights, rollout = weights[..., 0, 1:], rollout[:, 0, 1:]
        else:
            weights, rollout = weights.mean(dim=-2), rollout.mean(dim=-2)
        rollout = rollout / rollout.sum(dim=-1, keepdim=True)
        grid = network.config.grid
        return self.probabilities(logits), weights.unflatten(-1, grid), rollout.unflatten(-1, grid), layers


class ExplainedConvNet(ServedClassifier):
    """A ResNet, BiT or EfficientNet with its class activation maps."""

    output_names = ("probabilities", "activation")
    output_axes: Mapping[str, tuple[str, ...]] = {"activation": ("", "rows", "columns")}

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Classify images and return the class activation maps.

        Returns:
            probabilities [B, K]; activation [B, K, h, w]: the sum over the cells and the head's bias are the logit.
        """
        network = cast(ResNetV2 | ResNetClassifier | EfficientNet, self.network)
        features = network.features(self.normalise(pixels))  # [B, C, h, w]
        head = cast(nn.Linear, network.head)
        logits = head(features.mean(dim=(2, 3)))
        height, width = features.shape[-2:]
        cells = F.linear(features.flatten(2).transpose(1, 2), head.weight)  # [B, M, K]
        activation = cells.transpose(1, 2).unflatten(-1, (height, width)) / (height * width)
        return self.probabilities(logits), activation


class ExplainedDetector(ServedDetector):
    """A DETR with its attention."""

    output_names = ("scores", "class_ids", "boxes", "cross_attention", "encoder_attention")

    @property
    def output_axes(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """Names of the axes after the batch; with a neck, the encoder sees a coarser map than the decoder."""
        rows, columns = ("rows", "columns") if self.network.neck is None else ("encoder_rows", "encoder_columns")
        return {"cross_attention": ("", "rows", "columns"), "encoder_attention": (rows, columns, rows, columns)}

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Detect objects and return the attention over the cells of the feature map.

        Returns:
            The outputs of `ServedDetector.forward`, then cross_attention [B, Q, h, w] of each answer's query in the
            last decoder layer, and encoder_attention [B, h', w', h', w'] of each cell of the encoder's map in its last
            layer; both are means over the heads, zero at padding, and sum to one.
        """
        record: list[Tensor] = []
        output = self.network(self.normalised(pixels, sizes), sizes, record)
        scores, class_ids, boxes, queries = self.predictions(output)
        cross = record[-1].mean(dim=1)  # [B, Q, M]
        cross = cross.gather(1, queries[..., None].expand(-1, -1, cross.shape[-1])).unflatten(-1, output["grid"])
        grid = output["encoder_grid"]
        encoder = record[self.network.config.encoder_layers - 1].mean(dim=1)  # [B, M', M']
        return scores, class_ids, boxes, cross, encoder.unflatten(-1, grid).unflatten(1, grid)


def explained(
    network: nn.Module, mean: Channels, std: Channels, temperature: float = 1.0, offset: float = 0.0
) -> ServedClassifier | ServedDetector | None:
    """Wrap a network as `models.serving.served` does, with explanations; return None if the network offers none."""
    if isinstance(network, ViT) or (isinstance(network, EfficientNet) and isinstance(network.head, ViT)):
        return ExplainedViT(network, mean, std, temperature)
    if isinstance(network, ResNetV2 | ResNetClassifier | EfficientNet):
        return ExplainedConvNet(network, mean, std, temperature)
    if isinstance(network, Detr) and network.config.encoder_layers > 0:
        return ExplainedDetector(network, mean, std, temperature, offset)
    return None
