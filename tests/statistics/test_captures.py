"""`Captures`: what the optimizer asks of all its captures together."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

from minifisher.statistics.capture import Captures
from minifisher.statistics.layers import layer_of, layers_of
from tests.helpers import problem

LARGE = 1 << 30


def captures_of(case, *estimators):
    """Captures with one readable layer for each estimator."""
    readable = [layer for layer in layers_of(case.module) if layer.reads_samples]
    return Captures({name: [layer] for name, layer in zip(estimators, readable, strict=False)}, LARGE)


def always(layer):
    return True


def never(layer):
    return False


def no_scale(captured):
    return 1.0


def hooks(module):
    return sum(len(part._forward_hooks) for part in module.modules())


def test_captures_without_a_readable_layer_have_no_estimator():
    case = problem("linear")
    assert not Captures({}, LARGE).by_estimator
    assert not Captures({"empirical": []}, LARGE).by_estimator
    assert not Captures({"empirical": [layer_of("bare", torch.ones(2))]}, LARGE).by_estimator
    assert captures_of(case, "empirical")


def test_an_estimator_is_armed_where_one_of_its_layers_is_due():
    case = problem("linear")
    captures = captures_of(case, "empirical", "sampled")
    first = layers_of(case.module)[0]
    captures.arm(lambda layer: layer.name == first.name)
    assert [capture.armed for capture in captures.by_estimator.values()] == [True, False]
    captures.arm(always)
    assert all(capture.armed for capture in captures.by_estimator.values())
    captures.arm(never)
    assert not any(capture.armed for capture in captures.by_estimator.values())


def test_each_estimator_reads_its_own_backward_pass():
    case = problem("linear")
    captures = captures_of(case, "empirical", "exact")
    captures.arm(always)
    outputs = case.module(case.inputs)
    captures.draw_labels(outputs, "categorical")
    case.loss(outputs, case.targets).backward()
    found = {layer.name: samples.count for layer, samples in captures.collect(no_scale).items()}
    assert found == {"0.weight": 5, "2.weight": 15}  # "exact" counts every sample once a class


def test_labels_are_not_drawn_where_hooks_are_off():
    case = problem("linear")
    captures = captures_of(case, "sampled")
    captures.arm(never)
    state = torch.get_rng_state()
    captures.draw_labels(case.module(case.inputs), "categorical")
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_drawn_inside_no_grad_too():
    case = problem("linear")
    captures = captures_of(case, "sampled")
    captures.arm(always)
    outputs = case.module(case.inputs)
    with torch.no_grad():
        captures.draw_labels(outputs, "categorical")
    assert len(captures.collect(no_scale)) == 1


def test_the_scale_of_the_loss_is_divided_out_of_the_empirical_samples_alone():
    case = problem("linear")
    captures = captures_of(case, "empirical", "exact")
    found = []
    for scale in (1.0, 8.0):
        asked = []
        captures.arm(always)
        case.module.zero_grad()
        outputs = case.module(case.inputs)
        captures.draw_labels(outputs, "categorical")
        (scale * case.loss(outputs, case.targets)).backward()
        samples = captures.collect(lambda captured, asked=asked, scale=scale: asked.append(captured) or scale)
        assert asked == [True, False]
        found.append({layer.name: torch.cat(list(one.gradients())) for layer, one in samples.items()})
    torch.testing.assert_close(found[1], found[0])


def test_without_a_forward_pass_the_scale_need_not_be_known():
    captures = captures_of(problem("linear"), "empirical")
    asked = []
    assert captures.collect(lambda captured: asked.append(captured) or 1.0) == {}
    assert asked == [False]


def test_forgotten_backward_passes_leave_no_samples():
    case = problem("linear")
    captures = captures_of(case, "empirical")
    captures.arm(always)
    case.mean_loss().backward()
    captures.forget_backward()
    case.module.zero_grad()
    assert captures.collect(no_scale) == {}


def test_a_disarmed_capture_keeps_what_it_has():
    case = problem("linear")
    captures = captures_of(case, "empirical")
    captures.arm(always)
    case.mean_loss().backward()
    captures.disarm()
    case.mean_loss().backward()
    assert [samples.count for samples in captures.collect(no_scale).values()] == [5]


def test_released_captures_have_no_hooks_and_no_estimator():
    case = problem("linear")
    captures = captures_of(case, "empirical", "sampled")
    captures.arm(always)
    assert hooks(case.module) == 2
    captures.release()
    assert hooks(case.module) == 0
    assert not captures.by_estimator


def test_captures_that_are_thrown_away_while_armed_leave_no_hooks():
    case = problem("linear")
    captures = captures_of(case, "empirical", "sampled")
    captures.arm(always)
    del captures
    gc.collect()
    assert hooks(case.module) == 0


def test_missing_labels_raise():
    case = problem("linear")
    captures = captures_of(case, "sampled")
    captures.arm(always)
    case.mean_loss().backward()
    with pytest.raises(RuntimeError, match=r'fisher="sampled".*optimizer\.observe\(outputs\)'):
        captures.collect(no_scale)


def test_a_gradient_without_samples_warns_once_and_names_the_line_of_the_caller():
    module = nn.Linear(3, 2)
    captures = Captures({"empirical": layers_of(module)}, LARGE)
    module.weight.grad = torch.ones(2, 3)
    captures.arm(always)
    with pytest.warns(RuntimeWarning, match="weight got a gradient") as caught:
        captures.collect(no_scale)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captures.collect(no_scale) == {}


def test_outputs_without_their_last_dimension_are_warned_of_once():
    module = nn.Linear(3, 1)
    captures = Captures({"sampled": layers_of(module)}, 2**20)
    captures.arm(always)
    with pytest.warns(RuntimeWarning, match=r"outputs of shape \[4\] as the logits of 4 classes"):
        captures.draw_labels(module(torch.randn(4, 3)).squeeze(1), "categorical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captures.draw_labels(module(torch.randn(4, 3)).squeeze(1), "categorical")
        captures.draw_labels(module(torch.randn(4, 3)).squeeze(1), "bernoulli")


def test_one_sample_without_a_batch_dimension_is_not_warned_of():
    module = nn.Linear(3, 4)
    captures = Captures({"sampled": layers_of(module)}, 2**20)
    captures.arm(always)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captures.draw_labels(module(torch.randn(3)), "categorical")
