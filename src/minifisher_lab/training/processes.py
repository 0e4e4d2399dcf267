"""Processes that train together: `torchrun` starts them, and each takes its share of every batch.

The batch of a problem is that of all processes together, so that a run has the same steps on any number of
them. What a network averages over its own batch (batch norm) it averages over the share that it sees.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


@contextmanager
def joined() -> Iterator[None]:
    """The process group that torchrun's environment variables ask for; nothing where they do not."""
    if started() == 1:
        yield
        return
    if enough_gpus():
        torch.cuda.set_device(_local("RANK", 0))
    dist.init_process_group("cpu:gloo,cuda:nccl" if enough_gpus() else "gloo")
    try:
        yield
        dist.barrier()  # the first process still writes when the others are done
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun says that it started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def enough_gpus() -> bool:
    """Whether every process of this machine has a GPU of its own."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= _local("WORLD_SIZE", 1)


def _local(name: str, alone: int) -> int:
    return int(os.environ.get(f"LOCAL_{name}", alone))


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; number 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def replicate(model: nn.Module, seed: int) -> nn.Module:
    """The model with its gradients averaged over all processes, which from here on draw unlike numbers."""
    if world_size() == 1:
        return model
    if rank() > 0:
        torch.manual_seed(seed + 1_000_003 * rank())
    replica: nn.Module = DistributedDataParallel(model)
    return replica


def check_shares(size: int) -> None:
    """Raise ValueError where a batch cannot be dealt out in equal shares, whose means average to its own."""
    if size % world_size():
        raise ValueError(
            f"a batch of {size} samples cannot be dealt out equally to {world_size()} processes: "
            f"start a number of processes that divides {size}"
        )


def share(batch: Tensor) -> Tensor:
    """The samples of a batch that are this process's, [N / processes, ...]."""
    return batch.chunk(world_size())[rank()]


def mean(value: float) -> float:
    """The mean over all processes."""
    return _summed(value / world_size())


def of_first(value: float) -> float:
    """What the first process has."""
    return _summed(value if rank() == 0 else 0.0)


def _summed(value: float) -> float:
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
