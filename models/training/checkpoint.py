"""The checkpoint of a run: one self-describing file that export and resume need nothing beside.

runs/<name>/checkpoint.pt    architecture, preprocessing, labels, weights; training state, or where the weights are from
runs/<name>/metrics.jsonl    one line per epoch
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from bundle.manifest import Preprocessing, Task
from models.build import build_model
from models.training.errors import CheckpointError
from models.training.recipe import Recipe

CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.jsonl"
_FORMAT = 2


@dataclass(frozen=True)
class Progress:
    """How far a recipe has been followed, and all that it needs to go on."""

    recipe: dict[str, Any]  # Recipe as JSON values
    optimizer: dict[str, Any]
    epoch: int  # epochs done
    seconds: float  # of training so far
    metrics: dict[str, float]  # on the validation images, after the last evaluation
    data_path: str  # where the data was, to resume and to evaluate

    def read_recipe(self) -> Recipe:
        return Recipe.model_validate(self.recipe)


@dataclass(frozen=True)
class Origin:
    """The published file that weights were imported from."""

    file: str  # its name
    sha256: str
    layout: str
    arguments: list[str]  # that `vitrine import` was given beside it
    untrained: list[str]  # parts of the network that the file did not fill


@dataclass(frozen=True)
class Checkpoint:
    """A network that was trained (`progress`) or imported (`origin`)."""

    architecture: str
    settings: dict[str, Any]  # of the architecture, without num_classes
    preprocessing: dict[str, Any]  # Preprocessing as JSON values
    labels: list[str]
    weights: dict[str, torch.Tensor]
    progress: Progress | None = None
    origin: Origin | None = None
    format: int = _FORMAT

    def read_preprocessing(self) -> Preprocessing:
        preprocessing: Preprocessing = TypeAdapter(Preprocessing).validate_python(self.preprocessing)
        return preprocessing

    @property
    def task(self) -> Task:
        return self.read_preprocessing().task

    def build(self) -> nn.Module:
        """The network with these weights, in evaluation mode."""
        with torch.device("meta"):  # no time and memory for random weights
            network = build_model(self.architecture, self.settings, len(self.labels))
        network.load_state_dict(self.weights, assign=True)
        return network.eval()


def save(checkpoint: Checkpoint, run: Path) -> None:
    """Write the checkpoint so that a crash at any moment leaves either the old or the new one."""
    partial = run / f"{CHECKPOINT_FILE}.partial"
    content = {**vars(checkpoint), "progress": _plain(checkpoint.progress), "origin": _plain(checkpoint.origin)}
    torch.save(content, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(run / CHECKPOINT_FILE)


def _plain(part: Progress | Origin | None) -> dict[str, Any] | None:
    return None if part is None else dict(vars(part))


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
        found = content.get("format") if isinstance(content, dict) else None
        if isinstance(found, int) and found != _FORMAT:
            raise CheckpointError(f"{file}: format: expected {_FORMAT}, found {found}; train or import it again")
        progress, origin = content.pop("progress"), content.pop("origin")
        checkpoint = Checkpoint(
            **content,
            progress=None if progress is None else Progress(**progress),
            origin=None if origin is None else Origin(**origin),
        )
        checkpoint.read_preprocessing()
        if checkpoint.progress is not None:
            checkpoint.progress.read_recipe()
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {error.title}: {place}: {first['msg']}, found {first['input']!r}") from error
    except Exception as error:  # on broken bytes the unpickler raises almost anything
        raise CheckpointError(f"{file}: not a checkpoint of this version: {error}") from error
    return checkpoint


def sha256(run: Path) -> str:
    """SHA-256 of the checkpoint file."""
    with (run / CHECKPOINT_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
