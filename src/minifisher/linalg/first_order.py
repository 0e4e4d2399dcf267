"""What a first-order method does to every entry of a weight, in numbers that a fused pass can take along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FirstOrderPass:
    """M <- mu M + D, V <- beta V + (1 - beta) D^2; the step M / (sqrt(V) + epsilon), or M without V."""

    mu: float
    momentum: Tensor  # M, [..., *layer.shape]
    moment: Tensor | None = None  # V, likewise
    moment_decay: float = 0.0  # beta
    epsilon: float = 0.0
    scale: float = 1.0
    """What the length of that step is multiplied by: bias corrections."""
