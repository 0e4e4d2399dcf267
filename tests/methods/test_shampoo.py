from __future__ import annotations

import math
from functools import reduce

import pytest
import scipy.linalg
import torch
from torch import nn

from minifisher import Shampoo
from minifisher.linalg.modes import TensorReading
from minifisher.methods.shampoo import KroneckerRoots
from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import BatchGradient
from tests.helpers import per_sample_gradients, problem
from tests.methods.weights_as_tensors import EVERYTHING, dense, moment, observed, random_gradients, steps


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    return torch.as_tensor(scipy.linalg.fractional_matrix_power(matrix.numpy(), exponent).real)


def dense_shampoo(gradients: list[torch.Tensor], epsilon: float, exponent: float) -> torch.Tensor:
    """(H_1 + eps I)^-e (x) ... (x) (H_K + eps I)^-e with H_i the mean over the gradients."""
    factors = []
    for mode in range(gradients[0].ndim):
        mean = torch.stack([moment(gradient, mode) for gradient in gradients]).mean(0)
        factors.append(power(mean + epsilon * torch.eye(len(mean), dtype=mean.dtype), -exponent))
    return reduce(torch.kron, factors)


# ---- Shampoo against dense matrices ----


@pytest.mark.parametrize(
    ("shape", "limit", "modes"),
    [
        ((5,), None, (5,)),
        ((3, 4), None, (3, 4)),
        ((2, 3, 2, 2), None, (2, 12)),
        ((2, 3, 2, 2), 4, (2, 3, 4)),
        ((2, 3, 4), 1, (2, 3, 4)),
        ((2, 2, 2, 1, 2), 1, (2, 2, 2, 2)),
        ((), None, (1,)),
    ],
)
@pytest.mark.parametrize("root", ["eigen", "newton"])
def test_the_preconditioner_equals_the_dense_kronecker_root(shape, limit, modes, root):
    gradients = random_gradients(shape)
    expected = dense_shampoo([g.view(modes) for g in gradients], 0.01, 1 / (2 * len(modes)))
    options = {"relative_damping": False, "max_dim": EVERYTHING, "merge_dims": limit}
    result = dense(shape, gradients, 0.01, root=root, **options)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_with_a_large_max_dim_a_vector_has_a_full_matrix():
    gradients = random_gradients((6,))
    full = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    expected = power(full + 0.1 * torch.eye(6), -0.5)
    result = dense((6,), gradients, 0.1, relative_damping=False, max_dim=EVERYTHING)
    torch.testing.assert_close(result, expected)


def test_a_vector_has_a_diagonal_by_default():
    gradients = random_gradients((6,))
    square = sum(g.square() for g in gradients) / len(gradients)
    result = dense((6,), gradients, 0.1, relative_damping=False)
    torch.testing.assert_close(result, torch.diag((square + 0.1).rsqrt()))


@pytest.mark.parametrize(
    ("options", "exponent"),
    [({"power": 1.0}, 1 / 2), ({"exponent": 1 / 3}, 1 / 3), ({"exponent": 1.0}, 1.0), ({"power": 0.8}, 0.4)],
)
def test_the_exponent_is_power_over_modes_unless_given(options, exponent):
    gradients = random_gradients((3, 4))
    expected = dense_shampoo(gradients, 0.01, exponent)
    result = dense((3, 4), gradients, 0.01, relative_damping=False, **options)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue():
    gradients = random_gradients((3, 4))
    factors = [sum(moment(g, mode) for g in gradients) / len(gradients) for mode in (0, 1)]
    roots = [power(h + 0.2 * h.trace() / len(h) * torch.eye(len(h)), -0.25) for h in factors]
    torch.testing.assert_close(dense((3, 4), gradients, 0.2), torch.kron(*roots), rtol=1e-8, atol=1e-8)


def test_relative_damping_of_a_block_without_gradient_is_finite():
    gradients = random_gradients((4, 4))
    for gradient in gradients:
        gradient[:2] = 0
    result = dense((4, 4), gradients, 0.2, max_dim=2)
    assert torch.isfinite(result).all()
    assert 0 < result[0, 0] < 100 * result[-1, -1]


def test_empirical_factors_are_means_over_samples():
    one = problem("conv2d groups")
    weight = one.module[0].weight
    optimizer = Shampoo(one.module, fisher="empirical", statistics_every=1, curvature_decay=0.0)
    one.mean_loss().backward()
    samples = per_sample_gradients(one.module, one.loss, one.inputs, one.targets)[weight].flatten(2)
    optimizer.step()
    for mode in range(2):
        expected = torch.stack([moment(sample, mode) for sample in samples]).mean(0)
        torch.testing.assert_close(optimizer.state[weight][f"factor_{mode}"][0], expected)


@pytest.mark.parametrize(("shape", "max_dim"), [((5, 4), 2), ((4, 7), 4), ((3, 2, 5), 2), ((7,), 3)])
def test_every_block_is_preconditioned_by_itself(shape, max_dim):
    gradients = random_gradients(shape)
    result = dense(shape, gradients, 0.01, relative_damping=False, max_dim=max_dim, merge_dims=1)
    index = torch.arange(math.prod(shape)).view(shape)
    widths = [math.ceil(n / math.ceil(n / max_dim)) for n in shape]
    expected = torch.zeros_like(result)
    corners = torch.cartesian_prod(*[torch.arange(0, n, w) for n, w in zip(shape, widths, strict=True)])
    for corner in corners.view(-1, len(shape)).tolist():
        cut = tuple(slice(c, c + w) for c, w in zip(corner, widths, strict=True))
        rows = index[cut].flatten()
        block = dense_shampoo([g[cut] for g in gradients], 0.01, 1 / (2 * len(shape)))
        expected[rows[:, None], rows] = block
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("limit", "modes"), [(1, (2, 3, 2, 2)), (4, (2, 3, 4)), (12, (2, 12)), (24, (24,))])
def test_merged_dimensions_are_one_mode(limit, modes):
    shape = (2, 3, 2, 2)
    gradients = random_gradients(shape)
    expected = dense_shampoo([g.view(modes) for g in gradients], 0.01, 1 / (2 * len(modes)))
    options = {"relative_damping": False, "merge_dims": limit, "max_dim": EVERYTHING}
    torch.testing.assert_close(dense(shape, gradients, 0.01, **options), expected, rtol=1e-8, atol=1e-8)


# ---- roots by Newton iteration ----


def test_newton_equals_eigendecomposition_and_reports_its_residual():
    shape, gradients = (6, 9), random_gradients((6, 9))
    ends, reports = [], []
    for root in ("eigen", "newton"):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        optimizer = Shampoo([weight], lr=0.1, root=root, max_dim=4)
        ends.append(steps(weight, optimizer, gradients))
        reports.append(optimizer.diagnostics()["weights"]["parameter 0 of group 0"])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)
    assert 0 < reports[1]["residual"] < 1e-8
    assert reports[1]["newton_fallbacks"] == 0
    assert "residual" not in reports[0]


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])  # rank 8: one of the modes is singular
def test_a_newton_root_with_a_large_residual_is_replaced_with_a_warning_and_counted(shape):
    gradients = [g.float() for g in random_gradients(shape, count=1)]
    ends = []
    for root in ("eigen", "newton"):
        weight = torch.zeros(shape, requires_grad=True)
        optimizer = Shampoo([weight], lr=0.1, root=root, damping=1e-9, relative_damping=False)
        if root == "newton":
            with pytest.warns(RuntimeWarning, match="residual"):
                ends.append(steps(weight, optimizer, gradients))
            report = optimizer.diagnostics()["weights"]["parameter 0 of group 0"]
        else:
            ends.append(steps(weight, optimizer, gradients))
    assert report["newton_fallbacks"] == 1
    assert not report["residual"] < 0.1
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("tolerance", "replaced"), [(1e-3, 0), (0.0, 2)])
@pytest.mark.filterwarnings("ignore:a root by Newton iteration")
def test_a_newton_root_is_replaced_where_its_residual_is_above_the_tolerance(tolerance, replaced):
    reading, shape = TensorReading((4, 3), (4, 3)), torch.Size((4, 3))
    curvature = KroneckerRoots(
        reading, shape, BatchGradient, torch.float64, root="newton", tolerance=tolerance
    )
    state = curvature.init(layer_of("weight", torch.zeros(shape)))
    curvature.observe(state, BatchGradient(random_gradients((4, 3), count=1)[0]), 0.0)
    curvature.refresh(state, 0.1)
    assert int(state["newton_fallbacks"]) == replaced


def test_a_residual_that_is_not_finite_can_be_saved_and_loaded():
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Shampoo([weight], root="newton")
    weight.grad = torch.eye(4)
    optimizer.step()
    optimizer.state[weight]["residual"].fill_(torch.inf)  # as where an iteration overflows
    other = Shampoo([nn.Parameter(torch.zeros(4, 4))], root="newton")
    other.load_state_dict(optimizer.state_dict())
    assert other.diagnostics()["weights"]["parameter 0 of group 0"]["residual"] == math.inf


def test_newton_fallbacks_of_stacked_layers_are_counted_for_each_layer():
    weights = [torch.zeros(8, 30, requires_grad=True) for _ in range(2)]
    optimizer = Shampoo(weights, root="newton", damping=1e-9, relative_damping=False)
    weights[0].grad = random_gradients((8, 30), count=1)[0].float()
    weights[1].grad = torch.zeros(8, 30)
    with pytest.warns(RuntimeWarning, match="residual"):
        optimizer.step()
    report = optimizer.diagnostics()["weights"]
    assert [entry["newton_fallbacks"] for entry in report.values()] == [1, 0]


# ---- a whole step ----


def test_steps_equal_the_published_formula():
    """Momentum before preconditioning, decoupled decay, averages 0.9, no graft, absolute epsilon."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected, gradients = weight.detach().clone(), random_gradients((3, 4))
    optimizer = Shampoo(
        [weight],
        lr=0.05,
        momentum=0.9,
        curvature_decay=0.9,
        damping=1e-3,
        relative_damping=False,
        graft=None,
        nesterov=False,
        weight_decay=0.1,
        max_dim=EVERYTHING,
        statistics_every=1,
        inverse_every=1,
    )
    steps(weight, optimizer, gradients)
    past = torch.zeros_like(expected)
    left, right, total = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), 0.0
    for gradient in gradients:
        past = 0.9 * past + gradient
        left, right = 0.9 * left + 0.1 * gradient @ gradient.T, 0.9 * right + 0.1 * gradient.T @ gradient
        total = 0.9 * total + 0.1  # the averages are bias-corrected
        roots = [power(h / total + 1e-3 * torch.eye(len(h)), -0.25) for h in (left, right)]
        expected = (1 - 0.05 * 0.1) * expected - 0.05 * roots[0] @ past @ roots[1]
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


# ---- what a user sees ----


def test_describe_names_the_structure_of_every_weight():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 300, 1))
    rows = {row.name: row for row in Shampoo(module).describe().layers}
    assert (rows["0.weight"].structure, rows["0.weight"].blocks) == ("2 factors", 1)
    assert (rows["0.bias"].structure, rows["0.bias"].blocks) == ("diagonal", 8)
    assert (rows["1.weight"].structure, rows["1.weight"].block_size) == ("2 factors", 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "svd"}, "root must be one of 'eigen', 'newton', got 'svd'"),
        ({"exponent": 0.0}, "exponent must be"),
        ({"root": "newton", "power": 0.8}, "needs an exponent of 1 / p"),
        ({"eigenbasis": True, "exponent": 0.5}, "has no meaning with eigenbasis=True"),
        ({"eigenbasis": True, "root": "newton"}, "has no meaning with eigenbasis=True"),
    ],
)
def test_invalid_arguments_raise_an_error_with_the_cure(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo([torch.zeros(3, 4, requires_grad=True)], **options)


def test_blocks_with_padding_are_damped_by_the_means_of_their_entries():
    """Blocks of 3 x 3 in a weight of 5 x 6: the last ones along the first mode have two rows."""
    (gradient,), damping = random_gradients((5, 6), count=1), 0.1
    direction = random_gradients((6, 5), count=1)[0].T
    curvature, state, _ = observed((5, 6), [gradient], damping, max_dim=4)
    found = curvature.precondition(state, direction, damping)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 3), slice(3, 6)):
            block = gradient[rows, columns]
            scale = (block.square().mean() + gradient.square().mean()) / 2
            roots = []
            for h in (block @ block.T, block.T @ block):
                level = damping * scale * block.numel() / len(h)
                values, vectors = torch.linalg.eigh(h + level * torch.eye(len(h), dtype=torch.float64))
                roots.append(vectors @ torch.diag(values**-0.25) @ vectors.T)
            torch.testing.assert_close(found[rows, columns], roots[0] @ direction[rows, columns] @ roots[1])
