from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import EVERY_KIND, layers_of
from minifisher.statistics.likelihood import drawn_labels, sampled_loss
from tests.helpers import dense_empirical_fisher, dense_exact_fisher, problem

DRAWS = 40_000


def score(likelihood, outputs, seed=0):
    """The gradient of the loss on labels drawn once, [*outputs.shape]."""
    outputs = outputs.clone().requires_grad_()
    loss = sampled_loss(outputs, likelihood, torch.Generator().manual_seed(seed))
    return torch.autograd.grad(loss, outputs)[0]


def test_categorical_labels_have_the_predicted_frequencies():
    logits = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    probability = logits.softmax(0)
    labels = probability - score("categorical", logits.expand(DRAWS, 3))  # d loss / d z = p - onehot
    assert ((labels - labels.round()).abs() < 1e-9).all()
    assert (labels.sum(1).round() == 1).all()
    torch.testing.assert_close(labels.mean(0), probability, atol=0.01, rtol=0)


def test_bernoulli_labels_are_independent_entries():
    logits = torch.tensor([0.5, -1.0], dtype=torch.float64)
    probability = logits.sigmoid()
    labels = probability - score("bernoulli", logits.expand(DRAWS, 2))
    assert ((labels - labels.round()).abs() < 1e-9).all()
    torch.testing.assert_close(labels.mean(0), probability, atol=0.01, rtol=0)
    assert abs(torch.cov(labels.T)[0, 1]) < 0.01


def test_gaussian_noise_has_variance_one():
    noise = score("gaussian", torch.full((DRAWS, 2), 3.0, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(2, dtype=torch.float64), atol=0.03, rtol=0)
    assert noise.mean().abs() < 0.02


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_loss_is_a_sum_over_samples_and_repeats_with_the_same_generator(likelihood):
    outputs = torch.randn(4, 5, 3, dtype=torch.float64)
    twice = score(likelihood, torch.cat((outputs, outputs)))
    assert twice.shape == (8, 5, 3)
    assert torch.equal(score(likelihood, outputs), score(likelihood, outputs))
    assert not torch.equal(score(likelihood, outputs), score(likelihood, outputs, seed=1))
    # A sum over twice as many samples has a longer gradient; a mean would not.
    assert twice.norm() > 1.2 * score(likelihood, outputs).norm()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_drawn_labels_are_those_of_the_loss(likelihood):
    outputs = torch.randn(4, 5, 3, dtype=torch.float64)
    labels = drawn_labels(outputs, likelihood, torch.Generator().manual_seed(0))
    if likelihood == "categorical":
        assert labels.shape == (4, 5)
        expected = outputs.softmax(-1) - functional.one_hot(labels, 3)
    elif likelihood == "bernoulli":
        expected = outputs.sigmoid() - labels
    else:
        expected = outputs - labels
    torch.testing.assert_close(score(likelihood, outputs), expected)


def test_the_loss_of_a_half_precision_prediction_is_float32():
    assert sampled_loss(torch.randn(3, 2).bfloat16(), "categorical").dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_a_prediction_that_is_nan_has_a_loss_that_is_nan(likelihood):
    assert sampled_loss(torch.tensor([[0.0, float("nan")]]), likelihood).isnan()


def test_an_unknown_likelihood_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="'categorical', 'bernoulli', 'gaussian', got 'poisson'"):
        sampled_loss(torch.ones(2, 2), "poisson")


def test_a_prediction_of_integers_raises():
    with pytest.raises(TypeError, match="int64"):
        sampled_loss(torch.ones(2, 2, dtype=torch.int64), "categorical")


def captured_outer_products(capture, case, loss_of, weights):
    """Layer -> (1/N) sum_n weight_n vec(D_n) vec(D_n)^T for one choice of the labels."""
    capture.differentiate(loss_of(case.module(case.inputs)))
    return {
        layer: torch.einsum("n,ni,nj->ij", weights, d, d) / len(weights)
        for layer, samples in capture.collect().items()
        for d in [torch.cat(list(samples.gradients())).flatten(1)]
    }


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", ["linear", "twice", "tied"])
def test_over_all_labels_the_sampled_estimator_is_the_exact_fisher(name, fold_bias):
    case = problem(name, count=3)
    capture = Capture(layers_of(case.module, EVERY_KIND if fold_bias else ()), 1 << 20, model_labels=True)
    capture.arm()
    probability = case.module(case.inputs).softmax(1).detach()
    total = {}
    for label in range(probability.shape[1]):
        labels = torch.full((3,), label)
        found = captured_outer_products(
            capture,
            case,
            lambda z, labels=labels: functional.cross_entropy(z, labels, reduction="sum"),
            probability[:, label],
        )
        total = {layer: total.get(layer, 0) + product for layer, product in found.items()}
    assert total
    for layer, product in total.items():
        exact = dense_exact_fisher(layer, case.module, "categorical", case.inputs)
        torch.testing.assert_close(product, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_over_many_draws_the_sampled_estimator_is_the_exact_fisher(likelihood):
    case = problem("linear", count=1)
    module, inputs = case.module, case.inputs
    capture = Capture(layers_of(module, EVERY_KIND), 1 << 30, model_labels=True)
    capture.arm()
    generator = torch.Generator().manual_seed(0)
    capture.differentiate(sampled_loss(module(inputs.expand(DRAWS, -1)), likelihood, generator))
    for layer, samples in capture.collect().items():
        gradients = torch.cat(list(samples.gradients())).flatten(1)
        exact = dense_exact_fisher(layer, module, likelihood, inputs)
        assert (gradients.T @ gradients / DRAWS - exact).norm() < 0.03 * exact.norm()


def test_the_empirical_oracle_averaged_over_predicted_labels_is_the_exact_oracle():
    case = problem("linear", count=1)
    layer = layers_of(case.module, EVERY_KIND)[0]
    probability = case.module(case.inputs).softmax(1).detach()[0]
    expected = sum(
        p * dense_empirical_fisher(layer, case.module, case.loss, case.inputs, torch.tensor([label]))
        for label, p in enumerate(probability)
    )
    exact = dense_exact_fisher(layer, case.module, "categorical", case.inputs)
    torch.testing.assert_close(exact, expected)


def test_one_label_is_drawn_for_each_position_of_a_sequence():
    torch.manual_seed(0)
    tokens = score("categorical", torch.zeros(200, 7, 2, dtype=torch.float64))
    labels = (0.5 - tokens).argmax(-1)
    assert all(0.2 < labels[:, t].double().mean() < 0.8 for t in range(7))
    assert any(not torch.equal(labels[:, s], labels[:, t]) for s, t in itertools.combinations(range(7), 2))


@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 3, 1)])
def test_one_class_is_refused(shape):
    with pytest.raises(ValueError, match=r"are logits of one class.*bernoulli"):
        sampled_loss(torch.zeros(shape), "categorical")
    assert sampled_loss(torch.zeros(shape), "bernoulli") > 0
