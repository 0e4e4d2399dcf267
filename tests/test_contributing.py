"""The method in CONTRIBUTING.md works as it stands there, outside the package."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minifisher
from tests import test_every_method
from tests.helpers import dense_preconditioner

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
(CODE,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)

# The docstring of a method inside the package also names a paper and the cost.
OF_THE_PACKAGE = "test_the_docstring_gives_formula_paper_shapes_cost_and_memory"
PROPERTIES = {
    name: check
    for name, check in vars(test_every_method).items()
    if name.startswith("test_") and name != OF_THE_PACKAGE
}


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "contributed.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("contributed", path)
    module = sys.modules["contributed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["contributed"]


@pytest.mark.parametrize("check", PROPERTIES)
def test_the_example_has_the_properties_of_every_method(contributed, monkeypatch, check):
    monkeypatch.setitem(minifisher.METHODS, "inputscaling", contributed.InputScaling)
    run = PROPERTIES[check]
    further = {
        "dtype": torch.float32,
        "bad": float("nan"),
        "monkeypatch": monkeypatch,
    }
    wanted = inspect.signature(run).parameters.keys() - {"name"}
    run("inputscaling", **{name: further[name] for name in wanted})


def test_the_example_computes_its_formula(contributed):
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=False).double()
    optimizer = contributed.InputScaling(layer, lr=1e-2, damping=0.2)
    layer(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    state = {key: value for key, value in optimizer.state[layer.weight].items() if key == "mean_square"}
    squares = gradient.square().mean(0)
    torch.testing.assert_close(state["mean_square"], squares)
    (planned,) = test_every_method.plans(optimizer, layer)
    damped = squares + 0.2 * (squares + squares.mean()) / 2
    expected = torch.diag(damped.rsqrt().repeat(4))
    torch.testing.assert_close(dense_preconditioner(planned[1].curvature, state, planned[0], 0.2), expected)


def test_the_example_describes_itself_and_refuses_what_it_does_not_know(contributed):
    text = str(contributed.InputScaling(nn.Linear(3, 4)).describe())
    assert "scaled inputs" in text
    assert "first-order step" in text
    with pytest.raises(ValueError, match="power must be finite and > 0, got 0"):
        contributed.InputScaling(nn.Linear(3, 4), power=0)
    with pytest.raises(TypeError, match="did you mean 'power'"):
        contributed.InputScaling(nn.Linear(3, 4), powr=1)
    with pytest.raises(ValueError, match="fisher of InputScaling must be one of 'gradient'"):
        contributed.InputScaling(nn.Linear(3, 4), fisher="sampled")


def test_the_example_has_a_frozen_curvature_without_tensors(contributed):
    curvature = contributed.InputMeanSquares(torch.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        curvature.power = 1.0
    assert not any(torch.is_tensor(value) for value in dataclasses.astuple(curvature))
