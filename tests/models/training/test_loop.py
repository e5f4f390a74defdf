"""Real, tiny training runs on synthetic images."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.training.checkpoint import METRICS_FILE, load
from models.training.errors import DataError, TrainingError
from models.training.loop import learning_rate, make_optimizer, train
from models.training.recipe import Recipe, load_recipe

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 30)}
VIT = (
    "model.image_size=16",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "preprocessing.input_size=[16, 16]",
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
    "model.backbone_width=4",
    "model.query_groups=2",
    "preprocessing.shortest_edge=32",
    "preprocessing.longest_edge=48",
    "batch_size=3",
    "epochs=4",
    "evaluate_every=2",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, far slower where other processes want the cores."""
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


class Interrupt(io.StringIO):
    """Standard output of a user who presses Ctrl-C when a line appears."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if self.at in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_learns(data: Path, tmp_path: Path) -> None:
    checkpoint = train(vit("epochs=8"), data, tmp_path / "run")
    metrics = lines(tmp_path / "run")
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert checkpoint.progress.metrics["top1"] > 0.6
    assert load(tmp_path / "run").labels == list(COLOURS)


def test_detector_learns(data: Path, tmp_path: Path) -> None:
    train(detr("epochs=30", "evaluate_every=30", "lr=2e-3", "model.dropout=0"), data, tmp_path)
    metrics = lines(tmp_path)
    first, last = (np.mean([line["loss"] for line in part]) for part in (metrics[:5], metrics[-5:]))
    assert last < 0.8 * first
    assert metrics[-1].keys() >= {"class", "l1", "giou", "AP", "AP50_square"}


@pytest.mark.parametrize("recipe", [vit(), detr()], ids=["vit", "detr"])
def test_resumed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, recipe: Recipe) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, data, whole)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(Interrupt("epoch 2/4")):
        train(recipe, data, broken)
    assert load(broken).progress.epoch == 2
    torch.manual_seed(123)  # another process would start from another state
    train(recipe, data, broken, resume=True)
    expected, found = load(whole), load(broken)
    assert found.progress.epoch == 4
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert found.progress.metrics == expected.progress.metrics
    assert [{**line, "seconds": 0} for line in lines(broken)] == [{**line, "seconds": 0} for line in lines(whole)]


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
    with pytest.raises(TrainingError, match="try a smaller lr"):
        train(recipe, data, tmp_path / "run")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("change", ["model.num_heads=5", "model.patch_size=5", "model.image_size=20"])
def test_settings_that_fit_no_network(data: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(TrainingError, match=r"vit_cifar10: .*(num_heads|patch_size|image_size)"):
        train(vit(change), data, tmp_path)


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


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = vit("epochs=11", "lr=0.5")
    rates = [learning_rate(recipe, epoch) for epoch in np.linspace(0, 11, 111)]
    assert rates[0] == pytest.approx(0.005, rel=0.02)
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()


def test_only_matrices_decay() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, plain = make_optimizer(network, vit("weight_decay=0.3")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    assert [parameter.ndim for parameter in decayed["params"]] == [2]
    assert [parameter.ndim for parameter in plain["params"]] == [1, 1, 1]
