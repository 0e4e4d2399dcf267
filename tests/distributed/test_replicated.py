from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import minifisher
from tests.distributed import training
from tests.distributed.processes import run

CASES: dict[str, tuple[str, dict[str, Any]]] = {method: (method, {}) for method in minifisher.METHODS}
CASES |= {
    "mbf empirical": ("mbf", {"fisher": "empirical", "statistics_every": 3}),
    "mbf sampled, bias folded in": ("mbf", {"fisher": "sampled", "fold_bias": True}),
    "mbf kernels, own rows": ("mbf", {"fisher": "empirical", "conv_blocks": "kernel", "share": "row"}),
    "mbf two-sided": ("mbf", {"output_power": 0.5}),
    "mbf two-sided, sampled": ("mbf", {"output_power": 1.0, "fisher": "sampled", "statistics_every": 3}),
    "kfac exact, eigenvalues corrected": ("kfac", {"fisher": "exact", "eigenvalue_correction": True}),
    "kfac, divergence clipped": ("kfac", {"kl_clip": 1e-4}),
    "tnt by sample": ("tnt", {"per_sample": True}),
    "tnt of the gradient": ("tnt", {"fisher": "gradient"}),
    "adaptive damping": ("kbfgs", {"adaptive_damping": True}),
}
SHARDED = {
    f"{name}, sharded": (m, {**options, "shard_curvature": True}) for name, (m, options) in CASES.items()
}


def train_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Tensor]]:
    return {name: training.trained(*case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return train_all(CASES)


PLAIN = {name: CASES[name] for name in minifisher.METHODS}


@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (4, {**PLAIN, **SHARDED})], ids=["2", "4"])
def test_any_number_of_processes_trains_the_same(
    world: int, cases: dict[str, tuple[str, dict[str, Any]]], alone: dict[str, dict[str, Tensor]]
) -> None:
    for rank, results in enumerate(run(world, train_all, cases)):
        for name, result in results.items():
            expected = alone[name.removesuffix(", sharded")]
            torch.testing.assert_close(
                result, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name, r=rank: f"{n}, rank {r}: {m}"
            )
