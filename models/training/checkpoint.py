"""The checkpoint of a run: one self-describing file that export and resume need nothing beside.

runs/<name>/checkpoint.pt    weights, architecture, recipe, labels, training state
runs/<name>/metrics.jsonl    one line per epoch
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from models.build import build_model
from models.training.errors import CheckpointError
from models.training.recipe import Recipe

CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network after some epochs of a recipe."""

    recipe: dict[str, Any]  # Recipe as JSON values
    labels: list[str]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    epoch: int  # epochs done
    seconds: float  # of training so far
    metrics: dict[str, float]  # on the validation images, after the last evaluation
    data_path: str  # where the data was, to resume and to evaluate
    format: int = _FORMAT

    def read_recipe(self) -> Recipe:
        return Recipe.model_validate(self.recipe)

    def build(self) -> nn.Module:
        """The network with these weights, in evaluation mode."""
        recipe = self.read_recipe()
        network = build_model(recipe.architecture, recipe.model, len(self.labels))
        network.load_state_dict(self.weights)
        return network.eval()


def save(checkpoint: Checkpoint, run: Path) -> None:
    """Write the checkpoint so that a crash at any moment leaves either the old or the new one."""
    partial = run / f"{CHECKPOINT_FILE}.partial"
    torch.save(asdict(checkpoint), partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(run / CHECKPOINT_FILE)


def load(run: Path) -> Checkpoint:
    """Read a run's checkpoint; no code in the file is executed.

    Raises:
        CheckpointError: there is none, or it is broken or of another format.
    """
    file = run / CHECKPOINT_FILE
    if not file.is_file():
        raise CheckpointError(f"{run}: expected a run with {CHECKPOINT_FILE}, found none")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(**content)
        checkpoint.read_recipe()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: recipe: {place}: {first['msg']}, found {first['input']!r}") from error
    except Exception as error:  # on broken bytes the unpickler raises almost anything
        raise CheckpointError(f"{file}: not a checkpoint of this version: {error}") from error
    if checkpoint.format != _FORMAT:
        raise CheckpointError(f"{file}: format: expected {_FORMAT}, found {checkpoint.format}")
    return checkpoint


def sha256(run: Path) -> str:
    """SHA-256 of the checkpoint file."""
    with (run / CHECKPOINT_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
