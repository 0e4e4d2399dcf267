"""Linear layers that are not `nn.Linear` train as `nn.Linear` does, also where their weight is [in, out]."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minifisher
from minifisher.statistics.layers import layers_of
from tests.helpers import OwnLinear, TransposedLinear, train_on_batches

CASES = [(method, fisher) for method, cls in minifisher.METHODS.items() for fisher in cls.estimators]


def network(kind: type[nn.Module]) -> nn.Sequential:
    """The same function whatever the kind, with two equal layers, which are stacked."""
    torch.manual_seed(0)
    plain = [nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    layers: list[nn.Module] = []
    for linear in plain:
        layer = kind(linear.in_features, linear.out_features)
        with torch.no_grad():
            layer.weight.copy_(linear.weight.mT if kind is TransposedLinear else linear.weight)
            layer.bias.copy_(linear.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def weights(module: nn.Module) -> list[Tensor]:
    transposed = isinstance(module[0], TransposedLinear)
    return [p.detach().mT if transposed and p.ndim > 1 else p.detach() for p in module.parameters()]


@pytest.mark.parametrize("kind", [OwnLinear, TransposedLinear])
@pytest.mark.parametrize(
    "options", [{}, {"fold_bias": True}, {"graft": "adam-rows", "weight_decay": 0.1, "momentum": 0.0}]
)
@pytest.mark.parametrize(("method", "fisher"), CASES)
def test_every_method_trains_as_with_linear_layers(
    method: str, fisher: str, options: dict[str, Any], kind: type[nn.Module]
) -> None:
    if method == "tnt" and fisher == "exact":
        options = {**options, "per_sample": True}
    if minifisher.METHODS[method].options["fisher"].init:
        options = {**options, "fisher": fisher}
    results = []
    for layer_kind in (nn.Linear, kind):
        module = network(layer_kind)
        optimizer = minifisher.METHODS[method](module, lr=1e-2, inverse_every=2, **options)
        train_on_batches(module, optimizer, range(6))
        results.append(weights(module))
        assert optimizer.diagnostics()["fallbacks"] == 0
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fold_bias", [False, True])
def test_a_transposed_layer_resumes_to_the_last_bit(fold_bias: bool) -> None:
    module = network(TransposedLinear)
    optimizer = minifisher.MBF(module, lr=1e-2, fisher="empirical", fold_bias=fold_bias)
    train_on_batches(module, optimizer, range(3))
    again = copy.deepcopy(module)
    resumed = minifisher.MBF(again, lr=1e-2, fisher="empirical", fold_bias=fold_bias)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((module, optimizer), (again, resumed)):
        train_on_batches(*run, range(3, 6))
    torch.testing.assert_close(list(again.parameters()), list(module.parameters()), rtol=0, atol=0)


def test_rows_of_a_transposed_layer_are_its_outputs() -> None:
    described = minifisher.MBF(TransposedLinear(7, 3)).describe().layers[0]
    assert described.shape == (3, 7)
    assert described.structure == minifisher.MBF(nn.Linear(7, 3)).describe().layers[0].structure


def test_a_subclass_with_a_forward_method_of_its_own_is_not_read() -> None:
    class Doubled(OwnLinear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    (weight, _) = layers_of(Doubled(3, 2))
    assert weight.note == "Doubled with its own forward method: only its gradient is read"
    minifisher.register_layer(Doubled)
    assert layers_of(Doubled(3, 2))[0].reads_samples


def test_only_a_class_of_modules_can_be_registered() -> None:
    with pytest.raises(TypeError, match=r"takes a class of modules, such as MyLinear, got Linear\(in_"):
        minifisher.register_layer(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_error_lists_every_obstacle() -> None:
    class Scaled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    module = nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3), Scaled(3, 2), Scaled(2, 2))
    with pytest.raises(ValueError, match="was given none") as error:
        minifisher.MBF(module, fisher="empirical")
    for obstacle in ("Embedding (0.weight)", "LayerNorm (1.weight)", "own forward method (2.weight)"):
        assert str(error.value).count(obstacle) == 1
    assert "3.weight" not in str(error.value)  # the same obstacle again


def test_frozen_integers_of_quantised_layers_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].weight = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    optimizer = minifisher.MBF(module)
    assert [layer.name for layer in optimizer.describe().layers] == ["0.bias", "1.weight", "1.bias"]
    assert len(optimizer.param_groups[0]["params"]) == 3
