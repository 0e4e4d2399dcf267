"""Mean outputs and mean output gradients, compared with a formula for a single layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minifisher.statistics.layers import layers_of
from minifisher.statistics.secants import OutputMeans, secants


def outputs_and_gradients(module, inputs, weights):
    """h and its per-sample gradients of the loss mean_n <weights_n, tanh(h_n)>, from the module alone."""
    outputs = module(inputs).detach()
    return outputs, weights * (1 - outputs.tanh() ** 2)


def evaluate(module, inputs, weights, means, activation=torch.tanh, times=1):
    with means.recording():
        for _ in range(times):
            (activation(module(inputs)) * weights).flatten(1).sum(1).mean().div(times).backward()


def by_group(tensor, groups, channels):  # [n, out, *places] or [n, *places, out]
    last = tensor.movedim(channels, -1).flatten(0, -2).mean(0)
    return last.reshape(groups, -1)


CASES = {
    "linear": (nn.Linear(3, 4), (5, 3), 1, -1),
    "linear with positions": (nn.Linear(3, 4, bias=False), (5, 2, 3), 1, -1),
    "convolution": (nn.Conv2d(2, 4, 3, padding=1), (5, 2, 4, 4), 1, 1),
    "grouped convolution": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (5, 4, 7, 7), 2, 1),
    "1d": (nn.Conv1d(2, 3, 2), (5, 2, 4), 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_means_are_taken_over_samples_and_positions_of_per_sample_gradients(name):
    module, size, groups, channels = CASES[name]
    module = module.double()
    inputs = torch.randn(size, dtype=torch.float64)
    weights = torch.randn_like(module(inputs))
    layer = layers_of(module)[0]
    means = OutputMeans([layer])
    evaluate(module, inputs, weights, means)
    outputs, gradients = outputs_and_gradients(module, inputs, weights)
    mean_output, mean_gradient = means.read()[layer]
    torch.testing.assert_close(mean_output, by_group(outputs, groups, channels))
    torch.testing.assert_close(mean_gradient, by_group(gradients, groups, channels))


def test_two_backward_passes_on_one_graph_bring_two_terms():
    module, inputs = nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    weights = torch.randn(5, 4, dtype=torch.float64)
    layer = layers_of(module)[0]
    means = OutputMeans([layer])
    with means.recording():
        outputs = module(inputs)
        (outputs * weights).sum(1).mean().backward(retain_graph=True)
        outputs.square().sum(1).mean().backward()
    expected = weights + 2 * outputs.detach()
    torch.testing.assert_close(means.read()[layer][1], by_group(expected, 1, -1))


def gradient_for_the_inputs(module, inputs):
    perturbed = inputs.clone().requires_grad_()
    torch.autograd.grad(module(perturbed).square().sum(), perturbed)


def function_transform(module, inputs):
    torch.func.grad(lambda inputs: module(inputs).square().sum())(inputs)


@pytest.mark.parametrize("before", [gradient_for_the_inputs, function_transform])
def test_gradients_for_the_inputs_inside_the_closure_do_not_count(before):
    module = nn.Linear(3, 4)
    inputs, weights = torch.randn(5, 3), torch.randn(5, 4)
    (layer, _) = layers_of(module)
    usual, after_others = OutputMeans([layer]), OutputMeans([layer])
    evaluate(module, inputs, weights, usual)
    with after_others.recording():
        before(module, inputs)
    evaluate(module, inputs, weights, after_others)
    torch.testing.assert_close(after_others.read(), usual.read(), rtol=0, atol=0)


def test_an_in_place_activation_does_not_change_the_means():
    module = nn.Linear(3, 4)
    inputs, weights = torch.randn(5, 3), torch.randn(5, 4)
    (layer, _) = layers_of(module)
    usual, in_place = OutputMeans([layer]), OutputMeans([layer])
    evaluate(module, inputs, weights, usual)
    evaluate(module, inputs, weights, in_place, activation=torch.tanh_)
    torch.testing.assert_close(in_place.read()[layer], usual.read()[layer])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_inside_an_activation_checkpoint_counts_once(reentrant):
    module = nn.Sequential(nn.Linear(3, 4))
    inputs, weights = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4)
    layer = layers_of(module)[0]
    usual, checkpointed = OutputMeans([layer]), OutputMeans([layer])
    evaluate(module, inputs, weights, usual)
    evaluate(lambda x: checkpoint(module, x, use_reentrant=reentrant), inputs, weights, checkpointed)
    torch.testing.assert_close(checkpointed.read()[layer], usual.read()[layer])


def test_micro_batches_have_the_means_of_one_batch():
    module = nn.Linear(3, 4)
    inputs, weights = torch.randn(5, 3), torch.randn(5, 4)
    layer = layers_of(module)[0]
    once, thrice = OutputMeans([layer]), OutputMeans([layer])
    evaluate(module, inputs, weights, once)
    evaluate(module, inputs, weights, thrice, times=3)
    torch.testing.assert_close(thrice.read()[layer], once.read()[layer])


def test_a_layer_used_twice_has_the_positions_of_both_uses():
    module = nn.Linear(3, 3).double()
    inputs, weights = torch.randn(2, 5, 3, dtype=torch.float64)
    layer = layers_of(module)[0]
    means = OutputMeans([layer])
    with means.recording():
        (module(inputs).tanh() + module(2 * inputs).tanh()).mul(weights).sum(1).mean().backward()
    parts = [outputs_and_gradients(module, x, weights) for x in (inputs, 2 * inputs)]
    for mean, index in zip(means.read()[layer], (0, 1), strict=True):
        expected = torch.cat([part[index] for part in parts]).mean(0, keepdim=True)
        torch.testing.assert_close(mean, expected)


def test_a_secant_is_the_change_of_layers_with_means_before_and_after():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first, _, second, _ = layers_of(module)
    inputs, weights = torch.randn(5, 3), torch.randn(5, 4)
    before, after = OutputMeans([first, second]), OutputMeans([first])
    evaluate(module[0], inputs, weights, before)
    with torch.no_grad():
        module[0].weight.mul_(2)
    evaluate(module[0], inputs, weights, after)
    found = secants(before.read(), after.read())
    assert list(found) == [first]
    change = module[0](inputs).mean(0) - (module[0].bias + inputs.mean(0) @ module[0].weight.T / 2)
    torch.testing.assert_close(found[first].output_change, change.detach().unsqueeze(0))
    torch.testing.assert_close(found[first].gradient_change, after.read()[first][1] - before.read()[first][1])


def test_no_hook_remains_and_calls_under_no_grad_are_not_recorded():
    module = nn.Linear(3, 4)
    layer = layers_of(module)[0]
    means = OutputMeans([layer])
    with means.recording(), torch.no_grad():
        module(torch.randn(5, 3))
    assert means.read() == {}
    assert not module._forward_hooks
