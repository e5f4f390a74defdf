"""The command line: what it prints, and that every mistake is one sentence."""

import json
import re
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
            "nowhere: expected train.npz, train.csv, train.jsonl or train/<label>/* (without splits: <label>/*); ",
        ),
        (
            ["train", "detr_bccd", "--data", "nowhere", "--out", "nowhere"],
            "nowhere: expected train.json (COCO) beside images/, images/train",
        ),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere: expected a run with checkpoint.pt, found none"),
        (["verify", "nowhere/1"], "nowhere/1/manifest.json: file: expected a readable manifest, found No such file"),
        (["verify", "a\nforged\x1b[2J"], "vitrine: a\\nforged\\x1b[2J/manifest.json: "),
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


def test_predict_prints_what_it_sees(tiny_bundles: Path, colours: Path, squares: Path, root: Path) -> None:
    """Without torch, and without a progress bar where no terminal is."""
    image, scene = colours / "test" / "red" / "0.png", squares / "images" / "test0.png"
    python = str(root / ".venv" / "bin" / "python")
    printed = []
    for bundle, arguments in (
        (tiny_bundles / "colours" / "1", [image, "--top-k", "2", "--label", "red", "--label", "blue"]),
        (tiny_bundles / "squares" / "1" / "model.onnx", [scene, "--threshold", "0", "--max-detections", "2"]),
    ):
        command = [python, "-m", "vitrine", "predict", *map(str, (bundle, *arguments))]
        result = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        assert result.stderr == "1 image, 0 errors\n"
        printed.append(result.stdout)
    assert re.fullmatch(rf"{image}: red \d+\.\d%, blue \d+\.\d%\n", printed[0])
    box = ", ".join(rf"{edge} -?\d+\.\d" for edge in ("x_min", "y_min", "x_max", "y_max"))
    assert re.fullmatch(rf"{scene}: 2 objects\n(  (red|green|blue) \d+\.\d%  {box}\n){{2}}", printed[1])


def test_predict_writes_results_and_pictures(
    tiny_bundles: Path, colours: Path, tmp_path: Path, run_vitrine: Run
) -> None:
    bundle, out, pictures = tiny_bundles / "colours" / "1", tmp_path / "r.jsonl", tmp_path / "pictures"
    (tmp_path / "no.jpg").write_text("no image")
    arguments = [bundle, colours / "test", "--variant", "int8-dynamic", "--out", out, "--annotate", pictures]
    printed = run_vitrine("predict", *arguments, tmp_path / "no.jpg", status=1)
    assert printed == f"predicted: {out}  36 images, 1 error\n"
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0]["path"] == str(colours / "test" / "blue" / "0.png")
    assert found[0]["model"] == {"name": "colours", "version": "1", "variant": "int8-dynamic"}
    assert found[-1]["error"]["code"] == "unsupported_image_type"
    assert {str(file.relative_to(pictures)) for file in pictures.rglob("*.png")} == {
        record["annotated"] for record in found[:-1]
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "r.txt"], "r.txt: expected a name that ends in .jsonl, .csv, .coco.json, found .txt"),
        (["--out", "r.coco.json"], "r.coco.json: expected .jsonl or .csv for the answers of a classifier"),
        (["--out", "README.jsonl/r.csv"], "README.jsonl/r.csv.partial: cannot be written: No such file or directory"),
        (["--threshold", "0.5"], "threshold: expected none: it is for a detector, found 0.5"),
        (["--label", "rad"], "labels: expected some of the model's 3 labels, such as 'red', found 'rad'"),
        (
            ["--variant", "fp16"],
            "manifest.json: variants: expected one of fp32, fp16-weights, int8-dynamic, found fp16",
        ),
        (["--providers", "gpu"], "provider gpu: expected one of "),
        (["--annotate", "docs"], "docs: expected a new or an empty folder for the pictures, found files in it"),
    ],
)
def test_a_mistake_of_predict_is_one_sentence(
    arguments: list[str], message: str, tiny_bundles: Path, root: Path, run_vitrine: Run
) -> None:
    printed = run_vitrine("predict", tiny_bundles / "colours" / "1", "examples/frog.jpg", *arguments, status=1)
    assert printed.startswith("vitrine: ")
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not list(root.glob("r.*"))
