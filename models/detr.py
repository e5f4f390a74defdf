"""DETR: detection as set prediction (Carion et al. 2020, "End-to-End Object Detection with Transformers").

Backbone, transformer encoder, decoder with N object queries, a class head and a box head: no region proposals, no NMS.

The backbone is a ResNet or an EfficientNet-Lite (`backbone`). With `neck="fusion"`, the decoder attends to a finer
map, see `models.neck`.

The paper's queries are learned vectors, which need hundreds of epochs to learn where to attend. With `queries="boxes"`,
each query has a learned reference box: its sine encoding is the query's position, a Gaussian around it biases the
cross-attention (`models.transformer.SpatialPrior`), and every decoder layer predicts an offset to it and passes the
refined box on (Liu et al. 2022, "DAB-DETR", sec. 4). During training, several groups of queries can be matched
independently (Chen et al. 2023, "Group DETR"), which gives each image more supervision; inference uses the first group
only. The decoder can also be trained to restore noised objects (Li et al. 2022, "DN-DETR"), which needs no matching.

Shapes: B batch, H x W pixels, h x w cells of the feature map, M = h w, N queries, D embedding, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.efficientnet import VARIANTS as EFFICIENTNETS
from vitrine.models.efficientnet import EfficientNetBackbone, EfficientNetConfig
from vitrine.models.neck import FusionNeck
from vitrine.models.position import grid_points, nearest_valid_cells, pad_edges, sine_2d, valid_cells
from vitrine.models.resnet import VARIANTS as RESNETS
from vitrine.models.resnet import Norm, ResNet, ResNetConfig
from vitrine.models.transformer import DetrDecoderBlock, DetrEncoderBlock, SpatialPrior

BackboneName = Literal[
    "resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
]


@dataclass(frozen=True)
class DetrConfig:
    """Configuration of a DETR.

    `backbone` is a variant of `models.resnet` or `models.efficientnet`, or "resnet" for one with the `backbone_*`
    settings; these and `dilation` are the fields of `models.resnet.ResNetConfig`.
    `scores` are a softmax over the classes and "no object" as in the paper, or a sigmoid for each class.

    `unused_classes` outputs of the class head have no label: they take part in the softmax but are never predicted
    (the gaps in COCO's category ids). `denoising` is the number of groups of noised objects restored during training.
    """

    num_classes: int
    unused_classes: int = 0
    num_queries: int = 100
    queries: Literal["learned", "boxes", "selected"] = "learned"
    query_groups: int = 1
    denoising: int = 0
    embed_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    dropout: float = 0.1
    scores: Literal["softmax", "sigmoid"] = "softmax"
    neck: Literal["none", "fusion"] = "none"
    backbone: BackboneName = "resnet"
    backbone_layers: tuple[int, ...] = (2, 2, 2, 2)
    backbone_width: int = 64
    backbone_block: Literal["basic", "bottleneck"] = "basic"
    backbone_norm: Norm = "batch"
    dilation: bool = False

    def make_backbone(self) -> ResNet | EfficientNetBackbone:
        """Return a freshly initialised backbone."""
        if self.backbone in EFFICIENTNETS:
            return EfficientNetBackbone(EfficientNetConfig(self.num_classes, **EFFICIENTNETS[self.backbone]))
        if self.backbone in RESNETS:
            return ResNet(replace(RESNETS[self.backbone], norm=self.backbone_norm, dilation=self.dilation))
        return ResNet(
            ResNetConfig(
                self.backbone_layers, self.backbone_width, self.backbone_block, self.backbone_norm, self.dilation
            )
        )


def _variant(resnet: str, **settings: Any) -> dict[str, Any]:
    shape = RESNETS[resnet]
    backbone = {"backbone_layers": shape.layers, "backbone_block": shape.block, "backbone_norm": "frozen"}
    return {**backbone, "dilation": False, **settings}


# Table 1 of the paper, and a smaller variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "detr_resnet50": _variant("resnet50"),
    "detr_resnet50_dc5": _variant("resnet50", dilation=True),
    "detr_resnet101": _variant("resnet101"),
    "detr_resnet101_dc5": _variant("resnet101", dilation=True),
    "detr_small": _variant("resnet18", encoder_layers=3, decoder_layers=3, feedforward_dim=1024),
}


# Initial logit of a sigmoid score: most queries see no object (Lin et al. 2017, "Focal Loss", sec. 3.3).
_RARE = -math.log((1 - 0.01) / 0.01)
# Logit of what is never chosen, and without effect on a loss.
_NEVER = -20.0
# Logit of the edges of a small box in the corner.
_CORNER = -4.0
# Attention bias of masked queries. Finite, since in an image without objects all queries of a group are masked.
_MASKED = -1e4


class SetPrediction(TypedDict):
    """Output of one decoder layer: N predictions."""

    pred_logits: Tensor  # [B, N, K + 1], the last class is "no object"; [B, N, K] for sigmoid scores
    pred_boxes: Tensor  # [B, N, 4], cxcywh, fractions of the valid region


class DetrOutput(SetPrediction):
    """Output of the last decoder layer, with auxiliary outputs."""

    grid: tuple[int, int]  # (h, w) of the memory
    encoder_grid: tuple[int, int]  # (h, w) of the map that the encoder sees
    proposals: SetPrediction | None  # of each cell of the memory, M predictions; None outside training or unselected
    aux_outputs: list[SetPrediction]  # of the layers before the last, empty outside training
    denoising: list[SetPrediction]  # of all layers, [B, G n, ...] for the G groups of `Denoising`; empty without it


@dataclass(frozen=True)
class Denoising:
    """Noised objects for the decoder to restore, in G groups of at most n per image (DN-DETR, sec. 4)."""

    boxes_cxcywh: Tensor  # [B, G, n, 4], fractions of the valid region
    class_ids: Tensor  # int64 [B, G, n]
    valid: Tensor  # bool [B, n], False where an image has fewer than n objects


class _Memory(NamedTuple):
    """Encoder output that the decoder attends to."""

    tokens: Tensor  # [B, M, D]
    layers: list[tuple[Tensor, Tensor]]  # keys and values of each decoder layer, [B, heads, M, d] each
    cells: Tensor  # [B, h, w, 2], (x, y) of each token as fractions of the valid region
    bias: Tensor  # [B, 1, 1, M], minus infinity at padding


class BoxHead(nn.Module):
    """Three-layer perceptron that predicts box coordinates before the sigmoid."""

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
    """Image to N class distributions and boxes."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if dim % 4:
            raise ValueError(f"embed_dim {dim} is not divisible by 4 (sine and cosine of x and y)")
        for name, minimum in (("num_queries", 1), ("query_groups", 1), ("decoder_layers", 1), ("denoising", 0)):
            if getattr(config, name) < minimum:
                raise ValueError(f"{name}: expected at least {minimum}, found {getattr(config, name)}")
        if config.denoising and config.queries == "learned":
            raise ValueError(f"denoising={config.denoising} needs queries=boxes or selected, found learned")
        if config.queries == "selected" and config.query_groups > 1:
            raise ValueError(f"query_groups={config.query_groups} needs queries=boxes or learned, found selected")
        self.backbone = config.make_backbone()
        channels = self.backbone.channels
        if config.neck == "fusion" and len(channels) < 3:
            raise ValueError(f"neck=fusion: expected a backbone of at least 3 stages, found {len(channels)}")
        self.neck = FusionNeck(channels[-3:], dim) if config.neck == "fusion" else None
        self.input_proj = nn.Conv2d(channels[-1], dim, kernel_size=1)
        shape = (dim, config.num_heads, config.feedforward_dim, config.dropout)
        self.encoder = nn.ModuleList(DetrEncoderBlock(*shape) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DetrDecoderBlock(*shape) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_embed = nn.Embedding(config.num_queries * config.query_groups, dim)
        self.query_boxes = None if config.queries == "learned" else QueryBoxes(config)
        outputs = config.num_classes + config.unused_classes + (config.scores == "softmax")
        self.class_embed = nn.Linear(dim, outputs)
        self.bbox_embed = BoxHead(dim)
        self.proposals = Proposals(dim, outputs) if config.queries == "selected" else None
        # For comparing padded batches with public implementations: there, padding leaks into the backbone's features,
        # and the feature map's mask is sampled instead of rounded up.
        self.published_padding = False
        self._init_weights()
        if config.denoising:
            self.label_embed = nn.Embedding(config.num_classes, dim)

    def _init_weights(self) -> None:
        transformer = [self.encoder, self.decoder]
        if self.query_boxes is not None:
            # Includes the priors' offsets: each head starts by attending to a different side of the box.
            transformer.append(self.query_boxes.priors)
            for parameter in self.bbox_embed.layers[-1].parameters():
                nn.init.zeros_(parameter)  # the first prediction is the reference box itself
        for part in transformer:
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        if self.config.scores == "sigmoid":
            nn.init.constant_(self.class_embed.bias, _RARE)

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None,
        record: list[Tensor] | None = None,
        denoising: Denoising | None = None,
    ) -> DetrOutput:
        """Detect objects.

        Args:
            images: normalised, float [B, 3, H, W], padded with zeros at the bottom and right.
            sizes: int64 [B, 2], height and width of each image's valid region; None for images without padding, which
                skips the backbone's masks.
            record: list that the attention weights are appended to: each encoder layer's [B, heads, M, M], then each
                decoder layer's cross-attention [B, heads, N, M].
            denoising: objects to restore; needs a network with `denoising` groups.
        """
        return self.forward_head(self.forward_features(images, sizes), sizes, images.shape[-2:], record, denoising)

    @property
    def edge_multiple(self) -> int:
        """What the edges of images are padded to multiples of, 0 if they are not.

        Maps of a neck have to be twice as fine as the next ones, and an EfficientNet sees the parity of the edges.
        """
        pads = self.neck is not None or isinstance(self.backbone, EfficientNetBackbone)
        return self.backbone.strides[-1] if pads else 0

    def forward_features(self, images: Tensor, sizes: Tensor | None, *, stages: int = 0) -> list[Tensor]:
        """Return the backbone's maps that the rest of the network needs: the last, with a neck the last three.

        Those of the backbone's last `stages` (with a neck at most two) are left to `forward_head`. Arguments and shapes
        are those of `forward` and of the backbone.
        """
        if self.edge_multiple:
            if sizes is None:
                sizes = torch.tensor([images.shape[-2:]], device=images.device).expand(images.shape[0], -1)
            images = pad_edges(images, self.edge_multiple)
        visible = None if self.published_padding else sizes
        maps = self.backbone.forward_early(images, visible, stages)
        return maps[-1:] if self.neck is None else maps[stages - 3 :]

    def forward_head(
        self,
        maps: Sequence[Tensor],
        sizes: Tensor | None,
        edges: Sequence[int],
        record: list[Tensor] | None = None,
        denoising: Denoising | None = None,
        *,
        stages: int = 0,
    ) -> DetrOutput:
        """Detect objects, given the maps of `forward_features`, and the height and width of the padded batch."""
        maps = [*maps, *self.backbone.forward_last(maps[-1], sizes, stages)]
        config, stride = self.config, self.backbone.strides[-1]
        features = self.input_proj(maps[-1])  # [B, D, h, w]
        encoder_grid = grid = features.shape[-2:]
        if sizes is None:
            valid = features.new_ones((features.shape[0], *grid), dtype=torch.bool)  # [B, h, w]
        elif self.published_padding:
            valid = nearest_valid_cells(sizes, edges, grid)
        else:
            valid = valid_cells(sizes, grid, stride)
        offset = 1.0 if self.query_boxes is None else 0.5
        cells, positions, padding_bias = self._locate(valid, offset, features.dtype)
        tokens = features.flatten(2).transpose(1, 2)  # [B, M, D]
        for encoder_block in self.encoder:
            tokens = encoder_block(tokens, positions, padding_bias, record)
        if self.neck is not None:
            grid = maps[-2].shape[-2:]
            if sizes is None:
                valid = features.new_ones((features.shape[0], *grid), dtype=torch.bool)
            else:
                valid = valid_cells(sizes, grid, self.backbone.strides[-2])
            tokens = self.neck(maps, tokens, valid)
            cells, positions, padding_bias = self._locate(valid, offset, features.dtype)
        projected = [block.project_memory(tokens, positions) for block in self.decoder]  # type: ignore[operator]
        memory = _Memory(tokens, projected, cells, padding_bias)

        groups = config.query_groups if self.training else 1
        count = config.num_queries * groups
        learned = self.query_embed.weight[:count].expand(tokens.shape[0], -1, -1)  # [B, N, D]
        proposals: SetPrediction | None = None
        if self.query_boxes is None:
            layers = self._decode(memory, torch.zeros_like(learned), learned, groups, record=record)
        else:
            if self.proposals is not None:
                reference, proposals = self.proposals(memory, count, config.num_classes)  # [B, N, 4], logits
            else:
                assert self.query_boxes.boxes is not None
                reference = self.query_boxes.boxes[:count].expand(tokens.shape[0], -1, -1)
            layers = self._decode(memory, learned, reference, groups, record=record)
        return {
            **layers[-1],
            "grid": (grid[0], grid[1]),
            "encoder_grid": (encoder_grid[0], encoder_grid[1]),
            "proposals": proposals if self.training else None,
            "aux_outputs": layers[:-1] if self.training else [],
            "denoising": [] if denoising is None else self._denoise(memory, denoising),
        }

    def _locate(self, valid: Tensor, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the `cells`, `positions` and `bias` of `_Memory` for the valid cells of a map, bool [B, h, w]."""
        cells = grid_points(valid, offset)
        bias = torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, -math.inf)
        return cells, sine_2d(cells.flatten(1, 2), self.config.embed_dim), bias.flatten(1)[:, None, None]

    def _denoise(self, memory: _Memory, noised: Denoising) -> list[SetPrediction]:
        """Return each layer's restored objects, [B, G n, ...].

        Noised objects pass through the decoder separately: they and the queries do not attend to each other.
        """
        if not self.config.denoising:
            raise ValueError("there are objects to restore, but the network was made with denoising=0")
        reference = torch.logit(noised.boxes_cxcywh, eps=1e-3)  # [B, G, n, 4]; larger logits would saturate
        groups = reference.shape[1]
        bias = torch.zeros_like(noised.valid, dtype=reference.dtype).masked_fill(~noised.valid, _MASKED)
        queries = self.label_embed(noised.class_ids)
        return self._decode(memory, queries.flatten(1, 2), reference.flatten(1, 2), groups, bias.repeat(1, groups))

    def _decode(
        self,
        memory: _Memory,
        queries: Tensor,
        references: Tensor,
        groups: int,
        query_bias: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> list[SetPrediction]:
        """Return each layer's predictions for N queries [B, N, D].

        `references` are the queries' positions [B, N, D], or the logits of their reference boxes [B, N, 4] for
        queries="boxes". `groups` and `query_bias` are passed to `DetrDecoderBlock.forward`.
        """
        layers: list[SetPrediction] = []
        for index, decoder_block in enumerate(self.decoder):
            if self.query_boxes is None:
                query_positions, bias = references, memory.bias
            else:
                query_positions, prior = self.query_boxes(references.sigmoid(), memory.cells, index)
                bias = prior + memory.bias
            queries = decoder_block(queries, query_positions, memory.layers[index], bias, groups, query_bias, record)
            normed = self.decoder_norm(queries)
            box_logits = self.bbox_embed(normed)
            if self.query_boxes is not None:
                box_logits = references + box_logits
                references = box_logits.detach()
            layers.append({"pred_logits": self.class_embed(normed).float(), "pred_boxes": box_logits.float().sigmoid()})
        return layers


class QueryBoxes(nn.Module):
    """A reference box per query, learned unless it is selected, which determines where the query attends."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        boxes = _grid_of_boxes(config.num_queries).repeat(config.query_groups, 1)
        self.boxes = nn.Parameter(boxes) if config.queries == "boxes" else None
        self.position = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.priors = nn.ModuleList(SpatialPrior(config.num_heads) for _ in range(config.decoder_layers))
        self.embed_dim = dim

    def forward(self, boxes_cxcywh: Tensor, cells: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Encode the boxes that a decoder layer starts from.

        Args:
            boxes_cxcywh: [B, N, 4], fractions of the image.
            cells: (x, y) of the memory's cells, [B, h, w, 2], fractions of the image.
            layer: index of the decoder layer.

        Returns:
            The queries' positions [B, N, D] and their cross-attention bias [B, heads, N, M].
        """
        centres, edges = boxes_cxcywh.split(2, dim=-1)
        encoded = torch.cat((sine_2d(centres, self.embed_dim), sine_2d(edges, self.embed_dim)), dim=-1)  # [B, N, 2 D]
        return self.position(encoded), self.priors[layer](boxes_cxcywh, cells)


class Proposals(nn.Module):
    """Predict classes and a box at each cell of the memory, and select the best boxes as references of the queries."""

    def __init__(self, embed_dim: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.class_embed = nn.Linear(embed_dim, outputs)
        self.bbox_embed = BoxHead(embed_dim)
        nn.init.constant_(self.class_embed.bias, _RARE)
        for parameter in self.bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, memory: _Memory, count: int, num_classes: int) -> tuple[Tensor, SetPrediction]:
        """Return the logits of the `count` best boxes [B, N, 4], without gradients, and the M predictions.

        Boxes are offsets to one of a quarter of the image's edges, centred at the cell.
        """
        tokens = self.norm(memory.tokens)
        logits = self.class_embed(tokens)  # [B, M, outputs]
        cells = memory.cells.flatten(1, 2)
        start = torch.cat((cells, torch.full_like(cells, 0.25)), dim=-1)
        boxes = torch.logit(start, eps=1e-3) + self.bbox_embed(tokens)  # [B, M, 4]
        padding = memory.bias[:, 0, 0, :, None] < 0  # [B, M, 1]
        logits = logits.masked_fill(padding, _NEVER)
        boxes = boxes.masked_fill(padding, _CORNER)
        # A small image may have fewer cells than there are queries: the others get what padding has.
        scores = F.pad(logits[..., :num_classes].amax(dim=-1), (0, count), value=_NEVER).detach()  # [B, M + N]
        candidates = F.pad(boxes, (0, 0, 0, count), value=_CORNER).detach()  # [B, M + N, 4]
        best = scores.topk(count, dim=-1).indices[..., None]  # [B, N, 1]
        return candidates.gather(1, best.expand(-1, -1, 4)), {
            "pred_logits": logits.float(),
            "pred_boxes": boxes.float().sigmoid(),
        }


def _grid_of_boxes(count: int) -> Tensor:
    """Logits of `count` boxes cxcywh on a grid over the image, an eighth of its width and height, [count, 4]."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    x = (index % columns + 0.5) / columns
    y = (index // columns + 0.5) / rows
    eighth = torch.full((count,), 1 / 8)
    return torch.logit(torch.stack((x, y, eighth, eighth), dim=-1))
