from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import EVERY_KIND, layers_of
from tests.helpers import NETS, Problem, Twice, joined, per_sample_gradients, problem

LARGE = 1 << 30
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def captured_samples(case, fold_bias=False, memory=LARGE):
    """Layer -> LayerSamples of one training step's backward pass."""
    capture = Capture(layers_of(case.module, EVERY_KIND if fold_bias else ()), memory)
    capture.arm()
    case.mean_loss().backward()
    capture.disarm()
    return capture.collect()


def oracle(case):
    return per_sample_gradients(case.module, case.loss, case.inputs, case.targets)


def all_gradients(samples):
    return torch.cat(list(samples.gradients()))


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_per_sample_gradients_equal_those_of_one_backward_pass_for_each_sample(name, fold_bias):
    case = problem(name)
    expected = oracle(case)
    readable = [
        layer for layer in layers_of(case.module, EVERY_KIND if fold_bias else ()) if layer.reads_samples
    ]
    found = {layer.weight: (layer, samples) for layer, samples in captured_samples(case, fold_bias).items()}
    assert set(found) == {layer.weight for layer in readable}
    for layer, samples in found.values():
        assert samples.count == 5
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_chunks_give_the_same_gradients_in_the_normal_form(name, fold_bias):
    case = problem(name)
    expected = oracle(case)
    for layer, samples in captured_samples(case, fold_bias, memory=1).items():
        chunks = list(samples.chunks())
        assert [inputs.shape[0] for inputs, _ in chunks] == [1] * 5
        for n, (inputs, gradients) in enumerate(chunks):
            product = torch.einsum("ngso,ngsi->ngoi", gradients, inputs).reshape(layer.shape)
            torch.testing.assert_close(product, joined(layer, expected)[n], **CLOSE)
            assert layer.bias is None or (inputs[..., -1] == 1).all()


def test_backpack_agrees():
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2),
        nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    case = Problem(module, torch.randn(6, 2, 6, 5).double(), torch.randint(3, (6,)))
    found = captured_samples(case)
    twin = backpack.extend(copy.deepcopy(module))
    loss = backpack.extend(nn.CrossEntropyLoss())(twin(case.inputs), case.targets)
    with backpack.backpack(extensions.BatchGrad()):
        loss.backward()
    theirs = dict(twin.named_parameters())
    assert len(found) == 3
    for layer, samples in found.items():
        # BackPACK leaves the 1/N of the mean loss in.
        torch.testing.assert_close(all_gradients(samples), theirs[layer.name].grad_batch * 6, **CLOSE)


@pytest.mark.parametrize("name", ["linear", "conv2d groups", "twice", "tied", "convolution on two sizes"])
def test_micro_batches_equal_one_large_batch(name):
    case = problem(name, count=6)
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE)
    capture.arm()
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        (case.loss(case.module(case.inputs[part]), case.targets[part]) / 3).backward()
    expected = oracle(case)
    for layer, samples in capture.collect().items():
        assert samples.count == 6
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


def test_calls_with_different_numbers_of_samples_are_different_samples():
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    few, many = torch.randn(2, 3).double(), torch.randn(3, 3).double()
    (torch.cat((module(few), module(many))).pow(2).sum() / 5).backward()
    (samples,) = capture.collect().values()
    expected = torch.einsum("no,ni->noi", 2 * module(torch.cat((few, many))), torch.cat((few, many)))
    assert samples.count == 5
    torch.testing.assert_close(all_gradients(samples), expected, **CLOSE)


@pytest.mark.parametrize(("module", "shape"), [(nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 2), (2, 4, 3))])
def test_an_input_without_a_sample_dimension_is_one_sample(module, shape):
    module, inputs = copy.deepcopy(module).double(), torch.randn(shape).double()
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    module(inputs).pow(2).sum().backward()
    (samples,) = capture.collect().values()
    assert samples.count == 1
    torch.testing.assert_close(all_gradients(samples)[0], module.weight.grad, **CLOSE)


def test_a_call_without_a_gradient_is_ignored_and_later_passes_stay_apart():
    case = problem("linear", count=4)
    capture = Capture(layers_of(case.module), LARGE)
    capture.arm()
    case.module(case.inputs)  # never differentiated
    for part in (slice(0, 2), slice(2, 4)):
        (case.loss(case.module(case.inputs[part]), case.targets[part]) / 2).backward()
    expected = oracle(case)
    for layer, samples in capture.collect().items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


@pytest.mark.parametrize("model_labels", [False, True])
def test_a_graph_that_is_dropped_frees_its_calls(model_labels):
    case = problem("twice on tokens")
    capture = Capture(layers_of(case.module), LARGE, model_labels)
    capture.arm()
    gc.disable()
    try:
        outputs = case.module(case.inputs)
        memory = StorageWeakRef(case.inputs.untyped_storage())
        case = replace(case, inputs=None)
        assert not memory.expired()
        del outputs
        assert memory.expired()
    finally:
        gc.enable()
    assert capture.saw_calls
    assert capture.collect() == {}


@pytest.mark.parametrize("model_labels", [False, True])
def test_a_graph_kept_after_collect_keeps_no_samples(model_labels):
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE, model_labels)
    capture.arm()
    inputs = case.inputs.clone()
    memory = StorageWeakRef(inputs.untyped_storage())
    outputs = case.module(inputs)
    if model_labels:
        capture.differentiate(outputs.sum())
    outputs.sum().backward()
    del inputs
    assert not memory.expired()
    assert capture.collect()
    assert memory.expired()


def test_an_unused_layer_is_absent():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    module[0](torch.ones(3, 2)).sum().backward()
    assert [layer.name for layer in capture.collect()] == ["0.weight"]


def test_frozen_weights_have_no_samples():
    case = problem("linear")
    case.module[0].weight.requires_grad_(False)
    assert [layer.name for layer in captured_samples(case)] == ["2.weight"]


def test_an_empty_batch_has_no_samples():
    module = nn.Linear(2, 2)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    module(torch.ones(0, 2)).sum().backward()
    assert capture.collect() == {}


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_changed_after_construction_is_used_as_the_module_uses_it(mode):
    case = problem("conv2d reflect" if mode == "reflect" else "conv2d padding")
    case.module[0].padding = (0, 0) if mode == "reflect" else (2, 1)
    case.module[0].dilation = (1, 2)
    case.targets.zero_()  # the output has fewer entries now
    expected = oracle(case)
    for layer, samples in captured_samples(case).items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


def test_two_losses_of_one_forward_pass_add_up():
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE)
    capture.arm()
    loss = case.mean_loss()
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    expected = oracle(case)
    for layer, samples in capture.collect().items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    case = problem("linear")
    expected = oracle(case)
    capture = Capture(layers_of(case.module), LARGE)
    capture.arm()
    inputs = case.inputs.clone().requires_grad_()
    case.loss(checkpoint(case.module, inputs, use_reentrant=reentrant), case.targets).backward()
    found = capture.collect()
    assert len(found) == 2
    for layer, samples in found.items():
        assert samples.count == 5
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


@pytest.mark.parametrize("name", ["conv2d padding", "conv2d groups", "conv2d 1x1"])
def test_channels_last_images(name):
    case = problem(name)
    expected = oracle(case)
    laid_out = Problem(
        case.module.to(memory_format=torch.channels_last),
        case.inputs.to(memory_format=torch.channels_last),
        case.targets,
    )
    for layer, samples in captured_samples(laid_out, memory=20_000).items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


def test_input_by_keyword():
    module = nn.Linear(2, 3)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    module(input=torch.ones(4, 2)).sum().backward()
    assert [samples.count for samples in capture.collect().values()] == [4]


def test_autocast_statistics_are_float32():
    case = problem("conv2d padding", dtype=torch.float32)
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE)
    capture.arm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.module(case.inputs)
    case.loss(outputs.float(), case.targets).backward()
    expected = oracle(case)
    for layer, samples in capture.collect().items():
        found, reference = all_gradients(samples), joined(layer, expected)
        assert found.dtype == torch.float32
        assert all(tensor.dtype == torch.float32 for chunk in samples.chunks() for tensor in chunk)
        assert (found - reference).norm() < 0.02 * reference.norm()


def test_an_input_changed_in_place_after_the_call_under_autocast_is_recorded_as_it_was():
    torch.manual_seed(0)
    module, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(inputs)
    kept = inputs.clone()
    inputs.zero_()
    outputs.float().mean(0).sum().backward()
    ((found, _),) = next(iter(capture.collect().values())).chunks()
    torch.testing.assert_close(found[:, 0, 0], kept.bfloat16().float())


def test_statistics_of_half_precision_parameters_are_float32():
    case = problem("linear", dtype=torch.bfloat16)
    assert {all_gradients(samples).dtype for samples in captured_samples(case).values()} == {torch.float32}


def test_calls_under_no_grad_are_not_recorded():
    module = nn.Linear(2, 2)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    with torch.no_grad():
        module(torch.ones(1, 2))
    assert not capture.saw_calls
    module(torch.ones(1, 2))
    assert capture.saw_calls
    capture.collect()
    assert not capture.saw_calls


def test_after_disarm_nothing_is_recorded_and_gradients_stay_the_same():
    case = problem("attention")
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE)
    capture.arm()
    capture.arm()
    case.mean_loss().backward()
    assert capture.collect()
    observed = [parameter.grad.clone() for parameter in case.module.parameters()]
    capture.disarm()
    capture.disarm()
    case.module.zero_grad()
    case.mean_loss().backward()
    assert not capture.saw_calls
    assert all(torch.equal(a, p.grad) for a, p in zip(observed, case.module.parameters(), strict=True))


def test_release_removes_the_hooks():
    case = problem("attention")
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE)
    hooks = lambda: sum(len(module._forward_hooks) for module in case.module.modules())  # noqa: E731
    capture.arm()
    assert hooks() == 2
    capture.release()
    assert hooks() == 0
    assert not capture.armed


def test_a_capture_deleted_while_armed_leaves_no_hook():
    module = nn.Linear(2, 2)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    del capture
    gc.collect()
    assert not module._forward_hooks


def test_a_program_that_ends_while_armed_prints_nothing():
    program = """
        import torch
        from minifisher.statistics.capture import Capture
        from minifisher.statistics.layers import layers_of
        capture = Capture(layers_of(torch.nn.Linear(2, 2)), 1)
        capture.arm()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("model_labels", [False, True])
def test_an_armed_module_can_be_copied_and_pickled(model_labels):
    module = nn.Linear(2, 2)
    capture = Capture(layers_of(module), LARGE, model_labels)
    capture.arm()
    module(torch.ones(3, 2)).sum()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin(torch.ones(5, 2)).sum().backward()
    module.zero_grad()
    assert capture.collect() == {}


def test_differentiate_reads_the_summed_loss_and_not_the_training_loss():
    case = problem("conv2d groups")
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE, model_labels=True)
    capture.arm()
    outputs = case.module(case.inputs)
    other = (case.targets + 1) % outputs.flatten(1).shape[1]
    capture.differentiate(functional.cross_entropy(outputs.flatten(1), other, reduction="sum"))
    assert all(parameter.grad is None for parameter in case.module.parameters())
    case.loss(outputs, case.targets).backward()
    expected = per_sample_gradients(case.module, case.loss, case.inputs, other)
    found = capture.collect()
    assert len(found) == 2
    for layer, samples in found.items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)
    reference = oracle(case)
    for parameter in case.module.parameters():
        torch.testing.assert_close(parameter.grad, reference[parameter].mean(0), **CLOSE)


@pytest.mark.parametrize("name", ["in-place activation", "in-place after convolution", "twice", "tied"])
def test_differentiate_over_micro_batches(name):
    case = problem(name, count=4)
    capture = Capture(layers_of(case.module), LARGE, model_labels=True)
    capture.arm()
    for part in (slice(0, 2), slice(2, 4)):
        outputs = case.module(case.inputs[part])
        capture.differentiate(2 * case.loss(outputs, case.targets[part]))  # mean of two, summed
        case.loss(outputs, case.targets[part]).backward()
    expected = oracle(case)
    for layer, samples in capture.collect().items():
        assert samples.count == 4
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


def test_with_model_labels_the_training_loss_alone_gives_no_samples():
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE, model_labels=True)
    capture.arm()
    case.mean_loss().backward()
    assert capture.saw_calls
    assert capture.collect() == {}


def test_differentiate_through_activation_checkpoints():
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE, model_labels=True)
    capture.arm()
    outputs = checkpoint(case.module, case.inputs, use_reentrant=False)
    capture.differentiate(5 * case.loss(outputs, case.targets))
    case.loss(outputs, case.targets).backward()
    expected = oracle(case)
    found = capture.collect()
    assert len(found) == 2
    for layer, samples in found.items():
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


def test_outputs_without_a_graph_are_refused():
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE, model_labels=True)
    capture.arm()
    outputs = case.module(case.inputs)
    with pytest.raises(RuntimeError, match="do not require a gradient"):
        capture.differentiate(outputs.detach().sum())


def test_the_output_of_another_network_gives_no_samples():
    case, other = problem("linear"), problem("linear", seed=1)
    capture = Capture(layers_of(case.module), LARGE, model_labels=True)
    capture.arm()
    outputs = case.module(case.inputs)
    capture.differentiate(other.module(other.inputs).sum())
    assert capture.collect() == {}
    del outputs


def test_differentiate_needs_a_capture_with_model_labels():
    with pytest.raises(RuntimeError, match="model_labels=True"):
        Capture([], LARGE).differentiate(torch.tensor(0.0))


@pytest.mark.parametrize("route", ["chunks", "gradients"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Conv2d(16, 16, 5, groups=4, padding=2),
        nn.Conv2d(16, 16, 1, groups=16, padding=1),
    ],
)
@pytest.mark.parametrize("fold_bias", [False, True])
def test_memory_is_bounded(layer, route, fold_bias):
    module, memory = Twice(copy.deepcopy(layer)) if layer.groups > 1 else copy.deepcopy(layer), 2 << 20
    capture = Capture(layers_of(module, EVERY_KIND if fold_bias else ()), memory)
    capture.arm()
    module(torch.randn(64, 16, 12, 12)).pow(2).mean().backward()
    (samples,) = capture.collect().values()
    peaks, sizes = [], []
    iterator = getattr(samples, route)()
    while True:
        with torch.profiler.profile(profile_memory=True) as profile:
            chunk = next(iterator, None)
        if chunk is None:
            break
        sizes.append((chunk[0] if route == "chunks" else chunk).shape[0])
        peaks.append(peak_bytes(profile))
        del chunk
    assert sum(sizes) == 64
    assert sizes[0] > 1
    assert 0.3 * memory < max(peaks[:1]) <= memory


def peak_bytes(profile):
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
