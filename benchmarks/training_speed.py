"""Training speed of our loop, Hugging Face's `Trainer` and the peak of this machine.

    python benchmarks/training_speed.py vit --data DATA
    python benchmarks/training_speed.py detr --data DATA --threads 2

DATA contains `imagenette144` and `bccd`. `benchmarks/README.md` describes the method.
"""

import argparse
import gc
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Task
from vitrine.models import detr, vit
from vitrine.models.boxes import xyxy_to_cxcywh
from vitrine.models.training.augmentation.augment import NOISE, ClassificationAugmentation, DetectionAugmentation
from vitrine.models.training.data.dataset import ClassificationData, DetectionData
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.distributed import ProcessGroup
from vitrine.models.training.interruption import Interruption
from vitrine.models.training.loop import Trainer
from vitrine.models.training.objectives.losses import SetCriterion
from vitrine.models.training.recipe import ClassificationRecipe, DetectionRecipe, Recipe
from vitrine.models.training.targets import Target

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 2  # decoding processes, for both
SIDE = 224  # pixels, ViT input
EDGES = (320, 240)  # pixels, width and height of the DETR input
OURS = "ours, images in memory"
Item = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Training speed, compared with Hugging Face's Trainer.")
    parser.add_argument("network", choices=("vit", "detr"))
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette144 and bccd")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each competitor in a round")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the competitors to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        comparison = (compare_vit if options.network == "vit" else compare_detr)(options.data, Path(folder))
        selected = {
            name: train
            for name, train in comparison.competitors.items()
            if name == OURS or not options.only or any(part in name for part in options.only)
        }
        step_times, peaks = measure_rounds(selected, options.rounds, options.steps)
        report(comparison, step_times, max(peaks), options.threads)


@dataclass(frozen=True)
class Comparison:
    """Competitors that train until they are stopped, and the size of their networks."""

    batch_size: int
    competitors: dict[str, Callable[[], object]]
    networks: dict[str, tuple[int, int]]  # parameters; floating-point operations of an image's forward pass


def compare_vit(data: Path, folder: Path) -> Comparison:
    """ViT-Ti/16 at 224 pixels, Imagenette, random resized crops and flipping."""
    batch_size = 16
    recipe = ClassificationRecipe(
        name="vit",
        architecture="vit",
        model=vit.VARIANTS["vit_tiny_patch16"],
        preprocessing=ClassificationPreprocessing(input_size=(SIDE, SIDE), mean=MEAN, std=STD),
        augmentation=ClassificationAugmentation(crop="resized", flip=0.5),
        epochs=1000,
        batch_size=batch_size,
        lr=1e-4,
        cache="memory",
        workers=WORKERS,
    )
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig.from_dict({**shape, "num_labels": 10})
    train = load_split(data / "imagenette144", Task.CLASSIFICATION, "train")
    assert isinstance(train, ClassificationData)
    theirs = transformers.ViTForImageClassification(config)
    ours = vit.ViT(vit.ViTConfig(10, **vit.VARIANTS["vit_tiny_patch16"]))
    files, cached = ClassificationFiles(train), CachedItems(ClassificationFiles(train), 10 * batch_size)
    example = torch.zeros(1, 3, SIDE, SIDE)
    return Comparison(
        batch_size,
        {
            **our_competitors(recipe, data / "imagenette144", folder),
            **their_competitors(theirs, ClassifierForTrainer(ours), files, cached, batch_size, None, folder),
        },
        {"ours": network_size(ours, example), "Hugging Face": network_size(theirs, example)},
    )


def compare_detr(data: Path, folder: Path) -> Comparison:
    """A small DETR (ResNet-18, 3 + 3 layers) at 320 x 240 pixels, BCCD, auxiliary losses, flipping."""
    batch_size = 4
    recipe = DetectionRecipe(
        name="detr",
        architecture="detr",
        model=detr.VARIANTS["detr_small"],
        preprocessing=DetectionPreprocessing(shortest_edge=EDGES[1], longest_edge=EDGES[0], mean=MEAN, std=STD),
        augmentation=DetectionAugmentation(flip=0.5, zoom=(1.0, 1.0), brightness=0.0, contrast=0.0),
        epochs=1000,
        batch_size=batch_size,
        lr=1e-4,
        cache="memory",
        workers=WORKERS,
    )
    resnet18 = {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "out_features": ["stage4"],
    }
    shape = {"encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    config = transformers.DetrConfig.from_dict(
        {**shape, "backbone_config": resnet18, "num_queries": 100, "auxiliary_loss": True, "num_labels": 3}
    )
    train = load_split(data / "bccd", Task.DETECTION, "train")
    assert isinstance(train, DetectionData)
    theirs = transformers.DetrForObjectDetection(config)
    theirs.requires_grad_(True)  # it freezes the backbone's first layers, which ours trains
    ours = detr.Detr(detr.DetrConfig(3, **detr.VARIANTS["detr_small"]))
    files, cached = DetectionFiles(train), CachedItems(DetectionFiles(train), 10 * batch_size)
    example = torch.zeros(1, 3, EDGES[1], EDGES[0])
    return Comparison(
        batch_size,
        {
            **our_competitors(recipe, data / "bccd", folder),
            **their_competitors(theirs, DetectorForTrainer(ours), files, cached, batch_size, collate_detection, folder),
        },
        {
            "ours": network_size(ours, example, torch.tensor([example.shape[2:]])),
            "Hugging Face": network_size(theirs, example),
        },
    )


def our_competitors(recipe: Recipe, data: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """Our loop with images in memory, decoded by workers, and with one repeated batch."""

    def trainer(name: str, cache: str) -> Trainer:
        changed = recipe.model_copy(update={"cache": cache})
        return Trainer(changed, data, folder / name, ProcessGroup(0, 1, torch.device("cpu")), False, None, ())

    memory, disk, repeated = trainer("memory", "memory"), trainer("disk", "disk"), trainer("repeated", "disk")
    repeat_one_batch(repeated)
    return {
        OURS: lambda: memory.train_epoch(Interruption()),
        f"ours, {WORKERS} workers": lambda: disk.train_epoch(Interruption()),
        "ours, one batch repeated": lambda: repeated.train_epoch(Interruption()),
    }


def repeat_one_batch(trainer: Trainer) -> None:
    """Make a trainer repeat one augmented batch, to measure it without loading and augmentation."""
    indices = torch.arange(trainer.batch_size)
    images = next(trainer.images.batches([indices]))
    batch = trainer.objective.prepare(images, indices, torch.rand(trainer.batch_size, NOISE))
    vars(trainer.images)["batches"] = lambda selected: repeat(images, len(selected))
    vars(trainer.objective)["prepare"] = lambda *_: batch


def their_competitors(
    theirs: nn.Module,
    ours: nn.Module,
    files: Dataset[Item],
    cached: Dataset[Item],
    batch_size: int,
    collate: Callable[[list[Item]], Item] | None,
    folder: Path,
) -> dict[str, Callable[[], object]]:
    """Hugging Face's loop with images decoded by workers, with cached tensors, and with our network."""

    def train(network: nn.Module, data: Dataset[Item], workers: int) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "unused"),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1000,
            learning_rate=1e-4,
            weight_decay=0.05,
            max_grad_norm=1.0,
            dataloader_num_workers=workers,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(network, arguments, data_collator=collate, train_dataset=data).train()

    return {
        f"Hugging Face, {WORKERS} workers": lambda: train(theirs, files, WORKERS),
        "Hugging Face, tensors ready": lambda: train(theirs, cached, 0),
        "our network in Hugging Face's Trainer, tensors ready": lambda: train(ours, cached, 0),
    }


class ClassificationFiles(Dataset[Item]):
    """The usual data set: decode, crop, resize, flip and normalise in `__getitem__`."""

    def __init__(self, data: ClassificationData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        image = Image.open(io.BytesIO(self.data.encoded[index])).convert("RGB")
        area = image.width * image.height * random.uniform(0.08, 1.0)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = min(image.width, (area * ratio) ** 0.5), min(image.height, (area / ratio) ** 0.5)
        left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"pixel_values": normalise(image), "labels": int(self.data.class_ids[index])}


class DetectionFiles(Dataset[Item]):
    """The usual data set: decode, resize, flip and normalise in `__getitem__`."""

    def __init__(self, data: DetectionData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        image = Image.open(io.BytesIO(self.data.encoded[index])).convert("RGB")
        boxes = torch.from_numpy(self.data.boxes[index]) / torch.tensor([*image.size, *image.size])
        image = image.resize(EDGES, Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = torch.stack((1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]), dim=1)
        class_ids = torch.from_numpy(self.data.class_ids[index])
        labels = {"class_labels": class_ids, "boxes": xyxy_to_cxcywh(boxes)}
        return {"pixel_values": normalise(image), "labels": labels}


class CachedItems(Dataset[Item]):
    """The first items of a data set, decoded and augmented beforehand."""

    def __init__(self, data: Dataset[Item], count: int) -> None:
        self.items = [data[i] for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def normalise(image: Image.Image) -> Tensor:
    """Convert an image to a normalised tensor, float [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).contiguous()


def collate_detection(items: list[Item]) -> Item:
    """Stack images, with masks of valid pixels and a list of labels."""
    pixels = torch.stack([item["pixel_values"] for item in items])
    mask = torch.ones(len(items), *pixels.shape[2:], dtype=torch.int64)
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": [item["labels"] for item in items]}


class ClassifierForTrainer(nn.Module):
    """Our network with the interface of Hugging Face's Trainer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class DetectorForTrainer(nn.Module):
    """Our network and set loss with the interface of Hugging Face's Trainer."""

    def __init__(self, network: detr.Detr) -> None:
        super().__init__()
        self.network = network
        self.criterion = SetCriterion()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: list[Item]) -> dict[str, Tensor]:
        sizes = torch.stack((pixel_mask[:, :, 0].sum(dim=1), pixel_mask[:, 0].sum(dim=1)), dim=1)
        output = self.network(pixel_values, sizes)
        targets = [Target(label["class_labels"], label["boxes"]) for label in labels]
        totals = self.criterion.totals(targets, self.network.config)
        return {"loss": self.criterion(output, targets, totals)["loss"], "logits": output["pred_logits"]}


def network_size(network: nn.Module, *example: Tensor) -> tuple[int, int]:
    """Return the number of parameters and of floating-point operations in the forward pass of one image."""
    network.eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*example)
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()


class _StopTraining(Exception):
    """Raised to stop training."""


class StepTime(NamedTuple):
    """Seconds per step: wall-clock time, and CPU time of this process's threads without its workers."""

    wall: float
    cpu: float


def measure(train: Callable[[], object], steps: int) -> StepTime:
    """Train one step and `steps` further ones; return the mean time of these, between optimiser steps."""
    step_ends: list[StepTime] = []

    def stop(*_: object) -> None:
        step_ends.append(StepTime(time.perf_counter(), time.process_time()))
        if len(step_ends) > steps:
            raise _StopTraining

    hook = register_optimizer_step_post_hook(stop)
    try:
        train()
    except _StopTraining:
        pass
    finally:
        hook.remove()
    return StepTime(*((end - start) / steps for start, end in zip(step_ends[0], step_ends[-1], strict=True)))


def measure_rounds(
    competitors: dict[str, Callable[[], object]], rounds: int, steps: int
) -> tuple[dict[str, list[StepTime]], list[float]]:
    """Measure each competitor in each round, after a warm-up round; also return each round's `peak_flops`."""
    step_times: dict[str, list[StepTime]] = {name: [] for name in competitors}
    peaks = []
    for i in range(-1, rounds):
        peaks.append(peak_flops())
        for name, train in competitors.items():
            step_time = measure(train, steps if i >= 0 else 1)
            gc.collect()  # ends the workers of the stopped loader
            if i >= 0:
                step_times[name].append(step_time)
    return step_times, peaks


def peak_flops() -> float:
    """Measure the fastest float32 matrix multiplication of several sizes and tries, in operations per second."""
    best = 0.0
    for edge in (512, 1024, 2048):
        a, b, out = torch.randn(edge, edge), torch.randn(edge, edge), torch.empty(edge, edge)
        torch.mm(a, b, out=out)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * edge**3 / (time.perf_counter() - start))
    return best


def report(comparison: Comparison, step_times: dict[str, list[StepTime]], peak: float, threads: int) -> None:
    """Print a Markdown table. Ratios compare the same round: median and range."""
    print(f"{threads} threads, batches of {comparison.batch_size}, matrix multiplication {peak / 1e9:.1f} GFLOP/s\n")
    for name, (parameters, flops) in comparison.networks.items():
        print(f"{name}: {parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP forward per image")
    print("\n| | images/s | its time / ours | rounds | its CPU time / ours | of the peak |")
    print("|---|---|---|---|---|---|")
    for name, rounds in step_times.items():
        _, forward = comparison.networks["Hugging Face" if name.startswith("Hugging") else "ours"]
        rate = 3 * comparison.batch_size * forward / min(rounds).wall
        step = statistics.median(each.wall for each in rounds)
        pairs = list(zip(rounds, step_times[OURS], strict=True))
        ratios = [each.wall / ours.wall for each, ours in pairs]
        cpu_ratio = statistics.median(each.cpu / ours.cpu for each, ours in pairs)
        print(
            f"| {name} | {comparison.batch_size / step:.1f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {cpu_ratio:.2f} | {rate / peak:.0%} |"
        )


if __name__ == "__main__":
    main()
