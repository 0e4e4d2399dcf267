"""A problem: a network, its data, and the likelihood that determines the loss and the metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Schedule = Literal["constant", "linear", "steps"]
Augmentation = Literal["none", "crop", "crop and flip"]


Tensors: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor]"
"""Training inputs, training targets, test inputs, test targets."""


@dataclass(frozen=True)
class Problem:
    """A network, its data, and the likelihood that determines the loss, the target and the metric.

    A problem of your own is a function that returns one; `minifisher compare MODULE:FUNCTION` calls it:

        def make_problem():
            x = torch.randn(1000, 20)
            y = (x[:, :5].sum(1) > 0).long()
            return Problem(
                name="halves",
                data=lambda: (x[:800], y[:800], x[800:], y[800:]),
                architecture=lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)),
                likelihood="categorical",
            )

    The targets are classes [N] for "categorical". For "bernoulli" and "gaussian" they are what the outputs
    are compared with, floating-point numbers [N, outputs]; integers there mean that the inputs are the
    targets, as for an autoencoder.
    """

    name: str
    data: str | Callable[[], Tensors]
    """The name of a dataset, or a function that returns the tensors."""
    architecture: Callable[[], nn.Module]
    """Makes a network with new initial weights."""
    likelihood: Likelihood = "categorical"
    batch_size: int = 100
    epochs: int = 10
    description: str = "a problem of your own"
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

    def wanted(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What the outputs are compared with: the targets, or the inputs [N, pixels] of an autoencoder."""
        return targets if self.classifies or targets.is_floating_point() else inputs.flatten(1)

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood, summed over pixels for an autoencoder, mean over the batch.

        categorical: cross entropy with `targets` [N]; bernoulli: binary cross entropy of logits with
        the wanted outputs; gaussian: half the squared error to them. These are the targets, or the inputs if
        the targets are integers: an autoencoder's `outputs` are [N, pixels].
        """
        wanted = self.wanted(inputs, targets)
        if self.likelihood == "categorical":
            return functional.cross_entropy(outputs, wanted)
        if self.likelihood == "bernoulli":
            total = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")
        else:
            total = 0.5 * functional.mse_loss(outputs, wanted, reduction="sum")
        return total / len(inputs)
