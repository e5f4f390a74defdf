import contextlib
import os
import pickle
import resource
import threading
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vitrine.models.build import build_model
from vitrine.models.training.checkpoint import (
    CHECKPOINT_FILE,
    PREVIOUS_FILE,
    Checkpoint,
    Origin,
    Progress,
    WarmStart,
    checkpoint_sha256,
    load_checkpoint,
    save_checkpoint,
)
from vitrine.models.training.errors import CheckpointError
from vitrine.models.training.registry import load_recipe

TINY = ["model.depth=1", "model.embed_dim=8", "model.num_heads=2"]


@pytest.fixture
def checkpoint() -> Checkpoint:
    recipe = load_recipe("vit_cifar10", TINY)
    torch.manual_seed(0)
    document = recipe.model_dump(mode="json")
    return Checkpoint(
        architecture=recipe.architecture,
        settings=document["model"],
        preprocessing=document["preprocessing"],
        labels=["cat", "dog"],
        weights=build_model(recipe.architecture, recipe.model, 2).state_dict(),
        progress=Progress(
            recipe=document,
            changes=TINY,
            optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            epoch=3,
            seconds=1.5,
            metrics={"top1": 0.5},
            data_path="/data",
        ),
    )


def later(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    assert checkpoint.progress is not None
    return replace(checkpoint, progress=replace(checkpoint.progress, **changes))


def test_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path)
    loaded = load_checkpoint(tmp_path)
    recipe = load_recipe("vit_cifar10", TINY)
    assert loaded.progress.read_recipe() == recipe
    assert loaded.read_preprocessing() == recipe.preprocessing
    for name, value in vars(checkpoint).items():
        if name != "weights":
            assert getattr(loaded, name) == value
    assert all(torch.equal(loaded.weights[name], value) for name, value in checkpoint.weights.items())
    network = loaded.build()
    assert not network.training
    assert all(torch.equal(network.state_dict()[name], value) for name, value in checkpoint.weights.items())


@pytest.mark.parametrize("positions", ["none", "learned", "sine_1d", "sine_2d"])
def test_buffers_outside_the_checkpoint_are_built(checkpoint: Checkpoint, positions: str) -> None:
    settings = {**checkpoint.settings, "pos_embed": positions}
    network = build_model(checkpoint.architecture, settings, 2).eval()
    built = replace(checkpoint, settings=settings, weights=network.state_dict()).build()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(built(image), network(image))


def test_warm_start_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    start = WarmStart("vit-b", "0" * 64, ["head.weight", "head.bias"])
    save_checkpoint(later(checkpoint, start=start), tmp_path)
    assert load_checkpoint(tmp_path).progress.start == start


def test_no_other_files_are_left(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path)
    save_checkpoint(later(checkpoint, epoch=4), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [PREVIOUS_FILE, CHECKPOINT_FILE]
    assert load_checkpoint(tmp_path).progress.epoch == 4


def test_the_previous_checkpoint_is_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for epoch in (4, 5, 6):
        save_checkpoint(later(checkpoint, epoch=epoch), tmp_path)
    (tmp_path / PREVIOUS_FILE).rename(tmp_path / CHECKPOINT_FILE)
    assert load_checkpoint(tmp_path).progress.epoch == 5


def test_a_missing_checkpoint_is_distinguished_from_no_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for epoch in (3, 4):
        save_checkpoint(later(checkpoint, epoch=epoch), tmp_path)
    (tmp_path / CHECKPOINT_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"found none; the one before: mv .*checkpoint\.previous\.pt"):
        load_checkpoint(tmp_path)


def test_full_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written, the one before is untouched"):
            save_checkpoint(later(checkpoint, epoch=4), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@given(place=st.floats(0.1, 0.9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_found(checkpoint: Checkpoint, tmp_path: Path, place: float) -> None:
    for epoch in (3, 4):
        save_checkpoint(later(checkpoint, epoch=epoch), tmp_path)
    data = bytearray((tmp_path / CHECKPOINT_FILE).read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / CHECKPOINT_FILE).write_bytes(data)
    with contextlib.suppress(Exception), zipfile.ZipFile(tmp_path / CHECKPOINT_FILE) as archive:
        if archive.testzip() is None:
            return  # between the entries, where it means nothing
    with pytest.raises(CheckpointError, match=r"the one before: mv .*checkpoint\.previous\.pt .*checkpoint\.pt"):
        load_checkpoint(tmp_path)


def test_failed_save_leaves_the_old_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path)
    before = checkpoint_sha256(tmp_path)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_checkpoint(later(checkpoint, optimizer={"lock": threading.Lock}, metrics={"f": lambda: 0}), tmp_path)
    assert checkpoint_sha256(tmp_path) == before
    assert load_checkpoint(tmp_path).progress.epoch == 3


def test_half_written_file_is_not_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path)
    (tmp_path / f"{CHECKPOINT_FILE}.partial").write_bytes(b"half")
    assert load_checkpoint(tmp_path).progress.epoch == 3


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run with checkpoint\.pt, found none"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated(checkpoint: Checkpoint, tmp_path: Path, kept: float) -> None:
    save_checkpoint(checkpoint, tmp_path)
    data = (tmp_path / CHECKPOINT_FILE).read_bytes()
    (tmp_path / CHECKPOINT_FILE).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a checkpoint of this version"):
        load_checkpoint(tmp_path)


@given(st.binary(max_size=60))
@example(b"Vgarbage\n.")
@example(b"X\x02\x00\x00\x00\xff\xff.")  # a string that is not UTF-8
@example(b"0")  # nothing on the stack
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    run = tmp_path_factory.getbasetemp() / "any_bytes"
    run.mkdir(exist_ok=True)
    (run / CHECKPOINT_FILE).write_bytes(data)
    with pytest.raises(CheckpointError):
        load_checkpoint(run)


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.file), os.O_CREAT)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_the_file_is_not_run(checkpoint: Checkpoint, tmp_path: Path, archive: bool) -> None:
    trace = tmp_path / "executed"
    content = asdict(checkpoint)
    content["progress"]["data_path"] = Malicious(trace)
    if archive:
        torch.save(content, tmp_path / CHECKPOINT_FILE)
    else:
        (tmp_path / CHECKPOINT_FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 3, found 2"),
        ({"colour": "red"}, "not a checkpoint of this version.*colour"),
        ({"preprocessing": {"task": "object-detection"}}, "shortest_edge: Field required"),
    ],
)
def test_other_format(checkpoint: Checkpoint, tmp_path: Path, change: dict[str, object], message: str) -> None:
    torch.save({**asdict(checkpoint), **change}, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_checkpoint(tmp_path)


def test_imported_weights_name_their_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    origin = Origin(file="vit.npz", sha256="0" * 64, layout="Google's ViT (.npz)", arguments=[], untrained=["head"])
    save_checkpoint(replace(checkpoint, progress=None, origin=origin), tmp_path)
    assert load_checkpoint(tmp_path).origin == origin
    assert load_checkpoint(tmp_path).progress is None


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, torch.zeros(3)])
def test_something_else_saved_by_torch(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path)
