"""The command line: what it prints, and that every mistake is one sentence."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., str]


def test_bundles_lists_what_is_in_a_folder(tiny_bundles: Path, run_vitrine: Run) -> None:
    printed = run_vitrine("bundles", tiny_bundles).splitlines()
    assert [line.split("  ")[0] for line in printed] == ["colours 1", "squares 1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vit_cifar100"], "unknown 'vit_cifar100': did you mean 'vit_cifar10'?"),
        (["train", "vit_cifar10", "epoch=3"], "unknown 'epoch': did you mean 'epochs'?"),
        (["train", "vit_cifar10", "model.deptj=3"], "unknown 'model.deptj': did you mean 'model.depth'?"),
        (
            ["train", "vit_cifar10", "epochs=0"],
            "vit_cifar10: epochs: Input should be greater than or equal to 1, found 0",
        ),
        (["train", "vit_cifar10", "epochs"], "'epochs': expected key=value"),
        (
            ["train", "vit_cifar10", "preprocessing.input_size=[64,64]"],
            "model.image_size and preprocessing.input_size have to agree",
        ),
        (
            ["train", "vit_cifar10", "--data", "nowhere", "--out", "nowhere"],
            "nowhere: expected train.npz, train.csv, train.jsonl or train/<label>/*; found no such",
        ),
        (
            ["train", "detr_bccd", "--data", "nowhere", "--out", "nowhere"],
            "nowhere: expected train.json (COCO) beside images/, images/train",
        ),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere: expected a run with checkpoint.pt, found none"),
        (["verify", "nowhere/1"], "nowhere/1/manifest.json: file: expected a readable manifest, found No such file"),
        (["bundles", "nowhere"], "nowhere: bundles: expected a folder of <name>/<version>, found no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, run_vitrine: Run) -> None:
    printed = run_vitrine(*arguments, status=1)
    assert printed.startswith("vitrine: ")
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_training_into_an_existing_run_needs_resume(classifier_run: Path, colours: Path, run_vitrine: Run) -> None:
    printed = run_vitrine("train", "vit_cifar10", "--data", colours, "--out", classifier_run, status=1)
    assert "a run is already there; continue it with --resume or choose another --out" in printed
    printed = run_vitrine("train", "vit_cifar10", "--data", colours, "--out", classifier_run, "--resume", status=1)
    assert "cannot resume" in printed
    assert "epochs: expected 6, found" in printed


def test_a_run_is_not_resumed_on_other_labels(
    classifier_run: Path, tiny_vit: tuple[str, ...], tmp_path: Path, run_vitrine: Run
) -> None:
    folder = tmp_path / "data" / "train"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16)).save(folder / label / f"{i}.png")
    resumed = tmp_path / "run"
    shutil.copytree(classifier_run, resumed)
    printed = run_vitrine(
        "train", "vit_cifar10", *tiny_vit, "--data", tmp_path / "data", "--out", resumed, "--resume", status=1
    )
    assert "cannot resume: labels: expected ['blue', 'green', 'red'], found ['cat', 'dog']" in printed


def test_the_commands_of_serving_work_without_torch(tiny_bundles: Path, root: Path) -> None:
    python = str(root / ".venv" / "bin" / "python")
    for arguments in (["--help"], ["verify", str(tiny_bundles / "squares" / "1")], ["bundles", str(tiny_bundles)]):
        subprocess.run([python, "-m", "vitrine", *arguments], cwd=root, check=True, capture_output=True)


def test_training_without_torch_says_what_to_install(root: Path, colours: Path) -> None:
    python = str(root / ".venv" / "bin" / "python")
    command = [python, "-m", "vitrine", "train", "vit_cifar10", "--data", str(colours)]
    result = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("vitrine: this command needs ")
    assert "pip install -r requirements/train.txt" in result.stderr
    assert "Traceback" not in result.stderr
