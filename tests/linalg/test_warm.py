from __future__ import annotations

import pytest
import torch

from minifisher import MBF
from minifisher.linalg import warm
from minifisher.linalg.warm import newton_schulz_inverse


def positive_definite(size, condition, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), size, dtype=torch.float64)
    return ((basis * values) @ basis.T).to(dtype)


@pytest.fixture
def cholesky_calls(monkeypatch):
    """How many matrices were left to Cholesky, one number a call."""
    calls = []

    def counted(matrices, power):
        calls.append(len(matrices))
        return torch.linalg.inv(matrices)

    monkeypatch.setattr(warm, "inverse_power", counted)
    return calls


@pytest.mark.parametrize("size", [2, 9, 64])
def test_a_warm_start_gives_the_inverse(size, cholesky_calls):
    old = torch.stack([positive_definite(size, 30.0, seed) for seed in range(4)]).view(2, 2, size, size)
    fresh = torch.stack([positive_definite(size, 30.0, seed) for seed in range(4, 8)]).view(2, 2, size, size)
    moved = torch.lerp(old, fresh, 0.05)
    result = newton_schulz_inverse(moved, torch.linalg.inv(old))
    torch.testing.assert_close(result, torch.linalg.inv(moved), rtol=1e-9, atol=1e-10)
    assert not cholesky_calls


@pytest.mark.parametrize("start", [0.0, 1e9, -1e9, float("nan")])
def test_a_start_that_is_none_is_replaced(start, cholesky_calls):
    matrix = 1e-7 * positive_definite(12, 20.0)
    result = newton_schulz_inverse(matrix, torch.full_like(matrix, start))
    torch.testing.assert_close(result, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-3)
    assert not cholesky_calls


def test_only_what_does_not_converge_is_left_to_cholesky(cholesky_calls):
    matrices = torch.stack([positive_definite(12, condition) for condition in (10.0, 1e9, 20.0)])
    result = newton_schulz_inverse(matrices, torch.zeros_like(matrices))
    torch.testing.assert_close(result, torch.linalg.inv(matrices), rtol=1e-6, atol=1e-6)
    assert cholesky_calls == [1]


def test_single_precision_and_symmetry():
    old = positive_definite(64, 100.0, dtype=torch.float32)
    moved = torch.lerp(old, positive_definite(64, 100.0, 1, torch.float32), 0.05)
    result = newton_schulz_inverse(moved, torch.linalg.inv(old))
    assert torch.equal(result, result.mT)
    expected = torch.linalg.inv(moved.double())
    assert (result - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), -torch.eye(3), torch.full((3, 3), float("nan"))])
def test_what_has_no_inverse_is_as_with_cholesky(matrix):
    result = newton_schulz_inverse(matrix[None], torch.zeros(1, 3, 3))
    assert not torch.isfinite(result).all()


def test_mbf_steps_as_with_cholesky():
    weights = []
    for inverse in (None, "cholesky", "newton-schulz"):
        weight = torch.nn.Parameter(torch.zeros(20, 16, dtype=torch.float64))
        opt = MBF([weight], lr=0.01, inverse=inverse, statistics_every=2, inverse_every=4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            weight.grad = torch.randn(20, 16, generator=generator, dtype=torch.float64)
            opt.step()
        weights.append(weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-7, atol=1e-9)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="None, 'cholesky', 'newton-schulz', got 'lu'"):
        MBF([torch.nn.Parameter(torch.zeros(2, 2))], inverse="lu")
