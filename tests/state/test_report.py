"""Descriptions of what an optimizer chose."""

from __future__ import annotations

import torch
from torch import nn

import minifisher


def test_nothing_but_empty_weights_can_be_described():
    description = minifisher.MBF([nn.Parameter(torch.zeros(0))]).describe()
    assert description.parameters == 0
    assert description.coverage == {"diagonal": 0.0}
    assert str(description).endswith("MBF: 0 parameters, 0.0 curvature bytes each; diagonal 0.0%")
