"""MBF against dense matrices in float64, computed by autograd one sample at a time."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifisher import MBF
from minifisher import optimizer as optimizer_module
from minifisher.kernels.packed import Tiling
from minifisher.methods.mbf_packed import PackedBlocks
from minifisher.statistics.layers import layers_of
from tests.helpers import (
    NETS,
    cross_entropy,
    dense_empirical_fisher,
    dense_exact_fisher,
    joined,
    per_sample_gradients,
    problem,
)

CLOSE = {"rtol": 1e-7, "atol": 1e-12}
FOREVER = 10**6

# (conv_blocks, share, block_size)
CUTS = [
    ("row", "row", 1000),
    ("row", "layer", 1000),
    ("row", "row", 2),
    ("row", "layer", 5),
    ("kernel", "row", 1000),
    ("kernel", "row", 2),
    ("kernel", "row", 1),
    ("row", "row", 1),
]


def asked(cut):
    return dict(zip(("conv_blocks", "share", "block_size"), cut, strict=True))


def cut_of(shape, conv_blocks, share, block_size):
    """The number of rows, their length, the width of a block, and whether rows share their blocks."""
    if len(shape) < 2:
        return shape.numel(), 1, 1, False
    if len(shape) > 2 and conv_blocks == "kernel":
        rows, length, share = shape[0] * shape[1], shape[2:].numel(), "row"
    else:
        rows, length = shape[0], shape[1:].numel()
    width = min(block_size, length)
    return rows, length, width, share == "layer" and width > 1


def expected_blocks(dense, shape, *cut):
    """For each block of a row, [rows | 1, width, width] from the dense matrix; the last may be narrower."""
    rows, length, width, shared = cut_of(shape, *cut)
    blocks = []
    for start in range(0, length, width):
        ends = [(r * length + start, r * length + min(start + width, length)) for r in range(rows)]
        stack = torch.stack([dense[begin:end, begin:end] for begin, end in ends])
        blocks.append(stack.mean(0, keepdim=True) if shared else stack)
    return blocks


def block_diagonal(blocks, rows):
    """The dense matrix with these diagonal blocks; shared ones are repeated for every row."""
    each = [[block[r % len(block)] for block in blocks] for r in range(rows)]
    return torch.block_diag(*itertools.chain.from_iterable(each))


def assert_blocks(fisher, expected):
    """`fisher` [rows | 1, blocks, width, width] holds the expected blocks, and zeros in the padding."""
    assert fisher.shape[1] == len(expected)
    for index, block in enumerate(expected):
        width = block.shape[-1]
        largest = block.abs().max()
        torch.testing.assert_close(
            fisher[:, index, :width, :width], block, rtol=1e-6, atol=1e-9 * largest.item()
        )
        assert not fisher[:, index, width:].any()
        assert not fisher[:, index, :, width:].any()


def fisher_of(opt, layer, rows=None, curvature=None):
    """`fisher` of the state as [rows | 1, blocks, width, width], unpacked if it is packed."""
    fisher = opt.state[layer.weight]["fisher"]
    curvature = curvature or opt.plan(layer, opt.param_groups[0]).curvature
    if not isinstance(curvature, PackedBlocks):
        return fisher
    blocks = Tiling(curvature.reading).unpack(fisher)
    return blocks.reshape(rows or len(blocks), -1, *blocks.shape[-2:])


def layers(module, fold_bias=False):
    return layers_of(module, ("linear",) if fold_bias else ())


def dense_gradient_fisher(layer):
    gradient = joined(layer, {p: p.grad[None] for p in layer.parameters}).flatten()
    return torch.outer(gradient, gradient)


def observe_once(case, **options):
    """An optimizer after one step with lr=0."""
    opt = MBF(case.module, lr=0.0, statistics_every=1, **options)
    case.mean_loss().backward()
    opt.step()
    return opt


# ---- what is observed ----


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_gradient_blocks_are_blocks_of_the_outer_product(name, cut):
    case = problem(name)
    opt = observe_once(case, **asked(cut))
    for layer in layers(case.module):
        dense = dense_gradient_fisher(layer)
        assert_blocks(
            fisher_of(opt, layer, cut_of(layer.shape, *cut)[0]), expected_blocks(dense, layer.shape, *cut)
        )


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_empirical_blocks_are_blocks_of_the_dense_fisher(name, fold_bias):
    case = problem(name)
    optimizers = [
        MBF(case.module, lr=0.0, fisher="empirical", fold_bias=fold_bias, statistics_every=1, **asked(cut))
        for cut in CUTS
    ]
    case.mean_loss().backward()
    for opt, cut in zip(optimizers, CUTS, strict=True):
        opt.step()
        for layer in layers(case.module, fold_bias):
            dense = dense_gradient_fisher(layer)
            if layer.reads_samples:
                dense = dense_empirical_fisher(layer, case.module, case.loss, case.inputs, case.targets)
            assert_blocks(
                fisher_of(opt, layer, cut_of(layer.shape, *cut)[0]), expected_blocks(dense, layer.shape, *cut)
            )


@pytest.mark.parametrize("name", ["linear", "conv2d stride", "twice on tokens", "tied", "attention"])
def test_shared_blocks_equal_the_mean_of_a_loop_over_samples_and_rows(name):
    case = problem(name)
    opt = observe_once(case, fisher="empirical", **asked(("row", "layer", 3)))
    gradients = per_sample_gradients(case.module, case.loss, case.inputs, case.targets)
    for layer in (layer for layer in layers(case.module) if layer.reads_samples):
        rows = gradients[layer.weight].flatten(2)[..., :3]  # [n, out, 3]
        mean = sum(torch.outer(d, d) for sample in rows for d in sample) / rows.shape[0] / rows.shape[1]
        torch.testing.assert_close(opt.state[layer.weight]["fisher"][0, 0, : len(mean), : len(mean)], mean)


def inject_labels(monkeypatch, labels):
    """Replace drawn labels by these, in a loss that is summed over samples."""
    plain = nn.functional.nll_loss

    def summed(outputs, _drawn, reduction):
        assert reduction == "sum"
        return plain(outputs.log_softmax(-1), labels, reduction=reduction)

    monkeypatch.setattr(nn.functional, "cross_entropy", summed)


CLASSIFIERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3, 3)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), (2, 2, 3)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
        ),
        (3, 2, 2, 3),
    ),
}


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_expectation_of_sampled_blocks_is_the_exact_fisher(name, fold_bias, monkeypatch):
    torch.manual_seed(0)
    make, shape = CLASSIFIERS[name]
    module, inputs = make().double(), torch.randn(shape, dtype=torch.float64)
    outputs = module(inputs).detach()
    probabilities = outputs.reshape(-1, outputs.shape[-1]).softmax(-1)
    options = {"lr": 0.0, "fisher": "sampled", "fold_bias": fold_bias, "statistics_every": 1}
    optimizers = [MBF(module, curvature_decay=0.0, **options, **asked(cut)) for cut in CUTS]
    expectation = {}
    for labels in itertools.product(range(probabilities.shape[1]), repeat=len(probabilities)):
        drawn = torch.tensor(labels)[:, None]
        chance = probabilities.gather(1, drawn).prod()
        inject_labels(monkeypatch, drawn[:, 0])
        outputs = module(inputs)
        for opt in optimizers:
            opt.observe(outputs)
        outputs.sum().backward()
        for index, opt in enumerate(optimizers):
            opt.step()
            for layer in layers(module, fold_bias):
                seen = chance * fisher_of(opt, layer)
                expectation[index, layer.weight] = expectation.get((index, layer.weight), 0) + seen
    for layer in (layer for layer in layers(module, fold_bias) if layer.reads_samples):
        dense = dense_exact_fisher(layer, module, "categorical", inputs)
        for index, cut in enumerate(CUTS):
            expected = expected_blocks(dense, layer.shape, *cut)
            assert_blocks(expectation[index, layer.weight], expected)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_sampled_blocks_over_many_steps_approach_the_exact_fisher(likelihood):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = torch.randn(40, 3, dtype=torch.float64)
    opt = MBF(
        module,
        lr=0.0,
        fisher="sampled",
        statistics_every=1,
        curvature_decay=1 - 1e-9,
        **asked(("row", "row", 9)),
    )
    for _ in range(300):
        opt.observe(module(inputs), likelihood)
        opt.step()
        for parameter in module.parameters():  # a gradient of zero is no observation
            parameter.grad = torch.ones_like(parameter)
    for layer in (layer for layer in layers(module) if layer.reads_samples):
        dense = dense_exact_fisher(layer, module, likelihood, inputs)
        expected = expected_blocks(dense, layer.shape, "row", "row", 9)[0]
        difference = fisher_of(opt, layer)[:, 0] - expected
        assert difference.norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_the_average_is_bias_corrected(fisher):
    case = problem("linear")
    options = {"curvature_decay": 0.7, **asked(("row", "row", 4))}
    opt = MBF(case.module, lr=0.0, fisher=fisher, statistics_every=1, **options)
    layer = layers(case.module)[0]
    average, weight = 0.0, 0.0
    for targets in ([0, 1, 2, 0, 1], [2, 2, 1, 0, 0], [1, 1, 1, 2, 0]):
        opt.zero_grad()
        labels = torch.tensor(targets)
        case.loss(case.module(case.inputs), labels).backward()
        opt.step()
        fresh = (
            dense_gradient_fisher(layer)
            if fisher == "gradient"
            else dense_empirical_fisher(layer, case.module, case.loss, case.inputs, labels)
        )
        average, weight = 0.7 * average + 0.3 * fresh, 0.7 * weight + 0.3
        expected = expected_blocks(average / weight, layer.shape, "row", "row", 4)
        assert_blocks(fisher_of(opt, layer), expected)


@pytest.mark.parametrize(("decay", "scale"), [(0.9, 1.0), (1 - 1e-8, 1e4)])  # of the average; of the loss
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_a_warm_start_averages_over_all_batches_and_later_steps_decay_that_average(fisher, decay, scale):
    case = problem("linear", count=6)
    opt = MBF(
        case.module,
        lr=0.0,
        fisher=fisher,
        statistics_every=1,
        curvature_decay=decay,
        **asked(("row", "layer", 9)),
    )
    loader = [(case.inputs[:2], case.targets[:2]), (case.inputs[2:], case.targets[2:])]
    before = copy.deepcopy(case.module.state_dict())
    opt.warm_start(case.module, loader, case.loss)
    twin = problem("linear", count=6)  # has no hooks of the optimizer
    layer, own = layers(case.module)[0], layers(twin.module)[0]

    def dense(inputs, targets):
        twin.module.zero_grad()
        twin.loss(twin.module(inputs), targets).backward()
        if fisher == "gradient":
            return dense_gradient_fisher(own)
        return dense_empirical_fisher(own, twin.module, twin.loss, inputs, targets)

    mean = (dense(*loader[0]) + dense(*loader[1])) / 2
    assert_blocks(opt.state[layer.weight]["fisher"], expected_blocks(mean, layer.shape, "row", "layer", 9))
    assert all(torch.equal(value, before[name]) for name, value in case.module.state_dict().items())
    fresh = dense(case.inputs, case.targets) * scale**2
    (case.mean_loss() * scale).backward()
    opt.step()
    expected = expected_blocks(decay * mean + (1 - decay) * fresh, layer.shape, "row", "layer", 9)
    assert_blocks(fisher_of(opt, layer), expected)


LOSSES_OF = {
    "categorical": nn.functional.cross_entropy,
    "bernoulli": nn.functional.binary_cross_entropy_with_logits,
    "gaussian": lambda means, labels: 0.5 * (means - labels).square().mean(),
}


@pytest.mark.parametrize("likelihood", LOSSES_OF)
def test_a_warm_start_with_labels_of_the_model_approaches_the_exact_fisher_over_n(likelihood):
    """With labels y_n ~ p(. | z_n) the gradients D_n are independent of mean 0: E[D D^T] = F / N."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    per_output = 1 if likelihood == "categorical" else 3  # the others average over the three outputs, too
    opt = MBF(module, fisher="gradient", **asked(("row", "row", 9)))

    def loss(outputs, labels):
        return per_output * LOSSES_OF[likelihood](outputs, labels)

    nowhere = torch.full((5, 3), float("nan"))  # targets that would leave nothing finite
    opt.warm_start(module, [(inputs, nowhere)] * 3000, loss, likelihood, labels="model")
    assert not opt.skipped_steps
    for layer in (layer for layer in layers(module) if layer.reads_samples):
        dense = dense_exact_fisher(layer, module, likelihood, inputs) / len(inputs)
        expected = expected_blocks(dense, layer.shape, "row", "row", 9)[0]
        difference = fisher_of(opt, layer)[:, 0] - expected
        assert difference.norm() < 0.05 * expected.norm()


def test_a_warm_start_with_labels_of_the_model_reads_samples_of_those_labels(monkeypatch):
    case = problem("linear")
    drawn = torch.tensor([2, 0, 1, 1, 0])
    monkeypatch.setattr(optimizer_module, "drawn_labels", lambda outputs, likelihood: drawn)
    opt = MBF(case.module, fisher="empirical", **asked(("row", "row", 9)))
    opt.warm_start(case.module, [(case.inputs, case.targets)], case.loss, labels="model")
    layer = layers(case.module)[0]
    dense = dense_empirical_fisher(layer, case.module, case.loss, case.inputs, drawn)
    assert_blocks(fisher_of(opt, layer), expected_blocks(dense, layer.shape, "row", "row", 9))


def test_labels_of_a_warm_start_are_of_the_data_or_of_the_model():
    case = problem("linear")
    with pytest.raises(ValueError, match="labels must be one of 'data', 'model', got 'sampled'"):
        MBF(case.module).warm_start(case.module, [], case.loss, labels="sampled")


def test_the_statistics_memory_changes_nothing():
    for name in ("linear on tokens", "conv2d unequal", "conv2d depthwise", "twice", "conv3d"):
        case = problem(name, count=7)
        optimizers = [
            MBF(case.module, lr=0.0, fisher="empirical", statistics_memory=memory, **asked(CUTS[3]))
            for memory in (1, 3000, 2**28)
        ]
        case.mean_loss().backward()
        for opt in optimizers:
            opt.step()
        for parameter in case.module.parameters():
            one, some, whole = (opt.state[parameter]["fisher"] for opt in optimizers)
            torch.testing.assert_close(one, whole, **CLOSE)
            torch.testing.assert_close(some, whole, **CLOSE)


# ---- the preconditioner ----


def dense_preconditioners(opt, module, fold_bias=False):
    """Layer -> [d, d], whose columns are the steps of unit gradients (graft=None, momentum=0, lr=1)."""
    found = {layer: [] for layer in layers(module, fold_bias)}
    sizes = {layer: layer.shape.numel() for layer in found}
    for index in range(max(sizes.values())):
        before = {p: p.detach().clone() for p in module.parameters()}
        for layer, size in sizes.items():
            unit = identity(size)[min(index, size - 1)].view(layer.shape)
            for parameter, part in zip(layer.parameters, layer.split(unit), strict=True):
                parameter.grad = part.clone()
        opt.step()
        for layer, size in sizes.items():
            if index < size:
                moved = {p: (before[p] - p.detach())[None] for p in layer.parameters}
                found[layer].append(joined(layer, moved).flatten())
    return {layer: torch.stack(columns, dim=1) for layer, columns in found.items()}


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def matrix_power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def damped_powers(blocks, dampings, exponent):
    """(F + lambda I)^exponent of every block, one at a time."""
    unit = identity(blocks.shape[-1])
    pairs = zip(blocks, dampings, strict=True)
    return torch.stack([matrix_power(fisher + damping * unit, exponent) for fisher, damping in pairs])


def relative(blocks, shape, damping):
    """For each block of a row, [rows | 1]: `damping` times the average of two means, of block and layer."""
    diagonals = [block.diagonal(dim1=1, dim2=2) for block in blocks]
    layer = torch.cat([d.flatten() for d in diagonals]).mean()
    return [damping * (d.mean(1) + layer) / 2 for d in diagonals]


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_direction_is_the_damped_power_of_every_block(cut, relative_damping, power):
    for name, fold_bias in [("linear", True), ("conv2d groups", False), ("conv1d", False)]:
        case = problem(name)
        opt = MBF(
            case.module,
            lr=1.0,
            momentum=0.0,
            graft=None,
            fisher="empirical",
            statistics_every=FOREVER,
            power=power,
            damping=0.03,
            relative_damping=relative_damping,
            fold_bias=fold_bias,
            **asked(cut),
        )
        expected = {}
        case.mean_loss().backward()
        for layer in layers(case.module, fold_bias):
            dense = dense_gradient_fisher(layer)
            if layer.reads_samples:
                dense = dense_empirical_fisher(layer, case.module, case.loss, case.inputs, case.targets)
            blocks = expected_blocks(dense, layer.shape, *cut)
            lambdas = [torch.full((len(b),), 0.03, dtype=b.dtype) for b in blocks]
            if relative_damping:
                lambdas = relative(blocks, layer.shape, 0.03)
            powers = [damped_powers(b, ms, -power) for b, ms in zip(blocks, lambdas, strict=True)]
            rows = sum(b.shape[-1] for b in powers)
            expected[layer.weight] = block_diagonal(powers, layer.shape.numel() // rows)
        opt.step()
        measured = dense_preconditioners(opt, case.module, fold_bias)
        for layer, dense in measured.items():
            scale = expected[layer.weight].abs().max().item()
            torch.testing.assert_close(dense, expected[layer.weight], rtol=1e-5, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention"])
def test_with_large_damping_the_direction_is_the_momentum(name):
    case = problem(name)
    options = {"relative_damping": False, "graft": None, "nesterov": False, "statistics_every": 1}
    opt = MBF(case.module, lr=1e9, damping=1e9, **options)
    before = {p: p.detach().clone() for p in case.module.parameters()}
    case.mean_loss().backward()
    opt.step()
    for parameter, old in before.items():
        torch.testing.assert_close(old - parameter.detach(), parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"share": "row", "block_size": 3}, {"output_power": 1.0, "block_size": 1}], ids=str
)
def test_a_dead_unit_does_not_move_and_is_damped_like_its_layer(options):
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    opt = MBF([weight], lr=1.0, graft=None, **options)
    weight.grad = torch.randn(4, 3, dtype=torch.float64)
    weight.grad[2] = 0
    opt.step()
    assert torch.equal(weight[2], torch.ones(3, dtype=torch.float64))
    weight.grad[2] = 1e-3  # its first gradient comes before the next statistics
    opt.step()
    assert (weight[2] - 1).abs().max() < 1


def test_one_by_one_blocks_follow_the_scalar_formula():
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    opt = MBF([weight], block_size=1, share="row", lr=0.5, momentum=0.0, graft=None, damping=0.01)
    gradient = weight.grad = torch.randn(3, 4, dtype=torch.float64)
    opt.step()
    square = gradient**2
    expected = -0.5 * gradient / (square + 0.01 * (square + square.mean()) / 2)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_kernel_of_one_entry_is_elementwise():
    convolution = nn.Conv2d(3, 4, 1, bias=False).double()
    before = convolution.weight.detach().clone()
    options = {"damping": 0.01, "relative_damping": False, "momentum": 0.0, "graft": None}
    opt = MBF(convolution, lr=1.0, conv_blocks="kernel", **options)
    gradient = convolution.weight.grad = torch.randn_like(before)
    opt.step()
    torch.testing.assert_close(before - convolution.weight.detach(), gradient / (gradient**2 + 0.01))


def test_power_one_half_with_one_by_one_blocks_is_adam():
    weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    twin = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    ours = MBF(
        [weight],
        lr=1e-2,
        momentum=0.0,
        power=0.5,
        damping=0.0,
        relative_damping=False,
        graft=None,
        block_size=1,
        share="row",
        curvature_decay=0.9,
        statistics_every=1,
    )
    theirs = torch.optim.Adam([twin], lr=1e-2, betas=(0.0, 0.9), eps=0.0)
    for _ in range(5):
        weight.grad = torch.randn(5, 3, dtype=torch.float64)
        twin.grad = weight.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(weight, twin)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 7), max_size=5).filter(lambda shape: math.prod(shape) < 150),
    width=st.integers(1, 9),
    share=st.sampled_from(["row", "layer"]),
    conv_blocks=st.sampled_from(["row", "kernel"]),
)
def test_the_direction_equals_the_dense_formula_for_any_shape_and_cut(shape, width, share, conv_blocks):
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    cut = (conv_blocks, share, width)
    options = {"momentum": 0.0, "graft": None, "damping": 0.3, "relative_damping": False}
    opt = MBF([weight], lr=1.0, **options, **asked(cut))
    generator = torch.Generator().manual_seed(math.prod(shape))
    gradient = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight.grad = gradient.clone()
    opt.step()
    dense = torch.outer(gradient.flatten(), gradient.flatten())
    blocks = expected_blocks(dense, weight.shape, *cut)
    fisher = block_diagonal(blocks, weight.numel() // sum(b.shape[-1] for b in blocks))
    damped = fisher + 0.3 * identity(weight.numel())
    expected = -torch.linalg.solve(damped, gradient.flatten()).view(weight.shape)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_block_size_above_the_length_of_a_row_does_not_cut():
    results = []
    for width in (7, 8, 1000):
        case = problem("linear", seed=1)
        opt = MBF(case.module, block_size=width, statistics_every=1)
        for _ in range(3):
            opt.zero_grad()
            case.mean_loss().backward()
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in case.module.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


# ---- whole steps ----

RECIPES = {
    "published": {},
    "decoupled decay": {"weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "root": {"power": 0.5},
    "per sample": {"fisher": "empirical"},
    "stale": {"statistics_every": 2, "inverse_every": 4, "jitter": False},
    "no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True},
    "upwards": {"maximize": True},
}


def refreshes(step, statistics_every, inverse_every):
    """Whether inverses are recomputed in this step; as published, at first with every observation."""
    return step % (statistics_every if step < inverse_every else inverse_every) == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_steps_equal_the_dense_formula(name, recipe):
    case, twin = problem(name), problem(name)
    cut = ("kernel", "row", 3)
    options = {
        "lr": 0.02,
        "momentum": 0.9,
        "nesterov": False,
        "curvature_decay": 0.8,
        "damping": 0.1,
        "power": 1.0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": True,
        "fisher": "gradient",
        "maximize": False,
        "statistics_every": 1,
        "inverse_every": 1,
        **RECIPES[recipe],
    }
    opt = MBF(case.module, relative_damping=False, graft=None, **options, **asked(cut))
    own = layers(twin.module)
    momentum = dict.fromkeys(own, 0.0)
    average, weight = dict.fromkeys(own, 0.0), 0.0
    fisher = dict(average)
    for step in range(9):
        case.inputs.mul_(1.05)  # the batches differ
        twin.inputs.mul_(1.05)
        opt.zero_grad()
        case.mean_loss().backward()
        opt.step()

        twin.module.zero_grad()
        twin.mean_loss().backward()
        if step % options["statistics_every"] == 0:
            weight = 0.8 * weight + 0.2
            for layer in own:
                fresh = dense_gradient_fisher(layer)
                if options["fisher"] == "empirical" and layer.reads_samples:
                    fresh = dense_empirical_fisher(layer, twin.module, twin.loss, twin.inputs, twin.targets)
                average[layer] = 0.8 * average[layer] + 0.2 * fresh
        for layer in own:
            blocks = expected_blocks(average[layer] / weight, layer.shape, *cut)
            rows = layer.shape.numel() // sum(b.shape[-1] for b in blocks)
            if refreshes(step, options["statistics_every"], options["inverse_every"]):
                fisher[layer] = block_diagonal(blocks, rows) + 0.1 * identity(layer.shape.numel())
            old = layer.weight.detach().flatten()
            gradient = layer.weight.grad.flatten() * (-1 if options["maximize"] else 1)
            if not options["decoupled_weight_decay"]:
                gradient = gradient + options["weight_decay"] * old
            momentum[layer] = options["momentum"] * momentum[layer] + gradient
            ahead = (
                options["momentum"] * momentum[layer] + gradient if options["nesterov"] else momentum[layer]
            )
            direction = matrix_power(fisher[layer], -options["power"]) @ ahead
            shrink = options["lr"] * options["weight_decay"] if options["decoupled_weight_decay"] else 0
            layer.weight.data = ((1 - shrink) * old - options["lr"] * direction).view(layer.shape)
    for ours, theirs in zip(case.module.parameters(), twin.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_batch_with_every_sample_twice_gives_the_same_steps():
    results = []
    for repeats in (1, 2):
        case = problem("conv2d padding")
        inputs, targets = case.inputs.repeat(repeats, 1, 1, 1), case.targets.repeat(repeats)
        opt = MBF(case.module, fisher="empirical", statistics_every=1)
        for _ in range(3):
            opt.zero_grad()
            cross_entropy(case.module(inputs), targets).backward()
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in case.module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("share", [None, "layer"])
def test_kernel_blocks_are_never_shared_and_describe_says_so(share):
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 4, bias=False))
    kernels, rows = MBF(network, conv_blocks="kernel", share=share).describe().layers
    assert (kernels.structure, kernels.blocks) == ("kernel blocks", 6)
    assert "share is for rows" in kernels.reason
    assert rows.structure == ("two-sided blocks" if share is None else "blocks of shared rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_curvature_in_half_precision_is_damped_by_its_rounding_error(dtype):
    weight = nn.Parameter(torch.zeros(64, 32))
    opt = MBF([weight], lr=0.0, damping=1e-6, curvature_dtype=dtype, statistics_every=1, output_power=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weight.grad = torch.randn(64, 32, generator=generator) * torch.logspace(0, -4, 32)
        opt.step()
    entry = opt.state[weight]
    largest = entry["fisher"][0, 0].diagonal().max().item()
    gain = torch.linalg.eigvalsh(entry["inverse"][0, 0].double()).max().item()
    rounding = torch.finfo(torch.bfloat16).eps
    assert (gain < 1.1 / (rounding * largest)) == (dtype == torch.bfloat16)
    assert opt.diagnostics()["fallbacks"] == 0


def test_padding_leaves_an_inverse_that_needs_no_second_attempt():
    """A recorded step cannot factorise again with more damping: padded entries must not be singular."""
    weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    opt = MBF([weight], block_size=3, capturable=True, statistics_every=1, inverse_every=1)
    weight.grad = torch.ones(3, 5, dtype=torch.float64)
    opt.step()
    assert torch.isfinite(opt.state[weight]["inverse"]).all()
    assert opt.diagnostics()["fallbacks"] == 0


def test_blocks_of_one_entry_are_not_shared_and_say_so():
    optimizer = MBF(nn.Linear(1, 5), share="layer")
    assert "diagonal" in str(optimizer.describe())
    assert "single entries are not shared" in str(optimizer.describe())
