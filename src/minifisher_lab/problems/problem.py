"""A problem: a network, its data, and the likelihood that determines the loss and the metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Schedule = Literal["constant", "linear", "cosine", "steps", "thirds"]
Augmentation = Literal["none", "crop", "crop and flip", "crop and colour"]
Initialisation = Literal["torch", "fan-out"]
CHOICES = {
    "likelihood": Likelihood,
    "schedule": Schedule,
    "augmentation": Augmentation,
    "initialisation": Initialisation,
}
"""The fields of a problem that have a fixed set of values."""


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
    targets, as for an autoencoder. Raises ValueError for a value that a field does not have.
    """

    name: str
    data: str | Callable[[], Tensors]
    """The name of a dataset, or a function that returns the tensors."""
    architecture: Callable[[], nn.Module]
    """Makes a network with new initial weights."""
    likelihood: Likelihood = "categorical"
    batch_size: int = 100
    epochs: float = 10
    description: str = "a problem of your own"
    schedule: Schedule = "constant"
    warm_up: float = 0.0
    """The share of a run in which the learning rate rises linearly to its full value."""
    augmentation: Augmentation = "none"
    initialisation: Initialisation = "torch"
    """torch: as the network is made; fan-out: its convolutions start from N(0, 2 / (k^2 out)) and bias 0."""
    window: int = 0
    """The characters of a sample, where the data is a text."""
    weight_penalty: Mapping[str, float] = field(default_factory=dict)
    """For each named parameter w a factor c: the training loss has c / 2 |w|^2 added."""
    evaluation_samples: int = 2000
    """The size of the fixed slices of the training and the test set that are evaluated during a run."""

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            allowed, value = get_args(values), getattr(self, name)
            if value not in allowed:
                names = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} of {self.name} must be one of {names}, got {value!r}")

    def build(self, seed: int) -> nn.Module:
        """The network, initialised from the seed; the same seed gives every optimizer the same start."""
        torch.manual_seed(seed)
        model = self.architecture()
        if self.initialisation == "fan-out":
            _initialise_convolutions(model)
        return model

    def parameters(self) -> int:
        """How many parameters the network has; nothing is allocated."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.architecture().parameters())

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The sum of c / 2 |w|^2 over `weight_penalty`."""
        return sum(
            0.5 * factor * model.get_parameter(name).square().sum()
            for name, factor in self.weight_penalty.items()
        )

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes, so that there is an accuracy."""
        return self.likelihood == "categorical"

    def wanted(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What the outputs are compared with: the targets, or the inputs [N, pixels] of an autoencoder."""
        return targets if self.classifies or targets.is_floating_point() else inputs.flatten(1)

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood, summed over pixels for an autoencoder, mean over the batch.

        categorical: cross entropy with `targets` [N], or [N, positions] for a text, whose loss is the mean
        over positions; bernoulli: binary cross entropy of logits with `wanted`; gaussian: half the squared
        error to `wanted`. An autoencoder's `outputs` are [N, pixels].
        """
        wanted = self.wanted(inputs, targets)
        if self.likelihood == "categorical":
            return functional.cross_entropy(outputs.flatten(0, -2), wanted.flatten())
        if self.likelihood == "bernoulli":
            total = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")
        else:
            total = 0.5 * functional.mse_loss(outputs, wanted, reduction="sum")
        return total / len(inputs)


def _initialise_convolutions(model: nn.Module) -> None:
    """Weights N(0, 2 / (k^2 out)), biases 0 (He et al. 2015, the backward case; MBF's authors' code)."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
