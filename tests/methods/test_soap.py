from __future__ import annotations

import pytest
import torch

from minifisher import SOAP, Shampoo
from tests.methods.weights_as_tensors import dense, random_gradients, steps


def dense_soap(
    gradients: list[torch.Tensor], lr: float, beta: float, epsilon: float, every: int
) -> torch.Tensor:
    """SOAP for a matrix (Vyas et al. 2024, Algorithm 3), but a step uses the basis that it refreshes."""
    rows, columns = gradients[0].shape
    weight, mean, square = (torch.zeros(rows, columns, dtype=torch.float64) for _ in range(3))
    left, right = (torch.zeros(n, n, dtype=torch.float64) for n in (rows, columns))
    for t, gradient in enumerate(gradients, start=1):
        left = beta * left + (1 - beta) * gradient @ gradient.T
        right = beta * right + (1 - beta) * gradient.T @ gradient
        if t == 1:
            q_left, q_right = (torch.linalg.eigh(h).eigenvectors.flip(1) for h in (left, right))
        mean = beta * mean + (1 - beta) * gradient
        square = beta * square + (1 - beta) * (q_left.T @ gradient @ q_right) ** 2
        if t == 1 or (t - 1) % every == 0 or t <= every:
            for axis in (0, 1):
                h, q = ((left, q_left), (right, q_right))[axis]
                order = (q.T @ h @ q).diag().argsort(descending=True)
                square = square.index_select(axis, order)
                q = torch.linalg.qr((h @ q)[:, order]).Q
                q_left, q_right = (q, q_right) if axis == 0 else (q_left, q)
        correction = 1 - beta**t
        rotated = q_left.T @ (mean / correction) @ q_right
        weight = weight - lr * q_left @ (rotated / ((square / correction).sqrt() + epsilon)) @ q_right.T
    return weight


@pytest.mark.parametrize("every", [1, 3])
def test_steps_equal_an_independent_implementation(every):
    # The gradients have full rank. The null space of a singular H has no unique basis.
    gradients = random_gradients((4, 4), count=8)
    weight = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP(
        [weight],
        lr=0.01,
        nesterov=False,
        damping=1e-8,
        relative_damping=False,
        inverse_every=every,
        jitter=False,
    )
    steps(weight, optimizer, gradients)
    expected = dense_soap(gradients, lr=0.01, beta=0.95, epsilon=1e-8, every=every)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_blocks_of_one_entry_soap_is_adam(shape, decay):
    gradients = random_gradients(shape, count=12)
    weights = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    options = {
        "momentum": 0.9,
        "nesterov": False,
        "curvature_decay": 0.999,
        "damping": 1e-8,
        "relative_damping": False,
        "max_dim": 1,
        "weight_decay": decay,
        "decoupled_weight_decay": False,
    }
    ours = steps(weights[0], SOAP([weights[0]], lr=0.01, **options), gradients)
    adam = torch.optim.Adam([weights[1]], lr=0.01, weight_decay=decay)
    torch.testing.assert_close(ours, steps(weights[1], adam, gradients))


def test_a_scheduled_momentum_does_not_change_the_length_of_steps():
    """With a constant gradient, Adam moves every weight by lr for any momentum."""
    gradient = torch.randn(1, 1, dtype=torch.float64)
    weight = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP([weight], lr=0.01, momentum=0.95, damping=1e-8, statistics_every=2)
    for momentum in (0.95, 0.5, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        steps(weight, optimizer, [gradient] * 300)
        before = weight.detach().clone()
        after = steps(weight, optimizer, [gradient])
        torch.testing.assert_close(after, before - 0.01 * gradient.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("every", [2, 5])
def test_a_step_has_a_bound_where_statistics_do_not_see_every_gradient(every):
    """The first gradient has rank one: a later one meets squares that are zero."""
    weight = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP([weight], lr=0.01, statistics_every=every)
    gradients = [torch.outer(torch.ones(6), torch.ones(8)).double(), *random_gradients((6, 8))[:9]]
    for gradient in gradients:
        before = weight.detach().clone()
        moved = steps(weight, optimizer, [gradient]) - before
        assert torch.linalg.vector_norm(moved) <= 0.01 * 48**0.5 * (1 + 1e-9)


def test_soap_equals_shampoo_with_an_eigenbasis():
    gradients = random_gradients((4, 6))
    ends = []
    for method, options in ((SOAP, {}), (Shampoo, {"eigenbasis": True, "graft": None, "momentum": 0.95})):
        weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        ends.append(steps(weight, method([weight], lr=0.01, damping=1e-4, **options), gradients))
    assert torch.equal(*ends)


@pytest.mark.parametrize("damping", [1e-8, 0.1])
def test_no_step_is_taken_along_rounding_errors(damping):
    """The first gradient has rank one: all but one of its entries in the eigenbasis are rounding errors."""
    gradient = torch.outer(torch.randn(20), torch.randn(30))
    weight = torch.zeros(20, 30, requires_grad=True)
    steps(weight, SOAP([weight], lr=1.0, damping=max(damping, 1e-4)), [gradient])
    cosine = -torch.nn.functional.cosine_similarity(weight.detach().flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("relative", [True, False])
def test_the_preconditioner_is_symmetric_and_positive_definite(relative):
    shape = (5, 6)
    options = {"eigenbasis": True, "max_dim": 4, "relative_damping": relative}
    matrix = dense(shape, random_gradients(shape), 0.1, **options)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("shape", [(48, 32), (48, 20, 3)])
def test_rows_that_never_had_a_gradient_stay_exactly(shape):
    """The padding row of an embedding, and words that never occur: rounding must not move them."""
    used = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))[:19]
    weight = torch.ones(shape, requires_grad=True)
    optimizer = SOAP([weight], lr=3e-3)
    for gradient in random_gradients(shape, count=120):
        weight.grad = torch.zeros(shape).index_add_(0, used, gradient.float()[used])
        optimizer.step()
    unused = torch.ones(shape[0], dtype=torch.bool).index_fill_(0, used, False)
    assert torch.equal(weight[unused], torch.ones_like(weight[unused]))
    assert (weight[used] - 1).abs().min() > 0


def test_relative_damping_is_a_fraction_of_the_root_mean_square_without_padding():
    shape, options = (5, 6), {"eigenbasis": True, "max_dim": 4}
    (gradient,) = random_gradients(shape, count=1)
    level = 0.1 * gradient.square().mean().sqrt().item()
    torch.testing.assert_close(
        dense(shape, [gradient], 0.1, **options),
        dense(shape, [gradient], level, relative_damping=False, **options),
    )
