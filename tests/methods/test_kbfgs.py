"""K-BFGS and K-BFGS(L) against dense matrices in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import minifisher
from minifisher import KBFGS, KBFGSL
from minifisher.linalg.bfgs import double_damped, unit
from minifisher.methods.kbfgs import KroneckerBFGS
from minifisher.methods.kbfgsl import LimitedMemoryKroneckerBFGS
from minifisher.statistics.layers import layers_of
from minifisher.statistics.records import LayerSamples, Secant

GROUPS, OUT, IN, N = 2, 3, 4, 7
PUBLISHED = {
    "nesterov": False,
    "relative_damping": False,
    "graft": None,
    "curvature_decay": 0.9,
    "inverse_every": 10**9,
}


@dataclass(frozen=True)
class Samples(LayerSamples):
    inputs: Tensor  # [n, groups, s, in]
    output_gradients: Tensor  # [n, groups, s, out]

    @property
    def count(self):
        return self.inputs.shape[0]

    def chunks(self):
        for part in (slice(0, 3), slice(3, None)):
            yield self.inputs[part], self.output_gradients[part]


def grouped_layer():
    return layers_of(nn.Conv1d(GROUPS * 2, GROUPS * OUT, 2, groups=GROUPS, bias=False).double())[0]


def curvature(memory=None, **options):
    layer = grouped_layer()
    common = dict(shape=layer.shape, groups=GROUPS, dtype=torch.float64, **options)
    if memory is None:
        return KroneckerBFGS(**common), layer
    return LimitedMemoryKroneckerBFGS(**common, memory=memory), layer


def random_samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((N, GROUPS, 5, IN), (N, GROUPS, 5, OUT))
    return Samples(*(torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes))


def random_secant(generator):
    s, y = torch.randn(2, GROUPS, OUT, dtype=torch.float64, generator=generator)
    return Secant(s * 10 ** torch.randn((), generator=generator), y)


def output_matrix(method, state):
    return method._times_outputs(state, torch.eye(OUT, dtype=torch.float64).expand(GROUPS, OUT, OUT))


def input_moment(samples):
    return torch.einsum("ngsi,ngsj->gij", samples.inputs, samples.inputs) / samples.count


@pytest.mark.parametrize(("memory", "count"), [(None, 1000), (5, 200), (30, 100)])
@pytest.mark.parametrize("relative", [False, True])
def test_both_matrices_stay_positive_definite_over_many_pairs(memory, count, relative):
    method, layer = curvature(memory, relative_damping=relative, inverse_every=10**9)
    state = method.init(layer)
    generator = torch.Generator().manual_seed(0)
    batches = [random_samples(seed) for seed in range(20)]
    negative = 0
    for step in range(count):
        secant = random_secant(generator)
        negative += int((secant.output_change * secant.gradient_change).sum(-1).lt(0).sum())
        method.observe(state, batches[step % 20], 0.9)
        method.observe(state, secant, 0.0)
        method.refresh(state, 0.1)
        if step % 10 == 0 or step > count - 10:
            assert_positive_definite(output_matrix(method, state))
            assert_positive_definite(state["input_inverse"])
    assert negative > 0.4 * count * GROUPS
    assert state["pairs"] == count * GROUPS
    assert negative <= state["damped_pairs"] <= count * GROUPS
    assert state["skipped_pairs"] == 0


def assert_positive_definite(matrices):
    torch.testing.assert_close(matrices, matrices.mT, rtol=0, atol=1e-9 * float(matrices.abs().max()))
    assert torch.linalg.eigvalsh(matrices).min() > 0


@pytest.mark.parametrize("memory", [None, 3])
def test_an_undamped_pair_satisfies_the_secant_equation(memory):
    method, layer = curvature(memory, mu1=0.0)
    state = method.init(layer)
    method.observe(state, random_samples(), 0.0)
    method.refresh(state, 0.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        s = torch.randn(GROUPS, OUT, dtype=torch.float64, generator=generator)
        y = 2 * s + 0.3 * torch.randn(GROUPS, OUT, dtype=torch.float64, generator=generator)
        method.observe(state, Secant(s, y), 0.0)
        method.refresh(state, 0.0)
        torch.testing.assert_close(method._times_outputs(state, y.unsqueeze(-1)).squeeze(-1), s)
    assert state["damped_pairs"] == 0
    assert state["pairs"] == 5 * GROUPS


def test_a_pair_is_averaged_and_damped_as_published():
    method, layer = curvature(relative_damping=False)
    state = method.init(layer)
    damping, expected = 0.04, torch.eye(OUT, dtype=torch.float64).repeat(GROUPS, 1, 1)
    s = y = torch.zeros(GROUPS, OUT, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    method.observe(state, random_samples(), 0.0)
    for _ in range(6):
        secant = random_secant(generator)
        s, y = 0.9 * s + 0.1 * secant.output_change, 0.9 * y + 0.1 * secant.gradient_change
        method.observe(state, secant, 0.9)
        method.refresh(state, damping)
        for group in range(GROUPS):
            expected[group] = published(expected[group], s[group], y[group], 0.2, damping**0.5)
        torch.testing.assert_close(state["output_change"], s)
        torch.testing.assert_close(state["output_inverse"], expected)


def published(h, s, y, mu1, mu2):
    """Double damping and the BFGS update of one matrix, as in the published code."""
    if s @ y <= mu1 * y @ h @ y:
        theta = (1 - mu1) * y @ h @ y / (y @ h @ y - s @ y)
        s = theta * s + (1 - theta) * h @ y
    if s @ y <= mu2 * s @ s:
        theta = (1 - mu2) * s @ s / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    left = torch.eye(len(s), dtype=s.dtype) - torch.outer(s, y) / (s @ y)
    return left @ h @ left.T + torch.outer(s, s) / (s @ y)


def test_the_inputs_are_inverted_once_and_then_follow_the_hessian_action():
    method, layer = curvature(relative_damping=False, inverse_every=10**9)
    state = method.init(layer)
    first, second = random_samples(0), random_samples(1)
    method.observe(state, first, 0.0)
    method.refresh(state, 0.04)
    identity = torch.eye(IN, dtype=torch.float64)
    inverse = torch.linalg.inv(input_moment(first) + 0.2 * identity)
    torch.testing.assert_close(state["input_inverse"], inverse)
    method.observe(state, second, 0.9)
    method.refresh(state, 0.04)
    damped = 0.9 * input_moment(first) + 0.1 * input_moment(second) + 0.2 * identity
    mean = second.inputs.mean((0, 2))
    for group in range(GROUPS):
        s = inverse[group] @ mean[group]
        expected = published(inverse[group], s, damped[group] @ s, 0.0, 0.0)
        torch.testing.assert_close(state["input_inverse"][group], expected)


def test_with_relative_damping_the_direction_does_not_depend_on_units():
    directions = []
    for inputs, gradients in ((1.0, 1.0), (3.0, 7.0)):
        method, layer = curvature(relative_damping=True)
        state = method.init(layer)
        samples = random_samples()
        method.observe(state, Samples(inputs * samples.inputs, gradients * samples.output_gradients), 0.0)
        method.refresh(state, 0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):  # h is not scaled, so y = G s scales like g^2
            secant = random_secant(generator)
            method.observe(state, Secant(secant.output_change, gradients**2 * secant.gradient_change), 0.9)
            method.refresh(state, 0.1)
        generator.manual_seed(1)
        direction = torch.randn(layer.shape, dtype=torch.float64, generator=generator)
        directions.append(method.precondition(state, direction, 0.1) * inputs**2 * gradients**2)
    torch.testing.assert_close(*directions)


def test_the_limited_memory_form_equals_the_dense_matrix_of_the_same_pairs():
    """While no pair has been dropped; then the oldest pair is dropped first."""
    (dense, layer), (limited, _) = curvature(relative_damping=False), curvature(8, relative_damping=False)
    states = dense.init(layer), limited.init(layer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        secant = random_secant(generator)
        for method, state in zip((dense, limited), states, strict=True):
            method.observe(state, secant, 0.5)
            method.refresh(state, 0.1)
        torch.testing.assert_close(output_matrix(limited, states[1]), states[0]["output_inverse"])
    assert states[0]["damped_pairs"] == states[1]["damped_pairs"] > 0
    kept = limited._scaled_pairs(states[1])
    limited.observe(states[1], random_secant(generator), 0.5)
    limited.refresh(states[1], 0.1)
    torch.testing.assert_close(limited._scaled_pairs(states[1])[0][:, :-1], kept[0][:, 1:])


@pytest.mark.parametrize("memory", [None, 3])
def test_the_dense_preconditioner_is_the_kronecker_product(memory):
    method, layer = curvature(memory)
    state = method.init(layer)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        method.observe(state, random_samples(step), 0.9)
        method.observe(state, random_secant(generator), 0.9)
        method.refresh(state, 0.1)
    size = layer.shape.numel()
    units = torch.eye(size, dtype=torch.float64).reshape(size, *layer.shape)
    found = torch.stack([method.precondition(state, unit, 0.1).flatten() for unit in units])
    blocks = zip(output_matrix(method, state), state["input_inverse"], strict=True)
    torch.testing.assert_close(found, torch.block_diag(*(torch.kron(g, a) for g, a in blocks)))


@pytest.mark.parametrize("memory", [None, 3])
def test_stacked_layers_are_refreshed_and_preconditioned_as_single_ones(memory):
    method, layer = curvature(memory)
    states = [method.init(layer) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for index, state in enumerate(states):
            method.observe(state, random_samples(10 * step + index), 0.9)
            method.observe(state, random_secant(generator), 0.9)
        stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        method.refresh(stack, 0.1)
        for index, state in enumerate(states):
            method.refresh(state, 0.1)
            for name, tensor in state.items():
                torch.testing.assert_close(stack[name][index], tensor)
    directions = torch.randn(3, *layer.shape, dtype=torch.float64)
    stacked = method.precondition(stack, directions, 0.1)
    for index, state in enumerate(states):
        torch.testing.assert_close(stacked[index], method.precondition(state, directions[index], 0.1))


@pytest.mark.parametrize("memory", [None, 3])
def test_a_nan_pair_is_counted_and_changes_nothing(memory):
    method, layer = curvature(memory)
    state = method.init(layer)
    generator = torch.Generator().manual_seed(0)
    method.observe(state, random_samples(), 0.0)
    method.observe(state, random_secant(generator), 0.9)
    method.refresh(state, 0.1)
    before = {name: tensor.clone() for name, tensor in state.items()}
    bad = torch.full((GROUPS, OUT), torch.nan, dtype=torch.float64)
    method.observe(state, Secant(bad, bad), 0.9)
    method.refresh(state, 0.1)
    assert state["skipped_pairs"] == 1
    assert state["pairs"] == before["pairs"]
    for name in ("output_change", "gradient_change"):
        assert torch.equal(state[name], before[name])
    torch.testing.assert_close(output_matrix(method, state), output_matrix(method, before))


def test_a_pair_that_overflows_changes_nothing_and_is_not_counted_as_damped():
    method, layer = curvature()
    method = replace(method, relative_damping=False, dtype=torch.float32)
    state = {name: t.float() if t.is_floating_point() else t for name, t in method.init(layer).items()}
    state["output_inverse"].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    state["input_moment"].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    state["refreshes"].fill_(1)
    state["output_change"].fill_(1.0)
    state["gradient_change"].fill_(1e30)  # y^T H y overflows in float32
    state["pair_is_new"].fill_(True)
    before = state["output_inverse"].clone()
    method.refresh(state, 0.1)
    assert torch.equal(state["output_inverse"], before)
    assert state["damped_pairs"] == 0


def test_a_pair_is_used_only_once():
    method, layer = curvature()
    state = method.init(layer)
    method.observe(state, random_samples(), 0.0)
    method.observe(state, random_secant(torch.Generator()), 0.9)
    for _ in range(3):
        method.refresh(state, 0.1)
    assert state["pairs"] == GROUPS
    assert state["refreshes"] == 3


# ---- through the optimizer ----


def problem(kind):
    torch.manual_seed(0)
    if kind == "linear":
        module, inputs = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 5)
    else:
        module = nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        inputs = torch.randn(8, 2, 4, 4)
    return module.double(), inputs.double(), torch.randint(3, (8,))


def closure_of(module, optimizer, inputs, targets):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), targets)
        loss.backward()
        return loss

    return closure


def per_sample(module, inputs, targets):
    """h and g of the last layer of `problem("linear")`, and its inputs."""
    a = module[:-1](inputs).detach()
    h = module[-1](a).detach()
    g = h.softmax(-1) - nn.functional.one_hot(targets, 3)
    return torch.cat((a, torch.ones(len(a), 1).double()), dim=1), h, g


@pytest.mark.parametrize("bias_input", ["one", "mean"])
@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
def test_two_steps_equal_the_published_formula(method, bias_input):
    module, inputs, targets = problem("linear")
    optimizer = method(module, lr=0.1, damping=0.09, statistics_every=1, bias_input=bias_input, **PUBLISHED)
    last = module[-1]
    outputs_inverse, momentum = torch.eye(3).double(), torch.zeros(3, 5).double()
    s = y = torch.zeros(3).double()
    for step in range(2):
        weight = torch.cat((last.weight, last.bias.unsqueeze(1)), dim=1).detach()
        a, h, g = per_sample(module, inputs, targets)
        if step == 0:
            moment = a.T @ a / len(a)
            damped = moment + 0.3 * torch.eye(5)
            inputs_inverse = torch.linalg.inv(damped)
        else:
            decay = 1 - 0.1 / (1 - 0.9**2)
            damped = decay * moment + (1 - decay) * (a.T @ a / len(a)) + 0.3 * torch.eye(5)
            mean = a.mean(0)
            if bias_input == "mean":
                mean = torch.cat((mean[:4], mean[:4].mean(0, keepdim=True)))
            action = inputs_inverse @ mean
            inputs_inverse = published(inputs_inverse, action, damped @ action, 0.0, 0.0)
            outputs_inverse = published(outputs_inverse, s, y, 0.2, 0.3)
        momentum = 0.9 * momentum + g.T @ a / len(a)
        optimizer.step(closure_of(module, optimizer, inputs, targets))
        expected = weight - 0.1 * outputs_inverse @ momentum @ inputs_inverse
        torch.testing.assert_close(torch.cat((last.weight, last.bias.unsqueeze(1)), dim=1), expected)
        _, h_after, g_after = per_sample(module, inputs, targets)
        s = 0.9 * s + 0.1 * (h_after - h).mean(0)
        y = 0.9 * y + 0.1 * (g_after - g).mean(0)
        torch.testing.assert_close(optimizer.state[last.weight]["gradient_change"][0], y)
    assert optimizer.diagnostics()["weights"]["2.weight"]["pairs"] == 1


def test_the_scale_of_the_loss_does_not_change_the_steps():
    ends = []
    for scale in (1, 1024):
        module, inputs, targets = problem("linear")
        optimizer = KBFGS(module, lr=1e-2, statistics_every=1)
        optimizer.loss_scale = lambda scale=scale: scale

        def closure(module=module, optimizer=optimizer, scale=scale, inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(inputs), targets)
            (scale * loss).backward()
            for parameter in module.parameters():
                parameter.grad /= scale
            return loss

        for _ in range(8):
            optimizer.step(closure)
        ends.append([parameter.detach() for parameter in module.parameters()])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
def test_maximizing_the_negative_loss_is_minimizing_the_loss(method):
    ends = []
    for sign in (1, -1):
        module, inputs, targets = problem("linear")
        optimizer = method(module, lr=1e-2, statistics_every=1, maximize=sign < 0)

        def closure(module=module, optimizer=optimizer, sign=sign, inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = sign * nn.functional.cross_entropy(module(inputs), targets)
            loss.backward()
            return loss

        for _ in range(8):
            optimizer.step(closure)
        ends.append([parameter.detach() for parameter in module.parameters()])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
def test_the_loss_falls_and_a_resumed_run_equals_an_uninterrupted_one(method, kind):
    module, inputs, targets = problem(kind)
    optimizer = method(module, lr=1e-2, statistics_every=2)
    losses = [optimizer.step(closure_of(module, optimizer, inputs, targets)).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    again = copy.deepcopy(module)
    resumed = method(again, lr=1e-2, statistics_every=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.diagnostics()["weights"] == optimizer.diagnostics()["weights"]
    for _ in range(5):
        optimizer.step(closure_of(module, optimizer, inputs, targets))
        resumed.step(closure_of(again, resumed, inputs, targets))
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("asked", "every", "expected"), [(20, 2, 20), (3, 2, 2), (10, 4, 8), (1, 4, 4)])
def test_describe_says_how_often_the_input_matrix_is_inverted(asked, every, expected):
    optimizer = KBFGS(nn.Linear(3, 2), inverse_every=asked, statistics_every=every)
    assert f"H_a inverted every {expected} steps" in str(optimizer.describe())


def test_diagnostics_count_pairs_and_describe_names_weights_without_curvature():
    module, inputs, targets = problem("convolution")
    optimizer = KBFGS(module, lr=1e-2, statistics_every=1)
    for _ in range(4):
        optimizer.step(closure_of(module, optimizer, inputs, targets))
    counts = optimizer.diagnostics()["weights"]
    assert counts["0.weight"]["pairs"] == 3 * 2  # two groups; the latest pair is used in the next step
    assert counts["4.weight"]["pairs"] == 3
    assert 0 <= counts["4.weight"]["damped_pairs"] <= 3
    assert set(counts["2.weight"]) == {"step", "observations"}
    structures = {layer.name: layer.structure for layer in optimizer.describe().layers}
    assert structures["0.weight"] == structures["4.weight"] == "Kronecker BFGS"
    assert structures["2.weight"] == structures["2.bias"] == "first-order step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
def test_rounding_errors_before_a_batch_norm_are_skipped_and_counted(method, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 3)
    ).to(dtype)
    inputs, targets = torch.randn(64, 2, 6, 6, dtype=dtype), torch.randint(3, (64,))
    optimizer = method(module, lr=1e-2, statistics_every=1)
    for _ in range(6):
        optimizer.step(closure_of(module, optimizer, inputs, targets))
    counts = optimizer.diagnostics()["weights"]
    normed, free = counts["0.weight"], counts["3.weight"]
    assert (normed["pairs"], normed["skipped_pairs"]) == (0, 6)
    assert (free["pairs"], free["skipped_pairs"]) == (5, 0)
    state = optimizer.state[module[0].weight]
    assert not state["gradient_change"].any()


def test_max_dim_limits_inputs_and_of_kbfgs_also_outputs():
    module = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))
    structures = {
        method: [layer.structure for layer in method(module, max_dim=5).describe().layers]
        for method in (KBFGS, KBFGSL)
    }
    assert structures[KBFGS] == ["first-order step", "first-order step"]
    assert structures[KBFGSL] == ["Kronecker L-BFGS", "first-order step"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu1": 1.0}, "mu1 must be"),
        ({"pairs": 0}, "pairs must be"),
        ({"bias_input": "zero"}, "bias_input must be"),
        ({"curvature_dtype": torch.bfloat16}, "float32, float64 or None"),
        ({"adaptive_damping": 2}, "adaptive_damping must be"),
    ],
)
def test_invalid_arguments_raise_an_error_with_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        KBFGSL(nn.Linear(3, 2), **options)


def test_bare_tensors_raise_an_error_that_asks_for_the_module():
    with pytest.raises(ValueError, match=r"nn\.Module"):
        KBFGS(nn.Linear(3, 2).parameters())
    assert {"kbfgs", "kbfgsl"} <= minifisher.METHODS.keys()


def test_a_pair_is_damped_in_units_of_the_mean_squared_output_gradient():
    """With y / mean g^2 in place of y, the pair is damped as published."""
    method, layer = curvature(relative_damping=True)
    state = method.init(layer)
    samples = random_samples()
    method.observe(state, samples, 0.0)
    secant = random_secant(torch.Generator().manual_seed(0))
    method.observe(state, secant, 0.0)
    method.refresh(state, 0.04)
    means = samples.output_gradients.square().mean((0, 2, 3))
    units = 0.5 * (means + means.mean())
    for group in range(GROUPS):
        s, y = unit(secant.output_change[group], secant.gradient_change[group] / units[group])
        s, y, _ = double_damped(s, y, y, 0.2, 0.2)
        expected = published(torch.eye(OUT).double(), s, y, 0.0, 0.0) / units[group]
        torch.testing.assert_close(state["output_inverse"][group], expected)


def test_the_inputs_are_inverted_exactly_every_so_many_refreshes():
    method, layer = curvature(relative_damping=False, inverse_every=2)
    state, identity = method.init(layer), torch.eye(IN, dtype=torch.float64)
    for refresh in range(5):
        method.observe(state, random_samples(refresh), 0.5 if refresh else 0.0)
        method.refresh(state, 0.04)
        exact = torch.linalg.inv(state["input_moment"] + 0.2 * identity)
        assert torch.allclose(state["input_inverse"], exact, rtol=1e-9, atol=0) == (refresh % 2 == 0), refresh


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_pair_whose_output_change_alone_is_not_finite_is_skipped(bad):
    method, layer = curvature(relative_damping=False)
    state, secant = method.init(layer), random_secant(torch.Generator().manual_seed(0))
    secant.output_change[0, 0] = bad
    method.observe(state, secant, 0.5)
    assert state["skipped_pairs"] == 1
    assert (state["output_change"] == 0).all()
    assert (state["gradient_change"] == 0).all()


@pytest.mark.parametrize("memory", [None, 3])
def test_a_pair_of_negative_curvature_is_not_taken(memory):
    method, layer = curvature(memory, relative_damping=False)
    state, scale = method.init(layer), torch.full((GROUPS,), 4.0, dtype=torch.float64)
    method._start_outputs(state, scale)
    change = torch.ones(GROUPS, OUT, dtype=torch.float64)
    assert method._learn(state, change, 2 * change, scale).all()
    before = copy.deepcopy(state)
    assert not method._learn(state, change, -change, scale).any()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_the_limited_memory_starts_from_the_latest_scale():
    method, layer = curvature(3, relative_damping=True)
    state, change = method.init(layer), torch.ones(GROUPS, OUT, dtype=torch.float64)
    for size in (4.0, 5.0):
        method._learn(state, change, change, torch.full((GROUPS,), size, dtype=torch.float64))
    assert (state["initial_inverse"] == 1 / 5).all()


def test_the_period_of_exact_inverses_is_counted_in_refreshes():
    layer = grouped_layer()
    optimizer = KBFGS(layer.modules[0], statistics_every=2, inverse_every=10, fold_bias=False)
    assert optimizer.plan(layer, optimizer.param_groups[0]).curvature.inverse_every == 5
