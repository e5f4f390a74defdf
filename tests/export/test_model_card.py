"""Cards of manifests that no shipped bundle has: fine-tuned, calibrated, not measured."""

from pathlib import Path
from typing import Any

import pytest

from bundle.loading import read_manifest
from bundle.manifest import Calibration, Import, Manifest, Start
from export.model_card import model_card

SHA = "a" * 64
IMPORTED = Import(
    file="vit.safetensors", sha256=SHA, layout="timm", arguments=("--reset-head", "--labels", "my labels")
)


@pytest.fixture
def manifest(root: Path) -> Manifest:
    return read_manifest(root / "bundles" / "vit-cifar10" / "1")


def changed(manifest: Manifest, *, training: dict[str, Any] | None = None, **provenance: Any) -> Manifest:
    trained = manifest.provenance.training
    assert trained is not None
    own = manifest.provenance.model_copy(update={"training": trained.model_copy(update=training or {}), **provenance})
    return Manifest.model_validate(manifest.model_copy(update={"provenance": own}).model_dump())


def commands(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("vitrine ")]


def test_from_random_weights(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert "was trained on `cifar10` alone, from random weights." in card
    assert [command.split()[1] for command in commands(card)] == ["train", "export"]
    assert "--from" not in card


def test_from_an_imported_run(manifest: Manifest) -> None:
    start = Start(run="published", checkpoint_sha256=SHA)
    card = model_card(changed(manifest, training={"start": start}, imported=IMPORTED))
    first, second, _ = commands(card)
    assert first == "vitrine import vit.safetensors --reset-head --labels 'my labels' --out runs/published"
    assert second.startswith(
        "vitrine train vit_cifar10 --data DATA/cifar10 --out runs/vit-cifar10 --from runs/published"
    )
    assert "was trained on `cifar10`, from imported weights." in card


def test_from_another_run(manifest: Manifest) -> None:
    card = model_card(changed(manifest, training={"start": Start(run="my first", checkpoint_sha256=SHA)}))
    assert "--from 'runs/my first'" in commands(card)[0]
    assert f"Started from the run `my first` (checkpoint's SHA-256 `{SHA}`)" in card
    assert "was trained on `cifar10`, from the weights of the run `my first`." in card


def test_calibration(manifest: Manifest) -> None:
    assert "temperature" not in model_card(manifest)
    without = manifest.model_copy(update={"metrics": None, "calibration": Calibration(temperature=1.2345)})
    assert "by the temperature 1.23, fitted on held-out images" in model_card(without)
    assert "calibration error" not in model_card(without)
    calibration = Calibration(temperature=0.5, ece_before=0.081, ece_after=0.0123)
    assert "The expected calibration error is 1.23%, without the temperature 8.10%." in model_card(
        manifest.model_copy(update={"calibration": calibration})
    )


def test_metrics_are_named_and_the_loss_is_no_share(manifest: Manifest) -> None:
    assert manifest.metrics is not None
    values = {"AP": 0.5, "AP_small": 0.1, "AP50_cat": 0.6, "AP_cat": 0.4, "ECE": 0.031, "NLL": 1.25}
    card = model_card(manifest.model_copy(update={"metrics": manifest.metrics.model_copy(update={"values": values})}))
    assert [line for line in card.splitlines() if line.startswith("| ")][1:] == [
        "| AP (IoU 0.50:0.95) | 50.00% |",
        "| AP, small objects | 10.00% |",
        "| AP50, cat | 60.00% |",
        "| AP, cat | 40.00% |",
        "| expected calibration error (ECE) | 3.10% |",
        "| negative log-likelihood (nats) | 1.250 |",
    ]
