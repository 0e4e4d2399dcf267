"""The BFGS update against its textbook form, and the guarantees of double damping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minifisher.linalg.bfgs import (
    bfgs_update,
    double_damped,
    limited_memory_middle,
    limited_memory_product,
    reciprocal,
    times,
    unit,
)

MU1, MU2 = 0.2, 0.1


def pairs(count: int, size: int, seed: int = 0, positive: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Random pairs of very different lengths; half of them with negative curvature unless `positive`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        s, y = torch.randn(2, size, dtype=torch.float64, generator=generator)
        scale = 10 ** torch.randn(2, dtype=torch.float64, generator=generator)
        sign = torch.sign(s @ y) if positive else 1.0
        drawn.append((scale[0] * s, sign * scale[1] * y))
    return drawn


def textbook(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    identity, ratio = torch.eye(len(s), dtype=s.dtype), 1 / (s @ y)
    left = identity - ratio * torch.outer(s, y)
    return left @ inverse @ left.T + ratio * torch.outer(s, s)


def test_an_update_equals_the_textbook_formula_and_satisfies_the_secant_equation():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    inverse = root @ root.T + torch.eye(5, dtype=torch.float64)
    for s, y in pairs(20, 5, positive=True):
        updated = bfgs_update(inverse, s, y)
        torch.testing.assert_close(updated, textbook(inverse, s, y))
        torch.testing.assert_close(updated @ y, s)


def test_a_batch_is_updated_matrix_by_matrix():
    inverses = torch.eye(4, dtype=torch.float64).repeat(3, 2, 1, 1)
    s, y = (torch.stack(part).reshape(3, 2, 4) for part in zip(*pairs(6, 4, positive=True), strict=True))
    updated = bfgs_update(inverses, s, y)
    for index in ((layer, group) for layer in range(3) for group in range(2)):
        torch.testing.assert_close(updated[index], textbook(inverses[index], s[index], y[index]))


@pytest.mark.parametrize(
    ("s", "y"),
    [
        ((1.0, 0.0), (0.0, 1.0)),
        ((1.0, 0.0), (1e-8, 1.0)),  # positive by less than the rounding error of a product
        ((1.0, 0.0), (-1.0, 0.0)),
        ((0.0, 0.0), (1.0, 0.0)),
    ],
)
def test_a_pair_without_positive_curvature_changes_nothing(s, y):
    s, y = torch.tensor(s), torch.tensor(y)
    assert reciprocal(s, y) == 0
    assert torch.equal(bfgs_update(torch.eye(2), s, y), torch.eye(2))


def test_the_inverse_stays_positive_definite_over_a_thousand_damped_pairs():
    inverse = torch.eye(6, dtype=torch.float64)
    changed = 0
    for s, y in pairs(1000, 6):
        s, y = unit(s, y)
        s, y, damped = double_damped(s, y, times(inverse, y), MU1, MU2)
        assert s @ y >= MU2 * (s @ s) * (1 - 1e-12)
        inverse = bfgs_update(inverse, s, y)
        changed += int(damped)
        assert torch.equal(inverse, inverse.T)
        assert torch.linalg.eigvalsh(inverse)[0] > 0
        torch.testing.assert_close(inverse @ y, s)
    assert 400 < changed < 1000


def test_the_first_damping_gives_exactly_the_least_curvature_allowed():
    inverse = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    s, y = torch.tensor([-0.1, 0.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    damped, kept, changed = double_damped(s, y, inverse @ y, MU1, 0.0)
    theta = (1 - MU1) * 5 / (5 + 0.1)
    torch.testing.assert_close(damped, theta * s + (1 - theta) * inverse @ y)
    torch.testing.assert_close(damped @ y, torch.tensor(MU1 * 5, dtype=torch.float64))
    assert changed
    assert torch.equal(kept, y)


@pytest.mark.parametrize("mu2", [0.1, 0.9, 0.99, 1.0, 2.0, 30.0])
def test_the_second_damping_reaches_its_bound_for_every_mu2(mu2):
    for s, y in pairs(50, 4):
        s, y = unit(s, y)
        s, y, _ = double_damped(s, y, y, MU1, mu2)
        assert s @ y >= mu2 * (s @ s) * (1 - 1e-12)
        assert s @ s > 0
        assert torch.isfinite(y).all()


def test_a_mu2_above_one_damps_a_pair_of_unit_curvature():
    # The published formula for theta divides by zero here.
    s, y = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    _, damped, changed = double_damped(s, y, y, MU1, 2.0)
    assert changed
    torch.testing.assert_close(s @ damped, torch.tensor(2.0, dtype=torch.float64))


def test_the_second_damping_is_the_published_one_for_a_small_mu2():
    s, y = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([-0.4, 0.5], dtype=torch.float64)
    same, damped, _ = double_damped(s, y, y, MU1, 0.5)
    theta = (1 - 0.5) * 2 / (2 - 0.1)
    assert torch.equal(same, s)
    torch.testing.assert_close(damped, theta * y + (1 - theta) * s)


def test_a_pair_with_enough_curvature_is_not_changed():
    s, y = torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.2])
    same_s, same_y, changed = double_damped(s, y, y, MU1, MU2)
    assert torch.equal(s, same_s)
    assert torch.equal(y, same_y)
    assert not changed


@pytest.mark.parametrize("memory", [3, 8])
def test_the_compact_form_is_the_dense_matrix_of_the_latest_pairs(memory):
    kept = pairs(6, 5, positive=True)[-memory:]
    dense = torch.eye(5, dtype=torch.float64)
    for s, y in kept:
        dense = bfgs_update(dense, s, y)
    changes, gradient_changes = torch.zeros(2, memory, 5, dtype=torch.float64)
    changes[-len(kept) :] = torch.stack([s for s, _ in kept])
    gradient_changes[-len(kept) :] = torch.stack([y for _, y in kept])
    middle = limited_memory_middle(changes, gradient_changes)
    product = limited_memory_product(changes, gradient_changes, middle, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(product, dense, rtol=1e-9, atol=1e-9)


def test_a_pair_is_scaled_to_unit_length_or_to_zero_where_it_is_not_finite():
    s, y = unit(torch.tensor([[3e-15, 4e-15], [0.0, 0.0], [torch.inf, 0.0]]), torch.ones(3, 2) * 1e-15)
    torch.testing.assert_close(s, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.2, 0.2], [0.0, 0.0], [0.0, 0.0]]))
