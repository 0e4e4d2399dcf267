"""The kinds of statistics of a layer; a method declares which one it needs.

The normal form. For every sample n and position s, a layer maps an input a_ns to an output h_ns = W a_ns.
All positions share the weight: they are the tokens of a sequence, or the locations in the output of a
convolution. A fully connected layer on plain vectors has one position.
With the output gradient g_ns = d loss_n / d h_ns, the gradient of one sample is D_n = sum_s g_ns a_ns^T.
"Per sample" means the gradient of loss_n itself, *not* divided by the number of samples N.

| layer                  | a_ns                              | groups | positions s                          |
|------------------------|-----------------------------------|--------|--------------------------------------|
| Linear                 | the input, [in]                   | 1      | every dimension but first and last   |
| Conv1d, Conv2d, Conv3d | the patch, as `weight.flatten(1)` | groups | all locations in the output          |

With the bias folded in, a_ns ends in a 1. A layer that is called several times in one forward pass, or whose
weight is tied to that of another layer, has the positions of all calls: D_n is the sum over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Statistics:
    """Base of all kinds of statistics."""


@dataclass(frozen=True)
class BatchGradient(Statistics):
    """The gradient of the mini-batch loss, D = mean_n D_n, as in `.grad`."""

    gradient: Tensor  # [..., *layer.shape]


class LayerSamples(Statistics):
    """Inputs and output gradients of one layer, sample by sample, in the normal form."""

    count: int
    """N, the number of samples in the step."""

    @property
    def positions(self) -> int:
        """The largest number of positions of a sample."""
        raise NotImplementedError

    def is_finite(self) -> bool:
        """Whether every input and output gradient is finite."""
        raise NotImplementedError

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in] and output gradients [n, groups, s, out / groups], a few samples each."""
        raise NotImplementedError

    def gradients(self) -> Iterator[Tensor]:
        """Per-sample gradients D_n, [n, *layer.shape], a few samples each."""
        raise NotImplementedError


@dataclass(frozen=True)
class Secant(Statistics):
    """How the mean output and mean output gradient of a layer changed by a step, on the same mini-batch.

    s = mean h' - mean h, y = mean g' - mean g, with means over samples and positions; a prime means after the
    step.
    """

    output_change: Tensor  # s, [groups, out / groups]
    gradient_change: Tensor  # y, [groups, out / groups], of per-sample gradients


def mean_gradient(samples: LayerSamples, shape: torch.Size) -> Tensor:
    """(1/N) sum_n D_n, [*shape], computed without any single D_n."""
    total = sum(
        gradients.transpose(0, 1).flatten(1, 2).mT @ inputs.transpose(0, 1).flatten(1, 2)
        for inputs, gradients in samples.chunks()
    )
    assert isinstance(total, torch.Tensor)  # there is at least one chunk
    return total.reshape(shape) / samples.count
