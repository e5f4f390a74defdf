"""DETR: detection as set prediction (Carion et al. 2020, "End-to-End Object Detection with Transformers").

Backbone, transformer encoder, decoder with N object queries, a class head and a box head: no region proposals, no NMS.
Plain learned queries need hundreds of epochs to find out where they look. Here each query has a learned reference box:
its sine encoding is the query's position, the query looks around it first (`models.transformer.SpatialPrior`), and
every decoder layer predicts an offset to it and hands the moved box on (Liu et al. 2022, "DAB-DETR", sec. 4). While
training, several groups of queries are matched independently (Chen et al. 2023, "Group DETR"), which gives each image
more supervision; only the first group exists at inference.

Shapes: B batch, H x W pixels, h x w cells of the feature map, M = h w, N queries, D embedding, K classes.
"""

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from models.position import grid_centres, sine_2d, valid_cells
from models.resnet import ResNet
from models.transformer import DetrDecoderBlock, DetrEncoderBlock


@dataclass(frozen=True)
class DetrConfig:
    """The shape of a DETR. `backbone_layers` and `backbone_width` are those of `models.resnet.ResNet`."""

    num_classes: int
    num_queries: int = 100
    embed_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    dropout: float = 0.1
    backbone_layers: tuple[int, ...] = (2, 2, 2, 2)
    backbone_width: int = 64
    query_groups: int = 1


class SetPrediction(TypedDict):
    """One decoder layer's answer: N guesses for the set of objects."""

    pred_logits: Tensor  # [B, N, K + 1], the last class is "no object"
    pred_boxes: Tensor  # [B, N, 4], cxcywh, fractions of the valid region


class DetrOutput(SetPrediction):
    """The last layer's answer, and those of the layers before it (empty outside training)."""

    aux_outputs: list[SetPrediction]


class BoxHead(nn.Module):
    """Three-layer perceptron to box coordinates, before the sigmoid."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, 4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., 4]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        out: Tensor = self.layers[-1](x)
        return out


class Detr(nn.Module):
    """Image to a set of N class distributions and boxes."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if dim % 4:
            raise ValueError(f"embed_dim {dim} is not divisible by 4 (sine and cosine of x and y)")
        self.backbone = ResNet(config.backbone_layers, config.backbone_width)
        self.stride = 2 ** (1 + len(config.backbone_layers))
        self.input_proj = nn.Conv2d(self.backbone.num_features, dim, kernel_size=1)
        shape = (dim, config.num_heads, config.feedforward_dim, config.dropout)
        self.encoder = nn.ModuleList(DetrEncoderBlock(*shape) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DetrDecoderBlock(*shape) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_embed = nn.Embedding(config.num_queries * config.query_groups, dim)
        self.reference_boxes = nn.Parameter(_grid_of_boxes(config.num_queries).repeat(config.query_groups, 1))
        self.query_pos = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.class_embed = nn.Linear(dim, config.num_classes + 1)
        self.bbox_embed = BoxHead(dim)
        self._init_weights()

    def _init_weights(self) -> None:
        # Among them the offsets of the spatial priors: each head starts by looking to another side of the box.
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        last = self.bbox_embed.layers[-1]  # all zero, so that the first prediction is the reference box itself
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor, sizes: Tensor) -> DetrOutput:
        """Detect objects.

        Args:
            images: normalised, float [B, 3, H, W], padded with zeros below and to the right.
            sizes: int64 [B, 2], height and width of each image's valid region.
        """
        dim = self.config.embed_dim
        features = self.input_proj(self.backbone(images, sizes))  # [B, D, h, w]
        valid = valid_cells(sizes, features.shape[-2:], self.stride)  # [B, h, w]
        y, x = grid_centres(valid)
        cells = torch.stack((x, y), dim=-1).flatten(1, 2)  # [B, M, 2]
        positions = sine_2d(cells, dim)  # [B, M, D]
        hidden = torch.zeros_like(valid, dtype=features.dtype).masked_fill(~valid, -math.inf)
        padding_bias = hidden.flatten(1)[:, None, None]  # [B, 1, 1, M]
        memory = features.flatten(2).transpose(1, 2)  # [B, M, D]
        for encoder_block in self.encoder:
            memory = encoder_block(memory, positions, padding_bias)

        groups = self.config.query_groups if self.training else 1
        count = self.config.num_queries * groups
        batch = images.shape[0]
        queries = self.query_embed.weight[:count].expand(batch, -1, -1)  # [B, N, D]
        reference = self.reference_boxes[:count].expand(batch, -1, -1)  # [B, N, 4], logits
        layers: list[SetPrediction] = []
        for index, decoder_block in enumerate(self.decoder):
            boxes = reference.sigmoid()
            encoded = torch.cat((sine_2d(boxes[..., :2], dim), sine_2d(boxes[..., 2:], dim)), dim=-1)  # [B, N, 2 D]
            query_positions = self.query_pos(encoded)  # [B, N, D]
            queries = decoder_block(queries, query_positions, memory, positions, padding_bias, boxes, cells, groups)
            normed = self.decoder_norm(queries)
            box_logits = reference + self.bbox_embed(normed)
            if self.training or index == len(self.decoder) - 1:
                layers.append({"pred_logits": self.class_embed(normed), "pred_boxes": box_logits.sigmoid()})
            reference = box_logits.detach()
        return {**layers[-1], "aux_outputs": layers[:-1]}


def _grid_of_boxes(count: int) -> Tensor:
    """`count` boxes spread over the image, an eighth of it wide and high: logits of cxcywh, [count, 4]."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    x = (index % columns + 0.5) / columns
    y = (index // columns + 0.5) / rows
    eighth = torch.full((count,), 1 / 8)
    return torch.logit(torch.stack((x, y, eighth, eighth), dim=-1))
