"""Data-parallel training: `torchrun` starts the processes, and each takes its share of every batch.

A problem's batch size is the total over all processes, so the number of processes does not change the steps.
Batch norm is the exception: it averages over the share of one process.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

Value = TypeVar("Value")


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group that torchrun announces in the environment; without torchrun do nothing."""
    if started() == 1:
        yield
        return
    if enough_gpus():
        torch.cuda.set_device(_local("RANK", 0))
    dist.init_process_group("cpu:gloo,cuda:nccl" if enough_gpus() else "gloo")
    try:
        yield
        dist.barrier()  # wait for the first process, which still writes its results
    finally:
        gc.collect()  # models still hold the group; its threads have to end before the interpreter does
        dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def enough_gpus() -> bool:
    """Whether there is a GPU for each process on this machine."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= _local("WORLD_SIZE", 1)


def _local(name: str, alone: int) -> int:
    return int(os.environ.get(f"LOCAL_{name}", alone))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; only number 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def replicate(model: nn.Module, seed: int) -> nn.Module:
    """Average the model's gradients over all processes, and seed each process differently from here on."""
    if world_size() == 1:
        return model
    if rank() > 0:
        torch.manual_seed(seed + 1_000_003 * rank())
    replica: nn.Module = DistributedDataParallel(model)
    return replica


def check_shares(size: int) -> None:
    """Raise ValueError unless all shares are equal, so that the mean of their losses is the batch loss."""
    if size % world_size():
        raise ValueError(
            f"a batch of {size} samples cannot be split equally between {world_size()} processes: "
            f"start a number of processes that divides {size}"
        )


def share(batch: Tensor) -> Tensor:
    """This process's samples of a batch, [N / processes, ...]."""
    return batch.chunk(world_size())[rank()]


def mean(value: float) -> float:
    """The mean over all processes."""
    return _summed(value / world_size())


def of_first(value: float) -> float:
    """The value of the first process."""
    return _summed(value if rank() == 0 else 0.0)


def read_by_first(read: Callable[[], Value]) -> Value:
    """What the first process reads, in every process, so that all agree about a file."""
    if world_size() == 1:
        return read()
    values = [read() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in the order of their numbers."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def _summed(value: float) -> float:
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
