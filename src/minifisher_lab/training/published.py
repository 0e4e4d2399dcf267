"""The published algorithms as data: each method's own settings, with their source.

`minifisher compare` and the suite know a row by its name. The library's momentum is the sum M <- mu M + D.
Where a code averages, mu M + (1 - mu) D, the learning rate here is (1 - mu) times that of the code. All rows
of the library's methods begin with one pass through the data at the initial weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Published:
    """One method with the settings of a paper's own code on one problem."""

    method: str
    """A name of the laboratory: mbf, or adam-of-the-mean."""
    problem: str
    source: str
    rate: float
    damping: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    warm_labels: Literal["data", "model"] | None = None
    """The labels of the first pass: the training labels, or labels drawn from the model."""


class AdamOfTheMean(torch.optim.Optimizer):
    """Adam as the authors of K-BFGS, TNT and MBF run it: V averages the square of the mean, not of D.

    m <- 0.9 m + 0.1 D; m^ = m / (1 - 0.9^t); V <- 0.999 V + 0.001 m^^2; V^ = V / (1 - 0.999^t);
    W <- (1 - lr weight_decay) W - lr m^ / (sqrt(V^) + eps).
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-4, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(group["lr"] * self._direction(weight, group["eps"]))
        return loss

    def _direction(self, weight: Tensor, epsilon: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        assert weight.grad is not None
        mean = state["mean"].lerp_(weight.grad, 0.1) / (1 - 0.9 ** state["step"])
        square = state["square"].mul_(0.999).addcmul_(mean, mean, value=0.001)  # Adam has the gradient here
        direction: Tensor = mean / (square / (1 - 0.999 ** state["step"])).sqrt().add_(epsilon)
        return direction


def _name(row: Published) -> str:
    return row.method.partition("-")[0]


_KBFGS = "github.com/renyiryry/kbfgs_neurips2020_public, Demo.ipynb"
_TNT = "github.com/renyiryry/tnt_neurips_2021, demo.ipynb"
_MBF = "github.com/achrafba96/mbf, demo.ipynb"

_COMMON = {
    "relative_damping": False,
    "graft": None,
    "momentum": 0.9,
    "curvature_decay": 0.9,
    "jitter": False,
    "nesterov": False,
}
_OFTEN = {**_COMMON, "statistics_every": 1, "inverse_every": 20}
_SELDOM = {**_COMMON, "statistics_every": 10, "inverse_every": 100}
_ONCE = {**_COMMON, "statistics_every": 1, "inverse_every": 10**9}  # H_a is inverted at the start alone
_UNCUT = {"max_dim": 10**6, "merge_dims": 9}
_BFGS = {**_ONCE, "mu1": 0.2, "bias_input": "mean"}
_BLOCKS = {
    "fisher": "gradient",
    "output_power": 0.0,
    "conv_blocks": "kernel",
    "linear_blocks": "column",
    "share": "layer",
    "block_size": 10**9,
    "fold_bias": True,
    "vectors": "adam",
}

_AUTOENCODER = (
    Published("adam-of-the-mean", "autoencoder", _TNT, 1e-4, options={"eps": 1e-4}),
    Published("kfac", "autoencoder", _KBFGS, 0.1, 3.0, {**_OFTEN, "pi_correction": False}, "data"),
    Published("kbfgs", "autoencoder", _KBFGS, 0.03, 0.3, _BFGS, "data"),
    Published("kbfgsl", "autoencoder", _KBFGS, 0.03, 0.3, {**_BFGS, "pairs": 100}, "data"),
    Published("shampoo", "autoencoder", _TNT, 3e-4, 3e-4, {**_OFTEN, **_UNCUT}, "data"),
    Published("tnt", "autoencoder", _TNT, 1e-4, 0.1, {**_OFTEN, **_UNCUT}, "data"),
    Published(
        "mbf",
        "autoencoder",
        _MBF,
        1e-5,
        3e-4,
        {**_COMMON, **_BLOCKS, "statistics_every": 2, "inverse_every": 25},
        "model",
    ),
)
# VGG-16 on CIFAR-100, batch 128: learning rate x decoupled decay is 3e-4 in every row.
_VGG16 = (
    Published("adam-of-the-mean", "vgg16", _MBF, 3e-5, options={"weight_decay": 10.0}),
    Published(
        "kfac", "vgg16", _MBF, 1e-3, 0.03, {**_SELDOM, "pi_correction": False, "weight_decay": 0.3}, "data"
    ),
    Published("shampoo", "vgg16", _MBF, 1e-3, 0.03, {**_SELDOM, **_UNCUT, "weight_decay": 0.3}, "data"),
    Published("mbf", "vgg16", _MBF, 3e-5, 3e-3, {**_SELDOM, **_BLOCKS, "weight_decay": 10.0}, "model"),
)

PUBLISHED: dict[str, Published] = {
    **{f"{_name(row)}-published": row for row in _AUTOENCODER},
    **{f"{_name(row)}-published-vgg16": row for row in _VGG16},
}
"""Every row by its name; names without a problem are those of the MNIST autoencoder, batch 1000."""
