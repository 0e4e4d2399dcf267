"""Directions in float32, and with curvature in bfloat16, against float64, over condition numbers 1 to 1e8.

    python benchmarks/numerics.py > benchmarks/results/numerics.json

Every curvature matrix is Q diag(v) Q^T with v spaced evenly on a logarithmic scale from 1 down to 1 / kappa.
The error of a direction is |d - d64| / |d64|, where d64 is computed in float64 from the same matrix before it
is rounded. The largest of 5 random matrices counts.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from minifisher import KFAC, MBF, TNT, Shampoo
from minifisher.statistics.layers import layer_of, layers_of

WIDTH = 32
CONDITIONS = (1e0, 1e2, 1e4, 1e6, 1e8)
DAMPINGS = (0.0, 1e-6, 1e-3, 1e-1)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MBF, two-sided": (MBF, {"block_size": WIDTH, "output_power": 0.5}),
    "MBF, Cholesky": (MBF, {"block_size": WIDTH, "output_power": 0.0, "inverse": "cholesky"}),
    "MBF, Newton-Schulz": (MBF, {"block_size": WIDTH, "output_power": 0.0, "inverse": "newton-schulz"}),
    "MBF, power 0.5": (MBF, {"block_size": WIDTH, "output_power": 0.0, "power": 0.5}),
    "MBF, solved in every step": (MBF, {"block_size": WIDTH, "share": "row"}),
    "KFAC": (KFAC, {"fold_bias": False}),
    "EKFAC": (KFAC, {"fold_bias": False, "eigenvalue_correction": True}),
    "Shampoo, eigen": (Shampoo, {}),
    "Shampoo, Newton": (Shampoo, {"root": "newton"}),
    "TNT": (TNT, {"fisher": "gradient"}),
}


def spectrum(condition: float, seed: int) -> Tensor:
    """A symmetric positive definite matrix in float64 with this condition number."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), WIDTH, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def direction(method: str, matrix: Tensor, damping: float, dtype: torch.dtype, kept: torch.dtype) -> Tensor:
    """The direction of a fixed momentum, with every matrix of the curvature equal to `matrix`."""
    make, options = METHODS[method]
    module = nn.Linear(WIDTH, WIDTH, bias=False).to(dtype)
    optimizer = make(module, curvature_dtype=kept, **options)
    layer = layers_of(module)[0] if make is KFAC else layer_of("weight", module.weight)
    curvature = optimizer.plan(layer, optimizer.param_groups[0]).curvature
    state = curvature.init(layer)
    for name, tensor in state.items():
        if name.endswith(("fisher", "factor", "factor_0", "factor_1")):
            tensor.copy_(_packed(curvature, matrix) if tensor.shape[-1] != WIDTH else matrix)
        elif name == "mean":
            tensor.fill_(matrix.diagonal().mean())
    curvature.refresh(state, damping)
    momentum = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return curvature.precondition(state, momentum.to(dtype), damping).double()


def _packed(curvature: Any, matrix: Tensor) -> Tensor:
    return curvature._tiling.pack(matrix.expand(WIDTH, 1, WIDTH, WIDTH))


def error(method: str, condition: float, damping: float, kept: torch.dtype) -> float | None:
    """The largest error over 5 matrices; None where a direction is not finite."""
    errors = []
    for seed in range(5):
        matrix = spectrum(condition, seed)
        exact = direction(method, matrix, damping, torch.float64, torch.float64)
        found = direction(method, matrix, damping, torch.float32, kept)
        errors.append(((found - exact).norm() / exact.norm()).item())
    return max(errors) if all(map(math.isfinite, errors)) else None


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    rows = [
        {
            "method": method,
            "curvature": str(kept).removeprefix("torch."),
            "condition": condition,
            "damping": damping,
            "error": error(method, condition, damping, kept),
        }
        for method in METHODS
        for kept in (torch.float32, torch.bfloat16)
        for condition in CONDITIONS
        for damping in DAMPINGS
    ]
    about = {"torch": torch.__version__, "machine": platform.machine(), "width": WIDTH}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
