from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minifisher_lab.comparison import fisher
from minifisher_lab.comparison.fisher import Layer, partitions, shuffled
from minifisher_lab.presentation import inspect
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.problems.cnns import five_layer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_fisher_matrix_is_the_mean_outer_product_of_gradients_of_drawn_labels(likelihood: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    problem = replace(PROBLEMS["cnn-digits"], likelihood=likelihood)  # type: ignore[arg-type]
    inputs = torch.randn(4, 1, 1, 2)
    outputs = model(inputs).detach().requires_grad_()
    drawn = 20000
    labels = {
        "categorical": lambda: torch.distributions.Categorical(logits=outputs).sample((drawn,)),
        "bernoulli": lambda: torch.distributions.Bernoulli(logits=outputs).sample((drawn,)),
        "gaussian": lambda: outputs + torch.randn(drawn, 4, 3),
    }[likelihood]()
    errors = {
        "categorical": lambda: outputs.softmax(1) - nn.functional.one_hot(labels, 3),
        "bernoulli": lambda: outputs.sigmoid() - labels,
        "gaussian": lambda: outputs - labels,
    }[likelihood]()
    gradients = torch.einsum("dno,ni->dnoi", errors.detach(), inputs.flatten(1)).flatten(2).flatten(0, 1)
    sampled = gradients.T @ gradients / len(gradients)
    exact = fisher.fisher(problem, model, inputs, "1.weight")
    assert torch.allclose(exact.float(), sampled, atol=0.05 * float(sampled.abs().max()))


def test_partitions_are_rows_columns_and_kernels() -> None:
    named = partitions(torch.Size([2, 3, 1, 2]))
    assert named["rows"].tolist() == [0] * 6 + [1] * 6
    assert named["columns"].tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert named["kernels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert set(partitions(torch.Size([2, 3]))) == {"rows", "columns"}


def test_the_share_inside_the_blocks_is_that_of_the_norm() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    matrix = torch.ones(4, 4) + torch.eye(4)
    layer = Layer("w", (2, 2), matrix, {"rows": groups})
    assert layer.share(groups) == pytest.approx(((4 * 4 + 4) / (4 * 4 + 12)) ** 0.5)
    assert layer.share(groups, diagonal=False) == pytest.approx((4 / 12) ** 0.5)
    assert sorted(shuffled(groups).tolist()) == groups.tolist()


def test_inspect_draws_and_tabulates_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "REDUCED", {"cnn-digits": partial(five_layer, 1, 2, 10)})
    monkeypatch.setattr(fisher, "VISIBLE", range(60, 80))
    monkeypatch.setattr(fisher, "SAMPLES", 60)
    monkeypatch.setattr(fisher, "STEPS", 20)
    found = fisher.layers("cnn-digits")
    assert [layer.shape for layer in found] == [(4, 2, 3, 3), (10, 8)][: len(found)]
    assert inspect.table(found).row_count == sum(len(layer.partitions) for layer in found)
    with Image.open(inspect.draw(found, "title", tmp_path / "picture.png")) as image:
        assert len(np.unique(image.convert("L"))) > 20
    rows = found[0].partitions["rows"]
    assert found[0].share(rows) > found[0].share(shuffled(rows))


def test_a_large_problem_cannot_be_inspected() -> None:
    with pytest.raises(ValueError, match="inspect one of autoencoder-digits, cnn-digits"):
        fisher.reduced(PROBLEMS["vgg16-cifar10"])
