from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from minifisher.statistics.layers import EVERY_KIND, layer_of, layers_of
from tests.helpers import NETS, Attention, Tied, Twice


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Standardized(nn.Conv2d):
    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(inputs, weight / weight.norm(), bias)


class Named(nn.Linear):
    """A subclass that keeps the forward method of its base."""


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def patched():
    module = nn.Linear(2, 2)
    module.forward = lambda inputs: inputs
    return module


def layer_named(module, name, fold_bias=False):
    return next(layer for layer in layers_of(module, EVERY_KIND if fold_bias else ()) if layer.name == name)


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_is_in_one_layer_and_in_order(name, fold_bias):
    module = NETS[name][0]()
    layers = layers_of(module, EVERY_KIND if fold_bias else ())
    order = {parameter: place for place, parameter in enumerate(module.parameters())}
    found = [parameter for layer in layers for parameter in layer.parameters]
    assert len(found) == len(order)
    assert set(found) == set(order)
    weights = [order[layer.weight] for layer in layers]
    assert weights == sorted(weights)
    assert {layer.name for layer in layers} <= {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("module", "kind", "groups"),
    [
        (nn.Linear(3, 2), "linear", 1),
        (Named(3, 2), "linear", 1),
        (nn.Conv1d(4, 2, 3, groups=2), "convolution", 2),
        (nn.Conv2d(4, 4, 3, groups=4), "convolution", 4),
        (nn.Conv3d(2, 2, 3), "convolution", 1),
    ],
)
def test_layers_whose_samples_can_be_recorded(module, kind, groups):
    layer = layer_named(module, "weight")
    assert (layer.kind, layer.groups, layer.modules, layer.note) == (kind, groups, (module,), "")


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (Tied(), "first.bias", "bias of Linear"),
        (nn.ConvTranspose2d(2, 3, 2), "weight", "ConvTranspose2d"),
        (nn.Embedding(3, 2), "weight", "Embedding"),
        (nn.BatchNorm2d(2), "bias", "BatchNorm2d"),
        (nn.LayerNorm(2), "weight", "LayerNorm"),
        (nn.LSTM(2, 2), "weight_hh_l0", "weight_hh_l0 of LSTM"),
        (nn.Bilinear(2, 2, 2), "weight", "Bilinear"),
        (Attention(4), "attention.in_proj_weight", "in_proj_weight of MultiheadAttention"),
        (Attention(4), "attention.out_proj.weight", "MultiheadAttention"),
        (Scaled(2, 2), "weight", "Scaled with its own forward method"),
        (Standardized(2, 2, 1), "weight", "Standardized with its own forward method"),
        (patched(), "weight", "Linear with its own forward method"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "parametrizations.weight.original1", "parametrised"),
        (prune.identity(nn.Linear(2, 2), "weight"), "weight_orig", "weight_orig of Linear"),
        (nn.LazyLinear(3), "weight", "LazyLinear before its first forward pass"),
        (nn.Linear(0, 3), "weight", "Linear without entries"),
        (LanguageModel(), "embedding.weight", "used in 2 places, among them Embedding"),
    ],
)
@pytest.mark.parametrize("fold_bias", [False, True])
def test_other_layers_say_why_their_samples_cannot_be_recorded(module, name, reason, fold_bias):
    layer = layer_named(module, name, fold_bias)
    assert reason in layer.note
    assert "only its gradient is read" in layer.note
    assert not layer.reads_samples
    assert (layer.kind, layer.bias) == ("other", None)


def test_samples_of_a_lazy_module_can_be_recorded_after_its_first_forward_pass():
    module = nn.LazyLinear(3)
    module(torch.ones(1, 2))
    assert layer_named(module, "weight").reads_samples


def test_a_tied_weight_is_one_layer_and_its_biases_are_layers_of_their_own():
    module = Tied()
    layers = layers_of(module, EVERY_KIND)
    assert [layer.name for layer in layers] == ["first.weight", "first.bias", "second.bias"]
    assert layers[0].modules == (module.first, module.second)


def test_a_tied_bias_is_not_folded():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    module[1].bias = module[0].bias
    assert [layer.name for layer in layers_of(module, EVERY_KIND)] == ["0.weight", "0.bias", "1.weight"]


def test_a_frozen_bias_is_not_folded():
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    assert layer_named(module, "weight", fold_bias=True).bias is None


def test_a_module_called_twice_folds_its_bias():
    module = Twice(nn.Linear(2, 2))
    assert layer_named(module, "layer.weight", fold_bias=True).bias is module.layer.bias


def test_samples_of_a_weight_tied_between_convolutions_with_different_groups_are_not_recorded():
    module = nn.Sequential(nn.Conv2d(2, 2, 3, groups=1), nn.Conv2d(4, 2, 3, groups=2))
    module[1].weight = module[0].weight
    assert "tied between layers of different kinds" in layer_named(module, "0.weight").note


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Conv2d(4, 2, (3, 2), groups=2), nn.LayerNorm(3)])
def test_join_and_split(module, fold_bias):
    for layer in layers_of(module, EVERY_KIND if fold_bias else ()):
        tensors = [torch.randn_like(parameter) for parameter in layer.parameters]
        joined = layer.join(tensors)
        assert joined.shape == layer.shape
        if layer.bias is None:
            assert joined is tensors[0]
        else:
            torch.testing.assert_close(joined[1], torch.cat((tensors[0][1].flatten(), tensors[1][1:2])))
        for tensor, back in zip(tensors, layer.split(joined), strict=True):
            assert torch.equal(tensor, back)


def test_a_bare_tensor():
    parameter = nn.Parameter(torch.ones(2, 3))
    layer = layer_of("param 3 of group 0", parameter)
    assert (layer.name, layer.shape, layer.parameters) == ("param 3 of group 0", (2, 3), (parameter,))
    assert not layer.reads_samples
    assert "bare tensor" in layer.note
