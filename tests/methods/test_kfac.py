"""KFAC against dense matrices in float64, computed without `LayerSamples`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from minifisher import KFAC
from minifisher.methods.kfac import CorrectedFactors, KroneckerFactors
from minifisher.statistics.layers import Layer
from minifisher.statistics.records import LayerSamples
from tests import helpers
from tests.helpers import (
    Problem,
    dense_empirical_fisher,
    dense_exact_fisher,
    dense_preconditioner,
    problem,
    read_layers,
)
from tests.methods.samples import calls, patches, places


class Read(helpers.Read):
    """One layer after a step with lr=0, and its dense matrices."""

    @property
    def dense(self) -> Tensor:
        """A (x) G, [d, d], in the order of `weight.flatten()`."""
        pairs = zip(self.state["gradient_factor"], self.state["input_factor"], strict=True)
        return torch.block_diag(*(torch.kron(gradient, inputs) for gradient, inputs in pairs))


def read(case: Problem, likelihood: str = "categorical", steps: int = 1, **options) -> list[Read]:
    """Every layer with factors, after `steps` observations of the same batch at the same weights."""
    options = {"fisher": "empirical", "damping": 0.0, "statistics_every": 1, "inverse_every": 1, **options}
    opt = KFAC(case.module, lr=0.0, graft=None, momentum=0.0, **options)
    for _ in range(steps):
        opt.zero_grad()
        outputs = case.module(case.inputs.clone())
        opt.observe(outputs, likelihood)
        case.loss(outputs, case.targets).backward()
        opt.step()
    return read_layers(opt, KroneckerFactors, Read)


SHARED = [
    "linear on tokens",
    "linear on a grid",
    "conv2d stride",
    "conv2d groups",
    "conv2d depthwise",
    "conv2d dilation",
]


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d 1x1", "conv1d", "conv3d", *SHARED])
def test_factors_are_the_second_moments_of_inputs_and_output_gradients(name, weight_sharing):
    case = problem(name)
    oracle = calls(case)
    layers = read(case, weight_sharing=weight_sharing)
    assert layers
    for each in layers:
        (leaf,) = each.layer.modules
        a, g = patches(leaf, oracle[leaf][0]), places(leaf, oracle[leaf][1])
        if weight_sharing == "reduce":
            a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
        inputs = torch.einsum("ngsi,ngsj->gij", a, a) / a.shape[0]
        gradients = torch.einsum("ngso,ngsp->gop", g, g) / (a.shape[0] * a.shape[2])
        torch.testing.assert_close(each.state["input_factor"], inputs)
        torch.testing.assert_close(each.state["gradient_factor"], gradients)


EVERY = [
    "linear",
    *SHARED,
    "conv1d",
    "conv3d",
    "twice",
    "twice on tokens",
    "convolution on two sizes",
    "tied",
]


# "reduce" leaves factors of low rank, whose eigenvectors are not unique.
@pytest.mark.parametrize(
    ("weight_sharing", "eigenvalue_correction"), [("expand", False), ("reduce", False), ("expand", True)]
)
@pytest.mark.parametrize("name", EVERY)
def test_the_size_of_chunks_changes_nothing(name, weight_sharing, eigenvalue_correction):
    options = {
        "weight_sharing": weight_sharing,
        "eigenvalue_correction": eigenvalue_correction,
        "damping": 0.1,
    }
    case = problem(name, count=30)  # enough for eigenvectors that are unique
    whole, parts = (read(case, statistics_memory=memory, steps=2, **options) for memory in (2**30, 1))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.dense, other.dense)
        torch.testing.assert_close(one.preconditioner(0.1), other.preconditioner(0.1))


# ---- where theory says that it is exact ----


# Splitting the damping is an approximation. EKFAC does not split it.
@pytest.mark.parametrize(("eigenvalue_correction", "damping"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_the_inverse_is_exact_for_a_deep_linear_network(eigenvalue_correction, damping):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5)).double()
    case = Problem(module, torch.randn(20, 3, dtype=torch.float64), torch.randint(5, (20,)))
    options = {"eigenvalue_correction": eigenvalue_correction, "relative_damping": False, "damping": damping}
    layers = read(case, "gaussian", fisher="exact", steps=2, **options)
    assert len(layers) == 3
    for each in layers:
        fisher = dense_exact_fisher(each.layer, module, "gaussian", case.inputs)
        torch.testing.assert_close(each.dense, fisher)
        exact = torch.linalg.inv(fisher + damping * torch.eye(len(fisher)))
        torch.testing.assert_close(each.preconditioner(damping), exact)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_block_of_a_single_sample_is_exact(likelihood):
    case = problem("linear", count=1)
    for each in read(case, likelihood, fisher="exact"):
        torch.testing.assert_close(
            each.dense, dense_exact_fisher(each.layer, case.module, likelihood, case.inputs)
        )
    for each in read(case, fisher="empirical"):
        fisher = dense_empirical_fisher(each.layer, case.module, case.loss, case.inputs, case.targets)
        torch.testing.assert_close(each.dense, fisher)


@dataclass(frozen=True)
class Pairs(LayerSamples):
    """All pairs of an input and an output gradient, which makes the two independent."""

    inputs: Tensor  # [n, in]
    output_gradients: Tensor  # [m, out]

    @property
    def count(self) -> int:
        return len(self.inputs) * len(self.output_gradients)

    def chunks(self):
        n, m = len(self.inputs), len(self.output_gradients)
        yield (
            self.inputs.repeat_interleave(m, 0)[:, None, None],
            self.output_gradients.repeat(n, 1)[:, None, None],
        )


@pytest.mark.parametrize("form", [KroneckerFactors, CorrectedFactors])
def test_the_block_is_exact_if_inputs_and_output_gradients_are_independent(form):
    torch.manual_seed(0)
    pairs = Pairs(torch.randn(7, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))
    layer = Layer("weight", torch.zeros(3, 4, dtype=torch.float64))
    curvature = form(layer.shape, groups=1, dtype=torch.float64)
    state = curvature.init(layer)
    for decay in (0.0, 0.5):  # EKFAC measures nothing before it has a basis
        curvature.observe(state, pairs, decay)
        curvature.refresh(state, 0.0)
    gradients = torch.stack(
        [torch.outer(g, a).flatten() for g in pairs.output_gradients for a in pairs.inputs]
    )
    exact = torch.linalg.inv(gradients.T @ gradients / len(gradients))
    torch.testing.assert_close(dense_preconditioner(curvature, state, layer, 0.0), exact)


# ---- damping ----


def inverse_of(matrix: Tensor, shift: Tensor | float) -> Tensor:
    return torch.linalg.inv(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype))


@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("pi_correction", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d groups", "conv1d"])
def test_precondition_equals_the_dense_preconditioner(name, pi_correction, relative_damping):
    damping = 0.3
    options = {"pi_correction": pi_correction, "relative_damping": relative_damping, "damping": damping}
    for each in read(problem(name), **options):
        factors = list(zip(each.state["input_factor"], each.state["gradient_factor"], strict=True))
        # The scale of a group is the average of its own mean curvature and that of the layer.
        mean = torch.tensor([[f.trace() / len(f) for f in pair] for pair in factors])
        mean = (mean + mean.mean(0)) / 2
        blocks = []
        for (inputs, gradients), (of_inputs, of_gradients) in zip(factors, mean, strict=True):
            strength = damping * (of_inputs * of_gradients if relative_damping else 1.0)
            pi = (of_inputs / of_gradients) ** 0.5 if pi_correction else 1.0
            left = inverse_of(gradients, strength**0.5 / pi)
            blocks.append(torch.kron(left, inverse_of(inputs, strength**0.5 * pi)))
        torch.testing.assert_close(each.preconditioner(damping), torch.block_diag(*blocks))


@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d groups"])
def test_the_corrected_preconditioner_equals_the_dense_one(name, relative_damping):
    damping = 0.3
    options = {"eigenvalue_correction": True, "relative_damping": relative_damping, "damping": damping}
    for each in read(problem(name), steps=3, **options):
        basis, eigenvalues = rotation(each), each.state["eigenvalues"]
        mean = eigenvalues.mean((1, 2), keepdim=True)
        shift = damping * ((mean + mean.mean()) / 2 if relative_damping else torch.ones_like(mean))
        inverse = basis @ torch.diag(1 / (eigenvalues + shift).flatten()) @ basis.T
        torch.testing.assert_close(each.preconditioner(damping), inverse)


def rotation(each: Read) -> Tensor:
    """U_A (x) U_G of every group, [d, d]."""
    pairs = zip(each.state["gradient_basis"], each.state["input_basis"], strict=True)
    return torch.block_diag(*(torch.kron(gradient, inputs) for gradient, inputs in pairs))


def test_power_one_half_is_the_inverse_root():
    (whole, root), damping = [read(problem("linear"), power=p, damping=0.2)[0] for p in (1.0, 0.5)], 0.2
    torch.testing.assert_close(
        torch.linalg.matrix_power(root.preconditioner(damping), 2), whole.preconditioner(damping)
    )


def test_with_large_damping_the_direction_is_the_momentum():
    damping = 1e12
    for each in read(problem("conv2d groups"), damping=damping, relative_damping=False):
        dense = damping * each.preconditioner(damping)
        torch.testing.assert_close(dense, torch.eye(len(dense), dtype=dense.dtype), rtol=0, atol=1e-5)


# ---- groups ----


@pytest.mark.parametrize("form", [KroneckerFactors, CorrectedFactors])
def test_a_grouped_convolution_has_the_factors_of_its_parts(form):
    corrected = form is CorrectedFactors
    case = problem("conv2d groups")
    whole = case.module[0]
    halves = nn.ModuleList([nn.Conv2d(2, 2, 3, bias=False) for _ in range(2)]).double()
    for half, weight in zip(halves, whole.weight.chunk(2), strict=True):
        half.weight.data.copy_(weight)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves, self.rest = halves, case.module[1:]

        def forward(self, inputs: Tensor) -> Tensor:
            parts = zip(self.halves, inputs.chunk(2, 1), strict=True)
            return self.rest(torch.cat([half(part) for half, part in parts], dim=1))

    options = {"eigenvalue_correction": corrected, "steps": 2}
    grouped = read(case, **options)[0].state
    parts = [each.state for each in read(Problem(Parts(), case.inputs, case.targets), **options)[:2]]
    for key in ("input_factor", "gradient_factor", *(["eigenvalues"] if corrected else [])):
        torch.testing.assert_close(grouped[key], torch.cat([part[key] for part in parts]))


# ---- the eigenvalue correction ----


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", EVERY)
def test_the_eigenvalues_are_the_diagonal_of_the_fisher_matrix_in_the_basis(name, weight_sharing):
    case = problem(name)
    # The first observation has no basis yet. With decay 0 the second one replaces it.
    layers = read(
        case, eigenvalue_correction=True, steps=2, curvature_decay=0.0, weight_sharing=weight_sharing
    )
    for each in layers:
        basis, eigenvalues = rotation(each), each.state["eigenvalues"].flatten()
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype))
        fisher = dense_empirical_fisher(each.layer, case.module, case.loss, case.inputs, case.targets)
        blocks = block_diagonal(fisher, each.layer.groups)
        torch.testing.assert_close(eigenvalues, torch.diagonal(basis.T @ blocks @ basis))
        corrected = basis @ torch.diag(eigenvalues) @ basis.T
        assert torch.dist(corrected, blocks) <= torch.dist(each.dense, blocks) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["linear on tokens", "conv2d groups"])
def test_forming_few_per_sample_gradients_at_once_changes_nothing(name, monkeypatch):
    case = problem(name)
    whole = read(case, eigenvalue_correction=True, steps=2)
    monkeypatch.setattr("minifisher.methods.kfac._SCRATCH", 1)
    for one, other in zip(whole, read(case, eigenvalue_correction=True, steps=2), strict=True):
        torch.testing.assert_close(one.state["eigenvalues"], other.state["eigenvalues"])


def block_diagonal(matrix: Tensor, groups: int) -> Tensor:
    """The diagonal blocks, with zeros between them."""
    size = len(matrix) // groups
    return torch.block_diag(*(matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)))


def test_before_the_first_measurement_ekfac_equals_kfac():
    damping = 0.3
    options = {"relative_damping": False, "damping": damping}
    for each in read(problem("conv2d groups"), eigenvalue_correction=True, **options):
        torch.testing.assert_close(each.preconditioner(damping), inverse_of(each.dense, damping))


def test_a_new_basis_keeps_the_measured_correction():
    torch.manual_seed(0)
    layer = Layer("weight", torch.zeros(3, 4, dtype=torch.float64))
    curvature = CorrectedFactors(layer.shape, groups=1, dtype=torch.float64)
    state = curvature.init(layer)
    for key, size in (("input", 4), ("gradient", 3)):
        root = torch.randn(1, size, size, dtype=torch.float64)
        state[f"{key}_factor"].copy_(root @ root.mT)
    curvature.refresh(state, 0.0)
    state["eigenvalues"].mul_(1 + torch.rand(3, 4, dtype=torch.float64))
    measured = state["eigenvalues"].clone()
    dense = dense_preconditioner(curvature, state, layer, 0.1)

    curvature.refresh(state, 0.0)  # the same factors: nothing changes
    torch.testing.assert_close(state["eigenvalues"], measured)
    torch.testing.assert_close(dense_preconditioner(curvature, state, layer, 0.1), dense)

    before = Read(layer, curvature, {key: tensor.clone() for key, tensor in state.items()})
    other = torch.randn(1, 3, 3, dtype=torch.float64)
    state["gradient_factor"].lerp_(other @ other.mT, 0.1)
    curvature.refresh(state, 0.0)
    after = Read(layer, curvature, state)
    # The old matrix, with its Kronecker part replaced by that of the new factors.
    old_basis, new_basis = rotation(before), rotation(after)
    kronecker = torch.diag(torch.diagonal(old_basis.T @ after.dense @ old_basis))
    moved = after.dense + old_basis @ (torch.diag(measured.flatten()) - kronecker) @ old_basis.T
    expected = torch.diagonal(new_basis.T @ moved @ new_basis)
    assert (expected > 0).all()
    torch.testing.assert_close(state["eigenvalues"].flatten(), expected)


# ---- what the engine makes of it ----


def steps(module: nn.Module, count: int = 3, seed: int = 0, **options) -> KFAC:
    """An optimizer after a few steps with the labels of the data."""
    torch.manual_seed(seed)
    opt = KFAC(module, **{"fisher": "empirical", **options})
    for _ in range(count):
        opt.zero_grad()
        inputs = torch.randn(8, 2, 6, 6, dtype=torch.float64)
        functional.cross_entropy(module(inputs), torch.randint(3, (8,))).backward()
        opt.step()
    return opt


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, 3)
    ).double()


def test_a_step_equals_the_published_formula():
    case = problem("linear")
    before = [layer.weight.detach().clone() for layer in case.module if isinstance(layer, nn.Linear)]
    first = read(case, relative_damping=False, damping=0.2)[0]
    case.module.zero_grad()
    case.mean_loss().backward()
    linear = case.module[0]
    gradient = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], dim=1)
    step = (first.preconditioner(0.2) @ gradient.flatten()).view_as(gradient)
    options = {"relative_damping": False, "damping": 0.2, "graft": None, "fisher": "empirical"}
    opt = KFAC(case.module, lr=0.5, nesterov=False, weight_decay=0.1, **options)
    case.module.zero_grad()
    case.mean_loss().backward()
    opt.step()
    torch.testing.assert_close(linear.weight.detach(), before[0] * 0.95 - 0.5 * step[:, :-1])


def test_a_weight_without_factors_takes_the_first_order_step_and_is_described():
    module = network()
    opt = steps(module, count=0)
    structures = {layer.name: (layer.structure, layer.reason) for layer in opt.describe().layers}
    assert structures["0.weight"][0] == structures["4.weight"][0] == "Kronecker factors"
    assert structures["1.weight"] == ("first-order step", "BatchNorm2d: only its gradient is read")
    assert opt.describe().coverage["first-order step"] == pytest.approx(6 / (3 * 19 + 6 + 5 * 49 + 3 * 6))

    twin = network()
    adam = torch.optim.Adam([*twin[1].parameters()], lr=1e-2, betas=(0.9, 0.999))
    gradient = torch.randn(3, dtype=torch.float64)
    opt = KFAC(module, lr=1e-2, fisher="empirical")
    for _ in range(3):
        for parameter in (*module[1].parameters(), *twin[1].parameters()):
            parameter.grad = gradient.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(module[1].weight, twin[1].weight)


def test_without_a_graft_a_weight_without_factors_steps_along_the_momentum():
    module = network()
    start = module[1].weight.detach().clone()
    opt = KFAC(module, lr=0.1, graft=None, fisher="empirical")
    for _ in range(2):
        module[1].weight.grad = torch.ones(3, dtype=torch.float64)
        opt.step()
    torch.testing.assert_close(module[1].weight.detach(), start - 0.1 * (1 + 1.9))


def test_a_factor_above_max_dim_is_not_formed():
    opt = steps(network(), count=1, max_dim=40)
    wide = {layer.name: layer for layer in opt.describe().layers}["4.weight"]
    assert wide.structure == "first-order step"
    assert wide.reason == "a matrix of width 49 is above max_dim=40"
    assert wide.state_bytes == 0
    assert "input_factor" not in opt.state[opt.param_groups[0]["params"][4]]


@pytest.mark.parametrize(
    "rule", [{"graft": None}, {"graft": "adam", "length": "norm"}, {"graft": "adam"}], ids=str
)
def test_kl_clip_bounds_the_divergence_over_all_layers(rule):
    def moves(clip: float | None) -> tuple[KFAC, dict[str, Tensor]]:
        module = network()
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        opt = steps(module, count=1, lr=0.1, kl_clip=clip, **rule)
        return opt, {name: parameter.detach() - before[name] for name, parameter in module.named_parameters()}

    def divergence(opt: KFAC, moved: dict[str, Tensor]) -> float:
        total = 0.0
        for layer, (_, _, plan, _) in opt._enrolled.items():
            if isinstance(plan.curvature, KroneckerFactors):
                state = {k: v for k, v in opt.state[layer.weight].items() if isinstance(v, Tensor)}
                inverse = dense_preconditioner(plan.curvature, state, layer, opt.defaults["damping"])
                step = layer.join([moved[layer.name], moved[layer.name.replace("weight", "bias")]]).flatten()
                total += float(step @ torch.linalg.solve(inverse, step))
        return total

    (opt, free), (_, loose), (clipped, tight) = moves(None), moves(1e9), moves(1e-4)
    torch.testing.assert_close(loose, free)
    assert divergence(opt, free) > 1e-4
    assert divergence(clipped, tight) == pytest.approx(1e-4)
    torch.testing.assert_close(tight["1.weight"], free["1.weight"])  # no curvature: not clipped


def test_stacked_layers_step_as_single_ones():
    def towers(stacked: bool) -> nn.Module:
        torch.manual_seed(1)
        module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
        options = {"fisher": "empirical", "lr": 1e-2, "inverse_every": 2, "statistics_every": 1}
        options["jitter"] = False  # with it the schedule of a layer depends on its neighbours
        groups = [module] if stacked else list(module)  # a group of its own keeps a layer out of the stack
        opt = KFAC([{"params": group} for group in groups], **options)
        for _ in range(4):
            opt.zero_grad()
            functional.cross_entropy(module(torch.randn(6, 4).double()), torch.randint(4, (6,))).backward()
            opt.step()
        assert len(opt._stacks) == len(groups)
        return module

    torch.testing.assert_close(towers(True).state_dict(), towers(False).state_dict())


def test_a_warm_start_computes_the_factors_of_all_data():
    case = problem("linear", count=6)
    whole = read(case)
    opt = KFAC(case.module, fisher="empirical", statistics_every=3)
    parts = zip(case.inputs.chunk(3), case.targets.chunk(3), strict=True)
    opt.warm_start(case.module, parts, case.loss)
    for each in whole:
        for key in ("input_factor", "gradient_factor"):
            torch.testing.assert_close(opt.state[each.layer.weight][key], each.state[key])


def test_a_resumed_run_equals_an_uninterrupted_one():
    first, second = network(), network()
    opt = steps(first, count=3, seed=1, eigenvalue_correction=True)
    second.load_state_dict(first.state_dict())
    resumed = KFAC(second, fisher="empirical", eigenvalue_correction=True)
    resumed.load_state_dict(opt.state_dict())
    for module, optimizer in ((first, opt), (second, resumed)):
        torch.manual_seed(2)
        for _ in range(5):
            optimizer.zero_grad()
            outputs = module(torch.randn(8, 2, 6, 6, dtype=torch.float64))
            functional.cross_entropy(outputs, torch.randint(3, (8,))).backward()
            optimizer.step()
    torch.testing.assert_close(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("eigenvalue_correction", [False, True])
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_the_loss_falls(fisher, eigenvalue_correction):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(64, 4)
    targets = (inputs @ torch.randn(4, 3)).argmax(1)
    opt = KFAC(module, lr=1e-2, fisher=fisher, eigenvalue_correction=eigenvalue_correction)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            opt.zero_grad()
            outputs = module(inputs)
            opt.observe(outputs)
            loss = functional.cross_entropy(outputs, targets)
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("eigenvalue_correction", [False, True])
@pytest.mark.parametrize("curvature_dtype", [None, torch.bfloat16])
def test_the_curvature_of_half_precision_weights_is_float32_unless_asked_otherwise(
    curvature_dtype, eigenvalue_correction
):
    module = nn.Linear(4, 3, dtype=torch.bfloat16)
    opt = KFAC(
        module,
        lr=1e-2,
        fisher="empirical",
        curvature_dtype=curvature_dtype,
        eigenvalue_correction=eigenvalue_correction,
    )
    for _ in range(3):
        opt.zero_grad()
        inputs = torch.randn(8, 4, dtype=torch.bfloat16)
        functional.cross_entropy(module(inputs), torch.randint(3, (8,))).backward()
        opt.step()
    assert opt.state[module.weight]["input_factor"].dtype == (curvature_dtype or torch.float32)
    assert opt.diagnostics()["fallbacks"] == 0
    assert torch.isfinite(module.weight).all()


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (lambda m: list(m.parameters()), {}, r"looks inside the backward pass.*Pass the nn.Module"),
        (
            lambda m: m,
            {"fisher": "gradient"},
            r"fisher of KFAC must be one of 'empirical', 'sampled', 'exact'",
        ),
        (lambda m: m, {"kl_clip": 0.0}, r"kl_clip must be finite and > 0, or None, got 0.0"),
        (
            lambda m: m,
            {"weight_sharing": "mean"},
            r"weight_sharing must be one of 'expand', 'reduce', got 'mean'",
        ),
        (
            lambda m: [{"params": m, "kl_clip": 1.0}],
            {},
            r"kl_clip is one for all parameter groups, None, and.*1.0",
        ),
        (lambda m: m, {"max_dim": 0}, r"max_dim must be a whole number >= 1, or None, got 0"),
    ],
)
def test_invalid_arguments_raise_an_error_with_the_value(params, options, message):
    with pytest.raises(ValueError, match=message):
        KFAC(params(network()), **options)


def test_a_step_without_drawn_labels_raises_an_error():
    module = network()
    opt = KFAC(module)
    module(torch.randn(4, 2, 6, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.observe\(outputs\)"):
        opt.step()


# ---- another implementation ----


def flattened(each: Read) -> Tensor:
    """A (x) G, [d, d], with the entries in the order of weight.flatten(), then the bias."""
    indices = torch.arange(each.layer.shape.numel()).view(each.layer.shape)
    order = torch.cat([indices[:, :-1].flatten(), indices[:, -1]])
    return each.dense[order][:, order]


CONVOLUTIONS = nn.Sequential(
    nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
)
TOKENS = nn.Sequential(
    nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.AvgPool2d((3, 1)), nn.Flatten(), nn.Linear(4, 3)
)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("fisher", "theirs"), [("exact", "type-2"), ("empirical", "empirical")])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), (3,)),
        (CONVOLUTIONS, (2, 6, 6)),
        (TOKENS, (3, 3)),
    ],
)
def test_the_factors_equal_those_of_curvlinops(module, shape, fisher, theirs, weight_sharing):
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    case = Problem(module.double(), torch.randn(6, *shape, dtype=torch.float64), torch.randint(3, (6,)))
    operator = curvlinops.KFACLinearOperator(
        case.module,
        nn.CrossEntropyLoss(),
        list(case.module.parameters()),
        [(case.inputs, case.targets)],
        fisher_type=theirs,
        kfac_approx=weight_sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    size = sum(parameter.numel() for parameter in case.module.parameters())
    expected = operator @ torch.eye(size, dtype=torch.float64)
    layers = read(case, fisher=fisher, weight_sharing=weight_sharing)
    torch.testing.assert_close(torch.block_diag(*map(flattened, layers)), expected)


def test_eigenvalues_without_damping_are_at_least_the_rounding_error_of_their_mean():
    layer = Layer("weight", torch.zeros(2, 2, dtype=torch.float64))
    curvature = CorrectedFactors(layer.shape, groups=1, dtype=torch.float64, relative_damping=False)
    state = curvature.init(layer)
    for side in ("input", "gradient"):
        state[f"{side}_basis"].copy_(torch.eye(2))
    state["eigenvalues"].copy_(torch.tensor([[40.0, 0.0], [0.0, 0.0]]))
    direction = curvature.precondition(state, torch.ones(2, 2, dtype=torch.float64), 0.0)
    smallest = 10 * torch.finfo(torch.float64).eps
    expected = torch.tensor([[1 / 40, 1 / smallest], [1 / smallest] * 2], dtype=torch.float64)
    torch.testing.assert_close(direction, expected)


def corrected(power=1.0):
    layer = Layer("weight", torch.zeros(3, 4, dtype=torch.float64))
    curvature = CorrectedFactors(
        layer.shape, groups=1, dtype=torch.float64, relative_damping=False, power=power
    )
    return curvature, curvature.init(layer)


def test_the_corrected_eigenvalues_are_raised_to_the_power():
    curvature, state = corrected(power=0.5)
    for side in ("input", "gradient"):
        state[f"{side}_basis"].copy_(torch.eye(state[f"{side}_basis"].shape[-1]))
    eigenvalues = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    state["eigenvalues"].copy_(eigenvalues)
    direction = curvature.precondition(state, torch.ones(3, 4, dtype=torch.float64), 0.5)
    torch.testing.assert_close(direction, (eigenvalues + 0.5).rsqrt())


def test_a_new_basis_never_makes_an_eigenvalue_negative():
    curvature, state = corrected()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for side in ("input", "gradient"):
            width = state[f"{side}_factor"].shape[-1]
            root = torch.randn(1, width, width, generator=generator, dtype=torch.float64)
            state[f"{side}_factor"].copy_(root @ root.mT)
        state["eigenvalues"].zero_()  # measured: less than the factors explain
        curvature.refresh(state, 0.0)
    assert (state["eigenvalues"] == 0).any()
    assert (state["eigenvalues"] >= 0).all()
