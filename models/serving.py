"""Networks as they are served: uint8 pixels in, probabilities or boxes out.

Normalisation and post-processing are part of the module, so that evaluation during training (in torch) and the exported
graph (in ONNX Runtime) are the same computation in different runtimes.

Shapes: B batch, H x W pixels, K classes, N queries.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrine.models.boxes import cxcywh_to_xyxy
from vitrine.models.detr import Detr, DetrOutput
from vitrine.models.position import valid_cells

Channels = tuple[float, float, float]


class Normalise(nn.Module):
    """uint8 NHWC pixels to float NCHW, normalised by mean and standard deviation (of RGB in 0..1)."""

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)), persistent=False)
        self.register_buffer("shift", -torch.tensor(mean) / torch.tensor(std), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float [B, 3, H, W]."""
        return (pixels.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)


class ServedClassifier(nn.Module):
    """A classification network from pixels to probabilities.

    Dividing the logits by `temperature` calibrates the probabilities (`models/training/evaluation/calibration.py`).
    """

    output_names: tuple[str, ...] = ("probabilities",)
    output_axes: Mapping[str, tuple[str, ...]] = {}  # names of the axes after the batch, "" for fixed sizes

    def __init__(self, network: nn.Module, mean: Channels, std: Channels, temperature: float = 1.0) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network
        self.temperature = temperature

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> probabilities float [B, K]."""
        return self.probabilities(self.network(self.normalise(pixels)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, K] -> [B, K]."""
        return torch.softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)


class ServedDetector(nn.Module):
    """A DETR from pixels to boxes: one for each query, never "no object" or an unused class.

    Sigmoid scores are calibrated by `temperature` and `offset` (`models/training/evaluation/scores.py`).
    """

    output_names: tuple[str, ...] = ("scores", "class_ids", "boxes")
    output_axes: Mapping[str, tuple[str, ...]] = {}  # names of the axes after the batch, "" for fixed sizes

    def __init__(
        self, network: Detr, mean: Channels, std: Channels, temperature: float = 1.0, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network
        self.temperature, self.offset = temperature, offset

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects in padded images.

        Args:
            pixels: uint8 [B, H, W, 3]; pixels outside the valid region are set to zero after normalisation.
            sizes: int64 [B, 2], height and width of each valid region.

        Returns:
            scores float [B, N] in 0..1, class_ids int64 [B, N], boxes float [B, N, 4] as xyxy in 0..1 of the
            valid region.
        """
        scores, class_ids, boxes, _ = self.predictions(self.network(self.normalised(pixels, sizes), sizes))
        return scores, class_ids, boxes

    def normalised(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float [B, 3, H, W], zero outside the valid regions."""
        return self.normalise(pixels) * valid_cells(sizes, pixels.shape[1:3])[:, None]

    def predictions(self, output: DetrOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the network's output as scores, class ids and boxes, see `forward`, and the query of each, [B, N].

        With a softmax, each query answers its best class. Sigmoid scores of different classes are independent: the N
        best pairs of query and class are answered (Zhu et al. 2021, "Deformable DETR").
        """
        config, boxes = self.network.config, cxcywh_to_xyxy(output["pred_boxes"]).clamp(0, 1)
        if config.scores == "softmax":
            probabilities = torch.softmax(output["pred_logits"], dim=-1)
            scores, class_ids = probabilities[..., : config.num_classes].max(dim=-1)  # [B, N] each
            queries = torch.arange(boxes.shape[1], device=boxes.device).expand_as(class_ids)
            return scores, class_ids, boxes, queries
        logits = output["pred_logits"][..., : config.num_classes].flatten(1)  # [B, N K]
        best = logits.topk(boxes.shape[1], dim=-1)
        queries = torch.div(best.indices, config.num_classes, rounding_mode="trunc")
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        logits = best.values
        if (self.temperature, self.offset) != (1, 0):
            logits = logits / self.temperature + self.offset
        return logits.sigmoid(), best.indices - queries * config.num_classes, boxes, queries


def served(
    network: nn.Module, mean: Channels, std: Channels, temperature: float = 1.0, offset: float = 0.0
) -> ServedClassifier | ServedDetector:
    """Wrap a network for serving.

    Raises:
        ValueError: `temperature` is not above 0, or not 1 for a detector with a softmax: most queries predict "no
            object", so that one temperature for all queries would not calibrate the boxes' scores. Or there is an
            offset of other scores than a detector's sigmoids.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}")
    if isinstance(network, Detr) and network.config.scores == "sigmoid":
        return ServedDetector(network, mean, std, temperature, offset)
    if offset:
        raise ValueError(f"offset: expected 0.0 without sigmoid scores, found {offset}")
    if not isinstance(network, Detr):
        return ServedClassifier(network, mean, std, temperature)
    if temperature != 1:
        raise ValueError(f"temperature: expected 1.0 for a detector with a softmax, found {temperature}")
    return ServedDetector(network, mean, std)
