"""Own photographs, by the real commands; with a tiny network where the published one would take long."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrine.models.build import build_model
from vitrine.models.training.checkpoint import Checkpoint, Origin, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow

SETTINGS = {"image_size": 32, "width_factor": 0.25, "depth_factor": 0.3}


@pytest.fixture
def photos(colours: Path, tmp_path: Path) -> Path:
    """A folder of labels without splits."""
    return Path(shutil.copytree(colours / "train", tmp_path / "photos"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run like an imported one, with a tiny EfficientNet."""
    torch.manual_seed(0)
    network = build_model("efficientnet", SETTINGS, 2)
    preprocessing = {
        "task": "image-classification",
        "input_size": [32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    (tmp_path / "tiny").mkdir()
    origin = Origin("tiny.pth", "0" * 64, "test", [], [])
    save_checkpoint(
        Checkpoint("efficientnet", SETTINGS, preprocessing, ["a", "b"], network.state_dict(), origin=origin),
        tmp_path / "tiny",
    )
    return tmp_path / "tiny"


def vitrine(root: Path, folder: Path, *arguments: object, status: int = 0) -> str:
    """Run the command line in a folder of its own, as a user does."""
    result = subprocess.run(
        [sys.executable, "-m", "vitrine", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout + result.stderr


def test_one_command_with_published_weights(photos: Path, root: Path, tmp_path: Path) -> None:
    printed = vitrine(root, tmp_path, "train", "photos", "--data", photos, "views=1", "epochs=20")
    assert "trained: runs/photos" in printed
    found = load_checkpoint(tmp_path / "runs" / "photos")
    assert found.labels == ["blue", "green", "red"]
    assert found.progress is not None
    assert found.progress.metrics["top1"] > 0.8
    assert found.origin is not None
    assert found.origin.file.startswith("efficientnet-lite0")
    assert (tmp_path / "runs" / "efficientnet-lite0" / "checkpoint.pt").is_file()
    assert not (tmp_path / "runs" / "photos" / "features").exists()


def test_the_last_stage_is_trained_after_the_head(photos: Path, tiny: Path, root: Path, tmp_path: Path) -> None:
    arguments = ("train", "photos", "--data", photos, "--from", tiny, "--out", "runs/p", "epochs=3", "held_out=0.3")
    assert "trained: runs/p" in vitrine(root, tmp_path, *arguments, "--finetune")
    head, tuned = (load_checkpoint(tmp_path / "runs" / path) for path in ("p/head", "p"))
    assert tuned.progress is not None
    recipe = tuned.progress.read_recipe()
    assert recipe.name == "last_stages"
    assert recipe.held_out == 0.3  # of other images, some would have been trained on
    start = load_checkpoint(tiny)
    assert torch.equal(head.weights["backbone.stem.conv.weight"], start.weights["backbone.stem.conv.weight"])
    assert torch.equal(tuned.weights["backbone.stem.conv.weight"], start.weights["backbone.stem.conv.weight"])
    best, first = tuned.progress.best, head.progress
    assert best is not None
    assert first is not None
    assert best.value >= first.metrics["top1"]


def test_a_vit_as_head_is_exported_and_explained(photos: Path, tiny: Path, root: Path, tmp_path: Path) -> None:
    small = ("model.head=vit", "model.vit_embed_dim=16", "model.vit_num_heads=2", "epochs=3")
    vitrine(root, tmp_path, "train", "photos", "--data", photos, "--from", tiny, "--out", "runs/p", *small)
    printed = vitrine(root, tmp_path, "export", "runs/p", "--out", "bundles/p/1", "--latency", "none")
    assert "held out of train" in printed  # there is no other split to measure on
    assert "training chose the best epoch and the calibration of its scores by these" in printed
    assert "on others, expect less" in (tmp_path / "bundles" / "p" / "1" / "README.md").read_text()
    picture = next((photos / "red").iterdir())
    vitrine(root, tmp_path, "explain", "bundles/p/1", picture, "--out", "seen.png")
    assert (tmp_path / "seen.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrained=efficientnet-lite9",), "photos: pretrained: unknown"),
        (("pretrained=null",), "photos: expected --from RUN, the run to start from, found none"),
    ],
)
def test_weights_that_are_not_there(
    arguments: tuple[str, ...], message: str, photos: Path, root: Path, tmp_path: Path
) -> None:
    printed = vitrine(root, tmp_path, "train", "photos", "--data", photos, *arguments, status=1)
    assert message in printed


def test_a_backbone_without_published_weights(squares: Path, root: Path, tmp_path: Path) -> None:
    printed = vitrine(root, tmp_path, "train", "objects", "--data", squares, "model.backbone=resnet18", status=1)
    assert "objects: pretrained: unknown" in printed
    assert "pretrained=null" in printed
