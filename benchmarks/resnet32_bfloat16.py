"""ResNet-32 on CIFAR-10 under bfloat16 autocast, which halves the time of its epochs on some CPUs.

    cd benchmarks
    minifisher compare resnet32_bfloat16:make_problem --optimizers ... --epochs 5

The weights, the data, the batches and the augmentation are those of resnet32-cifar10; the rate falls by a
half cosine.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.problems.problem import Problem


class InBfloat16(nn.Module):
    """A network whose forward pass is under bfloat16 autocast, in the weights' dtype outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The logits in float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.network(images)
        return logits.float()


def make_problem() -> Problem:
    """The problem as `minifisher compare MODULE:FUNCTION` takes it."""
    problem = PROBLEMS["resnet32-cifar10"]
    return replace(
        problem,
        name="resnet32-cifar10-bfloat16",
        architecture=lambda: InBfloat16(problem.architecture()),
        schedule="cosine",
        description="resnet32-cifar10 under bfloat16 autocast",
    )
