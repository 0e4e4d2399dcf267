"""Samples of compiled models are those of eager mode, and a model has at most two compiled graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch.nn import functional

import minifisher
from minifisher.statistics.calls import PendingCall
from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import EVERY_KIND, layers_of
from tests.helpers import NETS, closure_of, joined, per_sample_gradients, problem

LARGE = 1 << 30
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def all_gradients(samples):
    return torch.cat(list(samples.gradients()))


def compiled(module, backend):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter), counter


def assert_samples(found, case, targets):
    expected = per_sample_gradients(case.module, case.loss, case.inputs, targets)
    for layer, samples in found.items():
        assert samples.count == len(targets)
        torch.testing.assert_close(all_gradients(samples), joined(layer, expected), **CLOSE)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("model_labels", [False, True])
def test_a_compiled_model_has_the_samples_of_an_eager_one(name, model_labels):
    case = problem(name)
    model, _ = compiled(case.module, "aot_eager")
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE, model_labels)
    capture.arm()
    outputs = model(case.inputs)
    targets = (case.targets + 1) % outputs.flatten(1).shape[1] if model_labels else case.targets
    if model_labels:
        capture.differentiate(functional.cross_entropy(outputs.flatten(1), targets, reduction="sum"))
        assert all(parameter.grad is None for parameter in case.module.parameters())
    case.loss(outputs, case.targets).backward()
    found = capture.collect()
    readable = [layer for layer in layers_of(case.module, EVERY_KIND) if layer.reads_samples]
    assert set(found) == set(capture.layers)
    assert len(found) == len(readable)
    capture.disarm()
    assert_samples(found, case, targets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [False, True])
def test_two_graphs_however_often_the_capture_is_armed(backend, before):
    case = problem("linear")
    model, counter = compiled(case.module, backend)
    if before:
        case.loss(model(case.inputs), case.targets).backward()
    capture = Capture(layers_of(model), LARGE)
    for _ in range(4):
        capture.arm()
        case.loss(model(case.inputs), case.targets).backward()
        found = capture.collect()
        assert len(found) == 2
        capture.disarm()
        assert_samples(found, case, case.targets)
        case.loss(model(case.inputs), case.targets).backward()
        assert not capture.saw_calls
    assert counter.frame_count == 2 + before


def test_several_losses_of_a_compiled_model_give_the_samples_of_an_eager_one():
    case, found = problem("conv2d padding"), []
    for model in (case.module, compiled(case.module, "aot_eager")[0]):
        capture = Capture(layers_of(case.module), LARGE, model_labels=True)
        capture.arm()
        outputs = model(case.inputs).flatten(1)
        capture.differentiate(outputs.sin().sum(), outputs.square().sum())
        outputs.cos().sum().backward()
        found.append({layer.name: all_gradients(samples) for layer, samples in capture.collect().items()})
        capture.release()
    assert len(found[0]["0.weight"]) == 10
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_model_labels_of_one_layer_do_not_count_as_training_loss_of_another(backend):
    case = problem("linear")
    model = compiled(case.module, backend)[0] if backend else case.module
    first, last = layers_of(case.module)[0], layers_of(case.module)[2]
    with_model_labels, empirical = Capture([first], LARGE, model_labels=True), Capture([last], LARGE)
    with_model_labels.arm()
    empirical.arm()
    outputs = model(case.inputs)
    with_model_labels.differentiate(outputs.sin().sum())
    case.loss(outputs, case.targets).backward()
    found = empirical.collect()
    empirical.disarm()
    with_model_labels.disarm()
    assert len(found) == 1
    assert_samples(found, case, case.targets)


@pytest.mark.parametrize("model_labels", [False, True])
def test_samples_of_a_compiled_model_over_micro_batches(model_labels):
    case = problem("linear", count=6)
    model, _ = compiled(case.module, "aot_eager")
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE, model_labels)
    capture.arm()
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        outputs = model(case.inputs[part])
        if model_labels:
            capture.differentiate(2 * case.loss(outputs, case.targets[part]))
        (case.loss(outputs, case.targets[part]) / 3).backward()
    found = capture.collect()
    capture.disarm()
    assert len(found) == 2
    assert_samples(found, case, case.targets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_labels", [False, True])
def test_a_compiled_graph_that_is_dropped_frees_its_calls(model_labels, backend):
    case = problem("linear")
    model, _ = compiled(case.module, backend)
    capture = Capture(layers_of(case.module), LARGE, model_labels)
    capture.arm()
    alive = lambda: sum(type(thing) is PendingCall for thing in gc.get_objects())  # noqa: E731
    outputs = model(case.inputs)
    assert alive() == 2
    del outputs
    gc.collect()
    assert alive() == 0
    assert capture.collect() == {}


def test_copies_and_pickles_of_an_armed_compiled_model_record_nothing():
    module = nn.Linear(2, 2)
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    compiled(module, "aot_eager")[0](torch.ones(3, 2)).sum().backward()
    assert capture.collect()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        compiled(twin, "aot_eager")[0](torch.ones(5, 2)).sum().backward()
        assert capture.collect() == {}


def test_compiled_code_still_works_after_its_capture_is_deleted():
    module = nn.Linear(2, 2)
    model, _ = compiled(module, "aot_eager")
    capture = Capture(layers_of(module), LARGE)
    capture.arm()
    output = model(torch.ones(3, 2)).sum()
    del capture
    gc.collect()
    output.backward()
    assert torch.equal(module.weight.grad, torch.full((2, 2), 3.0))
    model(torch.ones(3, 2)).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_that_was_compiled_first_has_a_graph_of_its_own(backend):
    case = problem("conv2d padding")
    teacher, average = copy.deepcopy(case.module), copy.deepcopy(case.module)
    capture = Capture(layers_of(case.module, EVERY_KIND), LARGE)
    capture.arm()
    counter = CompileCounterWithBackend(backend)  # one backend: torch shares code only within it
    for network in (teacher, case.module, average):
        case.loss(torch.compile(network, backend=counter)(case.inputs), case.targets).backward()
    found = capture.collect()
    assert set(found) == set(capture.layers)
    assert_samples(found, case, case.targets)
    assert counter.frame_count == 2


@pytest.mark.parametrize("end", [Capture.disarm, Capture.release, id], ids=["disarm", "release", "delete"])
def test_the_setting_of_torch_is_restored_in_whatever_order_captures_end(end):
    first, second = (Capture(layers_of(nn.Linear(2, 2)), LARGE, model_labels=True) for _ in range(2))
    with functorch_config.patch(donated_buffer=True):
        first.arm()
        second.arm()
        end(first)
        del first
        gc.collect()
        assert not functorch_config.donated_buffer
        second.disarm()
        assert functorch_config.donated_buffer


def test_torch_checks_for_hooks_until_the_last_capture_is_gone():
    def skips_hooks():
        captures = [Capture(layers_of(nn.Linear(2, 2)), LARGE) for _ in range(2)]
        yield dynamo_config.skip_nnmodule_hook_guards
        captures.pop().release()
        yield dynamo_config.skip_nnmodule_hook_guards
        del captures[:]
        gc.collect()
        yield dynamo_config.skip_nnmodule_hook_guards

    # A new thread has the settings of torch, whichever optimizers of other tests are still alive here.
    with ThreadPoolExecutor(1) as new_thread:
        assert new_thread.submit(list, skips_hooks()).result() == [False, False, True]


def test_every_thread_makes_the_settings_that_it_needs():
    def settings():
        capture = Capture(layers_of(nn.Linear(2, 2)), LARGE, model_labels=True)
        capture.arm()
        return capture, dynamo_config.skip_nnmodule_hook_guards, functorch_config.donated_buffer

    with functorch_config.patch(donated_buffer=True), ThreadPoolExecutor(1) as other:
        (_, *here), (made_there, *there) = settings(), other.submit(settings).result()
        assert here == there == [False, False]
        made_there.release()  # in this thread
        assert not functorch_config.donated_buffer


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_no_operators_of_ours(strict):
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE)
    capture.arm()
    program = torch.export.export(case.module, (case.inputs,), strict=strict)
    assert not [node for node in program.graph.nodes if "minifisher" in str(node.target)]
    assert not capture.saw_calls
    case.mean_loss().backward()
    assert len(capture.collect()) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "error::torch.jit.TracerWarning")
def test_a_traced_program_contains_the_model_alone():
    case = problem("linear")
    capture = Capture(layers_of(case.module), LARGE)
    capture.arm()
    traced = torch.jit.trace(case.module, case.inputs)
    assert not capture.saw_calls
    torch.testing.assert_close(traced(case.inputs), case.module(case.inputs))


def test_scripting_an_armed_model_says_what_to_do_instead():
    module = nn.Linear(2, 2)
    optimizer = minifisher.MBF(module, fisher="empirical")
    with pytest.raises(AttributeError, match=r"script a fresh model|torch\.export"):
        torch.jit.script(module)
    del optimizer
    gc.collect()
    torch.jit.script(module)


# ---- whole training steps ----


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3),
        ).double()  # fmt: skip


def train(module, model, optimizer, steps):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for _ in range(steps):
        images = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
        targets = images.flatten(1)[:, :3].argmax(1)
        optimizer.step(closure_of(model, optimizer, images, targets))
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trained(make, backend, steps=12):
    """The weights after some steps, and how many graphs the model was compiled to."""
    module = network()
    model, counter = compiled(module, backend) if backend else (module, None)
    return train(module, model, make(module), steps), counter and counter.frame_count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("fisher", ["gradient", "empirical", "sampled"])
def test_a_compiled_model_trains_as_an_eager_one(fisher, every, backend):
    def make(module):
        return minifisher.MBF(module, lr=1e-2, fisher=fisher, statistics_every=every, fold_bias=True)

    weights, compilations = trained(make, backend)
    torch.testing.assert_close(weights, trained(make, None)[0], rtol=1e-8, atol=1e-10)
    assert compilations == (1 if every == 1 or fisher == "gradient" else 2)


@pytest.mark.parametrize("name", minifisher.METHODS)
def test_every_method_trains_a_compiled_model(name):
    weights, compilations = trained(minifisher.METHODS[name], "aot_eager", steps=6)
    torch.testing.assert_close(
        weights, trained(minifisher.METHODS[name], None, steps=6)[0], rtol=1e-6, atol=1e-9
    )
    assert compilations <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_samples_stay_correct_although_inductor_reuses_buffers(fisher, monkeypatch):
    # If distutils was imported before, setuptools would otherwise insist on its own copy.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")

    def make(module):
        return minifisher.MBF(module, lr=1e-2, fisher=fisher, statistics_every=2)

    weights, compilations = trained(make, "inductor", steps=4)
    torch.testing.assert_close(weights, trained(make, None, steps=4)[0], rtol=1e-8, atol=1e-10)
    assert compilations == 2
