"""What MBF sends a step on 8 to 1,024 devices, by the formulas of docs/scaling.md: prints JSON.

The formulas are those that tests/distributed/test_traffic.py holds against counted calls. No tensor is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import nn

import minifisher

Shapes = Iterator[tuple[int, ...]]


def resnet50() -> Shapes:
    """Convolutions, batch norms and the classifier."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            for shape in shapes:
                yield from (shape, shape[:1], shape[:1])
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


def transformer_7b() -> Shapes:
    """32 blocks of width 4,096 with gated 11,008-wide feed-forward layers, 32,000 tokens."""
    yield from ((32_000, 4096), (32_000, 4096), (4096,))
    for _ in range(32):
        yield from [(4096, 4096)] * 4
        yield from ((11_008, 4096), (11_008, 4096), (4096, 11_008), (4096,), (4096,))


def figures(shapes: Shapes) -> dict[str, float]:
    """Numbers a step, before the number of devices matters."""
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    layers = minifisher.MBF(parameters).describe().layers
    shared = [layer for layer in layers if layer.structure == "blocks of shared rows"]
    matrices = [layer.blocks * layer.block_size**2 / layer.statistics_every for layer in shared]
    inverses = [layer.blocks * layer.block_size**3 / layer.inverse_every for layer in layers]
    return {
        "parameters": sum(layer.parameters for layer in layers),
        "weights": len(layers),
        "shared_matrices_a_step": sum(matrices),
        "direction_flops": sum(2 * layer.parameters * layer.block_size for layer in layers),
        "statistics_flops": sum(
            2 * layer.parameters * layer.block_size / layer.statistics_every for layer in layers
        ),
        "inverse_flops": sum(inverses),
    }


def traffic(model: dict[str, float], devices: int) -> dict[str, float]:
    """Bytes that one device sends a step beside the gradients' own, float32, ring algorithms."""
    ring = 2 * (devices - 1) / devices  # an all-reduce of one byte
    cut = 4 + 16 * model["weights"] + 4 * (model["shared_matrices_a_step"] + model["weights"] / 4)
    return {
        "devices": devices,
        "replicated_gradient": 0,
        "replicated_samples": round(ring * 4 * model["shared_matrices_a_step"]),
        "owners_directions": round(4 * model["parameters"] * (devices - 1) / devices),
        "fully_shard": round(ring * cut),
        "gradients_themselves": round(ring * 4 * model["parameters"]),
        "flops_a_device_fully_shard": round(
            (model["direction_flops"] + model["statistics_flops"]) / devices + model["inverse_flops"]
        ),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                name: {
                    "model": model,
                    "traffic": [traffic(model, devices) for devices in (8, 64, 256, 1024)],
                }
                for name, shapes in (("resnet50", resnet50()), ("transformer_7b", transformer_7b()))
                for model in (figures(shapes),)
            },
            indent=2,
        )
    )
