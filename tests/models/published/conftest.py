"""Published files, written in their own layouts, imported, and compared with what their publishers compute."""

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
SPREAD = 0.1  # outputs that vary less could agree although something is wrong


@pytest.fixture
def forward_only() -> Iterator[None]:
    """The same random numbers for each test, and no gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Removed after the test: whole networks would fill the disk."""
    path = tmp_path / "files"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def save(folder: Path) -> Callable[..., Path]:
    """Writes a file of weights into a folder of its own, with the JSON files beside it."""
    numbers = itertools.count()

    def save_(
        content: Mapping[str, Any],
        form: str = "safetensors",
        config: Mapping[str, Any] | None = None,
        preprocessor: Mapping[str, Any] | None = None,
    ) -> Path:
        place = folder / f"published{next(numbers)}"
        place.mkdir()
        file = place / f"weights.{form}"
        if form == "npz":
            np.savez(file, **{key: _array(value) for key, value in content.items()})
        elif form == "safetensors":
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, file)
        else:
            torch.save(content, file)
        for name, document in (("config", config), ("preprocessor_config", preprocessor)):
            if document is not None:
                (place / f"{name}.json").write_text(json.dumps(document))
        return file

    return save_


def _array(tensor: Tensor) -> np.ndarray:
    """NumPy's array; bfloat16 as two bytes without a meaning, as JAX's files have it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("V2")
    return tensor.contiguous().numpy()


@pytest.fixture
def import_file(folder: Path) -> Callable[..., Checkpoint]:
    """Imports a file, with `classes` labels of no meaning unless told otherwise; returns the run as it can be read."""
    numbers = itertools.count()

    def import_(source: Path, classes: int | None = None, **options: Any) -> Checkpoint:
        number = next(numbers)
        if classes is not None:
            labels = folder / f"labels{number}.txt"
            labels.write_text("\n".join(f"thing {i}" for i in range(classes)))
            options["labels"] = str(labels)
        run = folder / f"run{number}"
        import_weights(source, run, **options)
        return load_checkpoint(run)

    return import_


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Random weights for every tensor of a module, at scales that keep signals between 0.1 and 10."""

    def randomise_(module: nn.Module, gain: float = 1.0) -> nn.Module:
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var") or (tensor.ndim < 2 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim < 2:
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 3:  # tokens and their positions: faint, so that the norms' epsilon is seen
                tensor.normal_(0, 0.01)
            else:
                tensor.normal_(0, gain / math.sqrt(tensor[0].numel()))
        return module.eval()

    return randomise_


@pytest.fixture
def agree() -> Callable[..., None]:
    """Asserts that outputs [B, ..., K] agree, and that those expected differ from image to image.

    Prints the largest difference, a row of a table: `pytest -s` shows it.
    """

    def agree_(what: str, found: Tensor, expected: Tensor, spread: float = SPREAD) -> None:
        assert found.shape == expected.shape
        for axis in range(expected.ndim - 1):
            if expected.shape[axis] > 1:
                varied = expected.std(dim=axis).mean().item()
                assert varied >= spread, f"{what}: too alike along axis {axis} to be a test: {varied}"
        difference = (found - expected).abs().max().item()
        print(f"| {what} | {difference:.1e} |")
        assert difference <= TOLERANCE, f"{what}: largest difference {difference}"

    return agree_
