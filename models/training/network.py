"""Serving predictors on torch, so that a run is evaluated in the same way as a bundle."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitrine.bundle.manifest import Preprocessing, Task
from vitrine.bundle.predictors import Predictor, make_predictor
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import Checkpoint


class TorchNetwork:
    """Run a served network with torch, with the interface of `bundle.predictors.Network`."""

    def __init__(self, module: ServedClassifier | ServedDetector, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, **inputs: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        training = self.module.training
        self.module.eval()
        outputs = self.module(**{name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()})
        self.module.train(training)
        return [output.cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def torch_predictor(
    network: nn.Module,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    device: torch.device,
    temperature: float = 1.0,
    offset: float = 0.0,
) -> Predictor:
    """Return the serving predictor of a torch network."""
    module = served(network, preprocessing.mean, preprocessing.std, temperature, offset)
    return make_predictor(TorchNetwork(module, device), preprocessing, labels)


def checkpoint_predictor(checkpoint: Checkpoint, device: torch.device | None = None) -> tuple[Predictor, Task]:
    """Return the predictor and task of a checkpoint."""
    preprocessing = checkpoint.read_preprocessing()
    predictor = torch_predictor(
        checkpoint.build(),
        preprocessing,
        checkpoint.labels,
        device or default_device(),
        checkpoint.temperature,
        checkpoint.offset,
    )
    return predictor, preprocessing.task


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the display name of a device: "NVIDIA H200", "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
