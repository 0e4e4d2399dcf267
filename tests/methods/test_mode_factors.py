"""What Shampoo, SOAP and TNT have in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher import SOAP, TNT, Shampoo
from minifisher.linalg.modes import TensorReading
from minifisher.methods.mode_factors import outer_product_moments
from tests.methods.weights_as_tensors import random_gradients, steps


@pytest.mark.parametrize("widths", [(4, 6), (2, 3), (3, 4)])
def test_moments_of_outer_products_equal_those_of_the_products(widths):
    reading = TensorReading((4, 6), widths)
    left, right = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    blocks = reading.read(torch.einsum("ni,nj->nij", left, right), 2)
    result = outer_product_moments(reading, left, right)
    torch.testing.assert_close(result[0], torch.einsum("nbij,nbkj->bik", blocks, blocks))
    torch.testing.assert_close(result[1], torch.einsum("nbij,nbik->bjk", blocks, blocks))


@pytest.mark.parametrize("method", [Shampoo, SOAP])
def test_stacked_layers_step_as_single_ones(method):
    shape = (4, 6)
    gradients = [random_gradients(shape), [3 * g.flip(0) for g in random_gradients(shape)]]
    together = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = method(together, lr=0.1, max_dim=3, inverse_every=2)
    for pair in zip(*gradients, strict=True):
        for weight, gradient in zip(together, pair, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for weight, own in zip(together, gradients, strict=True):
        alone = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        steps(alone, method([alone], lr=0.1, max_dim=3, inverse_every=2), own)
        torch.testing.assert_close(weight, alone)


@pytest.mark.parametrize("method", [Shampoo, SOAP])
def test_rotating_the_gradients_rotates_the_steps(method):
    shape, gradients = (5, 5), random_gradients((5, 5), count=6)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in shape)
    ends = []
    for turn in (lambda g: g, lambda g: left @ g @ right.T):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        optimizer = method([weight], lr=0.1, graft=None, statistics_every=1, inverse_every=2, damping=1e-3)
        ends.append(steps(weight, optimizer, [turn(g) for g in gradients]))
    torch.testing.assert_close(left @ ends[0] @ right.T, ends[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [Shampoo, SOAP])
def test_memory_is_bounded_whatever_the_shape(method):
    shapes = [
        (10,),
        (1000, 2048),
        (10, 4096),
        (64, 3, 7, 7),
        (512, 512, 3, 3),
        (50_000, 64),
        (96, 1, 3, 3),
        (3, 71),
    ]
    weights = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    for row in method(weights).describe().layers:
        assert row.state_bytes <= 17 * 4 * row.parameters + 16, row


@pytest.mark.parametrize("method", [Shampoo, SOAP])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_train_and_resume(method, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    optimizer = method(module)
    for _ in range(3):
        module(torch.randn(5, 1, 4, 4, dtype=dtype)).square().mean().backward()
        optimizer.step()
    state = optimizer.state[module[0].weight]
    assert state["factor_0"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    resumed = method(module)
    resumed.load_state_dict(optimizer.state_dict())
    for name, value in state.items():
        assert torch.equal(torch.as_tensor(resumed.state[module[0].weight][name]), torch.as_tensor(value)), (
            name
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_dim": 0}, "max_dim must be a whole number"),
        ({"merge_dims": -1}, "merge_dims must be a whole number"),
        ({"power": 0.0}, "power must be > 0"),
    ],
)
@pytest.mark.parametrize("method", [Shampoo, SOAP, TNT])
def test_invalid_arguments_raise_an_error_with_the_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(nn.Linear(3, 4), **options)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("options", [{}, {"merge_dims": 9}, {"max_dim": 2}], ids=str)
@pytest.mark.parametrize("method", [Shampoo, SOAP, TNT])
def test_a_weight_without_entries_takes_the_first_order_step(method, options, shape):
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 2))
    optimizer = method([empty, other], fisher="gradient", **options)
    empty.grad, other.grad = torch.zeros(shape), torch.ones(2, 2)
    optimizer.step()
    assert (other < 1).all()
    assert optimizer.describe().layers[0].structure == "first-order step"
    assert optimizer.diagnostics()["fallbacks"] == 0
