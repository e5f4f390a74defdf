"""The processes that train one network together: started by `torchrun`, or this one alone."""

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

_TIMEOUT = timedelta(minutes=30)  # one process evaluates or writes while the others wait
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's `tensors`, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, by rank."""
        values: list[T] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the processes that `torchrun` started (NCCL on GPUs, gloo on CPUs); without it there is one."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        yield ProcessGroup(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, count = next(rendezvous("env://", timeout=_TIMEOUT))
    # torchrun keeps one store for all its attempts: without a prefix, the addresses of dead processes are found in it.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT, store=store, rank=rank, world_size=count)
    try:
        yield ProcessGroup(rank, count, device)
    finally:
        dist.destroy_process_group()


def job_id() -> str:
    """What names the job to all processes that `torchrun` ever starts for it; empty without such a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def local_world_size() -> int:
    """How many processes train beside each other here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
