"""The Triton kernel against dense float64 matrices; `test_packed_triton.py` runs this in its own process.

With TRITON_INTERPRET=1 Triton's interpreter runs the kernel on the CPU, without it the GPU does. Triton asks
once, when it is first imported.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from minifisher.kernels import packed_triton as leaf
from minifisher.linalg.dense import NO_CURVATURE

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# width and length of a row: ragged or not, one tile or two, sixteen lanes or fewer
READINGS = [(2, 32), (3, 7), (4, 70), (9, 27), (9, 160), (10, 23), (17, 40), (25, 50)]
ROWS = 3
DECAY, MU, MOMENT_DECAY, EPSILON = 0.9, 0.8, 0.99, 1e-6


class Case:
    """Blocks of some width, and what they are worked out from."""

    def __init__(self, width, length, dtype=torch.float32, first=False):
        torch.manual_seed(width + length)
        self.width, self.length = width, length
        self.blocks = math.ceil(length / width)
        self.tiles = math.ceil(self.blocks / 16)
        self.lanes = math.ceil(self.blocks / self.tiles)
        factors = torch.randn(ROWS, self.blocks, width, width + 2) * (0 if first else 1)
        factors *= self.split(torch.ones(ROWS, length)).unsqueeze(-1)  # nothing behind the end of the row
        self.packed = self.pack(factors @ factors.mT).to(dtype).to(DEVICE)
        self.gradient, self.momentum = torch.randn(2, ROWS, length, device=DEVICE)
        self.moment, self.means = torch.rand(ROWS, length, device=DEVICE), torch.rand(ROWS, device=DEVICE)

    def split(self, rows):
        """[rows, length] to [rows, blocks, width]."""
        padded = rows.new_zeros(ROWS, self.blocks * self.width)
        padded[:, : self.length] = rows
        return padded.view(ROWS, self.blocks, self.width)

    def places(self):
        """Block, i, j, and where it lies: tile, entry, lane."""
        for block in range(self.blocks):
            for i in range(self.width):
                for j in range(i + 1):
                    yield block, i, j, block // self.lanes, i * (i + 1) // 2 + j, block % self.lanes

    def pack(self, dense):
        packed = torch.zeros(ROWS, self.tiles, self.width * (self.width + 1) // 2, self.lanes)
        for block, i, j, tile, entry, lane in self.places():
            packed[:, tile, entry, lane] = dense[:, block, i, j]
        return packed

    def dense(self):
        """[rows, blocks, width, width] in float64."""
        dense = torch.zeros(ROWS, self.blocks, self.width, self.width, dtype=torch.float64)
        for block, i, j, tile, entry, lane in self.places():
            dense[:, block, i, j] = dense[:, block, j, i] = self.packed[:, tile, entry, lane].double().cpu()
        return dense

    def levels(self, damping, relative):
        if not relative:
            return torch.full((ROWS, self.blocks), damping, dtype=torch.float64)
        entries = self.split(torch.ones(ROWS, self.length)).sum(-1)
        traces = self.dense().diagonal(dim1=-2, dim2=-1).sum(-1)
        scale = 0.5 * (traces / entries + self.means.double().cpu()[:, None])
        return damping * scale.clamp_min(NO_CURVATURE)

    def solution(self, momentum, damping, relative):
        """What `torch.linalg` makes of the blocks as they are stored."""
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
    leaf.average(case.packed, case.gradient, width=width, decay=DECAY)
    # NOTE the interpreter cuts a bfloat16 off where the GPU rounds it (`test_it_compiles_for_a_gpu`).
    rounding = {torch.float32: 2**-22, torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8}[dtype]
    torch.testing.assert_close(case.dense(), expected, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(case.packed, case.pack(case.dense()).to(case.packed))  # other lanes are zero


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), READINGS)
def test_solve(width, length, dtype, relative):
    case = Case(width, length, dtype)
    before, momentum = case.packed.clone(), case.momentum.clone()
    answer = leaf.solve(case.packed, case.momentum, case.means, width=width, damping=0.3, relative=relative)
    case.check(*answer, case.solution(momentum, 0.3, relative))
    assert torch.equal(case.packed, before)
    assert torch.equal(case.momentum, momentum)


@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
@pytest.mark.parametrize("adam", [True, False], ids=["moment", "no moment"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), READINGS)
def test_advance(width, length, dtype, adam, first):
    case, average_alone = Case(width, length, dtype, first), Case(width, length, dtype, first)
    momentum = MU * case.momentum.double() + case.gradient
    moment = MOMENT_DECAY * case.moment.double() + (1 - MOMENT_DECAY) * case.gradient.double().square()
    step = momentum / (moment.sqrt() + EPSILON) if adam else momentum
    direction, squares, first_order_squares = leaf.advance(
        case.packed,
        case.gradient,
        case.momentum,
        case.moment if adam else None,
        case.means,
        width=width,
        decay=DECAY,
        damping=0.3,
        relative=True,
        mu=MU,
        moment_decay=MOMENT_DECAY,
        epsilon=EPSILON,
    )
    torch.testing.assert_close(case.momentum.double(), momentum, rtol=1e-6, atol=1e-6)
    if adam:
        torch.testing.assert_close(case.moment.double(), moment, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first_order_squares.double(), step.square().sum(1), rtol=1e-5, atol=0)
    leaf.average(average_alone.packed, average_alone.gradient, width=width, decay=DECAY)
    assert torch.equal(case.packed, average_alone.packed)
    case.check(direction, squares, case.solution(momentum, 0.3, True))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("width", [3, 9, 25])
def test_nothing_to_divide_by_gives_zero_for_zero(width, relative):
    case = Case(width, 2 * width + 1, first=True)
    direction, squares = leaf.solve(
        case.packed, case.momentum * 0, case.means * 0, width=width, damping=0.0, relative=relative
    )
    assert (direction == 0).all()
    assert (squares == 0).all()


def test_rank_one_without_damping_stays_finite():
    """One gradient leaves eight of nine pivots to rounding."""
    case = Case(9, 160, first=True)
    leaf.average(case.packed, case.gradient, width=9, decay=0.0)
    direction, squares = leaf.solve(
        case.packed, case.gradient, case.means, width=9, damping=0.0, relative=True
    )
    assert torch.isfinite(direction).all()
    assert torch.isfinite(squares).all()


def test_programs_share_nothing():
    """More tiles than one program has, rows that begin in the middle of one; the same bits twice."""
    case = Case(3, 3 * 40)
    repeated = [t.repeat(9, *[1] * (t.ndim - 1)) for t in (case.packed, case.momentum, case.means)]
    answers = [
        leaf.solve(*repeated, width=3, damping=0.1, relative=True)[0].view(9, ROWS, -1) for _ in range(2)
    ]
    assert torch.equal(*answers)
    assert (answers[0] == answers[0][0]).all()
