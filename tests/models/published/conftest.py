"""Write weights in published layouts, import them, and compare the outputs with those of a reference."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrine.models.published.importing import import_weights
from vitrine.models.training.checkpoint import Checkpoint, load_checkpoint

TOLERANCE = 1e-4
SPREAD = 0.1  # minimum variation of outputs: less could hide an error


@pytest.fixture
def forward_only() -> Iterator[None]:
    """Seeds each test, without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Removed after the test: full-size networks would fill the disk."""
    path = tmp_path / "files"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def import_file(folder: Path, save_pretrained: Callable[..., Path]) -> Callable[..., Checkpoint]:
    """Imports published weights, by default with `classes` placeholder labels, and returns the run's checkpoint.

    `source` is a path; the content of a file, which is written as `form` with an optional `config.json`; or a network
    of transformers, which is saved with the `names` of its weights.
    """
    numbers = itertools.count()

    def import_(
        source: Path | Mapping[str, Any] | nn.Module,
        classes: int | None = None,
        form: str = "safetensors",
        config: Mapping[str, Any] | None = None,
        names: str = "old",
        **options: Any,
    ) -> Checkpoint:
        number = next(numbers)
        if isinstance(source, nn.Module):
            source = save_pretrained(source, names)
        elif not isinstance(source, Path):
            source = _save(source, folder / f"published{number}", form, config)
        if classes is not None:
            labels = folder / f"labels{number}.txt"
            labels.write_text("\n".join(f"thing {i}" for i in range(classes)))
            options["labels"] = str(labels)
        run = folder / f"run{number}"
        import_weights(source, run, **options)
        return load_checkpoint(run)

    return import_


def _save(content: Mapping[str, Any], path: Path, form: str, config: Mapping[str, Any] | None) -> Path:
    path.mkdir()
    file = path / f"weights.{form}"
    if form == "npz":
        np.savez(file, **{key: _array(value) for key, value in content.items()})
    elif form == "safetensors":
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, file)
    else:
        torch.save(content, file)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return file


def _array(tensor: Tensor) -> np.ndarray:
    """Converts to NumPy; bfloat16 to two raw bytes, as in JAX's files."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("V2")
    return tensor.contiguous().numpy()


@pytest.fixture
def save_pretrained(folder: Path) -> Callable[..., Path]:
    """Saves a network of transformers with the names of its weights before version 5 ("old") or since ("new")."""

    def save(network: Any, names: str = "old") -> Path:
        path = folder / f"hugging_face_{names}"
        path.mkdir()
        if names == "old":
            network.save_pretrained(path)
        else:
            torch.save(network.state_dict(), path / "pytorch_model.bin")
            network.config.save_pretrained(path)
        return path

    return save


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Fills every tensor of a module with random numbers, at scales that keep activations between 0.1 and 10."""

    def randomise_(module: nn.Module, gain: float = 1.0) -> nn.Module:
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var") or (tensor.ndim < 2 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim < 2:
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 3:  # tokens and positions: small, so that the norms' epsilon matters
                tensor.normal_(0, 0.01)
            else:
                tensor.normal_(0, gain / math.sqrt(tensor[0].numel()))
        return module.eval()

    return randomise_


@pytest.fixture
def agree() -> Callable[..., None]:
    """Asserts that outputs [B, ..., K] agree, and that the expected ones vary along every axis but the last.

    Prints the largest difference as a table row, for `pytest -s`.
    """

    def agree_(what: str, found: Tensor, expected: Tensor, spread: float = SPREAD) -> None:
        assert found.shape == expected.shape
        for axis in range(expected.ndim - 1):
            if expected.shape[axis] > 1:
                varied = expected.std(dim=axis).mean().item()
                assert varied >= spread, f"{what}: varies too little along axis {axis}: {varied}"
        difference = (found - expected).abs().max().item()
        print(f"| {what} | {difference:.1e} |")
        assert difference <= TOLERANCE, f"{what}: largest difference {difference}"

    return agree_
