"""The checkpoint of a run: one self-describing file with all that export and resume need.

runs/<name>/checkpoint.pt             architecture, preprocessing, labels, weights; training state or origin
runs/<name>/checkpoint.previous.pt    the previous checkpoint
runs/<name>/weights.best.pt           with keep=best: the weights of the best epoch so far
runs/<name>/weights.last.pt           those of the last epoch, once the checkpoint has the best
runs/<name>/metrics.jsonl             one line per epoch
"""

import hashlib
import math
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from vitrine.bundle.manifest import Preprocessing, Task
from vitrine.models.build import build_model
from vitrine.models.training.errors import CheckpointError
from vitrine.models.training.recipe import Recipe, read_recipe

CHECKPOINT_FILE = "checkpoint.pt"
PREVIOUS_FILE = "checkpoint.previous.pt"
BEST_FILE = "weights.best.pt"
LAST_FILE = "weights.last.pt"
METRICS_FILE = "metrics.jsonl"
_FORMAT = 3


@dataclass(frozen=True)
class WarmStart:
    """The run that a network was fine-tuned from."""

    run: str  # name of its folder
    sha256: str  # of its checkpoint
    fresh: list[str]  # weights that were not loaded: a head for other labels


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by the metric of `GATE_METRIC`."""

    epoch: int  # from 1; 0: the weights that the run started from
    value: float


@dataclass(frozen=True)
class Progress:
    """The training state: all that a run needs to resume."""

    recipe: dict[str, Any]  # Recipe as JSON values
    changes: list[str]  # key=value overrides of the recipe
    optimizer: dict[str, Any]
    epoch: int  # epochs done
    seconds: float  # of training so far
    metrics: dict[str, float]  # on the validation images, after the last evaluation
    data_path: str  # path of the data, to resume and to evaluate
    start: WarmStart | None = None  # the run with the initial weights
    job: str = ""  # torchrun job, whose restarts resume without --resume
    step: int = 0  # steps done in the current epoch
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its parts over these steps
    best: Best | None = None
    finished: bool = False
    weights: dict[str, torch.Tensor] | None = None  # trained weights, if the checkpoint's are their moving average

    def read_recipe(self) -> Recipe:
        return read_recipe(self.recipe)


@dataclass(frozen=True)
class Origin:
    """The published file that weights were imported from."""

    file: str  # name
    sha256: str
    layout: str
    arguments: list[str]  # further arguments of `vitrine import`
    untrained: list[str]  # parts of the network that are not in the file


@dataclass(frozen=True)
class Checkpoint:
    """A trained (`progress`) or imported (`origin`) network."""

    architecture: str
    settings: dict[str, Any]  # of the architecture, without num_classes
    preprocessing: dict[str, Any]  # Preprocessing as JSON values
    labels: list[str]
    weights: dict[str, torch.Tensor]
    temperature: float = 1.0  # of the served softmax, or of a detector's sigmoid scores
    offset: float = 0.0  # of a detector's sigmoid scores
    progress: Progress | None = None
    origin: Origin | None = None
    format: int = _FORMAT

    def read_preprocessing(self) -> Preprocessing:
        preprocessing: Preprocessing = TypeAdapter(Preprocessing).validate_python(self.preprocessing)
        return preprocessing

    @property
    def task(self) -> Task:
        return self.read_preprocessing().task

    @property
    def is_finished(self) -> bool:
        """Whether the network was trained to the end: of all epochs, or until training stopped early."""
        progress = self.progress
        return progress is not None and (progress.finished or progress.epoch >= progress.recipe["epochs"])

    def build(self) -> nn.Module:
        """Build the network with these weights, in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the architecture, or its head does not fit the labels.
        """
        with torch.device("meta"):  # no time or memory for random weights
            network = build_model(self.architecture, self.settings, len(self.labels))
        try:
            network.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:  # first line: the class; others: what does not fit
            _, *misfits = (line.strip() for line in str(error).splitlines())
            expected = f"weights: expected those of {self.architecture} with {len(self.labels)} labels"
            raise CheckpointError(f"{expected}, found otherwise: {misfits[0]}") from error
        return network.eval()


def save_checkpoint(checkpoint: Checkpoint, run: Path) -> None:
    """Write the checkpoint atomically, and keep the previous one as checkpoint.previous.pt.

    Raises:
        CheckpointError: it cannot be written; the existing checkpoint is untouched.
    """
    file, partial, previous = run / CHECKPOINT_FILE, run / f"{CHECKPOINT_FILE}.partial", run / PREVIOUS_FILE
    content = {**vars(checkpoint), "progress": _to_dict(checkpoint.progress), "origin": _to_dict(checkpoint.origin)}
    try:
        with partial.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            previous.unlink(missing_ok=True)
            try:
                previous.hardlink_to(file)
            except OSError:  # not on every file system
                shutil.copyfile(file, previous)
        partial.replace(file)
        folder = os.open(run, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports disk errors as RuntimeError
        partial.unlink(missing_ok=True)
        state = "the one before is untouched" if file.exists() else "there was none before"
        raise CheckpointError(f"{file}: the checkpoint could not be written, {state}: {error}") from error


def _to_dict(part: Progress | Origin | None) -> dict[str, Any] | None:
    if part is None:
        return None
    plain = dict(vars(part))
    return {name: asdict(value) if isinstance(value, WarmStart | Best) else value for name, value in plain.items()}


def save_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write weights atomically.

    Raises:
        CheckpointError: they cannot be written.
    """
    partial = file.with_suffix(".partial")
    try:
        torch.save(weights, partial)
        partial.replace(file)
    except (OSError, RuntimeError) as error:  # torch reports disk errors as RuntimeError
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{file}: the weights could not be written: {error}") from error


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read what `save_weights` wrote.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        weights: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost any type on broken bytes
        raise CheckpointError(f"{file}: expected weights, found something else: {_first_line(error)}") from error
    return weights


def load_checkpoint(run: Path) -> Checkpoint:
    """Read a run's checkpoint without executing code in the file.

    Raises:
        CheckpointError: there is none, it is broken, or it has another format.
    """
    file = run / CHECKPOINT_FILE
    if not file.is_file():
        raise CheckpointError(f"{run}: expected a run with {CHECKPOINT_FILE}, found none{_hint(run)}")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch does not verify checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(file, map_location="cpu", weights_only=True)
        found = content.get("format") if isinstance(content, dict) else None
        if isinstance(found, int) and found != _FORMAT:
            raise CheckpointError(f"{file}: format: expected {_FORMAT}, found {found}; train or import it again")
        progress, origin = content.pop("progress"), content.pop("origin")
        checkpoint = Checkpoint(
            **content,
            progress=None if progress is None else _progress(progress),
            origin=None if origin is None else Origin(**origin),
        )
        checkpoint.read_preprocessing()
        if not 0 < checkpoint.temperature < math.inf:
            raise ValueError(f"temperature: expected above 0, found {checkpoint.temperature}")
        if not math.isfinite(checkpoint.offset):
            raise ValueError(f"offset: expected a finite number, found {checkpoint.offset}")
        if checkpoint.progress is not None:
            checkpoint.progress.read_recipe()
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {error.title}: {place}: {first['msg']}, found {first['input']!r}") from error
    except Exception as error:  # the unpickler raises almost any type on broken bytes
        raise CheckpointError(f"{file}: not a checkpoint of this version: {_first_line(error)}{_hint(run)}") from error
    return checkpoint


def _progress(content: dict[str, Any]) -> Progress:
    start, best = content.pop("start"), content.pop("best", None)
    return Progress(
        **content,
        start=None if start is None else WarmStart(**start),
        best=None if best is None else Best(**best),
    )


def _hint(run: Path) -> str:
    previous = run / PREVIOUS_FILE
    return f"; the one before: mv {previous} {run / CHECKPOINT_FILE}" if previous.is_file() else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def checkpoint_sha256(run: Path) -> str:
    """Return the SHA-256 of the checkpoint file."""
    with (run / CHECKPOINT_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
