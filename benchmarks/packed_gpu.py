"""Packed blocks on a GPU: one step's update and solve against a device copy that moves the same bytes.

A 512 x 512 convolution of 3x3 kernels has 262,144 blocks of 9x9. Times are medians by CUDA events with the
cache emptied before each call (`triton.testing.do_bench`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from alternate import report
from torch import Tensor

BLOCKS_PER_TILE = 16
NUMBERS = {"decay": 0.95, "damping": 0.1, "relative": True}
FIRST_ORDER = {"momentum_decay": 0.9, "moment_decay": 0.999, "epsilon": 1e-8}


def tensors(rows: int, blocks: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight's rows of whole tiles, after a first gradient."""
    entries = width * (width + 1) // 2
    weight = partial(torch.randn, rows, blocks * width, device="cuda")
    return {
        "packed": torch.zeros(
            rows, blocks // BLOCKS_PER_TILE, entries, BLOCKS_PER_TILE, dtype=dtype, device="cuda"
        ),
        "gradient": weight(),
        "momentum": weight(),
        "moment": weight().square(),
        "means": torch.full((rows,), 1.0, device="cuda"),
    }


def moved(state: dict[str, Tensor]) -> int:
    """Bytes read and written: everything is read, all but the gradient written back, and the direction."""
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    return 2 * (size["packed"] + size["momentum"] + size["moment"]) + 2 * size["gradient"]


def dense(state: dict[str, Tensor], width: int) -> Tensor:
    """Whole blocks [rows, blocks, b, b] of packed triangles."""
    triangles = state["packed"].float().mT.flatten(1, 2)
    i, j = torch.tril_indices(width, width, device="cuda")
    blocks = triangles.new_zeros(*triangles.shape[:2], width, width)
    blocks[..., i, j] = blocks[..., j, i] = triangles
    return blocks


def reference(blocks: Tensor, momentum: Tensor, means: Tensor) -> Tensor:
    """The solve alone, by Cholesky factors of whole blocks."""
    width = blocks.shape[-1]
    traces = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
    level = NUMBERS["damping"] * 0.5 * (traces / width + means[:, None])
    damped = blocks + level[..., None, None] * torch.eye(width, device="cuda")
    vectors = momentum.view(*blocks.shape[:-1], 1)
    return torch.cholesky_solve(vectors, torch.linalg.cholesky(damped)).view(momentum.shape)


def milliseconds(call: Callable[[], object], turns: int) -> float:
    from triton.testing import do_bench

    return statistics.median(do_bench(call, return_mode="median") for _ in range(turns))


def measure(rows: int, blocks: int, width: int, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    from minifisher.kernels import packed_triton

    torch.manual_seed(0)
    state = tensors(rows, blocks, width, dtype)
    step = partial(
        packed_triton.fused_step,
        **state,
        width=width,
        **NUMBERS,
        **FIRST_ORDER,
        with_slopes=False,
        nesterov=False,
    )
    direction, *_ = step()
    whole = dense(state, width)
    expected = reference(whole, state["momentum"], state["means"])
    error = ((direction - expected).norm() / expected.norm()).item()
    source = torch.empty(moved(state) // 2, dtype=torch.uint8, device="cuda")
    copy = milliseconds(partial(torch.empty_like(source).copy_, source), turns)
    own = milliseconds(step, turns)
    cholesky = milliseconds(partial(reference, whole, state["momentum"], state["means"]), turns)
    return {
        "bytes": moved(state),
        "copy_ms": round(copy, 4),
        "step_ms": round(own, 4),
        "cholesky_and_solve_ms": round(cholesky, 4),
        "share_of_the_copy's_bandwidth": round(copy / own, 3),
        "relative_difference_from_cholesky": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=512, help="of a row, a multiple of 16")
    parser.add_argument("--widths", default="9", help="of blocks, with commas")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was measured; run this where torch.cuda.is_available()")
    report(
        {"device": torch.cuda.get_device_name()}
        | {
            f"{width}x{width} {str(dtype).removeprefix('torch.')}": measure(
                arguments.rows, arguments.blocks, int(width), dtype, arguments.turns
            )
            for width in arguments.widths.split(",")
            for dtype in (torch.float32, torch.bfloat16)
        }
    )


if __name__ == "__main__":
    main()
