"""The training loop: `train` for a run, `train_epoch` for one pass over the data."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from models.build import build_model
from models.training import checkpoint as checkpoints
from models.training.checkpoint import CHECKPOINT_FILE, METRICS_FILE, Checkpoint, Progress
from models.training.data import load_training_splits
from models.training.errors import RecipeError, TrainingError
from models.training.evaluation import evaluate
from models.training.network import torch_predictor
from models.training.objectives import Objective, make_objective
from models.training.recipe import Recipe

_EXPLODED = 1e6  # no weight of a network that still learns comes near it; NaN is not below it either


def train(recipe: Recipe, data_path: Path, run: Path, *, resume: bool = False) -> Checkpoint:
    """Train a network and leave a checkpoint and `metrics.jsonl` in `run` after every epoch.

    With `resume`, go on after the last finished epoch, exactly as if it had not been interrupted.

    Raises:
        TrainingError: the run exists (without `resume`), the recipe differs from the run's, or the loss is not finite.
        DataError: the data cannot be read.
        RecipeError: the architecture cannot be built with these settings.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    previous = _previous(recipe, run, resume)
    train_data, val_data = load_training_splits(data_path, recipe.task, held_out=recipe.held_out, seed=recipe.seed)
    if previous is not None and list(train_data.labels) != previous[0].labels:
        raise TrainingError(
            f"{run}: cannot resume: labels: expected {previous[0].labels}, found {list(train_data.labels)}"
        )
    objective = make_objective(recipe, train_data, device)
    torch.manual_seed(recipe.seed)
    try:
        network = build_model(recipe.architecture, recipe.model, len(train_data.labels)).to(device)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise RecipeError(f"{recipe.name}: model: {error}") from error
    optimizer = make_optimizer(network, recipe)
    if previous is None:
        run.mkdir(parents=True, exist_ok=True)
        (run / METRICS_FILE).unlink(missing_ok=True)
        document = recipe.model_dump(mode="json")
        progress = Progress(
            recipe=document,
            optimizer={},
            epoch=0,
            seconds=0.0,
            metrics={},
            data_path=str(data_path.resolve()),
        )
        state = Checkpoint(
            architecture=recipe.architecture,
            settings=document["model"],
            preprocessing=document["preprocessing"],
            labels=list(train_data.labels),
            weights={},
            progress=progress,
        )
    else:
        state, progress = previous
        progress = replace(progress, data_path=str(data_path.resolve()))
        network.load_state_dict(state.weights)
        optimizer.load_state_dict(progress.optimizer)
    predictor = torch_predictor(network, recipe.preprocessing, state.labels, device)
    for epoch in range(progress.epoch, recipe.epochs):
        started = time.monotonic()
        means = train_epoch(network, objective, optimizer, recipe, epoch, device)
        seconds = time.monotonic() - started
        metrics = progress.metrics
        if (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs:
            metrics = evaluate(predictor, val_data)
        progress = replace(
            progress,
            optimizer=optimizer.state_dict(),
            epoch=epoch + 1,
            seconds=progress.seconds + seconds,
            metrics=metrics,
        )
        state = replace(state, weights=network.state_dict(), progress=progress)
        checkpoints.save(state, run)
        line = {"epoch": epoch + 1, "seconds": round(progress.seconds, 1), **means, **metrics}
        with (run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        summary = "  ".join(f"{key} {value:.4g}" for key, value in {**means, **metrics}.items())
        tqdm.write(f"epoch {epoch + 1}/{recipe.epochs}  {seconds:.0f} s  {summary}")
    return state


def train_epoch(
    network: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the data in random order. Returns the mean of each part of the loss.

    All randomness is drawn from the recipe's seed and the epoch's number, so that a resumed run repeats it.
    """
    network.train()
    torch.manual_seed(epoch_seed(recipe.seed, epoch))  # dropout
    generator = torch.Generator(device).manual_seed(epoch_seed(recipe.seed, epoch))
    order = torch.randperm(len(objective), generator=generator, device=device)
    batches = order.split(recipe.batch_size)
    sums: dict[str, float] = {}
    progress = tqdm(batches, desc=f"epoch {epoch + 1}/{recipe.epochs}", leave=False, disable=None)
    for step, indices in enumerate(progress):
        lr = learning_rate(recipe, epoch + step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = objective.loss(network, indices, generator)
        loss = parts["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"epoch {epoch + 1}, step {step}: the loss is {loss.item()}; try a smaller lr than {lr:g}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
        progress.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}")
    if not all(parameter.abs().max() < _EXPLODED for parameter in network.parameters()):
        raise TrainingError(f"epoch {epoch + 1}: the weights have exploded; try a smaller lr than {recipe.lr:g}")
    return {name: value / len(objective) for name, value in sums.items()}


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for each pair of run seed and epoch."""
    return (seed * 100_003 + epoch) % 2**63


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up to the peak, then half a cosine to zero; `epoch` counts epochs done, with fractions."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (epoch + 0.01) / (recipe.warmup_epochs + 0.01)
    progress = (epoch - recipe.warmup_epochs) / max(1e-9, recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on what has more than one axis (matrices, embeddings), not on biases and norms."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _previous(recipe: Recipe, run: Path, resume: bool) -> tuple[Checkpoint, Progress] | None:
    exists = (run / CHECKPOINT_FILE).is_file()
    if not exists:
        return None
    if not resume:
        raise TrainingError(f"{run}: a run is already there; continue it with --resume or choose another --out")
    previous = checkpoints.load(run)
    progress = previous.progress
    if progress is None:
        raise TrainingError(f"{run}: cannot resume: it was imported, not trained; choose another --out")
    if progress.read_recipe() != recipe:
        ours, theirs = recipe.model_dump(mode="json"), progress.recipe
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        raise TrainingError(
            f"{run}: cannot resume: "
            + ", ".join(f"{key}: expected {theirs.get(key)}, found {ours[key]}" for key in differing)
        )
    return previous, progress
