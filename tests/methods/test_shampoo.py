from __future__ import annotations

import math
from functools import reduce

import pytest
import scipy.linalg
import torch
from torch import nn

from minifisher import METHODS, SOAP, Shampoo
from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import BatchGradient
from tests.helpers import dense_preconditioner, per_sample_gradients, problem

EVERYTHING = 10**6  # max_dim: nothing is cut, and vectors get a full matrix


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    return torch.as_tensor(scipy.linalg.fractional_matrix_power(matrix.numpy(), exponent).real)


def moment(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    """mat_i mat_i^T, entry by entry."""
    slices = list(tensor.unbind(mode))
    return torch.stack([torch.stack([(a * b).sum() for b in slices]) for a in slices])


def dense_shampoo(gradients: list[torch.Tensor], epsilon: float, exponent: float) -> torch.Tensor:
    """(H_1 + eps I)^-e (x) ... (x) (H_K + eps I)^-e with H_i the mean over the gradients."""
    factors = []
    for mode in range(gradients[0].ndim):
        mean = torch.stack([moment(gradient, mode) for gradient in gradients]).mean(0)
        factors.append(power(mean + epsilon * torch.eye(len(mean), dtype=mean.dtype), -exponent))
    return reduce(torch.kron, factors)


def random_gradients(shape: tuple[int, ...], count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def observed(shape: tuple[int, ...], gradients: list[torch.Tensor], damping: float, **options: object):
    """A layer's curvature and state after the plain mean over the gradients, refreshed."""
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    layer, optimizer = layer_of("weight", weight), Shampoo([weight], **options)
    curvature = optimizer.plan(layer, optimizer.defaults).curvature
    state = curvature.init(layer)
    for count, gradient in enumerate(gradients, start=1):
        curvature.observe(state, BatchGradient(gradient), 1 - 1 / count)
    curvature.refresh(state, damping)
    return curvature, state, layer


def dense(
    shape: tuple[int, ...], gradients: list[torch.Tensor], damping: float, **options: object
) -> torch.Tensor:
    curvature, state, layer = observed(shape, gradients, damping, **options)
    return dense_preconditioner(curvature, state, layer, damping)


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
def test_every_order_equals_the_dense_kronecker_root(shape, limit, modes, root):
    gradients = random_gradients(shape)
    expected = dense_shampoo([g.view(modes) for g in gradients], 0.01, 1 / (2 * len(modes)))
    options = {"relative_damping": False, "max_dim": EVERYTHING, "merge_dims": limit}
    result = dense(shape, gradients, 0.01, root=root, **options)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_a_vector_has_the_root_of_its_full_matrix():
    gradients = random_gradients((6,))
    full = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    expected = power(full + 0.1 * torch.eye(6), -0.5)
    result = dense((6,), gradients, 0.1, relative_damping=False, max_dim=EVERYTHING)
    torch.testing.assert_close(result, expected)


def test_a_vector_is_a_diagonal_unless_asked_for_more():
    gradients = random_gradients((6,))
    square = sum(g.square() for g in gradients) / len(gradients)
    result = dense((6,), gradients, 0.1, relative_damping=False)
    torch.testing.assert_close(result, torch.diag((square + 0.1).rsqrt()))


@pytest.mark.parametrize(("shape", "max_dim"), [((5, 4), 2), ((4, 7), 4), ((3, 2, 5), 2), ((7,), 3)])
def test_every_block_is_a_tensor_of_its_own(shape, max_dim):
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


@pytest.mark.parametrize(
    ("options", "exponent"),
    [({"power": 1.0}, 1 / 2), ({"exponent": 1 / 3}, 1 / 3), ({"exponent": 1.0}, 1.0), ({"power": 0.8}, 0.4)],
)
def test_the_exponent_is_a_share_of_the_power_or_overridden(options, exponent):
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


def test_samples_take_the_place_of_the_batch():
    one = problem("conv2d groups")
    weight = one.module[0].weight
    optimizer = Shampoo(one.module, fisher="empirical", statistics_every=1, curvature_decay=0.0)
    one.mean_loss().backward()
    samples = per_sample_gradients(one.module, one.loss, one.inputs, one.targets)[weight].flatten(2)
    optimizer.step()
    for mode in range(2):
        expected = torch.stack([moment(sample, mode) for sample in samples]).mean(0)
        torch.testing.assert_close(optimizer.state[weight][f"factor_{mode}"][0], expected)


# ---- roots by Newton iteration ----


def steps(
    weight: torch.Tensor, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]
) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().clone()


def test_newton_takes_the_steps_of_the_eigendecomposition_and_shows_its_residual():
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


def test_a_newton_root_above_the_tolerance_is_replaced_counted_and_warned_about():
    gradients = [g.float() for g in random_gradients((8, 30), count=1)]  # rank 8: mode 2 is singular
    ends = []
    for root in ("eigen", "newton"):
        weight = torch.zeros(8, 30, requires_grad=True)
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


def test_newton_counts_layer_by_layer_when_equal_layers_are_stacked():
    weights = [torch.zeros(8, 30, requires_grad=True) for _ in range(2)]
    optimizer = Shampoo(weights, root="newton", damping=1e-9, relative_damping=False)
    weights[0].grad = random_gradients((8, 30), count=1)[0].float()
    weights[1].grad = torch.zeros(8, 30)
    with pytest.warns(RuntimeWarning, match="residual"):
        optimizer.step()
    report = optimizer.diagnostics()["weights"]
    assert [entry["newton_fallbacks"] for entry in report.values()] == [1, 0]


# ---- a whole step ----


def test_the_published_step_equals_the_formula():
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


@pytest.mark.parametrize("method", [Shampoo, SOAP])
def test_equal_layers_stacked_step_as_each_alone(method):
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


# ---- SOAP ----


def dense_soap(
    gradients: list[torch.Tensor], lr: float, beta: float, epsilon: float, every: int
) -> torch.Tensor:
    """SOAP for a matrix, written out: Vyas et al. 2024, Algorithm 3, a refreshed basis used at once."""
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
def test_soap_equals_an_independent_one(every):
    # Full rank from the first step on: where H is singular, its null space has no basis of its own.
    gradients = random_gradients((4, 4), count=8)
    weight = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP([weight], lr=0.01, damping=1e-8, relative_damping=False, inverse_every=every)
    steps(weight, optimizer, gradients)
    expected = dense_soap(gradients, lr=0.01, beta=0.95, epsilon=1e-8, every=every)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_soap_in_blocks_of_one_entry_is_adam(shape, decay):
    gradients = random_gradients(shape, count=12)
    weights = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    options = {
        "momentum": 0.9,
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


def test_the_length_of_soaps_steps_follows_a_scheduled_momentum():
    """A gradient that stays the same moves every weight by lr under Adam, whatever the momentum."""
    gradient = torch.randn(1, 1, dtype=torch.float64)
    weight = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = SOAP([weight], lr=0.01, momentum=0.95, damping=1e-8, statistics_every=2)
    for momentum in (0.95, 0.5, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        steps(weight, optimizer, [gradient] * 300)
        before = weight.detach().clone()
        after = steps(weight, optimizer, [gradient])
        torch.testing.assert_close(after, before - 0.01 * gradient.sign(), rtol=1e-6, atol=0)


def test_soap_is_shampoo_in_the_eigenbasis():
    gradients = random_gradients((4, 6))
    ends = []
    for method, options in ((SOAP, {}), (Shampoo, {"eigenbasis": True, "graft": None, "momentum": 0.95})):
        weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        ends.append(steps(weight, method([weight], lr=0.01, damping=1e-4, **options), gradients))
    assert torch.equal(*ends)


@pytest.mark.parametrize("damping", [1e-8, 0.1])
def test_soap_takes_no_steps_along_rounding_errors(damping):
    """A first gradient of rank one: in its eigenbasis all entries but one are rounding errors."""
    gradient = torch.outer(torch.randn(20), torch.randn(30))
    weight = torch.zeros(20, 30, requires_grad=True)
    steps(weight, SOAP([weight], lr=1.0, damping=max(damping, 1e-4)), [gradient])
    cosine = -torch.nn.functional.cosine_similarity(weight.detach().flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("relative", [True, False])
def test_the_eigenbasis_preconditioner_is_symmetric_and_positive(relative):
    shape = (5, 6)
    options = {"eigenbasis": True, "max_dim": 4, "relative_damping": relative}
    matrix = dense(shape, random_gradients(shape), 0.1, **options)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


# ---- what a user sees ----


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


def test_describe_names_the_structure_of_every_weight():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 300, 1))
    rows = {row.name: row for row in Shampoo(module).describe().layers}
    assert (rows["0.weight"].structure, rows["0.weight"].blocks) == ("2 factors", 1)
    assert (rows["0.bias"].structure, rows["0.bias"].blocks) == ("diagonal", 8)
    assert (rows["1.weight"].structure, rows["1.weight"].block_size) == ("2 factors", 50)


@pytest.mark.parametrize("name", ["shampoo", "soap", "tnt"])
def test_the_methods_are_registered(name):
    assert METHODS[name].__name__.lower() == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "svd"}, "root must be one of 'eigen', 'newton', got 'svd'"),
        ({"max_dim": 0}, "max_dim must be a whole number"),
        ({"merge_dims": -1}, "merge_dims must be a whole number"),
        ({"exponent": 0.0}, "exponent must be"),
        ({"root": "newton", "power": 0.8}, "needs an exponent of 1 / p"),
        ({"eigenbasis": True, "exponent": 0.5}, "has no meaning with eigenbasis=True"),
        ({"eigenbasis": True, "root": "newton"}, "has no meaning with eigenbasis=True"),
    ],
)
def test_impossible_arguments_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo([torch.zeros(3, 4, requires_grad=True)], **options)
