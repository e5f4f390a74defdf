"""The training loop.

A step computes the same for any number of processes and micro-batches: losses are divided by totals of the whole step,
and gradients add up. All random numbers are derived from the seed and the step's number, so that a resumed run repeats
an uninterrupted one.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vitrine.bundle.machine import keep_freed_memory
from vitrine.bundle.manifest import GATE_METRIC
from vitrine.models.build import build_model
from vitrine.models.detr import Detr
from vitrine.models.training.augmentation.augment import NOISE
from vitrine.models.training.checkpoint import (
    BEST_FILE,
    CHECKPOINT_FILE,
    LAST_FILE,
    METRICS_FILE,
    PREVIOUS_FILE,
    Best,
    Checkpoint,
    Progress,
    checkpoint_sha256,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from vitrine.models.training.data.dataset import ClassificationData, Data, DetectionData
from vitrine.models.training.data.layouts import load_training_splits
from vitrine.models.training.data.loading import ImageCache
from vitrine.models.training.distributed import ProcessGroup, job_id, process_group
from vitrine.models.training.errors import DataError, DivergedError, RecipeError, TrainingError
from vitrine.models.training.evaluation.calibration import apply_temperature, fit_temperature
from vitrine.models.training.evaluation.metrics import (
    ClassificationPredictions,
    DetectionPredictions,
    Predictions,
    measure,
    merge,
    predict,
)
from vitrine.models.training.evaluation.scores import fit_scores, right_detections
from vitrine.models.training.features import FeatureCache, TrainedPart
from vitrine.models.training.interruption import Interrupted, Interruption, handle_signals
from vitrine.models.training.network import torch_predictor
from vitrine.models.training.objectives.objectives import Batch, make_objective
from vitrine.models.training.optimisation import (
    average_weights,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    training_mode,
)
from vitrine.models.training.recipe import DetectionRecipe, Recipe
from vitrine.models.training.warm_start import load_initial_weights

DIVERGED_FILE = "diverged.txt"  # the images of the step that diverged
_MAX_MAGNITUDE = 1e6  # upper bound of losses and weights; far above those of a network that learns
_SAVE_EVERY = 600.0  # seconds
_SAVE_FEATURES_EVERY = 20.0  # seconds; an epoch on features may be shorter than writing a checkpoint
_POINTS_PER_EPOCH = 20  # in TensorBoard
_EVALUATION_BATCH = 256  # images whose features are classified at once
_MAX_NAMED = 8  # images named in an error message


def train(
    recipe: Recipe,
    data_path: Path,
    run: Path,
    *,
    resume: bool = False,
    start: Path | None = None,
    changes: Sequence[str] = (),
) -> Checkpoint:
    """Train a network; write a checkpoint, `metrics.jsonl` and TensorBoard events to `run`.

    SIGTERM or Ctrl-C saves and returns early: `progress.finished` is then false.

    Args:
        recipe: the settings.
        data_path: a data set (`models.training.data.layouts`).
        run: output folder.
        resume: continue from the last checkpoint, exactly as if the run had not been interrupted.
        start: a run with the initial weights.
        changes: `key=value` overrides of the recipe, stored in the checkpoint.

    Raises:
        TrainingError: the run exists (without `resume`), the recipe differs from the run's, or training diverges.
        DataError: the data cannot be read.
        RecipeError: the network cannot be built or initialised, or a step cannot be split among the processes.
        CheckpointError: a checkpoint cannot be read or written.
    """
    with handle_signals() as interruption, process_group() as processes, _kernel_settings(recipe, processes):
        trainer = Trainer(recipe, data_path, run, processes, resume, start, changes)
        try:
            with interruption.immediate():
                trainer.load_images()
                trainer.measure_start()
            if resume and trainer.step == trainer.epoch == 0:
                trainer.log(f"there is no run in {run} to resume: a new one begins")
            while not trainer.finished:
                trainer.train_epoch(interruption)
                with interruption.immediate():
                    trainer.evaluate()
                trainer.finish_epoch()
            trainer.remove_features()
        except Interrupted:
            trainer.save()
            trainer.log(f"interrupted in epoch {trainer.epoch + 1}: saved; resume with --resume")
        finally:
            trainer.close()
        return trainer.checkpoint()


class Trainer:
    """A run in progress: `epoch` epochs are done, and `step` steps of the next one."""

    def __init__(
        self,
        recipe: Recipe,
        data_path: Path,
        run: Path,
        processes: ProcessGroup,
        resume: bool,
        start: Path | None,
        changes: Sequence[str],
    ) -> None:
        previous = _load_previous(recipe, run, resume, start)
        self.images: ImageCache | FeatureCache
        self._val_features: FeatureCache | None = None
        data, self.val = load_training_splits(
            data_path, recipe.task, held_out=recipe.held_out, seed=recipe.seed, fraction=recipe.train_fraction
        )
        self._data = data
        if isinstance(self.val, DetectionData) and not any(map(len, self.val.class_ids)):
            raise DataError(f"{self.val.name}: none of the {len(self.val)} validation images has a box")
        labels = list(data.labels)
        if previous is not None and labels != previous[0].labels:
            raise TrainingError(f"{run}: cannot resume: labels: expected {previous[0].labels}, found {labels}")
        torch.manual_seed(recipe.seed)
        try:
            network = build_model(recipe.architecture, recipe.model, len(labels))
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise RecipeError(f"{recipe.name}: model: {error}") from error
        if previous is None:
            document = recipe.model_dump(mode="json")
            self._progress = Progress(
                recipe=document,
                changes=list(changes),
                optimizer={},
                epoch=0,
                seconds=0.0,
                metrics={},
                data_path=str(data_path.resolve()),
                start=None if start is None else load_initial_weights(network, recipe, labels, start),
                job=job_id(),
            )
            self._state = Checkpoint(
                architecture=recipe.architecture,
                settings=document["model"],
                preprocessing=document["preprocessing"],
                labels=labels,
                weights={},
                origin=None if start is None else load_checkpoint(start).origin,
            )
        else:
            self._state, self._progress = previous
            self._progress = replace(self._progress, data_path=str(data_path.resolve()), job=job_id())
            network.load_state_dict(self._progress.weights or self._state.weights)

        self.recipe, self.run, self.processes = recipe, run, processes
        self.epoch, self.step = self._progress.epoch, self._progress.step
        self._local_sums = {  # of this process; the main one starts with the saved sums of all
            name: torch.tensor(value, dtype=torch.float64, device=processes.device)
            for name, value in self._progress.sums.items()
            if processes.is_main
        }
        self._global_sums = self._progress.sums
        self._predictions: Predictions | None = None
        self.network = network.to(processes.device)
        self.optimizer = make_optimizer(self.network, recipe)
        self.average = average_weights(self.network, recipe.ema) if recipe.ema else None
        if previous is not None:
            self.optimizer.load_state_dict(self._progress.optimizer)
            if self.average is not None:
                self.average.module.load_state_dict(self._state.weights)
        trained = TrainedPart(self.network, recipe) if recipe.views else self.network
        self._ddp = _wrap_ddp(trained, recipe, processes) if processes.world_size > 1 else None
        self._forward = self._ddp or trained
        if recipe.compile:
            self._forward.compile()
        self.objective = make_objective(recipe, data, self.network, processes.device)
        self.names = data.names
        self.batch_size = min(recipe.batch_size, len(data))
        self.steps = len(data) // self.batch_size
        if self.average is not None:
            self.average.n_averaged.fill_(self.epoch * self.steps + self.step)
        self._rows = _local_rows(self.batch_size, recipe, processes, self.objective.group)
        _check_consistency(run, processes, (self.epoch, self.step, labels, len(data)))
        done = self.epoch * self.steps + self.step
        self._writer = None
        if processes.is_main:
            with _write_errors(run):
                run.mkdir(parents=True, exist_ok=True)
                _truncate_metrics(run / METRICS_FILE, self.epoch)
                self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=done)
        self._bar = tqdm(
            total=recipe.epochs * self.steps * self.batch_size,
            initial=done * self.batch_size,
            unit=" images",
            dynamic_ncols=True,
            disable=None if processes.is_main else True,
        )
        self._started = self._saved = time.monotonic()

    def load_images(self) -> None:
        """Decode the images, if they fit into memory, or compute the features of the frozen part."""
        recipe = self.recipe
        if not recipe.views:
            self.images = ImageCache(self._data, recipe, show=self.processes.is_main)
            return
        self.images = self._cache_features(self._data, recipe.views, "train")
        if isinstance(self.val, ClassificationData):
            self._val_features = self._cache_features(self.val, 1, "val")

    def _cache_features(self, data: Data, views: int, name: str) -> FeatureCache:
        """Return the features of the frozen part; the main process computes them, and the others wait."""
        folder = (Path(self.recipe.features) if self.recipe.features else self.run / "features") / name
        for is_main in (True, False):
            if self.processes.is_main is is_main:
                cache = FeatureCache(self.network, self.recipe, data, views, folder, show=is_main)
            self.processes.gather(None)
        return cache

    def remove_features(self) -> None:
        """Delete the features in the run's folder."""
        if self.recipe.views and not self.recipe.features and self.processes.is_main:
            shutil.rmtree(self.run / "features", ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or training stopped early."""
        return self._progress.finished or self.epoch >= self.recipe.epochs

    @property
    def eval_network(self) -> nn.Module:
        """The network that is evaluated and exported: with `ema`, the moving average."""
        return self.network if self.average is None else self.average.module

    def train_epoch(self, interruption: Interruption) -> None:
        """Train the rest of an epoch in random order, without an incomplete last batch.

        Raises:
            DivergedError: the loss, its gradient or a weight is not finite or too large.
            Interrupted: a process was asked to stop.
        """
        recipe = self.recipe
        training_mode(self.network, recipe)
        generator = _generator(recipe.seed, self.epoch, self.steps)
        order = torch.randperm(len(self.images), generator=generator)
        if isinstance(self.images, FeatureCache):
            order = self.images.order(order, self.batch_size, generator)
        batches = order.split(self.batch_size)[self.step : self.steps]
        load = self._loader([indices[rows] for indices in batches for rows in self._rows])
        unchecked: tuple[Tensor, Tensor, int] | None = None
        for indices in batches:
            seeds = (recipe.seed, self.epoch, self.step)
            noise = torch.rand(self.batch_size, NOISE, generator=_generator(*seeds))
            micro_batches = [load(indices[rows], noise[rows]) for rows in self._rows]
            totals, stop, save_due = self._sync_step(micro_batches, interruption)
            lr = learning_rate(recipe, self.epoch + self.step / self.steps)
            set_learning_rate(self.optimizer, lr)
            loss_and_norm = self._train_step(micro_batches, totals, seeds)
            if unchecked is not None:
                self._check_step(*unchecked)  # one step late, so that the GPU does not wait
            unchecked = (loss_and_norm, indices, self.step)
            self.step += 1
            self._bar.update(self.batch_size)
            if stop or save_due or self.step == self.steps:
                self._check_step(*unchecked)
                self._check_weights()
                self._reduce_sums()
            if stop:
                raise Interrupted
            if save_due:
                self.save()

    def _loader(self, chunks: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Batch]:
        """Return a function that makes the batch of each chunk of indices, in order, given its noise."""
        if isinstance(self.images, FeatureCache):
            return partial(self._load_features, self.images)
        loaded = self.images.batches(chunks)
        return lambda indices, noise: self.objective.prepare(next(loaded), indices, noise)

    def _load_features(self, cache: FeatureCache, indices: Tensor, noise: Tensor) -> Batch:
        features, targets = cache.batch(indices, noise)
        batch: Batch = self.objective.prepare_features(features, indices, targets, noise)
        return batch

    def evaluate(self) -> None:
        """Run the validation images, if this epoch is evaluated."""
        last = self.epoch + 1 == self.recipe.epochs
        if last or (self.epoch + 1) % self.recipe.evaluate_every == 0:
            cache = self._val_features
            self._predictions = self._predict() if cache is None else self._predict_from(cache)

    @torch.no_grad()
    def _predict_from(self, cache: FeatureCache) -> Predictions:
        """Classify images by their features: as `_predict`, up to the rounding of the features."""
        head = TrainedPart(self.eval_network.eval(), self.recipe)
        indices = torch.arange(len(cache))
        features, _ = cache.batch(indices, torch.zeros(len(indices), NOISE))
        chunks = features.maps[0].split(_EVALUATION_BATCH)
        logits = torch.cat([head(chunk.to(self.processes.device)) for chunk in chunks])
        probabilities = logits.float().softmax(dim=-1).cpu().numpy()
        return ClassificationPredictions(indices.numpy(), probabilities, seconds=0.0)

    def _predict(self) -> Predictions:
        """Run the validation images as they are served, split over the processes."""
        recipe, processes = self.recipe, self.processes
        predictor = torch_predictor(self.eval_network, recipe.preprocessing, self._state.labels, processes.device)
        processes.broadcast(self.eval_network.buffers())  # batch norm statistics differ between processes
        indices = np.arange(processes.rank, len(self.val), processes.world_size)
        return merge(processes.gather(predict(predictor, self.val, indices, progress=processes.is_main)))

    def finish_epoch(self) -> None:
        """Compute and write the metrics, conclude the run after its last epoch, and save."""
        metrics: dict[str, float] = {}
        if self._predictions is not None:
            predictions, self._predictions = self._predictions, None
            metrics = measure(predictions, self.val)
            improved = self._update_best(metrics, self.epoch + 1)
            if self._is_last(improved):
                metrics = self._conclude(predictions, metrics)
        means = {name: value / self.steps for name, value in self._global_sums.items()}
        seconds = self._progress.seconds + time.monotonic() - self._started
        line = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps,
            "seconds": round(seconds, 1),
            "lr": learning_rate(self.recipe, self.epoch + 1),
            **means,
            **metrics,
        }
        if self._writer is not None:
            with _write_errors(self.run), (self.run / METRICS_FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in {**means, **metrics}.items():
                self._writer.add_scalar(f"epoch/{name}", value, line["step"])
            self._writer.flush()
        summary = "  ".join(f"{name} {value:.4g}" for name, value in {**means, **metrics}.items())
        self.log(f"epoch {self.epoch + 1}/{self.recipe.epochs}  {seconds:.0f} s  {summary}")
        self._progress = replace(self._progress, metrics=metrics or self._progress.metrics)
        self.epoch, self.step, self._local_sums, self._global_sums = self.epoch + 1, 0, {}, {}
        if self.finished or not self.recipe.views or time.monotonic() - self._saved > _SAVE_FEATURES_EVERY:
            self.save()

    def measure_start(self) -> None:
        """Count the weights that the run starts from among those of which the best are kept, if all were loaded."""
        started = self._progress.start
        if self.recipe.keep == "best" and started is not None and not started.fresh and self.epoch == self.step == 0:
            cache = self._val_features
            metrics = measure(self._predict() if cache is None else self._predict_from(cache), self.val)
            self._update_best(metrics, epoch=0)
            name = GATE_METRIC[self.recipe.task]
            self.log(f"at the start: {name} {metrics[name]:.4g}")

    def _update_best(self, metrics: dict[str, float], epoch: int) -> bool:
        """Keep the weights of an epoch if they are the best so far; return whether they are."""
        value, best = metrics[GATE_METRIC[self.recipe.task]], self._progress.best
        if best is not None and value <= best.value:
            return False
        self._progress = replace(self._progress, best=Best(epoch, value))
        if self.recipe.keep == "best" and self.processes.is_main:
            save_weights(self.eval_network.state_dict(), self.run / BEST_FILE)
        return True

    def _is_last(self, improved: bool) -> bool:
        """Return whether this epoch is the last: of all, or as many as `patience` after the best one."""
        best, patience = self._progress.best, self.recipe.patience
        return self.epoch + 1 == self.recipe.epochs or (
            patience is not None and not improved and best is not None and self.epoch + 1 - best.epoch >= patience
        )

    def _conclude(self, predictions: Predictions, metrics: dict[str, float]) -> dict[str, float]:
        """Take the best weights if the recipe keeps them, and calibrate; return the metrics of the run's weights."""
        best, epoch = self._progress.best, self.epoch + 1
        if self.recipe.keep == "best" and best is not None and best.epoch != epoch:
            if self.processes.is_main:
                save_weights(self.eval_network.state_dict(), self.run / LAST_FILE)
            self.processes.gather(None)
            self.eval_network.load_state_dict(load_weights(self.run / BEST_FILE))
            predictions = self._predict()
            metrics = measure(predictions, self.val)
            self.log(f"the weights of epoch {best.epoch} are the best: they are kept")
        elif self._val_features is not None:
            predictions = self._predict()
            metrics = measure(predictions, self.val)
        self._progress = replace(self._progress, finished=True)
        if isinstance(predictions, DetectionPredictions) and isinstance(self.val, DetectionData):
            if cast(Detr, self.network).config.scores == "sigmoid":
                temperature, offset = fit_scores(predictions.scores, right_detections(predictions, self.val))
                self._state = replace(self._state, temperature=temperature, offset=offset)
                self.log(f"scores: temperature {temperature:.3f}, offset {offset:+.3f}")
            return metrics
        assert isinstance(predictions, ClassificationPredictions)
        assert isinstance(self.val, ClassificationData)
        truth = self.val.class_ids[predictions.indices]
        temperature = fit_temperature(predictions.probabilities, truth)
        calibrated = apply_temperature(predictions.probabilities, temperature).astype(np.float32)
        before = metrics["ECE"]
        metrics = measure(replace(predictions, probabilities=calibrated), self.val)
        self._state = replace(self._state, temperature=temperature)
        self.log(f"temperature {temperature:.3f}: expected calibration error {before:.4f} -> {metrics['ECE']:.4f}")
        return metrics

    def checkpoint(self) -> Checkpoint:
        """Return the current state of the run."""
        now = time.monotonic()
        self._progress = replace(
            self._progress,
            optimizer=self.optimizer.state_dict(),
            epoch=self.epoch,
            step=self.step,
            sums=self._global_sums,
            seconds=self._progress.seconds + now - self._started,
            weights=None if self.average is None else self.network.state_dict(),
        )
        self._started = now
        self._state = replace(self._state, weights=self.eval_network.state_dict(), progress=self._progress)
        return self._state

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._saved = time.monotonic()
        if self.processes.is_main:
            save_checkpoint(self.checkpoint(), self.run)

    def log(self, text: str) -> None:
        """Print a line above the progress bar, on the main process only."""
        if self.processes.is_main:
            self._bar.write(text)

    def close(self) -> None:
        """Close the progress bar and TensorBoard's file."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _sync_step(self, micro_batches: Sequence[Batch], interruption: Interruption) -> tuple[Tensor, bool, bool]:
        """Return the totals of the whole step, and whether any process was asked to stop or is due to save."""
        save_due = self.processes.is_main and time.monotonic() - self._saved > _SAVE_EVERY
        requested = torch.tensor([float(interruption.requested), float(save_due)], device=self.processes.device)
        local = torch.stack([batch.totals for batch in micro_batches]).sum(dim=0)
        joint = self.processes.sum(torch.cat((local, requested)))
        stop, save = (interruption.requested, save_due) if self.processes.world_size == 1 else (joint[-2:] > 0).tolist()
        return joint[:-2], stop, save

    def _train_step(self, micro_batches: Sequence[Batch], totals: Tensor, seeds: tuple[int, ...]) -> Tensor:
        """Take one optimiser step; return the loss and the gradient norm."""
        device = self.processes.device
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i, (batch, rows) in enumerate(zip(micro_batches, self._rows, strict=True)):
            torch.manual_seed(_derive_seed(*seeds, rows.start, 1))  # dropout
            with nullcontext() if i + 1 == len(micro_batches) else self._no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                    output = self.objective.forward(self._forward, batch)
                parts = self.objective.loss(output, batch, totals)
                (parts["loss"] * self.processes.world_size).backward()  # DistributedDataParallel averages
            losses.append(parts["loss"].detach())
            for name, value in parts.items():
                value = value.detach().double()
                self._local_sums[name] = self._local_sums[name] + value if name in self._local_sums else value
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return torch.stack((self.processes.sum(torch.stack(losses).sum()), norm))

    def _no_sync(self) -> AbstractContextManager[None]:
        """Accumulate the gradients of a micro-batch locally; the last one synchronises them."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def _check_step(self, loss_and_norm: Tensor, indices: Tensor, step: int) -> None:
        loss, norm = loss_and_norm.tolist()
        if not (abs(loss) < _MAX_MAGNITUDE and math.isfinite(norm)):
            names = [self.names[i] for i in indices.tolist()]
            if self.processes.is_main:
                with _write_errors(self.run):
                    (self.run / DIVERGED_FILE).write_text("".join(f"{name}\n" for name in names))
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            shown = ", ".join(names[:_MAX_NAMED]) + more
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {step}: the loss is {loss:.4g}, the norm of its gradient {norm:.4g}; "
                f"{self._advice()}; its images (all in {self.run / DIVERGED_FILE}): {shown}"
            )
        number = self.epoch * self.steps + step
        self._bar.set_postfix(loss=f"{loss:.3f}", epoch=self.epoch + 1, refresh=False)
        if self._writer is not None and number % max(1, self.steps // _POINTS_PER_EPOCH) == 0:
            self._writer.add_scalar("step/loss", loss, number)
            self._writer.add_scalar("step/gradient_norm", norm, number)
            self._writer.add_scalar("step/lr", learning_rate(self.recipe, number / self.steps), number)

    def _check_weights(self) -> None:
        largest = torch.stack([parameter.detach().abs().max() for parameter in self.network.parameters()]).max().item()
        if not largest < _MAX_MAGNITUDE:
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {self.step}: a weight has grown to {largest:.4g}; {self._advice()}"
            )

    def _advice(self) -> str:
        saved = self._progress
        exists = (self.run / CHECKPOINT_FILE).exists()
        last = f"the last good checkpoint is that after epoch {saved.epoch}, step {saved.step}"
        return f"{last if exists else 'there is no checkpoint yet'}; try a smaller lr than {self.recipe.lr:g}"

    def _reduce_sums(self) -> None:
        names = sorted(self._local_sums)
        local = torch.stack([self._local_sums[name].to(self.processes.device, torch.float64) for name in names])
        self._global_sums = dict(zip(names, self.processes.sum(local).tolist(), strict=True))


def _derive_seed(*numbers: int) -> int:
    """Hash numbers to a seed; trailing zeros make no difference."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _generator(*numbers: int) -> Generator:
    return Generator().manual_seed(_derive_seed(*numbers))


def _local_rows(batch_size: int, recipe: Recipe, processes: ProcessGroup, group: int) -> list[slice]:
    """Return the rows of a step's batch for each micro-batch of this process.

    Each `group` of rows, which augmentation mixes with each other, stays together.
    """
    count = processes.world_size * recipe.accumulate
    size = math.ceil(batch_size / (count * group)) * group
    if (count - 1) * size >= batch_size:
        raise RecipeError(
            f"{recipe.name}: batch_size: expected enough for {count} shares (processes times accumulate) of {size} "
            f"images, found {batch_size}"
        )
    first = processes.rank * recipe.accumulate
    starts = range(first * size, (first + recipe.accumulate) * size, size)
    return [slice(start, min(start + size, batch_size)) for start in starts]


def _wrap_ddp(network: nn.Module, recipe: Recipe, processes: ProcessGroup) -> DistributedDataParallel:
    """Wrap the network to average gradients over all processes."""
    cuda = processes.device.type == "cuda"
    return DistributedDataParallel(
        nn.SyncBatchNorm.convert_sync_batchnorm(network) if cuda else network,
        device_ids=[processes.device] if cuda else None,
        find_unused_parameters=isinstance(recipe, DetectionRecipe),  # denoising, for images without objects
    )


@contextmanager
def _kernel_settings(recipe: Recipe, processes: ProcessGroup) -> Iterator[None]:
    """Use plain attention in bfloat16 on a CPU (decision 18); reproducible kernels if `deterministic`.

    Denormal numbers, which CPUs compute slowly, are zeros, and freed memory is kept: each step's would otherwise be
    given back to the operating system and faulted in again page by page (decision 24).
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    plain = processes.device.type == "cpu" and recipe.precision == "bfloat16"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.deterministic)
    try:
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)


@contextmanager
def _write_errors(run: Path) -> Iterator[None]:
    """Raise errors of writing to a run's folder as `TrainingError`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{run}: cannot be written: {error}") from error


def _truncate_metrics(file: Path, epochs: int) -> None:
    """Remove lines that were written after the last checkpoint or truncated by a crash."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            done = json.loads(line)["epoch"] <= epochs
        except (ValueError, KeyError, TypeError):
            continue
        if done:
            kept.append(f"{line}\n")
    partial = file.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(file)


def _check_consistency(run: Path, processes: ProcessGroup, local: tuple[object, ...]) -> None:
    if len(set(map(repr, processes.gather(local)))) > 1:
        raise TrainingError(
            f"{run}: the processes found different data or different checkpoints; all need the same data and run folder"
        )


def _load_previous(recipe: Recipe, run: Path, resume: bool, start: Path | None) -> tuple[Checkpoint, Progress] | None:
    if not any((run / name).is_file() for name in (CHECKPOINT_FILE, PREVIOUS_FILE)):
        return None
    previous = load_checkpoint(run)
    progress = previous.progress
    if progress is None:
        raise TrainingError(
            f"{run}: an imported run is there; choose another --out and train from it with --from {run}"
        )
    if not resume and (not job_id() or progress.job != job_id()):  # restarts of torchrun resume
        raise TrainingError(f"{run}: a run is already there; continue it with --resume or choose another --out")
    differences = progress.read_recipe().differences(recipe)
    if start is not None and (progress.start is None or progress.start.sha256 != checkpoint_sha256(start)):
        differences.append(f"--from: expected {progress.start and progress.start.run}, found another run, {start}")
    if differences:
        raise TrainingError(f"{run}: cannot resume: {', '.join(differences)}")
    return previous, progress
