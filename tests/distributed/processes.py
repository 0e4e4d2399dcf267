"""Run one function in several processes joined by gloo, and hand back what each of them returned."""

from __future__ import annotations

import datetime
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = datetime.timedelta(seconds=60)


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned, rank by rank; an error of any rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", TIMEOUT, world, rank)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        gc.collect()  # what is left of models and optimizers holds subgroups
        dist.destroy_process_group()
