from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import training
from tests.distributed.processes import run

FIRST, ALL = range(5), range(10)
# Cut weights: kernels, whose rows are inputs times outputs, and rows that share.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cut": ("cut", "mbf", {"conv_blocks": "kernel", "output_power": 0.0}),
    "cut, two-sided": ("cut", "mbf", {"output_power": 0.5, "block_size": 1}),  # narrow: fits any pieces
    "copied": ("copied", "mbf", {"fisher": "empirical"}),
    "owned": ("copied", "kfac", {"shard_curvature": True, "fisher": "exact"}),
}


class Late(training.Network):
    """One layer never gets a gradient, and three outputs are cut into one, two and no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 4, 2))
        self.unused = nn.Linear(3, 3)


def build(way: str, method: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(0)
    network = Late().double()
    model: nn.Module = network
    if way == "cut":
        fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(network, find_unused_parameters=True)
    return network, model, training.minifisher.METHODS[method](network, **options)


def whole(network: nn.Module) -> dict[str, Tensor]:
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in network.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


def state_of(network: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(network, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save(folder: str) -> dict[str, dict[str, Tensor]]:
    """Train, save half way, go on: what the uninterrupted run ends with."""
    results = {}
    for name, case in CASES.items():
        network, model, optimizer = build(*case)
        training.train(model, optimizer, FIRST)
        checkpoint.save(state_of(network, optimizer), checkpoint_id=str(Path(folder) / name))
        training.train(model, optimizer, ALL[len(FIRST) :])
        results[name] = whole(network)
    return results


def resume(folders: list[str]) -> dict[tuple[str, str], dict[str, Tensor]]:
    results = {}
    for folder in folders:
        for name, case in CASES.items():
            network, model, optimizer = build(*case)
            state = state_of(network, optimizer)
            checkpoint.load(state, checkpoint_id=str(Path(folder) / name))
            set_state_dict(
                network, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            training.train(model, optimizer, ALL[len(FIRST) :])
            results[folder, name] = whole(network)
    return results


WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, Any]]:
    folders = {world: str(tmp_path_factory.mktemp(f"world{world}")) for world in WORLDS}
    return {world: (folder, run(world, save, folder)[0]) for world, folder in folders.items()}


@pytest.mark.parametrize("world", WORLDS)
def test_resumes_whatever_number_of_processes_saved(world: int, saved: dict[int, tuple[str, Any]]) -> None:
    folders = [folder for folder, _ in saved.values()]
    resumed = run(world, resume, folders)[0]
    for saved_by, (folder, expected) in saved.items():
        tolerance = 0.0 if saved_by == world else 1e-12
        for name in CASES:
            torch.testing.assert_close(
                resumed[folder, name],
                expected[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name, w=saved_by: f"{n}, saved by {w}: {m}",
            )
