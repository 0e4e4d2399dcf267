"""Packed triangles against dense blocks in float64, with the reference and with the numba kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minifisher.kernels import choose, packed
from minifisher.linalg.blocks import BlockReading
from minifisher.linalg.damping import LEAST_SCALE, curvature_scale

DECAY, DAMPING = 0.9, 0.1
FIRST_ORDER = {"momentum_decay": 0.8, "moment_decay": 0.99, "epsilon": 1e-8}

# Rows, length of a row, width of a block: one full tile, several, a last tile with filling, a last block with
# padding, tiles of few blocks.
CUTS = [
    (3, 16 * 9, 9),
    (2, 40 * 9, 9),
    (2, 17 * 9, 9),
    (3, 33 * 4 - 1, 4),
    (4, 3 * 9, 9),
    (1, 7, 2),
    (2, 75, 25),
]
WAYS = ["reference", "compiled"] if choose.NUMBA_INSTALLED else ["reference"]
cuts = pytest.mark.parametrize("cut", CUTS, ids=str)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(packed, "suits_numba", lambda *tensors, **options: False)
    return request.param


class Dense:
    """The same weight, block by block, in plain float64 loops."""

    def __init__(self, rows, length, width):
        self.starts = [(r, s, min(s + width, length)) for r in range(rows) for s in range(0, length, width)]
        self.blocks = [torch.zeros(e - s, e - s, dtype=torch.float64) for _, s, e in self.starts]
        self.size = rows * length

    def average(self, gradient, decay):
        for block, (r, s, e) in zip(self.blocks, self.starts, strict=True):
            d = gradient[r, s:e].double()
            block.mul_(decay).add_(torch.outer(d, d), alpha=1 - decay)

    def mean(self):
        return sum(block.trace() for block in self.blocks) / self.size

    def solve(self, momentum, damping, relative):
        direction = torch.zeros_like(momentum, dtype=torch.float64)
        for block, (r, s, e) in zip(self.blocks, self.starts, strict=True):
            level = damping * (block.trace() / len(block) + self.mean()) / 2 if relative else damping
            damped = block + level * torch.eye(len(block), dtype=torch.float64)
            direction[r, s:e] = torch.linalg.solve(damped, momentum[r, s:e].double())
        return direction


def gradients(rows, length, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * length)
    return [torch.randn(rows, length, generator=generator, dtype=dtype) for _ in range(count)]


def zeros(cut, dtype=torch.float32):
    tiling = packed.Tiling(BlockReading(*cut))
    return tiling, torch.zeros(tiling.shape, dtype=dtype)


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@cuts
def test_entries_of_triangles_are_stored_where_the_module_says(cut, way):
    rows, length, width = cut
    tiling, state = zeros(cut)
    (gradient,) = gradients(rows, length, 1)
    packed.average(state, gradient, tiling, 0.0)
    blocks = math.ceil(length / width)
    assert state.shape[0] == rows
    assert state.shape[2] == width * (width + 1) // 2
    assert blocks <= state.shape[1] * state.shape[3] < blocks + state.shape[1]
    for row in range(rows):
        for block in range(state.shape[1] * state.shape[3]):
            tile, place = divmod(block, state.shape[3])
            d = torch.zeros(width)
            part = gradient[row, block * width : (block + 1) * width]
            d[: len(part)] = part
            for i in range(width):
                for j in range(i + 1):
                    entry = state[row, tile, i * (i + 1) // 2 + j, place]
                    assert entry.item() == pytest.approx((d[i] * d[j]).item(), rel=1e-6)


@cuts
def test_packing_is_undone_by_unpacking(cut):
    tiling, state = zeros(cut, torch.float64)
    dense = Dense(*cut)
    for gradient in gradients(cut[0], cut[1], 3, torch.float64):
        packed.average(state, gradient, tiling, DECAY)
        dense.average(gradient, DECAY)
    blocks = tiling.unpack(state)
    torch.testing.assert_close(tiling.pack(blocks), state, rtol=0, atol=0)
    for found, expected in zip(blocks.flatten(0, 1), dense.blocks, strict=True):
        torch.testing.assert_close(found[: len(expected), : len(expected)], expected)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
@cuts
def test_average_and_solve_equal_dense_blocks(cut, dtype, tolerance, relative, way):
    tiling, state = zeros(cut, dtype)
    dense = Dense(*cut)
    for gradient in gradients(cut[0], cut[1], 4, dtype):
        packed.average(state, gradient, tiling, DECAY)
        dense.average(gradient, DECAY)
    momentum = gradients(cut[0] + 1, cut[1], 1, dtype)[0][:-1]
    means = dense.mean().to(dtype).view(1)
    direction = packed.solve(state, momentum, means, tiling, DAMPING, relative)
    assert direction.shape == momentum.shape
    assert_near(direction, dense.solve(momentum, DAMPING, relative), tolerance)


@pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("with_slopes", [False, True])
@pytest.mark.parametrize(("nesterov", "by_rows"), [(False, False), (True, False), (True, True)])
@cuts
def test_the_fused_step_equals_the_separate_functions_to_the_last_bit(
    cut, by_rows, nesterov, with_slopes, adam, dtype, relative
):
    tiling, state = zeros(cut, dtype)
    apart = state.clone()
    momentum, moment = torch.zeros(cut[:2]), torch.zeros(cut[:2])
    expected_momentum, expected_moment = momentum.clone(), moment.clone()
    means = torch.full((1,), 0.7)
    for gradient in gradients(cut[0], cut[1], 3):
        numbers = {"decay": DECAY, "damping": DAMPING, "relative": relative, **FIRST_ORDER}
        direction, *measures = packed.fused_step(
            state,
            gradient,
            momentum,
            moment if adam else None,
            means,
            tiling,
            **numbers,
            lengths=cut[0] if by_rows else 1,
            with_slopes=with_slopes,
            nesterov=nesterov,
        )
        expected_momentum.mul_(FIRST_ORDER["momentum_decay"]).add_(gradient)
        packed.average(apart, gradient, tiling, DECAY)
        ahead = FIRST_ORDER["momentum_decay"] * expected_momentum + gradient
        ahead = ahead if nesterov else expected_momentum
        expected = packed.solve(apart, ahead, means, tiling, DAMPING, relative)
        step = expected_momentum.double()
        if adam:
            decay = FIRST_ORDER["moment_decay"]
            expected_moment.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
            step = step / (expected_moment.double().sqrt() + FIRST_ORDER["epsilon"])
        assert torch.equal(state, apart)
        assert torch.equal(momentum, expected_momentum)
        assert torch.equal(direction, expected)
        parts = {"dim": 1} if by_rows else {"dim": (0, 1)}
        grows = adam and with_slopes
        squares = [x.double().sum(**parts).view(-1) for x in (gradient.square(), expected_moment)]
        for found, square in zip(measures[1][2:], squares, strict=True):
            assert found is None if not grows else found.tolist() == pytest.approx(square.tolist(), rel=1e-5)
        for (norm, slope, *_), exact in zip(measures, (expected.double(), step), strict=True):
            assert norm.tolist() == pytest.approx(exact.norm(**parts).view(-1).tolist(), rel=1e-5)
            assert (slope is not None) == with_slopes
            if with_slopes:
                products = (expected_momentum * exact).sum(**parts).view(-1)
                size = exact.norm().item() * expected_momentum.norm().item()
                assert slope.tolist() == pytest.approx(products.tolist(), rel=1e-5, abs=1e-6 * size)
    if adam:
        torch.testing.assert_close(moment, expected_moment)


@pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="the extra `fast` is not installed")
@cuts
def test_bfloat16_is_rounded_as_torch_rounds_it(cut, monkeypatch):
    tiling, state = zeros(cut, torch.bfloat16)
    reference = state.clone()
    for gradient in gradients(cut[0], cut[1], 4):
        packed.average(state, gradient, tiling, DECAY)
        with monkeypatch.context() as patched:
            patched.setattr(packed, "suits_numba", lambda *tensors, **options: False)
            packed.average(reference, gradient, tiling, DECAY)
    different = (state != reference).double().mean().item()
    assert (
        different < 1e-3
    )  # where the float32 values differ in the last bit, on two sides of a rounding boundary
    torch.testing.assert_close(state, reference, rtol=2**-7, atol=0)


def test_each_of_several_layers_is_solved_with_its_own_mean(way):
    cut = (2, 36, 9)
    tiling, _ = zeros(cut)
    state = torch.zeros(3, *tiling.shape)
    gradient = torch.randn(3, 2, 36, generator=torch.Generator().manual_seed(0))
    means = torch.tensor([[1.0], [10.0], [100.0]])
    packed.average(state, gradient, tiling, 0.0)
    together = packed.solve(state, gradient, means, tiling, DAMPING, True)
    for layer in range(3):
        alone = packed.solve(state[layer], gradient[layer], means[layer], tiling, DAMPING, True)
        assert torch.equal(together[layer], alone)
    assert not torch.allclose(together[0] / gradient[0], together[1] / gradient[1])


def test_a_small_pivot_that_is_no_rounding_error_is_used(way):
    tiling, state = zeros((1, 4, 4))
    vector = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    packed.average(state, vector, tiling, 0.0)  # rank one: all pivots but one are the damping
    momentum = torch.tensor([[1.0, 0.0, 2.0, 1.0]])
    direction = packed.solve(state, momentum, torch.zeros(1), tiling, 1e-3, False)
    dense = vector.double().mT @ vector.double() + 1e-3 * torch.eye(4, dtype=torch.float64)
    assert_near(direction, torch.linalg.solve(dense, momentum[0].double())[None], 1e-3)


@pytest.mark.parametrize("relative", [False, True])
def test_in_bfloat16_damping_is_above_the_rounding_of_the_largest_entry(relative, way):
    tiling, state = zeros((2, 17 * 9, 9), torch.bfloat16)
    (gradient,) = gradients(2, 17 * 9, 1)
    packed.average(state, gradient, tiling, 0.0)  # blocks of rank one: rounding makes them indefinite
    direction = packed.solve(state, gradient, torch.zeros(1), tiling, 1e-6, relative)
    blocks = tiling.unpack(state).double()
    level = torch.finfo(torch.bfloat16).eps * blocks.diagonal(dim1=-2, dim2=-1).amax(-1)
    damped = blocks + torch.diag_embed(level[..., None].expand(*level.shape, 9))
    vectors = gradient.double().view(2, 17, 9, 1)
    assert_near(direction, torch.linalg.solve(damped, vectors).view(2, -1), 1e-4)


@pytest.mark.parametrize("damping", [0.0, 1e-12])
@cuts
def test_singular_blocks_give_finite_directions(cut, damping, way):
    tiling, state = zeros(cut)
    (gradient,) = gradients(cut[0], cut[1], 1)
    gradient[0] = 0  # row 0 has blocks without curvature, the others have blocks of rank one
    packed.average(state, gradient, tiling, 0.0)
    direction = packed.solve(state, gradient, torch.zeros(1), tiling, damping, True)
    assert torch.isfinite(direction).all()
    assert not direction[0].any()
    assert (direction[1:] * gradient[1:]).sum() >= 0


@pytest.mark.parametrize("curvature", [0.0, 2.0])
@pytest.mark.parametrize("mean", [0.0, 0.5, 30.0])
def test_relative_damping_follows_the_rule_of_linalg_damping(curvature, mean, way):
    # Blocks c I: the solution for a vector x is x / (c + lambda), from which lambda is computed.
    tiling, _ = zeros((2, 33 * 4 - 1, 4))  # the last block has padding
    ones = torch.nn.functional.pad(torch.ones(2, 33 * 4 - 1), (0, 1)).view(2, 33, 4)
    state = tiling.pack(torch.diag_embed(curvature * ones))
    scale = curvature_scale(torch.tensor(curvature), torch.tensor(mean))
    assert scale == ((curvature + mean) / 2 or torch.tensor(LEAST_SCALE))
    vectors = (1000 * scale).expand(2, 33 * 4 - 1).contiguous()
    direction = packed.solve(state, vectors, torch.full((1,), mean), tiling, 1000.0, True)
    torch.testing.assert_close(vectors / direction - curvature, vectors, rtol=2e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, packed.WIDEST),
    st.integers(1, 60),
    st.floats(1e-3, 10),
    st.integers(0, 1000),
)
def test_the_damped_block_times_the_direction_is_the_momentum(rows, width, blocks, damping, seed):
    cut = (rows, max(width, blocks * width - seed % width), width)
    tiling, state = zeros(cut)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        packed.average(state, torch.randn(cut[:2], generator=generator), tiling, DECAY)
    momentum = torch.randn(cut[:2], generator=generator)
    direction = packed.solve(state, momentum, torch.zeros(1), tiling, damping, False)
    dense = tiling.unpack(state.double())
    padded = torch.nn.functional.pad(direction.double(), (0, dense.shape[1] * width - cut[1]))
    vectors = padded.view(rows, -1, width)
    back = torch.einsum("rkij,rkj->rki", dense, vectors) + damping * vectors
    assert_near(back.flatten(1)[:, : cut[1]], momentum.double(), 1e-4 * (1 + 1 / damping))


@pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="the extra `fast` is not installed")
def test_the_number_of_threads_does_not_change_a_bit():
    cut = (64, 64 * 9, 9)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        tiling, state = zeros(cut)
        momentum, moment = torch.zeros(cut[:2]), torch.zeros(cut[:2])
        for gradient in gradients(*cut[:2], 2):
            numbers = {"decay": DECAY, "damping": DAMPING, "relative": True, **FIRST_ORDER}
            direction, *measures = packed.fused_step(
                state,
                gradient,
                momentum,
                moment,
                torch.ones(1),
                tiling,
                **numbers,
                lengths=1,
                with_slopes=True,
                nesterov=True,
            )
        results.append((state, direction, *measures[0][:2], *measures[1]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
