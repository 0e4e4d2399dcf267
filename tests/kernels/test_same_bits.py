"""The bits of a kernel's results depend neither on numba's cache nor on where its arguments lie in memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from minifisher.curvature import FirstOrderStep
from minifisher.kernels import choose, packed
from minifisher.linalg.blocks import BlockReading

needs_numba = pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="numba (extra `fast`) is not installed")

WIDTHS = [2, 4, 8, 9, 16, 25, 49]
CHILD = """
import hashlib, sys
import torch
from minifisher.curvature import FirstOrderStep, Measures
from minifisher.kernels import choose, elementwise_cpu, packed, tiles_cpu
from minifisher.linalg.blocks import BlockReading

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
numbers = dict(decay=0.95, damping=0.1, relative=True, momentum_decay=0.9, moment_decay=0.999, epsilon=1e-8)


def told(name, tensors):
    parts = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    print(name, hashlib.sha256(b"".join(parts)).hexdigest())


for dtype in (torch.float32, torch.bfloat16):
    for width in map(int, sys.argv[1:]):
        for blocks in (3, 32):
            length = blocks * width - 1
            tiling = packed.Tiling(BlockReading(4, length, width))
            state = torch.zeros(tiling.shape, dtype=dtype)
            momentum, moment, out = torch.zeros(4, length), torch.zeros(4, length), []
            for _ in range(3):
                gradient = torch.randn(4, length, generator=generator)
                means = gradient.square().mean().view(1)
                for flag in (False, True):
                    flags = {"lengths": 1, "with_slopes": flag, "nesterov": flag}
                    direction, *measures = packed.fused_step(
                        state, gradient, momentum, moment, means, tiling, **numbers, **flags
                    )
                    out += [direction, *(n for pair in measures for n in pair if n is not None)]
                out.append(packed.solve(state, gradient, means, tiling, 0.1, True))
            told(f"{width} {blocks} {dtype}", [state, momentum, moment, *out])
for shape in ((1, 70_000), (3, 5_000)):
    gradient, momentum, moment = (torch.randn(shape, generator=generator) for _ in range(3))
    decays = dict(momentum_decay=0.9, moment_decay=0.999, epsilon=1e-8)
    (norm,) = elementwise_cpu.adam_step(gradient, momentum, moment.square_(), **decays, with_slope=False)
    of_adam = Measures(*elementwise_cpu.adam_step(gradient, momentum, moment, **decays, with_slope=True))
    mean = choose.mean_square(gradient, shape[0])
    measures = Measures(*elementwise_cpu.norm_and_slope(gradient, momentum))
    elementwise_cpu.subtract_scaled(momentum, gradient, norm, 0.1, 0.9)
    by_growth, _ = elementwise_cpu.descent_length(measures, of_adam, 4.0, 2.0)
    length, _ = elementwise_cpu.descent_length(measures, Measures(*of_adam[:2]), 4.0, 2.0)
    told(f"elementwise {shape}", [momentum, moment, norm, *of_adam, mean, *measures[:2], length, by_growth])
for shape in ((70, 130), (64, 64)):
    gradient, momentum, moment = (torch.randn(1, *shape, generator=generator) for _ in range(3))
    outputs, inputs = (torch.randn(1, -(-size // 50), 50, 50, generator=generator) for size in shape)
    for moment in (moment.square(), None):
        step = FirstOrderStep(0.9, momentum, moment, 0.999, 1e-8, lengths=shape[0], with_slopes=True)
        direction, *measures = tiles_cpu.direction_of_tiles(gradient, outputs, inputs, step)
        numbers = [number for of_step in measures for number in of_step if number is not None]
        told(f"tiles {shape}", [momentum, direction, *numbers])
"""


def hashes(cache: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, WIDTHS)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@needs_numba
def test_the_process_that_compiles_and_one_that_reads_the_cache_get_the_same_bits(tmp_path):
    compiled, cached = hashes(str(tmp_path)), hashes(str(tmp_path))
    assert len(compiled.splitlines()) == 2 * 2 * len(WIDTHS) + 2 + 4
    assert any(tmp_path.rglob("*.nbc"))
    assert compiled == cached


@needs_numba
def test_no_kernel_calls_another_compiled_function():
    # Such a function would have two versions of machine code, see minifisher.kernels.jit.
    from minifisher.kernels import elementwise_cpu, packed_cpu

    kernels = [
        value
        for module in (elementwise_cpu, packed_cpu)
        for value in vars(module).values()
        if hasattr(value, "py_func") and "inline" not in value.targetoptions
    ]
    assert len(kernels) == 6
    for kernel in kernels:
        names = re.findall(r"\w+", " ".join(kernel.py_func.__code__.co_names))
        called = [kernel.py_func.__globals__.get(name) for name in names]
        assert not [other for other in called if other in kernels]


# ---- wherever the arguments lie ----


def of_tiles(gradient, momentum):
    from minifisher.kernels import tiles_cpu

    step = FirstOrderStep(0.9, momentum, torch.ones_like(gradient), 0.999, 1e-8, with_slopes=True)
    outputs, inputs = torch.ones(1, 1, 1, 1), torch.rand(1, 1, *2 * gradient.shape[2:])
    direction, of_direction, _ = tiles_cpu.direction_of_tiles(gradient, outputs, inputs, step)
    return direction, *of_direction[:2]


def of_packed_blocks(gradient, momentum):
    tiling = packed.Tiling(BlockReading(1, gradient.shape[2], 8))
    flags = {"relative": True, "lengths": 1, "with_slopes": True, "nesterov": True}
    numbers = {"decay": 0.95, "damping": 0.1, "momentum_decay": 0.9, "moment_decay": 0.999, "epsilon": 1e-8}
    tensors = torch.zeros(tiling.shape), gradient[0], momentum[0], torch.ones_like(gradient[0]), torch.ones(1)
    direction, of_direction, _ = packed.fused_step(*tensors, tiling, **numbers, **flags)
    return direction, *of_direction[:2]


# A loop over vectors writes up to 256 bytes at once: more than a row of 60 numbers has.
@needs_numba
@pytest.mark.parametrize("columns", [8, 16, 40, 60])
@pytest.mark.parametrize("results", [of_tiles, of_packed_blocks])
def test_neighbours_in_memory_do_not_change_a_bit(results, columns, monkeypatch):
    torch.manual_seed(0)
    gradient, values = torch.rand(2, 1, 1, columns)

    def with_direction_before_momentum(entries):
        memory = torch.empty(512 + columns)
        direction, momentum = (memory[first : first + columns] for first in (512 - entries, 512))
        momentum = momentum.view_as(values).copy_(values)
        monkeypatch.setattr(torch, "empty_like", direction.view_as)
        torch.manual_seed(1)
        found = results(gradient, momentum)
        assert found[0].data_ptr() == direction.data_ptr()
        return [tensor.clone() for tensor in found]

    apart, close = with_direction_before_momentum(512), with_direction_before_momentum(columns)
    assert all(map(torch.equal, apart, close))
