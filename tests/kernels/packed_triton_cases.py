"""The triton kernel against dense float64 matrices; `test_packed_triton.py` runs this file in a new process.

With TRITON_INTERPRET=1 triton's interpreter runs the kernel on the CPU, otherwise it runs on the GPU. Triton
reads the variable once, when it is first imported.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from minifisher.kernels import packed_triton
from minifisher.linalg.damping import LEAST_SCALE, curvature_scale

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# width of a block and length of a row: with padding or without, one tile or two, sixteen blocks or fewer
READINGS = [(2, 32), (3, 7), (4, 70), (9, 27), (9, 160), (10, 23), (17, 40), (25, 50)]
ROWS = 3
DECAY, MOMENTUM_DECAY, MOMENT_DECAY, EPSILON = 0.9, 0.8, 0.99, 1e-6


class Case:
    """A weight with packed blocks of one width, its gradient and its averages."""

    def __init__(self, width, length, dtype=torch.float32, first=False):
        torch.manual_seed(width + length)
        self.width, self.length = width, length
        self.blocks = math.ceil(length / width)
        self.tiles = math.ceil(self.blocks / 16)
        self.blocks_per_tile = math.ceil(self.blocks / self.tiles)
        factors = torch.randn(ROWS, self.blocks, width, width + 2) * (0 if first else 1)
        factors *= self.split(torch.ones(ROWS, length)).unsqueeze(-1)  # zeros in the padding
        self.packed = self.pack(factors @ factors.mT).to(dtype).to(DEVICE)
        self.gradient, self.momentum = torch.randn(2, ROWS, length, device=DEVICE)
        self.moment, self.means = torch.rand(ROWS, length, device=DEVICE), torch.rand(ROWS, device=DEVICE)

    def split(self, rows):
        """[rows, length] to [rows, blocks, width]."""
        padded = rows.new_zeros(ROWS, self.blocks * self.width)
        padded[:, : self.length] = rows
        return padded.view(ROWS, self.blocks, self.width)

    def places(self):
        """Entry (i, j) of every block, and its place in the packed tensor: tile, entry, block of the tile."""
        for block in range(self.blocks):
            for i in range(self.width):
                for j in range(i + 1):
                    yield (
                        block,
                        i,
                        j,
                        block // self.blocks_per_tile,
                        i * (i + 1) // 2 + j,
                        block % self.blocks_per_tile,
                    )

    def pack(self, dense):
        packed = torch.zeros(ROWS, self.tiles, self.width * (self.width + 1) // 2, self.blocks_per_tile)
        for block, i, j, tile, entry, place in self.places():
            packed[:, tile, entry, place] = dense[:, block, i, j]
        return packed

    def dense(self):
        """[rows, blocks, width, width] in float64."""
        dense = torch.zeros(ROWS, self.blocks, self.width, self.width, dtype=torch.float64)
        for block, i, j, tile, entry, place in self.places():
            dense[:, block, i, j] = dense[:, block, j, i] = self.packed[:, tile, entry, place].double().cpu()
        return dense

    def levels(self, damping, relative):
        largest = self.dense().diagonal(dim1=-2, dim2=-1).amax(-1)
        least = torch.finfo(torch.bfloat16).eps if self.packed.dtype == torch.bfloat16 else 0.0
        return torch.maximum(self.asked_levels(damping, relative), least * largest)

    def asked_levels(self, damping, relative):
        if not relative:
            return torch.full((ROWS, self.blocks), damping, dtype=torch.float64)
        entries = self.split(torch.ones(ROWS, self.length)).sum(-1)
        traces = self.dense().diagonal(dim1=-2, dim2=-1).sum(-1)
        return damping * curvature_scale(traces / entries, self.means.double().cpu()[:, None])

    def solution(self, momentum, damping, relative):
        """The solution that torch.linalg computes in float64 from the stored blocks."""
        unit = torch.eye(self.width, dtype=torch.float64)
        damped = self.dense() + self.levels(damping, relative)[..., None, None] * unit
        solved = torch.linalg.solve(damped, self.split(momentum.double().cpu()))
        return solved.reshape(ROWS, -1)[:, : self.length]

    def check(self, direction, squares, expected):
        scale = expected.abs().max().item()
        torch.testing.assert_close(direction.double().cpu(), expected, rtol=0, atol=2e-4 * scale)
        torch.testing.assert_close(squares.double().cpu(), expected.square().sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), READINGS)
def test_average(width, length, dtype):
    case = Case(width, length, dtype)
    x = case.split(case.gradient.double().cpu())
    expected = DECAY * case.dense() + (1 - DECAY) * x.unsqueeze(-1) * x.unsqueeze(-2)
    packed_triton.average(case.packed, case.gradient, width=width, decay=DECAY)
    # NOTE the interpreter truncates to bfloat16, the GPU rounds (`test_it_compiles_for_a_gpu`).
    rounding = {torch.float32: 2**-22, torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8}[dtype]
    torch.testing.assert_close(case.dense(), expected, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(case.packed, case.pack(case.dense()).to(case.packed))  # the filling is zero


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), READINGS)
def test_solve(width, length, dtype, relative):
    case = Case(width, length, dtype)
    before, momentum = case.packed.clone(), case.momentum.clone()
    answer = packed_triton.solve(
        case.packed, case.momentum, case.means, width=width, damping=0.3, relative=relative
    )
    case.check(*answer, case.solution(momentum, 0.3, relative))
    assert torch.equal(case.packed, before)
    assert torch.equal(case.momentum, momentum)


@pytest.mark.parametrize("with_slopes", [False, True], ids=["norms", "slopes"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
@pytest.mark.parametrize("adam", [True, False], ids=["moment", "no moment"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), READINGS)
def test_fused_step(width, length, dtype, adam, first, nesterov, with_slopes):
    case, average_alone = Case(width, length, dtype, first), Case(width, length, dtype, first)
    momentum = MOMENTUM_DECAY * case.momentum.double() + case.gradient
    moment = MOMENT_DECAY * case.moment.double() + (1 - MOMENT_DECAY) * case.gradient.double().square()
    step = momentum / (moment.sqrt() + EPSILON) if adam else momentum
    direction, sums = packed_triton.fused_step(
        case.packed,
        case.gradient,
        case.momentum,
        case.moment if adam else None,
        case.means,
        width=width,
        decay=DECAY,
        damping=0.3,
        relative=True,
        momentum_decay=MOMENTUM_DECAY,
        moment_decay=MOMENT_DECAY,
        epsilon=EPSILON,
        with_slopes=with_slopes,
        nesterov=nesterov,
    )
    torch.testing.assert_close(case.momentum.double(), momentum, rtol=1e-6, atol=1e-6)
    if adam:
        torch.testing.assert_close(case.moment.double(), moment, rtol=1e-6, atol=1e-7)
    of_direction = 2 if with_slopes else 1
    square = sums[of_direction].double()
    torch.testing.assert_close(square, step.square().sum(1), rtol=1e-5, atol=0)
    packed_triton.average(average_alone.packed, average_alone.gradient, width=width, decay=DECAY)
    assert torch.equal(case.packed, average_alone.packed)
    ahead = MOMENTUM_DECAY * momentum + case.gradient if nesterov else momentum
    solution = case.solution(ahead, 0.3, True)
    case.check(direction, sums[0], solution)
    assert len(sums) == (2 if not with_slopes else 6 if adam else 4)
    if with_slopes:
        for slope, expected in zip(sums[1:4:2], (solution, step.cpu()), strict=True):
            products = (momentum.cpu() * expected).sum(1)
            torch.testing.assert_close(slope.double().cpu(), products, rtol=1e-3, atol=0)
    if len(sums) == 6:
        squares = torch.stack((case.gradient.double().square().sum(1), moment.sum(1)))
        torch.testing.assert_close(sums[4:].double(), squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("curvature", [0.0, 2.0])
def test_relative_damping_follows_the_rule_of_linalg_damping(curvature):
    # Blocks c I: the solution for a vector x is x / (c + lambda), from which lambda is computed.
    case = Case(9, 4 * 9 + 5)
    ones = case.split(torch.ones(ROWS, case.length))  # the last block has padding
    case.packed = case.pack(torch.diag_embed(curvature * ones)).to(DEVICE)
    means = torch.tensor([0.0, 0.5, 30.0], device=DEVICE)
    expected = 1000 * curvature_scale(torch.full((1,), curvature, device=DEVICE), means)
    vectors = expected[:, None].expand_as(case.momentum).contiguous()
    direction, _ = packed_triton.solve(case.packed, vectors, means, width=9, damping=1000.0, relative=True)
    level = vectors / direction - curvature
    torch.testing.assert_close(level, vectors, rtol=2e-6, atol=0)
    assert expected[0] == 1000 * (curvature / 2 or LEAST_SCALE)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("width", [3, 9, 25])
def test_without_curvature_and_damping_the_solution_of_zero_is_zero(width, relative):
    case = Case(width, 2 * width + 1, first=True)
    direction, squares = packed_triton.solve(
        case.packed, case.momentum * 0, case.means * 0, width=width, damping=0.0, relative=relative
    )
    assert (direction == 0).all()
    assert (squares == 0).all()


def test_blocks_of_rank_one_without_damping_give_finite_solutions():
    # Of one gradient, eight of nine pivots are rounding errors.
    case = Case(9, 160, first=True)
    packed_triton.average(case.packed, case.gradient, width=9, decay=0.0)
    direction, squares = packed_triton.solve(
        case.packed, case.gradient, case.means, width=9, damping=0.0, relative=True
    )
    assert torch.isfinite(direction).all()
    assert torch.isfinite(squares).all()


def test_the_result_of_a_row_does_not_depend_on_which_program_computes_it():
    # There are more tiles than one program has, and rows that start in the middle of a program.
    case = Case(3, 3 * 40)
    repeated = [t.repeat(9, *[1] * (t.ndim - 1)) for t in (case.packed, case.momentum, case.means)]
    answers = [
        packed_triton.solve(*repeated, width=3, damping=0.1, relative=True)[0].view(9, ROWS, -1)
        for _ in range(2)
    ]
    assert torch.equal(*answers)
    assert (answers[0] == answers[0][0]).all()
