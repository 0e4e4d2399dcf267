"""Descriptions of what an optimizer chose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import minifisher
from minifisher.kernels import choose


def test_nothing_but_empty_weights_can_be_described():
    description = minifisher.MBF([nn.Parameter(torch.zeros(0))]).describe()
    assert description.parameters == 0
    assert description.coverage == {"diagonal": 0.0}
    assert "MBF: 0 parameters, 0.0 curvature bytes each; diagonal 0.0%" in str(description).splitlines()


def test_frozen_weights_are_left_out_of_shares_and_sums():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    network[0].requires_grad_(False)
    description = minifisher.MBF(network).describe()
    assert (description.parameters, description.frozen) == (36, 72)
    assert description.coverage == {"two-sided blocks": 32 / 36, "diagonal": 4 / 36}
    assert description.state_bytes == sum(layer.state_bytes for layer in description.layers[2:])
    assert "36 parameters" in str(description)
    assert "72 frozen parameters are not counted" in str(description)
    assert len(description.layers) == 4


@pytest.mark.parametrize(
    ("numba", "works", "words"),
    [
        (True, True, "numba is used for float32 on the CPU"),
        (True, False, "numba is installed but switched off"),
        (False, False, "pip install 'minifisher[fast]'"),
    ],
)
def test_the_last_line_says_whether_kernels_are_compiled(monkeypatch, numba, works, words):
    monkeypatch.setattr(choose, "NUMBA_INSTALLED", numba)
    monkeypatch.setattr(choose, "_numba_works", lambda: works)
    assert words in str(minifisher.MBF(nn.Linear(2, 2)).describe()).splitlines()[-1]


@pytest.mark.parametrize(
    ("installed", "words"), [(True, "Triton is used"), (False, "Triton is not installed")]
)
def test_on_a_gpu_triton_is_named(monkeypatch, installed, words):
    monkeypatch.setattr(choose, "TRITON_INSTALLED", installed)
    assert words in choose.compiled_kernels("cuda")
    assert choose.compiled_kernels("mps") == "there are no compiled kernels for mps"
