"""benchmarks/convergence.py: its predictions against autograd, and the rate that MBF then has."""

from __future__ import annotations

import torch
from benchmarks import convergence
from torch.func import functional_call, jacrev


def jacobian(network, inputs):
    """d f / d W, [n, m, d], by autograd."""

    def outputs(weight):
        return functional_call(network, {"first.weight": weight}, (inputs,))[:, 0]

    return jacrev(outputs)(network.first.weight.detach())


def test_the_operators_are_those_of_the_dense_jacobian():
    inputs, _ = convergence.data(9, 4)
    network = convergence.TwoLayers(4, 6)
    blocks = jacobian(network, inputs).transpose(0, 1)  # [m, n, d]
    dense = torch.block_diag(*(b.T @ b / 9 + 0.01 * torch.eye(4, dtype=b.dtype) for b in blocks))
    whole = torch.cat(list(blocks), dim=1)  # [n, m d]
    expected = whole @ torch.linalg.inv(dense) @ whole.T / 9
    torch.testing.assert_close(convergence.mbf_operator(network, inputs, 0.01), expected)
    torch.testing.assert_close(convergence.gradient_operator(network, inputs), whole @ whole.T / 9)


def test_a_short_step_of_the_library_multiplies_the_residual_as_predicted():
    """To first order in lr: f_new - y = (I - lr G)(f - y); no unit changes its sign at this lr."""
    inputs, targets = convergence.data(9, 4)
    network = convergence.TwoLayers(4, 64)
    damping, rate = 1e-3, 1e-7
    operator = convergence.mbf_operator(network, inputs, damping)
    before = network(inputs).detach()
    convergence.train(network, convergence.mbf(network, rate, damping), inputs, targets, steps=0)
    moved = (network(inputs).detach() - before) / rate
    torch.testing.assert_close(moved, -operator @ (before - targets), rtol=1e-5, atol=1e-6)


def test_the_fitted_rate_approaches_the_predicted_one_as_the_width_grows():
    gaps = {}
    for width in (64, 1024):
        found = convergence.curves(width, samples=12, inputs=6, steps=100)
        mbf, gradient_descent = found["MBF"], found["gradient descent"]
        assert mbf.losses[-1] < 1e-12 * mbf.losses[0]
        assert mbf.predicted < gradient_descent.predicted
        assert gradient_descent.losses[mbf.steps_to(1e-6)] > 1e-3 * gradient_descent.losses[0]
        gaps[width] = abs(mbf.fitted - mbf.predicted)
    assert gaps[1024] < gaps[64]


def test_the_fit_recovers_a_factor():
    curve = convergence.Curve([3.0 * 0.7**step for step in range(20)], predicted=0.7)
    assert abs(curve.fitted - 0.7) < 1e-12
    assert curve.steps_to(0.5) == 2
    assert curve.steps_to(1e-9) is None
