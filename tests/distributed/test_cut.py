from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import minifisher
from minifisher.statistics.layers import Layer
from tests.distributed import training
from tests.distributed.processes import run

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kernels": {"conv_blocks": "kernel", "share": "row"},
    "rows": {"share": "row", "block_size": 4, "power": 0.5},
    "raw": {"graft": None, "relative_damping": False, "damping": 1.0},
    "sgd": {"graft": "sgd", "weight_decay": 0.1, "statistics_every": 3, "inverse_every": 2},
    "lengths by row": {"graft": "adam-rows", "fold_bias": True},
    "descent": {"length": "descent", "length_limit": 1.5},
    "descent by row": {"length": "descent", "graft": "adam-rows"},
    "adaptive": {"adaptive_damping": True, "graft": None, "relative_damping": False, "lr": 0.1},
    "columns": {"linear_blocks": "column", "block_size": 2},
    "columns of their own": {"linear_blocks": "column", "share": "row", "block_size": 2},
    "vectors by Adam": {"vectors": "adam", "graft": None, "relative_damping": False, "damping": 1.0},
    "folded": {"fold_bias": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    "two-sided": {"output_power": 0.5},
    "two-sided, raw": {
        "output_power": 1.0,
        "graft": None,
        "relative_damping": False,
        "damping": 1.0,
        "fold_bias": True,
    },
}
MESHES = {2: [(2,)], 4: [(4,), (2, 2)]}


class Uneven(nn.Module):
    """Rows that no number of processes divides; fewer rows than processes; one row; a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 5, 3)
        self.narrow = nn.Linear(20, 3)
        self.single = nn.Linear(3, 1)
        self.wide = nn.Linear(1, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.narrow(self.convolution(images).flatten(1))
        return self.last(torch.tanh(self.wide(self.single(hidden))) * self.scale)


def cut_between_outputs(pieces: int, layer: Layer) -> Layer:
    """The layer, whose curvature is cut as if so many processes held pieces of its weight."""
    rows = len(layer.weight)
    return replace(layer, piece_units={0: math.ceil(rows / pieces)}) if layer.weight.ndim else layer


class Even(nn.Module):
    """Two rows or more for each of four processes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3)
        self.first, self.last = nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(self.convolution(images).flatten(1))))


def make(kind: type[nn.Module], options: dict[str, Any], mesh: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = kind().double()
    if mesh is not None:
        fully_shard(network, mesh=mesh)
    return network, minifisher.MBF(network, **{"lr": 1e-2, **options})


def trained(kind: type[nn.Module], options: dict[str, Any], mesh: Any = None) -> dict[str, Tensor]:
    network, optimizer = make(kind, options, mesh)
    training.train(network, optimizer, range(20))
    return whole(network)


def whole(network: nn.Module) -> dict[str, Tensor]:
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in network.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


CASES = [
    *((training.Network, name) for name in OPTIONS if "columns" not in name),
    *((Even, name) for name in OPTIONS if "columns" in name),
    *((Uneven, name) for name in ("default", "kernels", "rows", "folded", "lengths by row", "descent")),
    *((Uneven, name) for name in ("two-sided", "two-sided, raw")),
]


def train_all(shapes: list[tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
    """On every mesh, whose last dimension is the one of pieces."""
    results = {}
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "pieces")[-len(shape) :])
        for kind, name in CASES:
            results[f"{kind.__name__} {name} {shape}"] = trained(kind, OPTIONS[name], mesh)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """Of every case and number of pieces: blocks over outputs end where a piece ends."""
    results = {}
    for pieces in {shape[-1] for shapes in MESHES.values() for shape in shapes}:
        with patch("minifisher.state.enrolment.with_piece_units", partial(cut_between_outputs, pieces)):
            results.update(
                {f"{kind.__name__} {name} {pieces}": trained(kind, OPTIONS[name]) for kind, name in CASES}
            )
    return results


@pytest.mark.parametrize("world", MESHES)
def test_fully_sharded_trains_the_same(world: int, alone: dict[str, dict[str, Tensor]]) -> None:
    for rank, results in enumerate(run(world, train_all, MESHES[world])):
        for name, result in results.items():
            case, shape = name.split(" (")
            expected = alone[f"{case} {shape.rstrip(',)')[-1]}"]
            torch.testing.assert_close(
                result, expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name, r=rank: f"{n}, rank {r}: {m}"
            )
