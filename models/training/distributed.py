"""Distributed training: the processes started by `torchrun`, or a single process."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_TIMEOUT = timedelta(minutes=30)  # the others wait while one process evaluates or writes
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process and its process group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy `tensors` of the main process to all processes, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank."""
        values: list[T] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the process group of `torchrun` (NCCL on GPUs, gloo on CPUs); without it, a single process."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        yield ProcessGroup(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    # torchrun reuses one store for all restarts: without a prefix, it has the addresses of dead processes.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT, store=store, rank=rank, world_size=world_size)
    try:
        yield ProcessGroup(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def job_id() -> str:
    """Return the ID of the `torchrun` job, which is the same after restarts; empty if there is none."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run_id == "none" else run_id


def local_world_size() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
