"""What a step of every method sends and computes on 8 to 1,024 devices: prints JSON; no tensor is made.

The formulas are those of docs/scaling.md: tests/distributed/test_traffic.py holds them against counted calls,
tests/test_flops.py against counted operations. Averages over the steps between two refreshes, defaults of
every method, float32, ring algorithms, 32 images or 4,096 tokens a device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import minifisher
from minifisher.curvature import Plan
from minifisher.distributed.ownership import assign_owners
from minifisher.distributed.placement import cost as placement_cost
from minifisher.methods.kbfgs import KroneckerBFGS
from minifisher.methods.kbfgsl import LimitedMemoryKroneckerBFGS
from minifisher.methods.kfac import KroneckerFactors
from minifisher.methods.mbf import MiniBlocks
from minifisher.methods.mbf_packed import PackedBlocks
from minifisher.methods.mbf_two_sided import TwoSidedBlocks
from minifisher.methods.mode_factors import ModeFactors
from minifisher.methods.shampoo import KroneckerRoots
from minifisher.methods.soap import EigenbasisAdam
from minifisher.statistics.layers import Layer, layers_of
from minifisher.statistics.records import BatchGradient

Row = tuple[Layer, Plan, "Cost"]

DEVICES = (8, 64, 256, 1024)
NUMBER = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Of one layer: matrix products in operations (two a multiplication), matrices to factorise, traffic."""

    direction: float = 0.0
    """Every step."""
    statistics: float = 0.0
    """Every T1, of one device's samples."""
    refresh: float = 0.0
    """Every T2, products alone."""
    factorised: float = 0.0
    """Every T2, the sum of b^3 over the matrices that are inverted or decomposed."""
    averaged: float = 0.0
    """Numbers that replicas sum up, every T1."""


def cost(layer: Layer, plan: Plan, samples: int, rows: int) -> Cost:
    """One device sees so many samples, and `rows` inputs of the layer: the samples times their positions."""
    curvature = plan.curvature
    if isinstance(curvature, MiniBlocks):
        return _mini_blocks(curvature, samples, rows)
    if isinstance(curvature, TwoSidedBlocks):
        return _two_sided_blocks(curvature, layer.groups, rows)
    if isinstance(curvature, PackedBlocks):
        return _packed_blocks(curvature, samples, rows)
    if isinstance(curvature, KroneckerBFGS):
        return _bfgs(curvature, rows)
    if isinstance(curvature, KroneckerFactors):
        return _kronecker(curvature, rows)
    if isinstance(curvature, ModeFactors | EigenbasisAdam):
        return _modes(curvature, layer, rows)
    return Cost()  # a first-order step


def _packed_blocks(curvature: PackedBlocks, samples: int, rows: int) -> Cost:
    """No matrix products but those of samples: factorised and solved block by block in every step."""
    reading, from_gradient = curvature.reading, curvature.needs is BatchGradient
    blocks, width = reading.rows * reading.blocks, reading.width
    return Cost(
        statistics=0 if from_gradient else _of_formed_gradients(curvature, samples, rows),
        factorised=blocks * (width**3 / 3 + 4 * width**2),
        averaged=0.0 if from_gradient else blocks * width * (width + 1) / 2,
    )


def _of_formed_gradients(curvature: MiniBlocks | PackedBlocks, samples: int, rows: int) -> float:
    """Every sample's gradient, and one product a block over all samples."""
    reading = curvature.reading
    entries = reading.rows * reading.blocks * reading.width
    return 2 * rows * curvature.shape.numel() + samples * 2 * entries * reading.width


def _mini_blocks(curvature: MiniBlocks, samples: int, rows: int) -> Cost:
    reading, from_gradient = curvature.reading, curvature.needs is BatchGradient
    entries, width = reading.rows * reading.blocks * reading.width, reading.width
    matrices = reading.blocks * (1 if curvature.shared else reading.rows)
    if width == 1:
        return Cost()  # elementwise
    positions = rows // samples
    if from_gradient:
        statistics = 2 * entries * width if curvature.shared else 0  # of own rows d_b d_b^T is elementwise
    elif curvature.shared and positions < curvature.shape[0]:  # no sample's gradient is formed
        padded = reading.blocks * width
        statistics = 2 * rows * (positions * (curvature.shape[0] + padded) + padded * width)
    else:
        statistics = _of_formed_gradients(curvature, samples, rows)
    return Cost(
        direction=2 * entries * width,
        statistics=statistics,
        factorised=matrices * width**3,
        averaged=0.0 if from_gradient else matrices * width**2,
    )


def _two_sided_blocks(curvature: TwoSidedBlocks, groups: int, rows: int) -> Cost:
    """One matrix product for the blocks of each side; a root has one more, Q f(Lambda) Q^T."""
    from_gradient = curvature.needs is BatchGradient
    total = Cost()
    for reading, power, seen in (
        (curvature.inputs, curvature.power, rows * groups),
        (curvature.outputs, curvature.output_power, rows),
    ):
        area, width = reading.blocks * reading.width**2, reading.width
        total = Cost(
            direction=total.direction + (2 * reading.rows * area if width > 1 else 0),
            statistics=total.statistics + 2 * (reading.rows if from_gradient else seen) * area,
            refresh=total.refresh + (2 * area * width if power != 1 and width > 1 else 0),
            factorised=total.factorised + area * width,
            averaged=total.averaged + (0 if from_gradient else area),
        )
    return total


def _kronecker(curvature: KroneckerFactors, rows: int) -> Cost:
    outputs, inputs = curvature.block_shape
    return Cost(
        direction=2 * curvature.groups * outputs * inputs * (outputs + inputs),
        statistics=2 * curvature.groups * rows * (outputs**2 + inputs**2),
        factorised=curvature.groups * (outputs**3 + inputs**3),
        averaged=curvature.groups * (outputs**2 + inputs**2),
    )


def _bfgs(curvature: KroneckerBFGS, rows: int) -> Cost:
    """Beside the second pass over the batch; every so many refreshes H_a is inverted instead of updated."""
    outputs, inputs = curvature.block_shape
    groups = curvature.groups
    left, by_outputs = 2 * outputs**2 * inputs, 4.0 * outputs**2
    if isinstance(curvature, LimitedMemoryKroneckerBFGS):
        m = curvature.memory
        left = 8 * m * (outputs + m) * inputs
        by_outputs = 8 * m * (outputs + m) + 4 * m**2 * outputs + 4 * m**3
    return Cost(
        direction=groups * (left + 2 * outputs * inputs**2),
        statistics=2 * groups * rows * inputs**2,
        refresh=groups * (6 * inputs**2 + by_outputs),
        factorised=groups * inputs**3 / curvature.inverse_every,
        averaged=groups * (inputs**2 + inputs + 1 + 2 * outputs),
    )


def _modes(curvature: ModeFactors | EigenbasisAdam, layer: Layer, rows: int) -> Cost:
    """Of K modes: blocks of w_1 ... w_K entries, a matrix w_i x w_i for each."""
    reading = curvature.reading
    wide = [width for width in reading.widths if width > 1]
    product = 2 * reading.blocks * math.prod(reading.widths) * sum(wide)  # of every mode with a matrix
    cubes = reading.blocks * sum(width**3 for width in wide)
    if isinstance(curvature, EigenbasisAdam):
        return Cost(2 * product, 2 * product, 2 * cubes, cubes)  # to the basis and back; QR
    from_samples = curvature.needs is not BatchGradient
    assert curvature.reads_mean_gradient or not from_samples, "products of every sample are not in the table"
    return Cost(
        direction=product,
        statistics=product + from_samples * 2 * rows * layer.shape.numel(),
        refresh=2 * cubes if isinstance(curvature, KroneckerRoots) else 0.0,  # Q f(Lambda) Q^T
        factorised=cubes,
        averaged=from_samples * layer.shape.numel(),
    )


# ---- models ----


class Model(nn.Module):
    """Layers without a forward pass; `rows` are the inputs that each weight sees on one device."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.rows: dict[nn.Parameter, int] = {}

    def take(self, module: nn.Module, rows: int) -> None:
        """One more layer."""
        self.add_module(str(len(self._modules)), module)
        self.rows.update((parameter, rows) for parameter in module.parameters())


def resnet50(images: int = 32) -> Model:
    """Convolutions, batch norms and the classifier, at 224 x 224 pixels."""
    model = Model(images)

    def convolution(inputs: int, outputs: int, kernel: int, side: int) -> None:
        model.take(nn.Conv2d(inputs, outputs, kernel, bias=False), images * side**2)
        model.take(nn.BatchNorm2d(outputs), images * side**2)

    convolution(3, 64, 7, 112)
    inputs = 64
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            first = side if block or width == 64 else 2 * side  # strides are in the 3x3 convolution
            convolution(inputs, width, 1, first)
            convolution(width, width, 3, side)
            convolution(width, 4 * width, 1, side)
            if block == 0:
                convolution(inputs, 4 * width, 1, side)
            inputs = 4 * width
    model.take(nn.Linear(2048, 1000), images)
    return model


def transformer_7b(tokens: int = 4096) -> Model:
    """32 blocks of width 4,096 with gated 11,008-wide feed-forward layers, 32,000 tokens."""
    model = Model(samples=1)
    model.take(nn.Embedding(32_000, 4096), tokens)
    for _ in range(32):
        for inputs, outputs in [(4096, 4096)] * 4 + [(4096, 11_008)] * 2 + [(11_008, 4096)]:
            model.take(nn.Linear(inputs, outputs, bias=False), tokens)
        for _ in range(2):
            model.take(nn.RMSNorm(4096), tokens)
    model.take(nn.Linear(4096, 32_000, bias=False), tokens)
    return model


# ---- predictions ----


def planned(method: str, model: Model, **options: Any) -> Iterator[Row]:
    """Every layer with what the method chose for it."""
    optimizer = minifisher.METHODS[method](model, **options)
    group = optimizer.param_groups[0]
    for layer in layers_of(model, optimizer.folds if group["fold_bias"] else ()):
        plan = optimizer.plan(layer, group)
        yield layer, plan, cost(layer, plan, model.samples, model.rows[layer.weight])


def prediction(layers: list[Row], devices: int) -> dict[str, float]:
    """Bytes that one device sends in an average step, beside the gradients' own, and its operations."""
    ring = 2 * (devices - 1) / devices  # an all-reduce of one byte
    averaged = sum(c.averaged / plan.statistics_every for _, plan, c in layers)
    each_step = sum(c.direction for _, _, c in layers)
    observing = sum(c.statistics / plan.statistics_every for _, plan, c in layers)
    refreshing = sum((c.refresh + c.factorised) / plan.inverse_every for _, plan, c in layers)
    gathered, own = _heaviest(layers, devices)
    of_samples = sum(c.statistics / plan.statistics_every for _, plan, c in layers if c.averaged)
    return {
        "replicas_bytes": round(ring * NUMBER * averaged),
        "owners_bytes": round(ring * NUMBER * averaged + NUMBER * gathered),
        "replicas_gflop": _giga(each_step + observing + refreshing),
        "owners_gflop": _giga(own + of_samples),
    }


def _heaviest(layers: list[Row], devices: int) -> tuple[float, float]:
    """Numbers that a device sends to hand directions out, and operations of the one that has most to do."""
    movable = [row for row in layers if row[1].curvature.needs is not None]
    owners = assign_owners([placement_cost(layer, plan) for layer, plan, _ in movable], devices)
    shares, operations = [0] * devices, [0.0] * devices
    for (layer, plan, c), owner in zip(movable, owners, strict=True):
        shares[owner] += layer.shape.numel()
        statistics = 0.0 if c.averaged else c.statistics  # of samples: every device its own
        operations[owner] += (
            c.direction + statistics / plan.statistics_every + (c.refresh + c.factorised) / plan.inverse_every
        )
    gather, addition = (devices - 1) * max(shares), 2 * (devices - 1) / devices * sum(shares)
    return min(gather, addition), max(operations)


def cut(layers: list[Row], devices: int, by_rows: bool) -> dict[str, float]:
    """The same of MBF under fully_shard; `by_rows`: with `graft="adam-rows"`."""
    ring = 2 * (devices - 1) / devices
    shared = sum(
        plan.blocks * plan.block_size**2 / plan.statistics_every
        for _, plan, _ in layers
        if plan.structure == "blocks of shared rows"
    )
    means = sum(1 / plan.statistics_every for _, plan, _ in layers)
    lengths = 0 if by_rows else 2 * len(layers)
    products = sum(c.direction + c.statistics / plan.statistics_every for _, plan, c in layers)
    refreshing = sum(c.factorised / plan.inverse_every for _, plan, c in layers)
    return {
        "bytes": round(ring * (NUMBER * (shared + means) + 2 * NUMBER * (lengths + 1))),
        "gflop": _giga(products / devices + refreshing),
    }


def _giga(operations: float) -> float:
    return float(f"{operations / 1e9:.3g}")


def main() -> None:
    report = {}
    for build in (resnet50, transformer_7b):
        with torch.device("meta"):
            model = build()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows = {method: list(planned(method, model)) for method in minifisher.METHODS}
        rows["mbf from samples"] = list(planned("mbf", model, fisher="empirical"))
        report[build.__name__] = {
            "parameters": parameters,
            "gradients_bytes": {
                devices: round(2 * (devices - 1) / devices * NUMBER * parameters) for devices in DEVICES
            },
            **{
                method: {devices: prediction(layers, devices) for devices in DEVICES}
                for method, layers in rows.items()
            },
            **{
                f"mbf fully_shard, graft {graft}": {
                    devices: cut(rows["mbf"], devices, graft == "adam-rows") for devices in DEVICES
                }
                for graft in ("adam", "adam-rows")
            },
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
