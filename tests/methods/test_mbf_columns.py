"""Blocks over columns against dense matrices in float64: those of the rows of D^T."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minifisher import MBF
from minifisher.statistics.layers import Layer
from minifisher.statistics.records import BatchGradient
from tests.helpers import (
    NETS,
    dense_empirical_fisher,
    dense_exact_fisher,
    dense_preconditioner,
    problem,
)
from tests.methods.test_mbf import (
    CLOSE,
    assert_blocks,
    block_diagonal,
    damped_powers,
    dense_gradient_fisher,
    expected_blocks,
    fisher_of,
    layers,
    relative,
)

# (share, block_size)
CUTS = [("layer", 1000), ("row", 1000), ("layer", 3), ("row", 2), ("row", 1)]


def columns(cut, **options):
    return {"linear_blocks": "column", "share": cut[0], "block_size": cut[1], **options}


def transposed(dense, shape):
    """The matrix of vec(D), [d, d], as that of vec(D^T), and the shape of W^T; a vector is one column."""
    outputs, inputs = (*shape, 1)[:2]
    order = torch.arange(outputs * inputs).view(outputs, inputs).T.flatten()
    return dense[order][:, order], torch.Size((inputs, outputs))


def blocks_over_columns(dense, shape, cut):
    return expected_blocks(*transposed(dense, shape), "row", *cut)


def with_columns(module, fold_bias=False):
    return [layer for layer in layers(module, fold_bias) if len(layer.shape) in (1, 2)]


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_gradient_blocks_are_blocks_over_columns_of_the_outer_product(name, fold_bias):
    case = problem(name)
    optimizers = [MBF(case.module, lr=0.0, fold_bias=fold_bias, **columns(cut)) for cut in CUTS]
    case.mean_loss().backward()
    for opt, cut in zip(optimizers, CUTS, strict=True):
        opt.step()
        for layer in with_columns(case.module, fold_bias):
            expected = blocks_over_columns(dense_gradient_fisher(layer), layer.shape, cut)
            assert_blocks(columns_of(opt, layer), expected)


def columns_of(opt, layer):
    """`fisher` of the state, unpacked if it is packed."""
    of_rows = opt.plan(layer, opt.param_groups[0]).curvature.transposed
    return fisher_of(opt, layer, of_rows.reading.rows, of_rows)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", ["linear", "linear on tokens", "twice on tokens", "tied", "attention"])
def test_blocks_of_samples_are_blocks_over_columns_of_the_dense_fisher(name, fisher):
    for cut in CUTS:
        case = problem(name)
        fold_bias = cut[0] == "layer"
        twin = copy.deepcopy(case.module)  # has no hooks of the optimizer
        opt = MBF(case.module, lr=0.0, fisher=fisher, fold_bias=fold_bias, **columns(cut))
        outputs = case.module(case.inputs)
        opt.observe(outputs)
        case.loss(outputs, case.targets).backward()
        opt.step()
        own = with_columns(case.module, fold_bias)
        for layer, other in zip(own, with_columns(twin, fold_bias), strict=True):
            if layer.reads_samples:
                dense = (
                    dense_exact_fisher(other, twin, "categorical", case.inputs)
                    if fisher == "exact"
                    else dense_empirical_fisher(other, twin, case.loss, case.inputs, case.targets)
                )
                assert_blocks(columns_of(opt, layer), blocks_over_columns(dense, layer.shape, cut))


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_direction_is_the_damped_power_of_every_block(cut, relative_damping, power):
    case = problem("linear")
    options = {"power": power, "relative_damping": relative_damping, "damping": 0.1}
    opt = MBF(case.module, lr=0.0, **options, **columns(cut))
    case.mean_loss().backward()
    opt.step()
    for layer in with_columns(case.module):
        blocks = blocks_over_columns(dense_gradient_fisher(layer), layer.shape, cut)
        dampings = (
            relative(blocks, layer.shape, 0.1)
            if relative_damping
            else [0.1 * torch.ones(len(b)) for b in blocks]
        )
        powers = [damped_powers(*pair, -power) for pair in zip(blocks, dampings, strict=True)]
        inputs = (*layer.shape, 1)[1]
        dense = block_diagonal(powers, inputs)
        curvature = opt.plan(layer, opt.param_groups[0]).curvature
        entry = opt.state[layer.weight]
        tensors = {name: tensor for name, tensor in entry.items() if name in ("fisher", "inverse", "mean")}
        actual = dense_preconditioner(curvature, tensors, layer, 0.1)
        torch.testing.assert_close(transposed(actual, layer.shape)[0], dense, **CLOSE)


def test_shared_uncut_columns_multiply_by_one_matrix_from_the_left():
    """W <- W - lr (D D^T / (in + 1) + lambda I)^-1 D of [W b], one step without momentum."""
    case = problem("linear")
    before = copy.deepcopy(case.module.state_dict())
    options = {"fold_bias": True, "graft": None, "momentum": 0.0, "relative_damping": False, "damping": 0.01}
    opt = MBF(case.module, lr=0.5, **columns(("layer", 1000), **options))
    case.mean_loss().backward()
    opt.step()
    for name in ("0", "2"):
        layer = case.module.get_submodule(name)
        gradient = torch.cat((layer.weight.grad, layer.bias.grad[:, None]), dim=1)
        outputs, inputs = gradient.shape
        matrix = gradient @ gradient.T / inputs + 0.01 * torch.eye(outputs, dtype=gradient.dtype)
        direction = torch.linalg.solve(matrix, gradient)
        torch.testing.assert_close(layer.weight, before[f"{name}.weight"] - 0.5 * direction[:, :-1])
        torch.testing.assert_close(layer.bias, before[f"{name}.bias"] - 0.5 * direction[:, -1])


@pytest.mark.parametrize("share", ["row", "layer"])
@pytest.mark.parametrize(
    ("shape", "fits"), [((6, 2), True), ((4, 5), True), ((2, 3), True), ((3, 5), False), ((6, 5), True)]
)
def test_a_piece_has_any_columns_and_whole_blocks_of_each(shape, share, fits):
    whole, piece = piece_of(torch.Size((6, 5)), torch.Size(shape), share)
    assert (piece is not None) == fits
    if not fits:
        return
    torch.manual_seed(0)
    gradient, direction = torch.randn(2, 6, 5, dtype=torch.float64)
    own = tuple(slice(0, length) for length in shape)
    states = [curvature.init(layer_of_shape(s)) for curvature, s in ((whole, (6, 5)), (piece, shape))]
    for curvature, state, seen in ((whole, states[0], gradient), (piece, states[1], gradient[own])):
        curvature.observe(state, BatchGradient(seen), 0.0)
    if share == "row":  # otherwise ranks average the shared blocks
        blocks = states[0]["fisher"][: shape[1], : shape[0] // 2]
        torch.testing.assert_close(states[1]["fisher"], blocks)
    else:
        states[1]["fisher"].copy_(states[0]["fisher"][:, : shape[0] // 2])
    states[1]["mean"].copy_(states[0]["mean"])
    for curvature, state in zip((whole, piece), states, strict=True):
        curvature.refresh(state, 0.1)
    expected = whole.precondition(states[0], direction, 0.1)[own]
    torch.testing.assert_close(piece.precondition(states[1], direction[own], 0.1), expected)


def layer_of_shape(shape):
    return Layer("weight", torch.zeros(shape, dtype=torch.float64))


def piece_of(shape, piece, share):
    """The curvature of a whole weight as it is kept under sharding, and that of a piece, with blocks of 2."""
    layer = layer_of_shape(shape)
    options = columns((share, 2), inverse="cholesky")
    opt = MBF([nn.Parameter(layer.weight)], **options)
    curvature = opt.plan(layer, opt.param_groups[0]).curvature
    return curvature.shard(shape), curvature.shard(piece)


def test_the_axes_of_the_state_are_those_of_the_transpose():
    _, own = piece_of(torch.Size((6, 5)), torch.Size((6, 5)), "row")
    _, shared = piece_of(torch.Size((6, 5)), torch.Size((6, 5)), "layer")
    assert own.state_axes(0) == {"fisher": 1, "inverse": 1, "mean": None}
    assert own.state_axes(1) == {"fisher": 0, "inverse": 0, "mean": None}
    assert shared.state_axes(1)["fisher"] is None


def test_columns_resume_bit_for_bit():
    runs = []
    for resumes in (False, True):
        case = problem("linear on tokens")
        opt = MBF(case.module, **columns(("layer", 3)))
        for step in range(6):
            if resumes and step == 3:
                saved = opt.state_dict()
                opt = MBF(case.module, **columns(("layer", 3)))
                opt.load_state_dict(saved)
            opt.zero_grad()
            case.mean_loss().backward()
            opt.step()
        runs.append(case.module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_describe_names_the_columns():
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5))
    described = MBF(module, **columns(("layer", 2))).describe()
    found = {layer.name: (layer.structure, layer.blocks, layer.block_size) for layer in described.layers}
    assert found["0.weight"] == ("blocks of shared rows", 9, 2)
    assert found["2.weight"] == ("blocks of shared columns", 3, 2)
    assert found["2.bias"] == ("blocks of one column", 3, 2)
    assert found["3.weight"] == ("blocks of one column", 3, 2)


def test_vectors_can_be_columns_beside_rows_and_diagonals_beside_columns():
    module = nn.Linear(4, 6)
    for linear_blocks, vectors, structure in [
        ("row", None, "diagonal"),
        ("row", "column", "blocks of one column"),
        ("column", "diagonal", "diagonal"),
    ]:
        described = MBF(module, linear_blocks=linear_blocks, vectors=vectors).describe()
        assert described.layers[1].structure == structure


# ---- Adam's step for what is no matrix ----


def image_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("graft", [None, "sgd", "adam"])
def test_vectors_take_the_step_of_torchs_adam(graft, decoupled):
    """For given gradients; everything else moves as without the option."""
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    options = {"lr": 0.01, "graft": graft, "momentum": 0.9, "relative_damping": False, **decay}
    networks = [image_network() for _ in range(3)]
    ours, plain = (MBF(n, vectors=v, **options) for n, v in zip(networks, ("adam", None), strict=False))
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        networks[2].parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for own in zip(*(network.parameters() for network in networks), strict=True):
            gradient = torch.randn(own[0].shape, dtype=torch.float64, generator=generator)
            for parameter in own:
                parameter.grad = gradient.clone()
        for optimizer in (ours, plain, reference):
            optimizer.step()
    for own, without, adam in zip(*(network.parameters() for network in networks), strict=True):
        if own.ndim == 1:
            torch.testing.assert_close(own, adam, rtol=1e-10, atol=1e-12)
            assert not torch.allclose(own, without)
        else:
            assert torch.equal(own, without)


def test_vectors_that_take_adams_step_resume_and_say_so():
    network = image_network()
    opt = MBF(network, vectors="adam", graft=None)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    bias = network[0].bias
    assert opt.state[bias].keys() == {"step", "momentum", "second_moment", "observations", "missed"}
    other = MBF(network, vectors="adam", graft=None)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[bias]["second_moment"], opt.state[bias]["second_moment"])
    structures = {layer.name: layer.structure for layer in opt.describe().layers}
    assert structures["0.bias"] == structures["1.weight"] == "step of adam"
    assert structures["4.weight"] == "two-sided blocks"
