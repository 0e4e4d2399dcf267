"""Small blocks: average, factorise and solve all of them, against what moving the same bytes takes.

One turn is the whole work of a step on a convolution's kernels: M <- mu M + D, Adam's V and step length, the
average of d d^T, L P L^T with damping, two triangular solves, the direction and its length. `copy` is one
copy_ of a buffer that reads and writes as many bytes; `cholesky` is torch.linalg.cholesky and cholesky_solve
of the same blocks, damped, and nothing else.

`--first-use` times the first step of a fresh process with an empty cache, and the next one's with a full one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from alternate import CLOCKS, alternate, compare, machine, report
from torch import Tensor

from minifisher.kernels import packed
from minifisher.linalg.blocks import BlockReading

BLOCKS_OF_A_ROW = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def weight(rows: int, width: int) -> Tensor:
    return torch.randn(rows, BLOCKS_OF_A_ROW * width)


def fused(rows: int, width: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """The step, and the bytes that it must read and write."""
    tiling = packed.Tiling(BlockReading(rows, BLOCKS_OF_A_ROW * width, width))
    state = torch.zeros(tiling.shape, dtype=dtype)
    gradient, momentum, moment = (weight(rows, width) for _ in range(3))
    moment.square_()
    means = torch.ones(1)

    def step() -> object:
        done = packed.fused_step(
            state,
            gradient,
            momentum,
            moment,
            means,
            tiling,
            decay=0.95,
            damping=0.1,
            relative=True,
            momentum_decay=0.9,
            moment_decay=0.999,
            epsilon=1e-8,
            lengths=1,
            with_slopes=False,
            nesterov=False,
        )
        assert done is not None, "no compiled kernel: install the extra `fast`"
        return done

    # F, M and V are read and written, D is read, the direction written.
    return step, 2 * state.nbytes + 6 * gradient.nbytes


def copy(size: int) -> Callable[[], object]:
    source, target = torch.zeros(size // 2, dtype=torch.uint8), torch.zeros(size // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


def cholesky(rows: int, width: int) -> Callable[[], object]:
    vectors = weight(rows, width).view(-1, width, 1)
    blocks = vectors @ vectors.mT + torch.eye(width)
    return lambda: torch.cholesky_solve(vectors, torch.linalg.cholesky(blocks))


def measure(
    blocks: int, width: int, dtype: str, turns: int, clock: str, rest: float, peers: bool
) -> dict[str, Any]:
    rows = max(1, blocks // BLOCKS_OF_A_ROW)
    step, size = fused(rows, width, DTYPES[dtype])
    rivals = {"copy": copy(size), "fused": step}
    if peers:
        rivals["cholesky"] = cholesky(rows, width)
    seconds = alternate(rivals, turns, clock, rest)
    table: dict[str, Any] = {"megabytes": round(size / 1e6, 1), **compare(seconds, "copy")}
    if peers:
        pairs = zip(seconds["fused"], seconds["cholesky"], strict=True)
        ratios = sorted(own / other for own, other in pairs)
        table["fused / cholesky"] = round(ratios[len(ratios) // 2], 4)
    return table


def first_step() -> float:
    started = time.perf_counter()
    fused(1, 9, torch.float32)[0]()
    return time.perf_counter() - started


def first_use() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["env", f"NUMBA_CACHE_DIR={folder}", sys.executable, __file__, "--first-step"]
        runs = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(2)]
    return {"compiled": round(runs[0], 2), "cached": round(runs[1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=262_144)
    parser.add_argument("--widths", default="9")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rest", type=float, default=0.02, help="seconds between rivals")
    parser.add_argument("--without-cholesky", action="store_true")
    parser.add_argument("--first-use", action="store_true")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.first_step:
        print(first_step())
        return
    if arguments.first_use:
        print(json.dumps({"machine": machine(), "first step, seconds": first_use()}, indent=1))
        return
    report(
        {
            f"{arguments.blocks} blocks {width}x{width}, {dtype}": measure(
                arguments.blocks,
                int(width),
                dtype,
                arguments.turns,
                arguments.clock,
                arguments.rest,
                not arguments.without_cholesky,
            )
            for width in arguments.widths.split(",")
            for dtype in arguments.dtypes.split(",")
        }
    )


if __name__ == "__main__":
    main()
