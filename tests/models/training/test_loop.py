"""Real, tiny training runs on synthetic images."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrine.models.training.checkpoint import (
    BEST_FILE,
    CHECKPOINT_FILE,
    LAST_FILE,
    METRICS_FILE,
    PREVIOUS_FILE,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from vitrine.models.training.data.layouts import load_split
from vitrine.models.training.errors import DataError, DivergedError, RecipeError, TrainingError
from vitrine.models.training.loop import DIVERGED_FILE, train
from vitrine.models.training.recipe import Recipe
from vitrine.models.training.registry import load_recipe

pytestmark = pytest.mark.slow

ReadUntil = Callable[["subprocess.Popen[str]", str], None]
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 30)}
VIT = (
    "model.image_size=16",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "preprocessing.input_size=[16, 16]",
    "precision=float32",
    "lr=2e-3",
    "batch_size=8",
    "epochs=4",
)
DETR = (
    "model.num_queries=6",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.feedforward_dim=16",
    "model.dropout=0.1",
    "model.backbone_layers=[1, 1]",
    "model.backbone_width=8",
    "model.query_groups=2",
    "preprocessing.shortest_edge=32",
    "preprocessing.longest_edge=48",
    "batch_size=3",
    "epochs=4",
    "evaluate_every=2",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, far slower where other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed split of noisy coloured images, and a COCO split of coloured squares on grey noise."""
    path, random = tmp_path_factory.mktemp("synthetic"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        colours = list(COLOURS.values()) * count
        files = [png(random.normal(colour, 30, (16, 16, 3))) for colour in colours]
        np.savez(
            path / f"{split}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=np.arange(len(files), dtype=np.uint8) % 3,
            classes=np.array(list(COLOURS)),
        )
    (path / "images").mkdir()
    images, annotations = [], []
    for i in range(8):
        pixels = random.normal(128, 10, (32, 48, 3))
        x, y = (int(edge) for edge in random.integers(0, 16, 2))
        pixels[y : y + 12, x : x + 14] = COLOURS["red"]
        (path / "images" / f"{i}.png").write_bytes(png(pixels))
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations.append({"image_id": i, "category_id": 3, "bbox": [x, y, 14, 12]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "square"}]}
    for split in ("train", "val"):
        (path / f"{split}.json").write_text(json.dumps(document))
    return path


def vit(*changes: str) -> Recipe:
    return load_recipe("vit_cifar10", [*VIT, *changes])


def detr(*changes: str) -> Recipe:
    return load_recipe("detr_bccd", [*DETR, *changes])


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


def without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def command(recipe: str, data: Path, run: Path, *changes: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "vitrine", "train", recipe, "--data", str(data), "--out", str(run), *changes]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_learns(data: Path, tmp_path: Path) -> None:
    checkpoint = train(vit("epochs=8"), data, tmp_path / "run")
    metrics = lines(tmp_path / "run")
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert checkpoint.progress.metrics["top1"] > 0.6
    assert load_checkpoint(tmp_path / "run").labels == list(COLOURS)


def test_detector_learns(data: Path, tmp_path: Path) -> None:
    train(detr("epochs=30", "evaluate_every=30", "lr=2e-3", "model.dropout=0"), data, tmp_path)
    metrics = lines(tmp_path)
    first, last = (np.mean([line["loss"] for line in part]) for part in (metrics[:5], metrics[-5:]))
    assert last < 0.8 * first
    assert metrics[-1].keys() >= {"class", "l1", "giou", "AP", "AP50_square"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_cifar10", (*VIT, "epochs=12", "deterministic=true", "augmentation.mixup=0.2")),
        ("vit_cifar10", (*VIT, "epochs=12", "ema=0.9", "cache=disk", "workers=1")),
        ("detr_bccd", (*DETR, "epochs=16", "model.denoising=1")),
    ],
    ids=["vit", "vit, averaged, from disk", "detr"],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_run_resumes_to_the_same_bits(
    data: Path, tmp_path: Path, read_until: ReadUntil, name: str, changes: tuple[str, ...], number: signal.Signals
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = load_recipe(name, changes)
    train(recipe, data, whole)
    job = command(name, data, broken, *changes)
    read_until(job, "epoch 2/")
    os.killpg(job.pid, number)  # its workers too, as torchrun and schedulers do
    output, _ = job.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert job.returncode == 0, output
        assert "saved; resume with --resume" in output
    progress = load_checkpoint(broken).progress
    assert 1 <= progress.epoch < recipe.epochs
    torch.manual_seed(123)  # another process starts from another state
    train(recipe, data, broken, resume=True)
    expected, found = load_checkpoint(whole), load_checkpoint(broken)
    assert found.progress.epoch == recipe.epochs
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert (found.progress.metrics, found.temperature) == (expected.progress.metrics, expected.temperature)
    assert without_times(lines(broken)) == without_times(lines(whole))


def test_sigterm_saves_within_an_epoch(data: Path, tmp_path: Path, read_until: ReadUntil) -> None:
    changes = ("epochs=1", "batch_size=1", "model.depth=20", "evaluate_every=1")
    job = command("vit_cifar10", data, tmp_path / "run", *VIT, *changes, "--resume")
    read_until(job, "there is no run")  # just before the first step
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    progress = load_checkpoint(tmp_path / "run").progress
    assert progress.epoch == 0
    assert 0 < progress.step < 60
    whole = train(vit(*changes), data, tmp_path / "whole")
    resumed = train(vit(*changes), data, tmp_path / "run", resume=True)
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())
    assert without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))


def test_corrupt_checkpoint_names_the_previous_one_which_resumes(data: Path, tmp_path: Path) -> None:
    whole = train(vit(), data, tmp_path)
    expected = lines(tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    with pytest.raises(TrainingError, match=r"the one before: mv .*checkpoint\.previous\.pt "):
        train(vit(), data, tmp_path, resume=True)
    (tmp_path / CHECKPOINT_FILE).unlink()
    with pytest.raises(TrainingError, match="found none; the one before: mv "):
        train(vit(), data, tmp_path, resume=True)
    (tmp_path / PREVIOUS_FILE).rename(tmp_path / CHECKPOINT_FILE)
    again = train(vit(), data, tmp_path, resume=True)
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert without_times(lines(tmp_path)) == without_times(expected)


@pytest.mark.parametrize(("change", "same"), [("cache=disk", True), ("cache=memory", True), ("accumulate=2", False)])
def test_execution_does_not_change_the_result(data: Path, tmp_path: Path, change: str, same: bool) -> None:
    settings = ("epochs=1", "model.drop_path=0", "model.stem=patch")
    expected, found = (train(vit(*settings, *extra), data, tmp_path / str(i)) for i, extra in enumerate([[], [change]]))
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0 if same else 1e-2, atol=0 if same else 1e-4)


def test_bfloat16_and_moving_average_learn_too(data: Path, tmp_path: Path) -> None:
    checkpoint = train(vit("epochs=8", "precision=bfloat16", "ema=0.9"), data, tmp_path)
    assert checkpoint.progress.metrics["top1"] > 0.6
    assert all(value.dtype != torch.bfloat16 for value in checkpoint.weights.values())
    raw = checkpoint.progress.weights
    assert not torch.equal(raw["head.weight"], checkpoint.weights["head.weight"])


def test_binary_cross_entropy_learns_too(data: Path, tmp_path: Path) -> None:
    assert train(vit("epochs=8", "loss=sigmoid"), data, tmp_path).progress.metrics["top1"] > 0.6


def test_temperature_is_fitted_at_the_end(data: Path, tmp_path: Path) -> None:
    checkpoint = train(vit("epochs=1"), data, tmp_path)
    assert checkpoint.temperature != 1
    assert load_checkpoint(tmp_path).temperature == checkpoint.temperature


def test_batch_that_cannot_be_split(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="batch_size: expected enough for 9 shares"):
        train(vit("accumulate=9"), data, tmp_path)


def test_tensorboard_has_the_curves(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(vit("epochs=2"), data, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("epoch/loss")] == pytest.approx(
        [line["loss"] for line in lines(tmp_path)], rel=1e-6
    )
    assert {"step/loss", "step/lr", "step/gradient_norm", "epoch/top1"} <= set(events.Tags()["scalars"])


def test_finished_run_resumes_to_itself(data: Path, tmp_path: Path) -> None:
    first = train(vit("epochs=1"), data, tmp_path)
    again = train(vit("epochs=1"), data, tmp_path, resume=True)
    assert again.progress.epoch == 1
    assert all(torch.equal(again.weights[name], value) for name, value in first.weights.items())


def test_same_seed_same_run_other_seed_other_run(data: Path, tmp_path: Path) -> None:
    runs = [train(vit("epochs=1", f"seed={seed}"), data, tmp_path / str(i)) for i, seed in enumerate((1, 1, 2))]
    same, other = (all(torch.equal(runs[0].weights[n], run.weights[n]) for n in run.weights) for run in runs[1:])
    assert same
    assert not other


def test_run_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    train(vit("epochs=1"), data, tmp_path)
    with pytest.raises(TrainingError, match="a run is already there; continue it with --resume"):
        train(vit("epochs=1"), data, tmp_path)


def test_resume_with_another_recipe(data: Path, tmp_path: Path) -> None:
    train(vit("epochs=1"), data, tmp_path)
    with pytest.raises(
        TrainingError, match=r"cannot resume: epochs: expected 1, found 2, lr: expected 0\.002, found 0\.1"
    ):
        train(vit("epochs=2", "lr=0.1"), data, tmp_path, resume=True)


@pytest.mark.parametrize(
    "recipe",
    [
        vit("lr=1e30"),
        vit("lr=1e30", "epochs=1", "batch_size=100"),  # the only step: no loss follows it
        detr("lr=1e30"),
        detr("lr=1e30", "epochs=1", "batch_size=100"),
    ],
    ids=["vit", "vit, last step", "detr", "detr, last step"],
)
def test_divergence_is_an_error_and_leaves_no_checkpoint(data: Path, tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(DivergedError, match=r"epoch 1, step \d+: .*there is no checkpoint yet; try a smaller lr"):
        train(recipe, data, tmp_path / "run")
    assert not list(tmp_path.rglob("*.pt"))


def test_divergence_names_the_images_and_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    train(vit("epochs=1", "warmup_epochs=0"), data, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    progress = replace(checkpoint.progress, recipe={**checkpoint.progress.recipe, "epochs": 4}, finished=False)
    broken = {**checkpoint.weights, "norm.weight": checkpoint.weights["norm.weight"] * float("nan")}
    save_checkpoint(replace(checkpoint, weights=broken, progress=progress), tmp_path)
    with pytest.raises(DivergedError, match=r"epoch 2, step 0: the loss is nan.* after epoch 1, step 0;.*npz\[\d+\]"):
        train(vit("epochs=4", "warmup_epochs=0"), data, tmp_path, resume=True)
    assert len((tmp_path / DIVERGED_FILE).read_text().splitlines()) == 8


@pytest.mark.parametrize("change", ["model.num_heads=5", "model.patch_size=5", "model.image_size=20"])
def test_settings_that_fit_no_network(data: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(TrainingError, match=r"vit_cifar10: .*(num_heads|patch_size|image_size)"):
        train(vit(change), data, tmp_path)


def test_validation_images_without_boxes(data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(data, empty)
    document = json.loads((empty / "val.json").read_text())
    (empty / "val.json").write_text(json.dumps({**document, "annotations": []}))
    with pytest.raises(DataError, match="none of the 8 validation images has a box"):
        train(detr(), empty, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_folder_that_is_a_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file: cannot be written: "):
        train(vit(), data, tmp_path / "file")


def test_resume_from_another_start(data: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(vit("epochs=1", f"seed={seed}"), data, tmp_path / str(seed))
    train(vit("epochs=1"), data, tmp_path / "run", start=tmp_path / "1")
    with pytest.raises(TrainingError, match=r"cannot resume: --from: expected 1, found another run, .*2"):
        train(vit("epochs=1"), data, tmp_path / "run", start=tmp_path / "2", resume=True)


def test_data_of_another_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found an empty folder"):
        train(vit(), tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_broken_image_is_named(tmp_path: Path) -> None:
    for i in range(3):
        folder = tmp_path / "data" / "train" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"picture{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"picture\d\.png"):
        train(vit(), tmp_path / "data", tmp_path / "run")


def test_training_stops_early_and_keeps_the_best_weights(data: Path, tmp_path: Path) -> None:
    checkpoint = train(vit("epochs=40", "patience=3", "keep=best"), data, tmp_path)
    progress = checkpoint.progress
    assert checkpoint.is_finished
    measured = [line["top1"] for line in lines(tmp_path)]
    assert len(measured) < 40
    best = max(measured[:-1])
    assert progress.best.value == best == measured[progress.best.epoch - 1]
    assert progress.best.epoch == len(measured) - 3
    assert progress.metrics["top1"] == pytest.approx(best)
    kept = load_weights(tmp_path / BEST_FILE)
    assert all(torch.equal(value, kept[name]) for name, value in load_checkpoint(tmp_path).weights.items())
    assert not torch.equal(load_weights(tmp_path / LAST_FILE)["head.weight"], kept["head.weight"])
    again = train(vit("epochs=40", "patience=3", "keep=best"), data, tmp_path, resume=True)
    assert len(lines(tmp_path)) == len(measured)
    assert again.progress.best == progress.best


def test_weights_that_fine_tuning_does_not_improve_are_kept(data: Path, tmp_path: Path) -> None:
    first = train(vit("epochs=12"), data, tmp_path / "first")
    start = tmp_path / "first"
    recipe = vit("epochs=2", "keep=best", "lr=1", "warmup_epochs=0")
    tuned = train(recipe, data, tmp_path / "tuned", start=start)
    assert tuned.progress.best.epoch == 0
    assert tuned.progress.metrics["top1"] == pytest.approx(first.progress.metrics["top1"])
    assert all(torch.equal(value, first.weights[name]) for name, value in tuned.weights.items())


def test_a_probe_on_cached_features_learns_and_resumes(data: Path, tmp_path: Path) -> None:
    start = train(vit("epochs=8"), data, tmp_path / "start")
    changes = ["views=2", "epochs=3", "evaluate_every=3"]
    probe = load_recipe("linear_probe", changes, start)
    found = train(probe, data, tmp_path / "probe", start=tmp_path / "start")
    assert found.progress.metrics["top1"] > 0.6
    assert not (tmp_path / "probe" / "features").exists()
    frozen = [name for name in start.weights if not name.startswith("head.")]
    assert all(torch.equal(found.weights[name], start.weights[name]) for name in frozen)
    shared = probe.derive(features=str(tmp_path / "features"))
    again = train(shared, data, tmp_path / "again", start=tmp_path / "start")
    assert (tmp_path / "features" / "train" / "cache.json").is_file()
    assert torch.equal(again.weights["head.weight"], found.weights["head.weight"])


def test_unbalanced_classes_are_weighed(data: Path, tmp_path: Path) -> None:
    plain, balanced = (
        train(vit("epochs=1", f"class_weights={how}"), data, tmp_path / how) for how in ("none", "balanced")
    )
    auto = train(vit("epochs=1", "class_weights=auto"), data, tmp_path / "auto")
    equal = len(set(np.bincount(load_split(data, plain.task, "train").class_ids))) == 1
    assert torch.equal(plain.weights["head.weight"], balanced.weights["head.weight"]) == equal
    assert torch.equal(plain.weights["head.weight"], auto.weights["head.weight"])  # not ten times as many of one class
