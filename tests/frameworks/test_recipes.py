"""The recipes for other packages run as they stand on the page."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import minifisher
from tests.frameworks.conftest import needs
from tests.test_docs import given

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
RECIPES = dict(
    re.findall(r"<!-- not run: needs (\w+) -->\n```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
)


def test_the_recipes_are_found() -> None:
    expected = {"accelerate", "lightning", "peft", "timm", "torch_geometric", "transformers"}
    assert expected <= RECIPES.keys()


@pytest.mark.parametrize("package", RECIPES)
def test_a_recipe_runs(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "1")
    if package in ("accelerate", "transformers"):
        import accelerate

        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    optimizers: list[minifisher.CurvatureOptimizer] = []
    made = minifisher.CurvatureOptimizer.__init__

    def remembered(optimizer: minifisher.CurvatureOptimizer, *arguments: object, **options: object) -> None:
        made(optimizer, *arguments, **options)
        optimizers.append(optimizer)

    monkeypatch.setattr(minifisher.CurvatureOptimizer, "__init__", remembered)
    taken_for_granted = given()
    if package == "lightning":  # to which a list of batches would be a list of loaders
        inputs, targets = map(torch.cat, zip(*taken_for_granted["loader"], strict=True))
        taken_for_granted["loader"] = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    with torch.random.fork_rng():
        exec(compile(RECIPES[package], f"{PAGE.name}: {package}", "exec"), taken_for_granted)
    (optimizer,) = optimizers
    if package != "timm":  # which makes the optimizer alone
        counts = optimizer.diagnostics()["weights"].values()
        assert any(entry["observations"] for entry in counts)
