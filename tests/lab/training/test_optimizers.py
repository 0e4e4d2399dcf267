from __future__ import annotations

import pytest
import torch

import minifisher
from minifisher_lab.names import UnknownNameError
from minifisher_lab.training import optimizers as module
from minifisher_lab.training.optimizers import choose, grid_around, next_rate, optimizers

FIRST_ORDER = ("adamw", "adam", "adagrad", "rmsprop", "sgd", "muon")


def _model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_optimizers_come_from_torch_and_step(name: str) -> None:
    model = _model()
    choice = choose(name)
    optimizer = choice.build(model, lr=choice.rate)
    before = [weight.detach().clone() for weight in model.parameters()]

    def closure() -> torch.Tensor:
        loss = model(torch.ones(3, 4)).square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    parts = optimizer.optimizers if name == "muon" else [optimizer]
    assert all(type(part).__module__.startswith("torch.optim") for part in parts)
    assert all(group["lr"] == choice.rate for group in optimizer.param_groups)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    muon, adamw = choose("muon").build(_model(), lr=1e-3).optimizers
    assert [w.ndim for group in muon.param_groups for w in group["params"]] == [2, 2]
    assert [w.ndim for group in adamw.param_groups for w in group["params"]] == [1, 1]


def test_every_method_of_minifisher_has_a_name() -> None:
    assert set(minifisher.METHODS) <= set(optimizers())


def test_grids_are_equal_for_all_methods_and_hold_five_rates_with_the_default() -> None:
    for choice in optimizers().values():
        assert len(choice.grid) == 5
        assert choice.rate in choice.grid
        assert list(choice.grid) == sorted(choice.grid)
    assert len({choose(name).grid for name in (*minifisher.METHODS, "adamw", "adam", "muon")}) == 1
    assert grid_around(1e-3) == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert (next_rate(3e-2, up=True), next_rate(3e-4, up=False)) == (1e-1, 1e-4)


def test_arguments_after_the_name_reach_the_optimizer() -> None:
    choice = choose("sgd:nesterov=True:weight_decay=0.1")
    group = choice.build(_model(), lr=0.5).param_groups[0]
    assert (group["nesterov"], group["weight_decay"], group["momentum"], group["lr"]) == (True, 0.1, 0.9, 0.5)
    assert choice.name == "sgd:nesterov=True:weight_decay=0.1"


def test_a_fixed_argument_is_no_longer_searched() -> None:
    assert set(choose("mbf:power=0.5").ranges) == set(choose("mbf-sampled").ranges) == {"damping"}
    assert not choose("mbf:power=0.5:damping=0.5").ranges


def test_an_alias_is_one_row_and_takes_further_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALIASES", {"heavy": "sgd:momentum=0.99", "later": "absent:argument=1"})
    assert "later" not in optimizers()
    group = choose("heavy:weight_decay=0.1").build(_model(), lr=0.5).param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.99, 0.1)


@pytest.mark.parametrize(("name", "near"), [("adamm", "adam"), ("SGD", "sgd"), ("rms_prop", "rmsprop")])
def test_an_unknown_name_lists_similar_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"{name}.*did you mean.*\b{near}\b"):
        choose(name)


def test_an_unknown_name_without_similar_ones_lists_all() -> None:
    with pytest.raises(UnknownNameError, match="there are: adamw, adam"):
        choose("zzzzzz")


def test_an_argument_without_a_value_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="is not ARGUMENT=VALUE"):
        choose("sgd:nesterov")


@pytest.mark.parametrize("spec", ["mbf:lr=0.5", "mbf-sampled:damping=1:lr=0.5", "sgd:lr=0.5"])
def test_a_learning_rate_after_the_name_is_refused_and_the_right_option_named(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"'{spec}' sets lr.*--lr NAME=0\.5 .*--lr 0\.5 "):
        choose(spec)
