"""Packed blocks against `MiniBlocks` with an inverse after every observation, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from minifisher.curvature import FirstOrderStep
from minifisher.linalg.blocks import BlockReading
from minifisher.methods.mbf import MiniBlocks
from minifisher.methods.mbf_packed import PackedBlocks
from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import BatchGradient, LayerSamples

READINGS = [BlockReading(3, 4, 4), BlockReading(3, 7, 3), BlockReading(2, 68, 2)]  # the last has three tiles


def curvatures(reading, **options):
    """Packed blocks and mini-blocks of the same weight, and their layer."""
    layer = layer_of("weight", nn.Parameter(torch.zeros(reading.rows, reading.length, dtype=torch.float64)))
    common = {"reading": reading, "shape": layer.shape, "needs": BatchGradient, "dtype": torch.float64}
    return PackedBlocks(**common, **options), MiniBlocks(**common, shared=False, **options), layer


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Given(LayerSamples):
    """Samples with given per-sample gradients, [N, *shape]."""

    def __init__(self, gradients):
        self.all, self.count = gradients, len(gradients)

    def gradients(self):
        yield from self.all.split(2)


@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("kind", ["gradient", "samples"])
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_the_direction_is_that_of_mini_blocks(reading, kind, relative_damping):
    packed, mini, layer = curvatures(reading, relative_damping=relative_damping)
    states = packed.init(layer), mini.init(layer)
    for seed, decay in enumerate((0.0, 0.5, 0.8)):
        gradients = random(5, *layer.shape, seed=seed)
        seen = Given(gradients) if kind == "samples" else BatchGradient(gradients[0])
        for curvature, state in zip((packed, mini), states, strict=True):
            curvature.observe(state, seen, decay)
            curvature.refresh(state, 0.1)
    direction = random(*layer.shape, seed=9)
    found = packed.precondition(states[0], direction, 0.1)
    torch.testing.assert_close(found, mini.precondition(states[1], direction, 0.1))


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_the_state_holds_a_triangle_for_each_block(reading):
    packed, mini, layer = curvatures(reading)
    entries = reading.width * (reading.width + 1) // 2
    shape = packed.init(layer)["fisher"].shape
    assert shape[0] == reading.rows
    assert shape[1] * shape[3] >= reading.blocks
    assert shape[2] == entries
    assert packed.averages == mini.averages


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_stacked_layers_are_preconditioned_as_single_ones(reading):
    packed, _, layer = curvatures(reading)
    gradients, directions = random(2, *layer.shape), random(2, *layer.shape, seed=1)
    stack = {name: torch.stack((value, value)) for name, value in packed.init(layer).items()}
    packed.observe(stack, BatchGradient(gradients), 0.0)
    together = packed.precondition(stack, directions, 0.1)
    for index in range(2):
        state = packed.init(layer)
        packed.observe(state, BatchGradient(gradients[index]), 0.0)
        torch.testing.assert_close(together[index], packed.precondition(state, directions[index], 0.1))


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_fused_step_equals_the_separate_verbs(nesterov):
    pytest.importorskip("numba")
    packed, _, layer = curvatures(BlockReading(12, 36, 9))
    packed = replace(packed, dtype=torch.float32)  # the only dtype of the kernel
    gradient, momentum = (random(1, *layer.shape, seed=seed).float() for seed in (0, 1))
    states = [{name: value.unsqueeze(0) for name, value in packed.init(layer).items()} for _ in range(2)]
    tensors = momentum.clone(), torch.ones_like(momentum)
    flags = {"sum_of_weights": 0.5, "with_slopes": True, "nesterov": nesterov}
    first_order = FirstOrderStep(0.9, *tensors, 0.99, 1e-8, scale=2.0, **flags)
    direction, *measures = packed.fused_step(states[0], gradient, 0.0, 0.1, first_order)

    packed.observe(states[1], BatchGradient(gradient), 0.0)
    momentum = 0.9 * momentum + gradient
    step = 2.0 * momentum / ((0.99 + 0.01 * gradient.square()).sqrt() + 1e-8)
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(first_order.momentum, momentum)
    ahead = 0.9 * momentum + gradient if nesterov else momentum
    torch.testing.assert_close(direction, packed.precondition(states[1], ahead, 0.1))
    for (norm, slope, *_), expected in zip(measures, (direction, step), strict=True):
        torch.testing.assert_close(norm, expected.norm().view(1, 1))
        torch.testing.assert_close(slope, (momentum * expected).sum().view(1, 1))
    squares = gradient.square(), (0.99 + 0.01 * gradient.square()) / 0.5
    torch.testing.assert_close(list(measures[1][2:]), [square.sum().view(1, 1) for square in squares])


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2, 64), True), ((4, 32), True), ((4, 16), False), ((4, 33), False), ((1, 32), True)],
)
def test_a_piece_has_any_rows_and_whole_tiles_of_each_row(shape, fits):
    packed, _, layer = curvatures(BlockReading(4, 64, 2))  # two tiles of 16 blocks
    piece = packed.shard(torch.Size(shape))
    assert (piece is not None) == fits
    if fits:
        assert piece.shape == torch.Size(shape)
        rows, columns = (slice(0, length) for length in shape)
        gradient, direction = random(*layer.shape), random(*layer.shape, seed=1)
        whole, part = packed.init(layer), piece.init(layer)
        packed.observe(whole, BatchGradient(gradient), 0.0)
        piece.observe(part, BatchGradient(gradient[rows, columns]), 0.0)
        part["mean"].copy_(whole["mean"])  # what the ranks average
        expected = packed.precondition(whole, direction, 0.1)[rows, columns]
        torch.testing.assert_close(piece.precondition(part, direction[rows, columns], 0.1), expected)
