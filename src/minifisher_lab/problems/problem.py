"""A problem: a network, its data, and the likelihood that determines the loss and the metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Schedule = Literal["constant", "linear", "steps"]
Augmentation = Literal["none", "crop", "crop and flip"]


@dataclass(frozen=True)
class Problem:
    """A network and the name of its data. The likelihood determines the loss, the target and the metric."""

    name: str
    description: str
    data: str
    architecture: Callable[[], nn.Module]
    likelihood: Likelihood
    batch_size: int
    epochs: int
    schedule: Schedule = "constant"
    augmentation: Augmentation = "none"

    def build(self, seed: int) -> nn.Module:
        """The network, initialised from the seed; the same seed gives every optimizer the same start."""
        torch.manual_seed(seed)
        return self.architecture()

    def parameters(self) -> int:
        """How many parameters the network has; nothing is allocated."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.architecture().parameters())

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes, so that there is an accuracy."""
        return self.likelihood == "categorical"

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood, summed over pixels for an autoencoder, mean over the batch.

        categorical: cross entropy with `targets` [N]; bernoulli: binary cross entropy of logits with
        `inputs`; gaussian: half the squared error to `inputs`. An autoencoder's `outputs` are [N, pixels].
        """
        if self.likelihood == "categorical":
            return functional.cross_entropy(outputs, targets)
        pixels = inputs.flatten(1)
        if self.likelihood == "bernoulli":
            total = functional.binary_cross_entropy_with_logits(outputs, pixels, reduction="sum")
        else:
            total = 0.5 * functional.mse_loss(outputs, pixels, reduction="sum")
        return total / len(inputs)
