"""Whatever backward passes are run, the samples are those whose gradients are summed in `.grad`."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minifisher import KBFGS, MBF
from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import layers_of
from tests.helpers import problem


def gradient_for_the_inputs(model, loss, inputs):
    for _ in range(3):
        perturbed = inputs.clone().requires_grad_()
        torch.autograd.grad(loss(model(perturbed)), perturbed)
    loss(model(inputs)).backward()


def gradient_for_the_inputs_on_the_same_graph(model, loss, inputs):
    perturbed = inputs.clone().requires_grad_()
    found = loss(model(perturbed))
    torch.autograd.grad(found, perturbed, retain_graph=True)
    found.backward()


def backward_for_the_inputs(model, loss, inputs):
    perturbed = inputs.clone().requires_grad_()
    loss(model(perturbed)).backward(inputs=[perturbed])
    loss(model(inputs)).backward()


def gradient_for_the_weights(model, loss, inputs):
    torch.autograd.grad(loss(model(inputs[:3])), list(model.parameters()))
    loss(model(inputs)).backward()


def cleared_before_the_forward_pass(model, loss, inputs):
    loss(model(inputs[:3])).backward()
    model.zero_grad()
    loss(model(inputs)).backward()


def cleared_after_the_forward_pass(model, loss, inputs):
    for _ in range(3):
        found = loss(model(inputs))
        model.zero_grad()
        found.backward()


def cleared_between_two_backward_passes_on_one_graph(model, loss, inputs):
    found = loss(model(inputs))
    found.backward(retain_graph=True)
    model.zero_grad()
    found.backward()


def cleared_between_two_graphs_of_one_forward_pass(model, loss, inputs):
    first, second = loss(model(inputs)), loss(model(2 * inputs))
    first.backward()
    model.zero_grad()
    second.backward()


def set_to_zero_after_another_optimizer_took_a_step(model, loss, inputs):
    for _ in range(3):
        found = loss(model(inputs))
        model.zero_grad(set_to_none=False)
        found.backward()
        change_weights(model)
    found = loss(model(inputs))
    model.zero_grad(set_to_none=False)
    found.backward()


def accumulated_while_the_weights_change(model, loss, inputs):
    for part in (inputs[:2], inputs[2:4]):
        (loss(model(part)) / 2).backward()
        change_weights(model)


def accumulated_after_gradients_for_the_inputs(model, loss, inputs):
    for part in (inputs[:2], inputs[2:4]):
        perturbed = part.clone().requires_grad_()
        torch.autograd.grad(loss(model(perturbed)), perturbed)
        (loss(model(part)) / 2).backward()


SCRIPTS = [
    gradient_for_the_inputs,
    gradient_for_the_inputs_on_the_same_graph,
    backward_for_the_inputs,
    gradient_for_the_weights,
    cleared_before_the_forward_pass,
    cleared_after_the_forward_pass,
    cleared_between_two_backward_passes_on_one_graph,
    cleared_between_two_graphs_of_one_forward_pass,
    set_to_zero_after_another_optimizer_took_a_step,
    accumulated_while_the_weights_change,
    accumulated_after_gradients_for_the_inputs,
]


def change_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


def assert_samples_of_the_gradients(capture):
    found = capture.collect()
    assert set(found) == set(capture.layers)
    for layer, samples in found.items():
        mean = torch.cat(list(samples.gradients())).sum(0) / samples.count
        torch.testing.assert_close(mean, layer.weight.grad, rtol=1e-10, atol=1e-12)
    return [samples.count for samples in found.values()]


@pytest.mark.parametrize(
    ("name", "backend"),
    [("linear", None), ("twice", None), ("in-place activation", None), ("linear", "aot_eager")],
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_samples_are_those_whose_gradients_are_in_grad(script, name, backend):
    case = problem(name)
    model = torch.compile(case.module, backend=backend) if backend else case.module
    capture = Capture(layers_of(case.module), 1 << 30)
    capture.arm()
    script(model, lambda outputs: outputs.sin().sum(1).mean(), case.inputs)
    expected = {accumulated_while_the_weights_change: 4, accumulated_after_gradients_for_the_inputs: 4}.get(
        script, 5
    )
    assert set(assert_samples_of_the_gradients(capture)) == {expected}
    capture.release()


def per_sample(module):
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(weights, one):
        return torch.func.functional_call(module, weights, (one[None],)).square().sum()

    return lambda inputs: torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, inputs)


TRANSFORMS = {
    "vmap": torch.func.vmap,
    "grad": lambda module: torch.func.grad(lambda inputs: module(inputs).square().sum()),
    "jacrev": torch.func.jacrev,
    "hessian": lambda module: torch.func.hessian(lambda inputs: module(inputs).square().sum()),
    "per sample": per_sample,
}


@pytest.mark.parametrize("model_labels", [False, True])
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, None) for name in TRANSFORMS), ("grad", "aot_eager"), ("vmap", "aot_eager")],
)
def test_calls_inside_function_transforms_are_not_recorded(name, backend, model_labels):
    case = problem("linear")
    transform = TRANSFORMS[name](case.module)
    capture = Capture(layers_of(case.module), 1 << 30, model_labels)
    capture.arm()
    (case.mean_loss() / 2).backward()
    (torch.compile(transform, backend=backend) if backend else transform)(case.inputs)
    (case.mean_loss() / 2).backward()
    if model_labels:
        assert capture.collect() == {}
    else:
        assert set(assert_samples_of_the_gradients(capture)) == {10}
    capture.release()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_called_inside_and_outside_of_a_checkpoint(reentrant):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 3).double(), torch.randn(5, 3).double()
    capture = Capture(layers_of(layer), 1 << 30)
    capture.arm()
    for _ in range(2):
        layer.zero_grad()
        hidden = checkpoint(layer, layer(inputs).sin(), use_reentrant=reentrant)
        layer(hidden.sin()).sin().sum(1).mean().backward()
    assert_samples_of_the_gradients(capture)


def test_forget_backward_keeps_the_forward_passes():
    case = problem("linear")
    capture = Capture(layers_of(case.module), 1 << 30)
    capture.arm()
    case.mean_loss().backward()
    loss = case.mean_loss()
    case.module.zero_grad(set_to_none=False)
    capture.forget_backward()
    loss.backward()
    assert set(assert_samples_of_the_gradients(capture)) == {5}


def test_forget_backward_keeps_the_gradients_of_model_labels():
    case = problem("linear")
    capture = Capture(layers_of(case.module), 1 << 30, model_labels=True)
    capture.arm()
    outputs = case.module(case.inputs)
    capture.differentiate(outputs.sum())
    capture.forget_backward()
    assert len(capture.collect()) == 2


def test_a_weight_frozen_before_the_backward_pass_has_no_samples():
    case = problem("linear")
    capture = Capture(layers_of(case.module), 1 << 30)
    capture.arm()
    loss = case.mean_loss()
    case.module[0].weight.requires_grad_(False)
    loss.backward()
    assert [layer.name for layer in capture.collect()] == ["2.weight"]


# ---- the outputs of DistributedDataParallel ----


class Sink(torch.autograd.Function):
    """As the last node of DistributedDataParallel: outputs without a gradient bring None to hooks."""

    @staticmethod
    def forward(ctx, wrapper, *outputs):
        ctx.set_materialize_grads(False)
        ctx.ddp_weakref = wrapper
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


class Wrapper:
    def __init__(self, static_graph):
        self.static_graph = static_graph


class TwoOutputs(nn.Module):
    def __init__(self, static_graph=False):
        super().__init__()
        self.trunk, self.first, self.second = (nn.Linear(3, width) for width in (3, 2, 4))
        self.wrapper = Wrapper(static_graph)

    def forward(self, inputs):
        hidden = self.trunk(inputs).tanh()
        return Sink.apply(weakref.ref(self.wrapper), self.first(hidden), self.second(hidden))


@pytest.mark.parametrize("method", [partial(MBF, fisher="empirical"), KBFGS])
def test_an_output_that_the_loss_leaves_out_has_no_samples(method):
    module = TwoOutputs()
    optimizer = method(module)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(4, 3))[0].square().mean()
        loss.backward()
        return loss

    before = module.first.weight.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(module.first.weight, before)
    assert not optimizer.state.get(module.second.weight, {}).get("observations")


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_drawn_labels_and_a_static_graph_are_refused(fisher):
    module = TwoOutputs(static_graph=True)
    with pytest.raises(RuntimeError, match=r"static_graph=True.*leave static_graph=True out"):
        MBF(module, fisher=fisher).observe(module(torch.ones(4, 3))[0])
    module.wrapper.static_graph = False
    MBF(module, fisher=fisher).observe(module(torch.ones(4, 3))[0])
