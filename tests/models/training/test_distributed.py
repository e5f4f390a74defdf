"""Training in two processes under `torchrun`, compared with one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vitrine.models.training.checkpoint import METRICS_FILE, load_checkpoint
from vitrine.models.training.distributed import ProcessGroup, job_id, process_group
from vitrine.models.training.loop import train
from vitrine.models.training.registry import load_recipe

pytestmark = pytest.mark.slow

VIT = (
    "model.image_size=16",
    "model.patch_size=8",
    "model.stem=patch",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "augmentation.mixup=0.2",
    "batch_size=24",
    "optimizer=adamw",
    "precision=float32",
    "lr=2e-3",
    "held_out=0.2",
    "epochs=1",
)
DETR = (
    "model.num_queries=6",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.feedforward_dim=16",
    "model.backbone_layers=[1, 1]",
    "model.backbone_width=8",
    "model.backbone_norm=frozen",
    "preprocessing.shortest_edge=32",
    "preprocessing.longest_edge=48",
    "batch_size=24",
    "epochs=1",
)


ReadUntil = Callable[["subprocess.Popen[str]", str], None]
Torchrun = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def torchrun() -> Iterator[Torchrun]:
    """Start `vitrine train` in two processes; kill those that still run after the test."""
    jobs: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], *options: str) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        job = subprocess.Popen(
            [*launcher, "-m", "vitrine", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        for pid in (*children(job.pid), job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.communicate()


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def gradients(run: Path) -> dict[int, torch.Tensor]:
    """The (clipped) gradient of a run's only step: AdamW's first moment is a tenth of it."""
    return {i: 10 * state["exp_avg"] for i, state in load_checkpoint(run).progress.optimizer["state"].items()}


@pytest.mark.parametrize(
    ("recipe", "changes", "name"), [("vit_cifar10", VIT, "colours"), ("detr_bccd", DETR, "squares")]
)
def test_two_processes_make_the_gradients_and_metrics_of_one(
    torchrun: Torchrun,
    recipe: str,
    changes: tuple[str, ...],
    name: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    data = request.getfixturevalue(name)
    job = torchrun([recipe, "--data", str(data), "--out", str(tmp_path / "two"), *changes])
    train(load_recipe(recipe, changes), data, tmp_path / "one")
    train(load_recipe(recipe, [*changes, "accumulate=3"]), data, tmp_path / "parts")
    finished(job)
    expected = gradients(tmp_path / "one")
    for other in ("two", "parts"):
        found = gradients(tmp_path / other)
        assert found.keys() == expected.keys()
        for i, gradient in expected.items():
            torch.testing.assert_close(found[i], gradient, rtol=1e-4, atol=1e-6)
        ours, theirs = (json.loads((tmp_path / run / METRICS_FILE).read_text()) for run in ("one", other))
        assert ours.keys() == theirs.keys()
        assert all(theirs[key] == pytest.approx(ours[key], rel=1e-4) for key in ours if key != "seconds")


def test_a_killed_process_ends_the_job_and_the_run_resumes(
    torchrun: Torchrun, read_until: ReadUntil, colours: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["vit_cifar10", "--data", str(colours), "--out", str(run), *VIT, "epochs=1000", "batch_size=8"]
    job = torchrun(arguments)
    read_until(job, "epoch 2/")
    workers = [pid for pid in children(job.pid) if "vitrine" in command(pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0, output
    done = load_checkpoint(run).progress.epoch
    assert done >= 2
    again = torchrun([*arguments, "--resume"])
    read_until(again, f"epoch {done + 2}/")
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert load_checkpoint(run).progress.epoch >= done + 2
    epochs = [json.loads(line)["epoch"] for line in (run / METRICS_FILE).read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))


def test_torchrun_restarts_a_failed_job_where_it_was(
    torchrun: Torchrun, read_until: ReadUntil, colours: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = [*VIT, "epochs=20", "batch_size=8", "evaluate_every=20"]
    job = torchrun(["vit_cifar10", "--data", str(colours), "--out", str(run), *changes], "--max-restarts=1")
    read_until(job, "epoch 2/")
    os.kill(next(pid for pid in children(job.pid) if "vitrine" in command(pid)), signal.SIGKILL)
    finished(job)
    assert load_checkpoint(run).progress.epoch == 20


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def command(pid: int) -> str:
    return (Path("/proc") / str(pid) / "cmdline").read_text()


def test_a_single_process_without_torchrun() -> None:
    with process_group() as processes:
        assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
        assert processes.gather("x") == ["x"]
        assert processes.sum(torch.ones(2)).tolist() == [1, 1]
    assert job_id() == ""


def test_only_the_first_process_writes() -> None:
    assert not ProcessGroup(1, 2, torch.device("cpu")).is_main
