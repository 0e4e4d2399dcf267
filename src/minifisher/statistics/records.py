"""The closed family of what a backward pass can tell; a method declares which one it needs.

The normal form. A layer maps, for every sample n and shared position s (a token of a sequence, a place of
a convolution's output; one position for a plain fully connected layer), an input a_ns to an output
h_ns = W a_ns.
With the output gradient g_ns = d loss_n / d h_ns the gradient of one sample is D_n = sum_s g_ns a_ns^T.
"Per sample" means: of loss_n itself, *not* divided by the number of samples N.

| layer                  | a_ns                                | groups | positions s                    |
|------------------------|-------------------------------------|--------|--------------------------------|
| Linear                 | the input, [in]                     | 1      | all dimensions between the two |
| Conv1d, Conv2d, Conv3d | the patch, as `weight.flatten(1)`   | groups | places of the output           |

With the bias folded in, a_ns ends in a 1. A layer that is used more than once in one forward pass, or whose
weight is tied to another layer's, has the positions of all its uses: D_n adds them up before any product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Statistics:
    """Base of the family."""


@dataclass(frozen=True)
class BatchGradient(Statistics):
    """The gradient of the mini-batch loss, D = mean_n D_n, as backward left it."""

    gradient: Tensor  # [..., *layer.shape]


class LayerSamples(Statistics):
    """What one layer saw, sample by sample, in the normal form."""

    count: int
    """N, the samples of the step."""

    @property
    def positions(self) -> int:
        """The most shared positions that a sample has."""
        raise NotImplementedError

    def is_finite(self) -> bool:
        """Whether every number in it is finite."""
        raise NotImplementedError

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in], output gradients [n, groups, s, out / groups], few samples at a time."""
        raise NotImplementedError

    def gradients(self) -> Iterator[Tensor]:
        """Per-sample gradients D_n, [n, *layer.shape], few samples at a time."""
        raise NotImplementedError


@dataclass(frozen=True)
class Secant(Statistics):
    """How far a layer's means moved from the mini-batch before the step to the same one after it.

    Means over samples and shared positions alike: s = mean h' - mean h, y = mean g' - mean g.
    """

    output_change: Tensor  # s, [groups, out / groups]
    gradient_change: Tensor  # y, [groups, out / groups], per sample


def mean_gradient(samples: LayerSamples, shape: torch.Size) -> Tensor:
    """(1/N) sum_n D_n, [*shape], without forming any D_n."""
    total = sum(
        gradients.transpose(0, 1).flatten(1, 2).mT @ inputs.transpose(0, 1).flatten(1, 2)
        for inputs, gradients in samples.chunks()
    )
    return torch.as_tensor(total).reshape(shape) / samples.count
