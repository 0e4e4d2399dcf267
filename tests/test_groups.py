"""Parameter groups of tensors whose samples are read: `MBF(groups, model=model)`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import minifisher
from tests.helpers import train_on_batches


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def decayed_and_not(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_groups_read_the_samples_that_the_module_reads(method: str) -> None:
    results = []
    for grouped in (False, True):
        model = network()
        groups = decayed_and_not(model)
        for group in groups:
            group["weight_decay"] = 0.1
        cls = minifisher.METHODS[method]
        reads = cls.options["fisher"].init and "empirical" in cls.estimators
        options = {
            "lr": 1e-2,
            "weight_decay": 0.1,
            "fold_bias": False,
            **({"fisher": "empirical"} if reads else {}),
        }
        optimizer = cls(groups, model=model, **options) if grouped else cls(model, **options)
        assert "1.weight" in {layer.name for layer in optimizer.describe().layers}
        train_on_batches(model, optimizer, range(5))
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_each_group_has_its_own_decay() -> None:
    model = network()
    optimizer = minifisher.MBF(decayed_and_not(model), lr=0.5, model=model, fisher="empirical")
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_a_bias_is_folded_in_only_within_one_group() -> None:
    model = network()
    optimizer = minifisher.MBF(decayed_and_not(model), model=model, fold_bias=True)
    assert [layer.name for layer in optimizer.describe().layers][:2] == ["0.weight", "3.weight"]
    assert optimizer.describe().layers[0].shape == (6, 5)
    together = minifisher.MBF([{"params": list(model.parameters())}], model=model, fold_bias=True)
    assert together.describe().layers[0].shape == (6, 6)


def test_a_tensor_that_is_not_of_the_module_says_so() -> None:
    model, other = network(), nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    groups = [{"params": [*model.parameters(), other]}]
    optimizer = minifisher.MBF(groups, model=model, fisher="empirical")
    assert "given as a bare tensor" in optimizer.describe().layers[-1].reason


def test_a_group_that_is_added_later_is_read_too() -> None:
    model = network()
    optimizer = minifisher.KFAC([{"params": list(model[0].parameters())}], model=model)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train_on_batches(model, optimizer, range(2))
    assert optimizer.diagnostics()["weights"]["3.weight"]["observations"] == 1


def test_groups_resume_and_are_copied() -> None:
    model = network()
    optimizer = minifisher.KFAC(decayed_and_not(model), model=model, fisher="empirical")
    train_on_batches(model, optimizer, range(3))
    twin, copied = copy.deepcopy((model, optimizer))
    again = copy.deepcopy(model)
    resumed = minifisher.KFAC(decayed_and_not(again), model=again, fisher="empirical")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((model, optimizer), (twin, copied), (again, resumed)):
        train_on_batches(*run, range(3, 6))
        torch.testing.assert_close(list(run[0].parameters()), list(model.parameters()), rtol=0, atol=0)


def test_a_list_of_modules_gets_a_clear_word() -> None:
    with pytest.raises(TypeError, match="params is a list of modules: pass the module that holds them"):
        minifisher.MBF(list(network()))


def test_the_module_is_no_option_of_a_group() -> None:
    model = network()
    optimizer = minifisher.MBF(decayed_and_not(model), model=model)
    assert "model" not in optimizer.defaults
    assert all("model" not in group for group in optimizer.state_dict()["param_groups"])
