from __future__ import annotations

import pytest
import torch
from torch import nn

import minifisher
from minifisher_lab.names import UnknownNameError
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import optimizers as module
from minifisher_lab.training.optimizers import choose, grid_around, hidden_weights, next_rate, optimizers

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


HIDDEN = {
    "autoencoder-digits": [f"{number}.weight" for number in (3, 5, 7, 8, 10, 12)],
    "cnn-digits": ["3.weight", "7.weight", "10.weight", "14.weight"],
    "gcn-cora": [],
    "gpt-shakespeare-small": [
        f"blocks.{block}.{layer}.weight"
        for block in range(3)
        for layer in ("attention.queries_keys_values", "attention.projection", "mlp.0", "mlp.2")
    ],
    "lstm-shakespeare": ["lstm.weight_ih_l0", "lstm.weight_hh_l0"],
}


@pytest.mark.parametrize(("problem", "names"), HIDDEN.items())
def test_muon_takes_the_hidden_weights_and_adamw_the_rest(problem: str, names: list[str]) -> None:
    model = PROBLEMS[problem].build(seed=0)
    known = dict(model.named_parameters())
    assert [
        name for name, w in known.items() if any(w is hidden for hidden in hidden_weights(model))
    ] == names
    built = choose("muon").build(model, lr=1e-3).optimizers
    matrices = [w for part in built[:-1] for group in part.param_groups for w in group["params"]]
    others = [w for group in built[-1].param_groups for w in group["params"]]
    assert [w.data_ptr() for w in matrices] == [known[name].data_ptr() for name in names]
    assert [tuple(w.shape) for w in matrices] == [(len(known[n]), known[n][0].numel()) for n in names]
    assert {id(w) for w in others} == {id(w) for name, w in known.items() if name not in names}


def test_muon_moves_a_kernel_as_it_would_move_the_matrix() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3)]
    model = nn.Sequential(*layers)
    matrix = nn.Parameter(layers[1].weight.detach().clone().flatten(1))
    alone = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    optimizer = choose("muon").build(model, lr=0.1)
    for _ in range(3):
        model.zero_grad()

        def closure() -> torch.Tensor:
            loss = model(torch.ones(1, 1, 8, 8)).square().sum()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        matrix.grad = layers[1].weight.grad.flatten(1)
        alone.step()
        torch.testing.assert_close(layers[1].weight.flatten(1), matrix)


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
